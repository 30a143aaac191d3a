"""Goals and peers on tiny shapes: what is compared with what, what is said where something cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the bench is not part of the package

from bench import measure, peers, problems, score_goals, shapes  # noqa: E402

TINY = shapes.QUICK_MODELS[0]


def test_every_form_of_the_matmul_is_the_product():
    query, key = torch.randn(1, 8, 4, 16), torch.randn(2, 50, 16)
    grouped = score_goals.grouped(query, 2)
    assert torch.equal(grouped[1, 8 + 3], query[0, 3, 3])  # KV head 1: query heads 2 and 3, rows of each together
    wanted = grouped @ key.transpose(1, 2)
    for name, form in score_goals.matmul_forms(grouped, key).items():
        got = form(grouped, key)
        if got is None:  # those head by head write into the buffer that they hold
            got = next(c.cell_contents for c in form.__closure__ if isinstance(c.cell_contents, torch.Tensor))
        got = got if got.shape == wanted.shape else got.transpose(1, 2)
        torch.testing.assert_close(got, wanted, msg=name)


def test_the_fastest_form_counts():
    class Clock:
        graphs = False

        def seconds(self, call) -> float:
            call()
            seen.append(call)
            return 1.0 if len(seen) % 4 == 3 else 2.0  # the third of four

    seen: list = []
    queries, keys = [torch.randn(2, 8, 16)] * 3, [torch.randn(2, 20, 16)] * 3
    name, call = score_goals.fastest_matmul(Clock(), queries, keys)
    assert name == "mm Q K^T per head"
    call()


def test_verdicts_count_both_directions():
    def row(to: float, over: float, peak: int | None) -> dict:
        factors = {"to_matmul": to, "over_definition": over, "over_eager": over - 1}
        return {"op": "score_layers", **factors, "peak_bytes": peak, "peak_limit": 10}

    chosen = [
        {"op": "select_tokens", "rows": n, "caches": caches, "to_bound": x, "compiled_to_bound": x / 2}
        for n, caches, x in ((8, "warm", 1.6), (1, "warm", 1.4), (8, "cold", 1.0), (1, "cold", 2.0))
    ]
    rows = [row(1.2, 9.0, 5), row(1.6, 7.9, 20), row(1.5, 8.5, None), *chosen]
    found = [(v["met"], v["of"], v["worst"]) for v in score_goals.verdicts(rows)]
    scores = [(2, 3, 1.6), (2, 3, 7.9), (1, 3, 6.9)]
    selections = [
        (1, 1, 1.4),
        (1, 1, 0.7),
        (0, 1, 1.6),
        (1, 1, 0.8),
        (0, 1, 2.0),
        (1, 1, 1.0),
        (1, 1, 1.0),
        (1, 1, 0.5),
    ]
    assert found == [*scores, *selections, (1, 2, 2.0)]
    assert score_goals.table(score_goals.verdicts(rows)).count("NOT REACHED") == 6


def test_the_goals_command(tmp_path, capsys):
    assert score_goals.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "score_goals.json").read_text())
    scores = [row for row in report["rows"] if row["op"] == "score_layers"]
    assert {row["dtype"] for row in scores} == {"bfloat16", "float32"}
    for row in scores:
        assert row["to_matmul"] == pytest.approx(row["seconds"]["p50"] / row["matmul_seconds"]["p50"])
        assert row["over_eager"] == pytest.approx(row["eager_seconds"] / row["seconds"]["p50"])
        assert row["over_definition"] > 0
        assert (row["matmul_float32_seconds"] is None) == (row["dtype"] == "float32")
        assert row["layers"] == row["of_layers"] == 2
    selects = {(row["op"], row["rows"], row["caches"]) for row in report["rows"] if row["op"] != "score_layers"}
    assert len(selects) == 6
    assert "bare matmul" in capsys.readouterr().out
    assert {"environment", "command", "verdicts"} <= set(report)
    assert report["command"] == "python -m bench.score_goals --quick --threads 1"


def test_a_wrong_score_is_not_timed(monkeypatch, tmp_path):
    real = problems.score_layers

    def wrong(*args):
        problem = real(*args)
        result = problem.result
        problem.result = lambda backend: [result(backend)[0] * 1.001]
        return problem

    monkeypatch.setattr(problems, "score_layers", wrong)
    monkeypatch.setattr(measure, "in_turn", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(problems.WrongResult):
        score_goals.main(["--quick", "--threads", "1", "--only", "tiny", "--out", str(tmp_path)])


def test_a_wrong_selection_is_not_timed(monkeypatch):
    state, ids = torch.rand(1, 8, 1000), torch.arange(1000)[None]
    score_goals.check_selection(state, ids, 8)
    monkeypatch.setattr(problems, "_kept", lambda importance: torch.arange(224))
    with pytest.raises(problems.WrongResult):
        score_goals.check_selection(state, ids, 8)
    with pytest.raises(problems.WrongResult, match="select_chunks"):
        score_goals.check_chunks(state.mean(1))
    with pytest.raises(problems.WrongResult, match="the compiled call"):
        score_goals.compiled_call(state, ids, 8)


def test_a_compiled_call_that_writes_nothing_is_not_timed(monkeypatch):
    compiled = score_goals._native.module()
    idle = SimpleNamespace(**{name: getattr(compiled, name) for name in ("Finalize", "Select", "GatherTokens")})
    idle.select_tokens = lambda *_: None
    monkeypatch.setattr(score_goals._native, "module", lambda: idle)
    with pytest.raises(problems.WrongResult, match="the compiled call"):
        score_goals.compiled_call(torch.rand(1, 8, 1000), torch.arange(1000)[None], 8)


@pytest.mark.parametrize("form", ["score_layer", "select_tokens"])
def test_a_wrong_eager_form_is_not_timed(monkeypatch, tmp_path, form):
    real = getattr(score_goals.eager, form)

    def wrong(*args):
        found = real(*args)
        return found * 1.001 if form == "score_layer" else (found[0].roll(1), found[1])

    monkeypatch.setattr(score_goals.eager, form, wrong)
    monkeypatch.setattr(measure, "in_turn", lambda *_, **__: pytest.fail("it was timed"))
    only = "tiny" if form == "score_layer" else "select"
    with pytest.raises(problems.WrongResult, match="eager"):
        score_goals.main(["--quick", "--threads", "1", "--only", only, "--out", str(tmp_path)])


def test_the_peers_command(tmp_path):
    assert peers.main(["--quick", "--no-compile", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    names = {(row["op"], row["peer"]) for row in rows}
    assert {("score", name) for name in ("specprefill_kernels", "eager", "published", "torch.compile")} < names
    assert {("select", name) for name in ("topk + sort", "published selection")} < names
    for row in rows:
        assert row["computes"]
        assert ("skipped" in row) == (row["peer"] == "torch.compile")
        if row["peer"] == "specprefill_kernels":
            assert row["ratio"] == 1.0
        if row["op"] == "score" and "seconds" in row and row["dtype"] == "float32":
            assert row["relative_error"] < 1e-4
            assert row["kept_overlap"] == 1.0


def test_a_peer_that_cannot_be_compiled_is_a_row(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    rows = list(peers.score_rows(TINY, 64, torch.float32, 2**20, measure.clock("cpu", True), 0.0))
    (row,) = (row for row in rows if row["peer"] == "torch.compile")
    assert row["skipped"] == "RuntimeError: no compiler"


def test_a_peer_that_is_wrong_is_a_row_and_ours_is_an_error(monkeypatch):
    monkeypatch.setattr(peers.eager, "score_layers", lambda queries, keys: torch.full((8, 64), 0.5))
    ticks = measure.clock("cpu", True)
    rows = list(peers.score_rows(TINY, 64, torch.float32, 2**20, ticks, 0.0, compiling=False))
    (row,) = (row for row in rows if row["peer"] == "eager")
    assert "off by" in row["skipped"]
    monkeypatch.setattr(peers.spk, "finalize_importance", lambda *_, **__: torch.full((1, 64), 0.5))
    with pytest.raises(problems.WrongResult):
        list(peers.score_rows(TINY, 64, torch.float32, 2**20, ticks, 0.0, compiling=False))


@pytest.mark.parametrize(("script", "count"), [('echo \'{"peer": "kvpress SnapKV", "op": "x"}\'', 1), ("exit 3", 1)])
def test_the_other_environment_answers_in_lines(tmp_path, script, count):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    options = type("Options", (), {"shapes": "quick", "seconds": 0.0, "only": "", "key_mib": 0})
    rows = peers.kvpress_rows(str(python), options, 1)
    assert len(rows) == count
    assert rows[0]["computes"] == peers.WHAT["kvpress SnapKV"]
    assert ("skipped" in rows[0]) == (script == "exit 3")
    (absent,) = peers.kvpress_rows(str(tmp_path / "nothing"), options, 1)
    assert "No such file" in absent["skipped"]
