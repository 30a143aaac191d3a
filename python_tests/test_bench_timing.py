"""The bench's harness on tiny shapes: what is counted, what is refused, what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the bench is not part of the package

from bench import goals, measure, timing, traffic, truth  # noqa: E402
from bench.problems import Problem, WrongResult, problems, verify  # noqa: E402

OPS = {
    "score_layer",
    "score_layers",
    "finalize_importance",
    "select_chunks",
    "gather_tokens",
    "gather_kv",
    "select_tokens",
}


def a_problem(wrong: float = 0.0) -> Problem:
    """A copy of numbers; `wrong` is added where the backend is cpu."""
    numbers = torch.rand(100)

    def run(backend: str) -> torch.Tensor:
        calls.append(backend)
        return numbers + (wrong if backend == "cpu" else 0)

    calls: list[str] = []
    made = Problem("finalize_importance", "100", 800, run, lambda b: [run(b)], lambda: [numbers.double()], rtol=1e-5)
    made.calls = calls  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_is_refused_before_it_is_timed(wrong):
    problem = a_problem(wrong)
    rows = timing.measured(problem, ["reference", "cpu"], measure.clock("cpu", True), 0.01, 1e9)
    good, bad = rows
    assert "seconds" in good
    assert "seconds" not in bad
    assert "is off by" in bad["failed"]
    assert problem.calls.count("cpu") == 1, "it ran on after its result had been refused"
    assert "FAILED" in timing.table(rows, 1e9)


class Recorded:
    """A clock that makes graphs: each call is as slow as its name says."""

    graphs = True

    def seconds(self, call) -> float:
        return float(call() or 1.0)


def test_the_cuda_kernels_are_compared_with_triton_and_the_eager_form(monkeypatch):
    """In one run, in turn; and their graphs with each other."""
    slow = {"reference": 8.0, "triton": 2.0, "cuda": 0.5}
    monkeypatch.setattr(timing.spk, "available_backends", lambda op: dict.fromkeys(slow))
    monkeypatch.setattr(timing.measure, "graph_of", lambda call: lambda: call() / 4)
    problem = a_problem()
    problem.call, problem.result = slow.get, lambda _: problem.expected()
    rows = timing.measured(problem, slow, Recorded(), 0.0, 1e9)
    assert [row.get("faster_than_eager") for row in rows] == [None, 4.0, 16.0]
    assert [row.get("faster_than_triton") for row in rows] == [None, None, 4.0]
    assert ["graph_seconds" in row for row in rows] == [False, True, True]
    assert rows[2]["graph_seconds"]["p50"] == 0.125
    lines = timing.table(rows, 1e9).splitlines()
    assert lines[1].split()[-2:] == ["eager", "triton"]
    assert [line.split()[-2:] for line in lines[2:]] == [["-", "-"], ["4.0x", "-"], ["16.0x", "4.0x"]]


def test_a_graph_that_fails_costs_no_other_figure(monkeypatch):
    monkeypatch.setattr(timing.spk, "available_backends", lambda op: {"reference": None, "triton": None, "cuda": None})

    def graph_of(call):
        if call() == 2.0:
            raise RuntimeError("planted")
        return call

    monkeypatch.setattr(timing.measure, "graph_of", graph_of)
    problem = a_problem()
    problem.call, problem.result = {"reference": 8.0, "triton": 2.0, "cuda": 0.5}.get, lambda _: problem.expected()
    rows = timing.measured(problem, ["reference", "triton", "cuda"], Recorded(), 0.0, 1e9)
    assert rows[1]["failed"] == "as a CUDA graph: RuntimeError: planted"
    assert "seconds" in rows[1]
    assert "graph_seconds" in rows[2]


def test_goals_are_said():
    def row(op: str, shape: str, of_copy: float = 0.0, graph: float | None = None, backend: str = "cuda") -> dict:
        times = {"seconds": {"p50": 50e-6}} | ({"graph_seconds": {"p50": graph}} if graph else {})
        return {"op": op, "shape": shape, "backend": backend, "of_copy": of_copy, **times}

    rows = [
        row("score_layer", "Llama-3.1-8B 128K lse", 0.85),
        row("score_layer", "Llama-3.1-8B 128K", 0.5),
        row("score_layer", "Llama-3.1-8B 128K", 0.1, backend="triton"),
        row("score_layer", "Llama-3.1-8B 32K", 0.1),
        row("select_tokens", "128K ids", graph=25e-6),
        row("select_tokens", "128K ids"),
        {"op": "select_tokens", "shape": "128K ids", "backend": "cuda", "skipped": "no GPU"},
    ]
    assert goals.reached(rows) == [
        "score_layer Llama-3.1-8B 128K lse on cuda: 85% of a copy, goal 80%",
        "score_layer Llama-3.1-8B 128K on cuda: 50% of a copy, goal 55%, NOT REACHED",
        "select_tokens 128K ids on cuda: 25.0 us, goal 30 us",
        "select_tokens 128K ids on cuda: 50.0 us, goal 30 us, NOT REACHED",
    ]
    makers = {(op, make().shape) for op, make in problems("cpu", quick=True)}
    assert all(any(op == goal.op for op, _ in makers) for goal in goals.GOALS)


def test_wrong_integers_and_shapes_are_refused():
    problem = a_problem()
    problem.result = lambda _: [torch.arange(5)]
    with pytest.raises(WrongResult, match="1 of 5 elements"):
        verify(problem, "cpu", [torch.tensor([0, 1, 2, 3, 5])])
    with pytest.raises(WrongResult, match=r"\(5,\), not \(4,\)"):
        verify(problem, "cpu", [torch.arange(4)])
    verify(problem, "cpu", [torch.arange(5)])


@pytest.mark.parametrize("place", range(5))
def test_an_element_off_is_refused(place):
    """The checks of the real problems too: each op's result with one element changed."""
    for op, make in problems("cpu", quick=True):
        problem = make()
        expected = problem.expected()
        verify(problem, "reference", expected)
        at = place % len(expected)
        spoilt = [tensor.clone() for tensor in problem.result("reference")]
        flat = spoilt[at].reshape(-1)
        index = place * 7 % len(flat)
        flat[index] = ~flat[index] if flat.dtype == torch.bool else flat[index] + 1
        spoilt[at] = flat.view(spoilt[at].shape)
        problem.result = lambda _, spoilt=spoilt: spoilt
        with pytest.raises(WrongResult):
            verify(problem, op, expected)


def test_every_op_has_a_row():
    assert {op for op, _ in problems("cpu", quick=True)} == OPS
    assert {op for op, _ in problems("cpu")} == OPS


def test_the_truth_is_the_oracle():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(3, 4, 16, generator=generator), torch.randn(2, 50, 16, generator=generator)
    arrays = query[None].double().numpy(), [key.transpose(0, 1).double().numpy()]
    expected = oracle.score_layer(torch.zeros(1, 3, 50).numpy(), *arrays, [50], [3], oracle.Scoring())
    torch.testing.assert_close(truth.state(query, key), torch.from_numpy(expected[0]), rtol=1e-12, atol=0)
    lse = oracle.row_lse(query[1, 3].numpy(), key[1].numpy(), 50, upto=50, scale=0.25)
    assert abs(float(truth.lse(query, key)[1, 3]) - lse) < 1e-5
    importance = torch.rand(131, generator=generator)
    kept = oracle.select_chunks(importance[None].numpy(), [131], oracle.Budget(keep_ratio=0.3, chunk_size=7))
    assert truth.kept(importance, 6, 7).tolist() == kept[0].tokens


def test_bytes_by_hand():
    """Two heads of 4 numbers, 10 tokens, 3 look-ahead rows of 4 query heads."""
    one = traffic.score(3, 4, 2, 4, 10, key=2, query=4, lse=False)
    assert one == 2 * 10 * 4 * 2 + 3 * 4 * 4 * 4 + 2 * 4 * 3 * 10
    assert traffic.score(3, 4, 2, 4, 10, key=2, query=4, lse=True) == one + 4 * 3 * 4
    assert traffic.score_layers(5, 3, 10, one) == 5 * one - 4 * 2 * 4 * 3 * 10
    assert traffic.finalize(3, 10) == 4 * 3 * 10 + 4 * 10
    assert traffic.select(10, 4) == 40 + 16
    assert traffic.gather_tokens(4, 8) == 4 * (4 + 8 + 8 + 8)
    assert traffic.gather_kv(4, 2, 8, 2) == 4 * 4 + 2 * 2 * 4 * 2 * 8 * 2
    assert traffic.select_tokens(3, 10, 4, 8) == traffic.finalize(3, 10) + 4 * (4 + 8 + 8 + 8)
    assert traffic.kept_tokens(1000, 0.2, 32) == 7 * 32
    assert traffic.kept_tokens(100, 1.0, 32) == 100


def test_candidates_run_in_turn():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.in_turn(measure.clock("cpu", True), calls, budget=0, most=9)
    assert order == list("abab" + 5 * "ab")
    assert times["a"].runs == 5
    assert times["a"].p20 <= times["a"].p50 <= times["a"].p80


def test_the_command(tmp_path):
    """The whole of it on the CPU: a table last on stdout, JSON beside it."""
    command = ["-m", "bench.timing", "--device", "cpu", "--backends", "cpu,reference", "--quick", "--seconds", "0.01"]
    result = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "timing.json").read_text())
    assert report["copy_bytes_per_second"] > 0
    assert {"commit", "torch", "cores", "time"} <= set(report["environment"])
    assert {row["op"] for row in report["rows"]} == OPS
    for row in report["rows"]:
        assert row["rate"] == pytest.approx(row["bytes"] / row["seconds"]["p50"])
        assert ("faster_than_eager" in row) == (row["backend"] != "reference")
    assert (tmp_path / "timing.txt").read_text().strip() in result.stdout


def test_a_limit_is_said(tmp_path, capsys):
    options = ["--device", "cpu", "--quick", "--seconds", "0", "--limit", "0", "--out", str(tmp_path)]
    assert timing.main(options) == 1
    assert "0 of" in capsys.readouterr().out.splitlines()[-1]
