"""`pytest bench/`: the options, and the benchmarks that they ask for.

Each test is one op on one shape, backend and thread count. Its result is checked before anything is timed; then calls
of the backend and of the plain PyTorch form take turns, and pytest-benchmark keeps the backend's times.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("pytest_benchmark") is None:
    raise pytest.UsageError("bench/ needs pytest-benchmark: pip install '.[bench]', or python3 run.py bench")

from bench import measure, memory, microbench, problems, roofline
from bench.environment import command, environment
from bench.shapes import GRIDS

BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("specprefill_kernels' benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--threads", default="1,2", help="thread counts on a CPU, as far as it has cores (default 1,2)")
    group.addoption("--shapes", choices=tuple(GRIDS), default="default", help="quick only tries the harness")
    group.addoption("--backend", default="", help="comma-separated (default: cpu; on a GPU triton,cuda); or reference")
    group.addoption("--op", default="", help="only ops whose name contains this")
    group.addoption(
        "--caches",
        choices=microbench.CACHES,
        default="auto",
        help="before each call on a CPU: cold, filled with something else; warm, left as they are; auto, cold for what "
        "reads keys (scores, gather_kv) and warm for what reads the step before's output",
    )
    group.addoption("--key-mib", type=int, default=0, help="MiB that all layers' keys may take together")
    group.addoption("--round-seconds", type=float, default=0.0, help="seconds of timing for each benchmark")
    group.addoption("--roofline", type=Path, help="a file of bench.roofline, instead of measuring the ceilings now")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no GPU that torch can use")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench_case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = config.getoption("--device")
    grid = GRIDS[config.getoption("--shapes")]
    share = (config.getoption("--key-mib") * 2**20) or grid.key_bytes or memory.free_bytes(device) // 2
    makers = problems.grid_problems(device, grid, share, config.getoption("--op"))
    named = [name for name in config.getoption("--backend").split(",") if name]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [int(n) for n in config.getoption("--threads").split(",") if int(n) <= cores] or [1]
    cases = []
    for op, make in makers:
        if op not in metafunc.function.OPS:
            continue
        for count in threads if device == "cpu" else [torch.get_num_threads()]:
            for backend in named or BACKENDS[device]:
                # A captured graph has none of the host's time; the eager forms wait for the device and cannot be one.
                for graph in (False, True) if device == "cuda" and backend != "reference" else (False,):
                    case = microbench.Case(op, make, backend, count, graph, bool(named))
                    marks = [pytest.mark.benchmark(timer=measure.device_timer)] if device == "cuda" else []
                    name = f"{op}-{microbench.shape_of(make)}-{backend}" + (f"-{count}t" if device == "cpu" else "")
                    cases.append(pytest.param(case, id=name + "-graph" * graph, marks=marks))
    metafunc.parametrize("bench_case", cases)


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> microbench.Session:
    config = request.config
    quick = config.getoption("--shapes") == "quick"
    saved = config.getoption("--roofline")
    known = json.loads(saved.read_text())["ceilings"] if saved else []
    device = config.getoption("--device")
    session = microbench.Session(
        device, quick, config.getoption("--caches"), config.getoption("--round-seconds") or _seconds(config), known
    )
    config._specprefill_session = session  # type: ignore[attr-defined]
    return session


def _seconds(config: pytest.Config) -> float:
    return GRIDS[config.getoption("--shapes")].seconds


@pytest.fixture
def run_case(bench_session: microbench.Session, benchmark: Any, bench_case: microbench.Case) -> Iterator[Any]:
    """Checks and times the case; the former number of threads comes back."""
    before = torch.get_num_threads()
    yield lambda: bench_session.run(bench_case, benchmark)
    torch.set_num_threads(before)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict) -> None:
    """The saved file says where its figures come from, and what the machine's ceilings are."""
    del benchmarks
    output_json["environment"] = environment(config.getoption("--device"))
    output_json["command"] = command("pytest", [str(one) for one in config.invocation_params.args])
    session = getattr(config, "_specprefill_session", None)
    output_json["ceilings"] = [] if session is None else list(session.ceilings.values())
    output_json["caches"] = config.getoption("--caches")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_specprefill_session", None)
    if session is None or not session.rows:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(microbench.summary(session.rows))
    for ceiling in session.ceilings.values():
        terminalreporter.write_line(roofline.text(ceiling))


def pytest_report_header(config: pytest.Config) -> str:
    return f"benchmarks: {config.getoption('--shapes')} shapes on {config.getoption('--device')}"
