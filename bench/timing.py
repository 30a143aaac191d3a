"""The first timing table: per op, shape and backend its time, GB/s, part of a copy's rate, ratio to other backends.

    python -m bench.timing                                        on a GPU: reference (the eager form), triton, cuda
    python -m bench.timing --device cpu --backends cpu --quick    the harness itself, tiny shapes

No backend is timed whose result is wrong. Results: timing.json and timing.txt under --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import specprefill_kernels as spk
from bench import goals, measure
from bench.environment import command, environment
from bench.problems import Problem, WrongResult, problems, verify

EAGER = "reference"
DEFAULT = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}  # device -> backends beside the eager form
# What each backend's time is compared with, in the same run: key of the row, column of the table, the other backend.
COMPARED = (("faster_than_eager", "eager", EAGER), ("faster_than_triton", "triton", "triton"))


def measured(problem: Problem, backends: Iterable[str], ticks: Any, budget: float, copy_rate: float) -> list[dict]:
    """Rows of one problem, one for each backend: first all results are checked, then the good ones timed in turn."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    expected = problem.expected()
    for backend in backends:
        rows[backend] = row = {"op": problem.op, "shape": problem.shape, "backend": backend, "bytes": problem.traffic}
        reason = spk.available_backends(problem.op).get(backend, "no such backend")
        if reason is not None:
            row["skipped"] = reason
            continue
        try:
            verify(problem, backend, expected)
        except Exception as error:
            kind = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
            row["failed"] = kind + str(error)
            continue
        calls[backend] = lambda name=backend: problem.call(name)
    timed = measure.in_turn(ticks, calls, budget) if calls else {}
    for backend, times in timed.items():
        rate = problem.traffic / times.p50
        rows[backend] |= {"seconds": times.json(), "rate": rate, "of_copy": rate / copy_rate}
        for name, _, other in COMPARED:
            if other in timed and backend not in (other, EAGER):
                rows[backend][name] = timed[other].p50 / times.p50
    if ticks.graphs:
        _time_graphs(rows, calls, ticks, budget)
    return list(rows.values())


def _time_graphs(rows: dict[str, dict], calls: dict[str, Callable[[], object]], ticks: Any, budget: float) -> None:
    """The same calls as CUDA graphs, in turn again; but not the eager form, which waits for the device."""
    made = {backend: _graph(rows[backend], call) for backend, call in calls.items() if backend != EAGER}
    graphs = {backend: graph for backend, graph in made.items() if graph is not None}
    if graphs:
        for backend, times in measure.in_turn(ticks, graphs, budget / 2).items():
            rows[backend]["graph_seconds"] = times.json()


def _graph(row: dict[str, Any], call: Callable[[], object]) -> Callable[[], object] | None:
    try:
        return measure.graph_of(call)
    except Exception as error:
        row["failed"] = f"as a CUDA graph: {type(error).__name__}: {error}"
        return None


def table(rows: list[dict], copy_rate: float) -> str:
    """What fits a terminal: microseconds, without and with a graph, and how they compare."""
    lines = [f"copy: {copy_rate / 1e9:.0f} GB/s, read and written bytes counted"]
    lines.append(
        f"{'op':20}{'shape':29}{'backend':11}{'us':>9}{'p20-p80':>16}{'graph':>9}{'GB/s':>7}{'copy':>6}"
        + "".join(f"{column:>8}" for _, column, _ in COMPARED)
    )
    for row in rows:
        head = f"{row['op']:20}{row['shape']:29}{row['backend']:11}"
        if "seconds" not in row:
            lines.append(head + ("FAILED: " + row["failed"] if "failed" in row else "not here: " + row["skipped"]))
            continue
        micro = {name: 1e6 * row["seconds"][name] for name in ("p20", "p50", "p80")}
        graph = f"{1e6 * row['graph_seconds']['p50']:.1f}" if "graph_seconds" in row else "-"
        ratios = "".join(f"{f'{row[name]:.1f}x' if name in row else '-':>8}" for name, _, _ in COMPARED)
        spread = f"{micro['p20']:.1f}-{micro['p80']:.1f}"
        rate = f"{row['rate'] / 1e9:7.0f}{100 * row['of_copy']:5.0f}%"
        lines.append(f"{head}{micro['p50']:9.1f}{spread:>16}{graph:>9}{rate}{ratios}")
        if "failed" in row:
            lines.append(f"  FAILED: {row['failed']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backends", default="", help="comma-separated; the eager form is always among them")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the harness, measures nothing")
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.4, help="budget of timing a row")
    parser.add_argument("--limit", type=float, default=1e9, help="start no further row after so many seconds in all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.timing: no GPU that torch can use (--device cpu --quick tries the harness)", file=sys.stderr)
        return 2
    named = [name for name in options.backends.split(",") if name] or DEFAULT[options.device]
    backends = list(dict.fromkeys([EAGER, *named]))
    started = time.perf_counter()
    ticks = measure.clock(options.device, options.quick)
    copy_rate = measure.copy_rate(ticks, options.device, options.quick)
    report: dict[str, Any] = {
        "environment": environment(options.device),
        "command": command("python -m bench.timing", sys.argv[1:] if argv is None else argv),
        "copy_bytes_per_second": copy_rate,
    }
    rows: list[dict] = report.setdefault("rows", [])
    options.out.mkdir(parents=True, exist_ok=True)
    makers = problems(options.device, options.quick, options.only)
    for i, (op, make) in enumerate(makers):
        if time.perf_counter() - started > options.limit:
            report["cut"] = f"after {options.limit:.0f} s: {i} of {len(makers)} problems"
            break
        try:
            new = measured(make(), backends, ticks, options.seconds, copy_rate)
        except Exception as error:  # the others are worth having
            new = [{"op": op, "shape": "", "backend": "", "failed": f"{type(error).__name__}: {error}"}]
        rows += new
        print("\n".join(table(new, copy_rate).splitlines()[2:]), flush=True)
        # After every row: what has been measured is not lost when time runs out.
        (options.out / "timing.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "timing.txt").write_text(table(rows, copy_rate) + "\n")
    text = table(rows, copy_rate) + (f"\ncut {report['cut']}" if "cut" in report else "")
    text = "\n".join([text, *goals.reached(rows)])
    (options.out / "timing.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "timing.txt").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if "cut" in report or any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
