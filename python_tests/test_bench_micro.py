"""`pytest bench/` and what it is made of: what is refused, what is counted, what is saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the bench is not part of the package

from bench import eager, measure, memory, microbench, operations, peers_published, problems, roofline, shapes, truth  # noqa: E402
from bench.environment import caches, command, describe, environment  # noqa: E402

TINY = shapes.QUICK_MODELS[0]
CEILING = {
    "device": "cpu",
    "threads": 1,
    "sizes": {"1 MiB": 2**20, "4 MiB": 2**22, "memory": 2**28},
    "copy": {"1 MiB": 40e9, "4 MiB": 15e9, "memory": 10e9},
    "read": {"1 MiB": 30e9, "4 MiB": 20e9, "memory": 12e9},
    "matmul": {"float32": 100e9, "bfloat16": 30e9},
}


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as is used: one second a call."""

    def __init__(self) -> None:
        self.calls, self.extra_info, self.group = 0, {}, None
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, call, setup, rounds, warmup_rounds):
        for i in range(rounds + warmup_rounds):
            setup()
            call()
            self.calls += 1
            if i >= warmup_rounds:
                self.stats.stats.data.append(1.0)


def session() -> microbench.Session:
    return microbench.Session("cpu", True, "auto", 0.0, [CEILING])


def test_a_wrong_backend_is_not_timed():
    problem = problems.finalize("cpu", 100)
    right, calls = problem.result, []
    problem.result = lambda backend: [right(backend)[0] + 1e-3]
    problem.call = lambda backend: calls.append(backend)
    benchmark = FakeBenchmark()
    with pytest.raises(problems.WrongResult, match="is off by"):
        session().run(microbench.Case("finalize_importance", lambda: problem, "cpu", 1), benchmark)
    assert (benchmark.calls, calls, benchmark.extra_info) == (0, [], {})


def test_a_backend_that_was_asked_for_must_be_there():
    case = microbench.Case("finalize_importance", partial(problems.finalize, "cpu", 100), "cuda", 1)
    for named, outcome in ((False, pytest.skip.Exception), (True, pytest.fail.Exception)):
        with pytest.raises(outcome):
            session().run(microbench.Case(case.op, case.make, "nothing", 1, named=named), FakeBenchmark())


def test_what_is_saved():
    make = partial(problems.score_layers, "cpu", TINY, 512, torch.float32, 2)
    shared, benchmark = session(), FakeBenchmark()
    shared.run(microbench.Case("score_layers", make, "cpu", 1), benchmark)
    info = benchmark.extra_info
    moved, worked = info["bytes"], info["flops"]
    assert (info["op"], info["backend"], info["tokens"], info["dtype"]) == ("score_layers", "cpu", 512, "float32")
    assert (info["threads"], info["layers"], info["of_layers"], info["cold"]) == (1, 2, 2, True)
    assert info["gbps"] == pytest.approx(moved / 1e9)  # in one second
    assert info["gflops"] == pytest.approx(worked / 1e9)
    assert info["roofline_seconds"] == info["roofline_fraction"] == max(moved / 12e9, worked / 100e9)
    assert info["ratios"]["eager"] == info["eager_seconds"] > 0
    assert info["peak_bytes"] is None or info["peak_bytes"] >= 0
    json.dumps(info)
    assert "score_layers" in microbench.summary([info])
    reference = FakeBenchmark()
    shared.run(microbench.Case("score_layers", make, "reference", 1), reference)
    assert reference.extra_info["ratios"] == {}
    assert shared.problem(make)[0] is shared.problem(make)[0]


def test_names_of_problems_differ():
    makers = problems.grid_problems("cpu", shapes.GRIDS["full"], 2**30)
    names = [f"{op}-{microbench.shape_of(make)}" for op, make in makers]
    assert len(set(names)) == len(names)
    assert "score_layers-Llama-3.1-8B-128K-float32-2" in names


def test_layers_are_as_many_as_fit():
    model = shapes.Model("m", 8, 2, 64, 10)
    one = 2 * 1000 * 64 * 2
    assert [shapes.layers_within(model, 1000, 2, n * one + 5) for n in (0, 1, 4, 99)] == [1, 1, 4, 10]
    queries, keys = problems.layer_tensors("cpu", TINY, 64, torch.bfloat16, 5)
    assert len({key.data_ptr() for key in keys}) == len(keys) == len(queries) == 5
    assert not any(torch.equal(a, b) for i, a in enumerate(keys) for b in keys[:i])


def test_eager_and_the_published_steps_are_the_definition():
    queries, keys = problems.layer_tensors("cpu", TINY, 100, torch.float32, 3)
    plain = [query[0] for query in queries], [key[0] for key in keys]
    wanted = torch.stack([truth.state(query, key) for query, key in zip(*plain)]).amax(0)
    torch.testing.assert_close(eager.score_layers(*plain).double(), wanted, rtol=1e-5, atol=0)
    importance = peers_published.importance(*plain)
    torch.testing.assert_close(importance.double(), wanted.mean(0), rtol=1e-5, atol=0)
    values = torch.rand(133, generator=torch.Generator().manual_seed(0))
    kept = truth.kept(values, 2, 32)  # ceil(0.3 * 5)
    assert torch.equal(peers_published.select(values, 0.3, 32), kept)
    state, ids = values.expand(4, -1), torch.arange(133) * 3
    assert torch.equal(eager.select_tokens(state, ids, 2, 32)[0], ids[kept])
    assert torch.equal(eager.chunk_scores(values, 32)[-1], values[128:].mean())


def test_operations_by_hand():
    """3 look-ahead rows of 4 query heads, 10 tokens, 8 numbers each."""
    assert operations.score(3, 4, 8, 10) == 12 * 10 * (2 * 8 + operations.PER_WEIGHT)
    assert operations.finalize(3, 10) == 30
    assert operations.select_tokens(3, 10) == 40


def test_the_floor_is_the_higher_of_two():
    assert roofline.floor(CEILING, 12 * 10**9, 0, "float32") == 1.0  # the faster stream
    assert roofline.floor(CEILING, 0, 100 * 10**9, "bfloat16") == 1.0  # bf16 may be widened
    assert roofline.floor(CEILING, 24 * 10**9, 300 * 10**9, "float32") == 3.0
    sizes = (10, 2**20, 2**21, 2**22, 2**30)
    assert [roofline.level(CEILING, n) for n in sizes] == ["1 MiB", "1 MiB", "1 MiB", "4 MiB", "memory"]
    assert roofline.floor(CEILING, 2**20, 0, "float32", cold=False) == 2**20 / 40e9
    assert roofline.floor(CEILING, 2**22, 0, "float32", cold=False) == 2**22 / 20e9
    assert roofline.floor(CEILING, 2**20, 0, "float32", cold=True) == 2**20 / 12e9
    old = {name: rates for name, rates in CEILING.items() if name != "sizes"}
    assert roofline.level(old, 100) == "memory"


def test_ceilings_are_measured():
    before = torch.get_num_threads()
    found = roofline.ceilings("cpu", 1, quick=True)
    assert torch.get_num_threads() == before
    assert min(*found["copy"].values(), *found["read"].values(), *found["matmul"].values()) > 1e6
    assert "float32" in roofline.text(found)


@pytest.mark.skipif(not memory.RESET.exists(), reason="Linux tells the highest resident size, others do not")
@pytest.mark.parametrize("size", [2**22, 2**26])
def test_peak_memory_is_what_a_call_holds_at_once(size):
    held = memory.peak_bytes(lambda: torch.ones(size // 4), "cpu")
    assert held is not None
    assert abs(held - size) <= memory.RESOLUTION
    one_after_the_other = memory.peak_bytes(lambda: [float(torch.ones(size // 64).sum()) for _ in range(16)], "cpu")
    assert one_after_the_other is not None
    assert one_after_the_other < size / 2
    assert memory.free_bytes("cpu") > 2**20


def test_the_device_timer_counts_pairs(monkeypatch):
    """Two readings are as far apart as their events; a reading that was left alone spoils no pair after it."""
    clock = iter([10.0, 13.0, 99.0, 100.0, 104.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, other):
            return other.at - self.at

    waited: list[float] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = measure.DeviceTimer()
    start = timer()
    assert timer() - start == pytest.approx(3e-3)
    timer()  # a call that raised
    timer.arm()
    start = timer()
    assert timer() - start == pytest.approx(4e-3)
    assert waited == [13.0, 104.0]


def test_the_environment_says_what_a_figure_needs():
    found = environment("cpu")
    assert {"commit", "time", "processor", "cores", "threads", "flags", "caches", "torch", "device"} <= set(found)
    assert found["torch"] in describe(found)
    assert all(size > 0 for size in caches().values())
    assert describe({})  # an old file's


def test_the_ceilings_say_how_they_were_measured(tmp_path):
    assert roofline.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "roofline.json").read_text())
    assert report["command"] == "python -m bench.roofline --quick --threads 1"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--quick", "--out", "/home/someone/results", "--threads", "1"], "--quick --threads 1"),
        (["--out=/home/someone/results", "--quick"], "--quick"),
        (["--benchmark-storage=file:///home/someone/saved", "-q", "bench"], "-q bench"),
        (["/home/someone/bench", "--threads", "1", "/srv/more"], "--threads 1"),
        (["--threads=1", "/srv/more", "-c/etc/x.ini", "--out", "~/results"], "--threads=1"),
        (["--pair", "smollm2-135m:/srv/weights", "--out", r"C:\results"], ""),
        (["--out", "bench/results", "-k", "one or two"], "--out bench/results -k 'one or two'"),
    ],
)
def test_commands_in_results_name_no_path_of_this_machine(given, kept):
    assert command("tool", given) == f"tool {kept}".rstrip()


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess:
    called = ["-m", "pytest", "bench/", "-q", "--shapes", "quick", "--threads", "1", "--op", "finalize"]
    storage = [f"--benchmark-storage=file://{folder}", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [sys.executable, *called, *storage, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python_tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_saved_runs_are_compared(tmp_path):
    """The whole of it: saved with everything that is promised; a slower run fails against a faster baseline."""
    pytest.importorskip("pytest_benchmark")
    first = run_pytest(tmp_path, "--benchmark-save=before")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "GFLOP/s" in first.stdout
    (saved,) = tmp_path.glob("*/0001_before.json")
    report = json.loads(saved.read_text())
    assert {"environment", "ceilings", "caches", "command"} <= set(report)
    assert str(tmp_path) not in report["command"]
    assert "--op finalize" in report["command"]
    assert [one["extra_info"]["op"] for one in report["benchmarks"]] == ["finalize_importance"]
    for one in report["benchmarks"]:
        one["stats"]["median"] /= 1e6
    saved.write_text(json.dumps(report))
    slower = run_pytest(tmp_path, "--benchmark-compare=0001", "--benchmark-compare-fail=median:1000%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr


def test_a_gpu_is_timed_by_its_events(tmp_path):
    """Calls and graphs, by the device's clock and not the host's; the caches are always flushed."""
    pytest.importorskip("pytest_benchmark")
    saved = tmp_path / "ops.json"
    options = ["-p", "fake_cuda", "--device", "cuda", "--backend", "cpu,reference", "--caches", "warm"]
    result = run_pytest(tmp_path, *options, "--benchmark-json", str(saved))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(saved.read_text())
    assert report["environment"]["gpu"] == "Some GPU"
    infos = [one["extra_info"] for one in report["benchmarks"]]
    assert [(info["backend"], info["graph"]) for info in infos] == [("cpu", False), ("cpu", True), ("reference", False)]
    for one in report["benchmarks"]:
        assert one["stats"]["min"] == one["stats"]["max"] == pytest.approx(1000)
        assert one["options"]["timer"] == "device_timer"
        assert one["extra_info"]["peak_bytes"] == 1000
        assert one["extra_info"]["cold"]
    assert infos[0]["ratios"]["eager"] == pytest.approx(1)
