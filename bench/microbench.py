"""One microbenchmark: check the result, measure memory, then time it in turn with the plain form."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import specprefill_kernels as spk
from bench import measure, memory, roofline
from bench.problems import Problem, verify, verify_plain
from bench.shapes import Model, size_name

LEAST, MOST = 5, 50  # rounds
# What these read has just been written by the step before, and is small; keys are the whole prompt's.
WARM = {"finalize_importance", "select_chunks", "select_tokens", "gather_tokens"}
CACHES = ("auto", "cold", "warm")


@dataclass(frozen=True)
class Case:
    """A test's parameter.

    Attributes:
        make: makes the problem; equal problems are made once and shared by the tests that follow each other.
        graph: time a CUDA graph's replay instead of the call.
        named: the backend was asked for by name, so that it must be there.
    """

    op: str
    make: Callable[[], Problem]
    backend: str
    threads: int
    graph: bool = False
    named: bool = False


def shape_of(make: Callable[[], Problem]) -> str:
    """A name for a problem that is not made yet, from what makes it."""
    if not isinstance(make, partial):
        return "problem"
    words = []
    for value in (*make.args, *make.keywords.items()):
        if isinstance(value, Model):
            words.append(value.name)
        elif isinstance(value, torch.dtype):
            words.append(str(value).removeprefix("torch."))
        elif isinstance(value, tuple):
            name, given = value
            words.append(name if given is True else str(given).removeprefix("torch."))
        elif value and isinstance(value, int):
            words.append(size_name(value))
        elif value and value not in ("cpu", "cuda"):
            words.append(str(value))
    return "-".join(words)


class Session:
    """What the tests of one run share: the clock, the ceilings, and the problem that is being measured."""

    def __init__(
        self, device: str, quick: bool, caches: str, seconds: float, known: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.device, self.quick, self.caches, self.seconds = device, quick, caches, seconds
        self._clocks = {cold: measure.clock(device, quick, cold) for cold in (True, False)}
        self.ceilings: dict[int, dict[str, Any]] = {row["threads"]: dict(row) for row in known}
        self.rows: list[Mapping[str, Any]] = []
        self._plain: Callable[[], Problem] | None = None
        self._made: tuple[Callable[[], Problem], Problem, list[torch.Tensor]] | None = None

    def ceiling(self, threads: int) -> dict[str, Any]:
        if threads not in self.ceilings:
            self.ceilings[threads] = roofline.ceilings(self.device, threads, self.quick)
        return self.ceilings[threads]

    def cold(self, op: str) -> bool:
        """A GPU's caches are always flushed: they are small beside what a prefill has just moved through them."""
        if self.device == "cuda" or self.caches == "cold":
            return True
        return self.caches == "auto" and op not in WARM

    def problem(self, make: Callable[[], Problem]) -> tuple[Problem, list[torch.Tensor]]:
        """The problem and its right result; the one before is let go first, as both may not fit."""
        if self._made is None or self._made[0] is not make:
            self._made = None
            problem = make()
            self._made = (make, problem, problem.expected())
        return self._made[1:]

    def run(self, case: Case, benchmark: Any) -> None:
        reason = spk.available_backends(case.op).get(case.backend, "no such backend")
        if reason is not None:
            (pytest.fail if case.named else pytest.skip)(f"{case.backend}: {reason}")
        torch.set_num_threads(case.threads)
        ceiling = self.ceiling(case.threads)
        problem, expected = self.problem(case.make)
        verify(problem, case.backend, expected)  # a wrong result fails here, untimed
        peak = memory.peak_bytes(lambda: problem.call(case.backend), self.device)
        call = partial(problem.call, case.backend)
        timed = measure.graph_of(call) if case.graph else call
        eager = self._eager(problem, case)
        if eager is not None and self._plain is not case.make:  # once for all backends and numbers of threads
            verify_plain(problem, expected)
            self._plain = case.make
        cold = self.cold(case.op)
        ticks = self._clocks[cold]
        others: list[float] = []

        def before_a_round() -> None:
            if eager is not None:
                others.append(ticks.seconds(eager))
            measure.device_timer.arm()
            ticks.flush()

        benchmark.group = problem.op
        benchmark.pedantic(
            timed, setup=before_a_round, rounds=self._rounds(ticks, timed, eager), warmup_rounds=0 if self.quick else 1
        )
        if benchmark.stats is None:  # --benchmark-disable: nothing was timed
            return
        seconds = sorted(benchmark.stats.stats.data)
        floor = roofline.floor(ceiling, problem.traffic, problem.flops, problem.dtype, cold)
        benchmark.extra_info |= described(problem, case, seconds, floor, peak)
        if others:
            # The first is from the round that warmed up.
            plain = statistics.median(others[0 if self.quick else 1 :]) * problem.eager_times
            benchmark.extra_info["ratios"] = {"eager": plain / statistics.median(seconds)}
            benchmark.extra_info["eager_seconds"] = plain
            benchmark.extra_info["eager_layers"] = round(problem.layers / problem.eager_times)
        benchmark.extra_info["cold"] = cold
        self.rows.append(benchmark.extra_info)

    def _eager(self, problem: Problem, case: Case) -> Callable[[], object] | None:
        if case.backend == "reference":
            return None
        return problem.eager or partial(problem.call, "reference")

    def _rounds(self, ticks: Any, call: Callable[[], object], eager: Callable[[], object] | None) -> int:
        """As many as the seconds allow, from one call's time."""
        started = time.perf_counter()
        ticks.flush()
        for one in (call, eager):
            if one is not None:
                one()
        if self.device == "cuda":
            torch.cuda.synchronize()
        spent = max(time.perf_counter() - started, 1e-6)
        return max(LEAST, min(MOST, math.ceil(self.seconds / spent)))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each benchmark, from its `extra_info`: what pytest-benchmark's own table does not show."""
    lines = [
        f"{'op':20}{'shape':38}{'backend':10}{'threads':>8}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'roofline':>10}"
        f"{'peak MiB':>10}{'eager':>8}"
    ]
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        faster = f"{row['ratios']['eager']:.1f}x" if "eager" in row["ratios"] else "-"
        backend = row["backend"] + " graph" * row["graph"]
        lines.append(
            f"{row['op']:20}{row['shape']:38}{backend:10}{row['threads']:8}{1e3 * row['seconds']['p50']:10.3f}"
            f"{row['gbps']:8.1f}{row['gflops']:9.1f}{row['roofline_fraction']:10.0%}{peak:>10}{faster:>8}"
        )
    return "\n".join(lines)


def described(problem: Problem, case: Case, seconds: list[float], floor: float, peak: int | None) -> dict[str, Any]:
    """What a saved file says of a benchmark beside pytest-benchmark's own statistics."""
    p50 = statistics.median(seconds)
    return {
        "op": problem.op,
        "backend": case.backend,
        "shape": problem.shape,
        "tokens": problem.tokens,
        "dtype": problem.dtype,
        "threads": case.threads,
        "graph": case.graph,
        "layers": problem.layers,
        "of_layers": problem.of_layers,
        "seconds": measure.Times.of(seconds).json(),
        "bytes": problem.traffic,
        "flops": problem.flops,
        "gbps": problem.traffic / p50 / 1e9,
        "gflops": problem.flops / p50 / 1e9,
        "roofline_seconds": floor,
        "roofline_fraction": floor / p50,
        "peak_bytes": peak,
        "ratios": {},
    }
