"""Times of calls: cold caches, many runs, the candidates in turn, so that a drift of the clock meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    p20: float
    p50: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        ranks = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(ranks[1], statistics.median(seconds), ranks[7], len(seconds))

    def json(self) -> dict[str, float]:
        return asdict(self)


class Cpu:
    """A clock for CPU tensors."""

    graphs = False

    def __init__(self, quick: bool) -> None:
        self._flush = torch.ones(2**16 if quick else 2**24)

    def seconds(self, call: Callable[[], object]) -> float:
        self._flush.add_(1)
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


class Gpu:
    """Device events around one call, after the second-level cache has been overwritten.

    The flush keeps the device busy while the host queues the call, so what is timed is the device's work and the gaps
    between its kernels; a graph shows how much of it are gaps.
    """

    graphs = True

    def __init__(self, quick: bool) -> None:
        del quick
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        # At 3 TB/s a GiB takes 350 microseconds: as long as it takes the host to queue an op of three launches.
        self._flush = torch.empty(max(4 * cache, 2**30), dtype=torch.uint8, device="cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def clock(device: str, quick: bool = False) -> Cpu | Gpu:
    return Gpu(quick) if device == "cuda" else Cpu(quick)


def in_turn(ticks: Cpu | Gpu, calls: Calls, budget: float, most: int = 50) -> dict[str, Times]:
    """A B A B ... until the budget of seconds is spent: at least 5 rounds and at most `most`, after 2 to warm up."""
    for call in [*calls.values(), *calls.values()]:
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + budget
    for done in range(most):
        if done >= 5 and time.perf_counter() > stop:
            break
        for name, call in calls.items():
            seconds[name].append(ticks.seconds(call))
    return {name: Times.of(values) for name, values in seconds.items()}


def copy_rate(ticks: Cpu | Gpu, device: str, quick: bool = False) -> float:
    """Bytes per second of a plain copy, read and written ones counted: the ceiling of what only moves bytes."""
    size = 2**20 if quick else 2**30 if device == "cuda" else 2**27
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turn(ticks, {"copy": lambda: target.copy_(source)}, budget=1.0, most=20)
    return 2 * size / times["copy"].p50


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph's replay. The graph keeps what the call returned, so that its memory stays its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []
    with torch.cuda.graph(graph):
        kept.append(call())

    def replay(_keep: list[Any] = kept) -> None:
        graph.replay()

    return replay
