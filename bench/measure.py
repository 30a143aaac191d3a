"""Times of calls: cold caches, many runs, the candidates in turn, so that a drift of the clock meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.environment import caches

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
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        ranks = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(ranks[1], statistics.median(seconds), ranks[7], len(seconds))

    def json(self) -> dict[str, float]:
        return asdict(self)


class Cpu:
    """A clock for CPU tensors. Before each call the caches are filled with something else, by reading it."""

    graphs = False

    def __init__(self, quick: bool, cold: bool = True) -> None:
        size = 2**18 if quick else max(2**25, last_cache() * 5 // 4)
        self._flush = torch.ones(size // 4) if cold else None

    def flush(self) -> None:
        if self._flush is not None:
            self._flush.sum()

    def seconds(self, call: Callable[[], object]) -> float:
        self.flush()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


def last_cache() -> int:
    """Bytes of the largest cache that the system names."""
    return max(caches().values(), default=2**25)


class Gpu:
    """Device events around one call, after the second-level cache has been overwritten.

    The flush keeps the device busy while the host queues the call, so what is timed is the device's work and the gaps
    between its kernels; a graph shows how much of it are gaps.
    """

    graphs = True

    def __init__(self, quick: bool, cold: bool = True) -> None:
        del quick, cold  # the flush also hides the host's time
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        # At 3 TB/s a GiB takes 350 microseconds: as long as it takes the host to queue an op of three launches.
        self._flush = torch.empty(max(4 * cache, 2**30), dtype=torch.uint8, device="cuda")

    def flush(self) -> None:
        self._flush.zero_()

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


class DeviceTimer:
    """A clock that pytest-benchmark can read before and after a call: what passes between is the device's time.

    It is read in pairs. The first reading puts an event before the call's work, the second one behind it, waits, and
    says as much more than the first as passed between them. `arm` begins a pair anew, whatever happened before.
    """

    __name__ = "device_timer"  # pytest-benchmark writes it down

    def __init__(self) -> None:
        self._total = 0.0
        self._start: torch.cuda.Event | None = None

    def arm(self) -> None:
        self._start = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
        else:
            event.synchronize()
            self._total += float(self._start.elapsed_time(event)) * 1e-3
            self._start = None
        return self._total


device_timer = DeviceTimer()


def clock(device: str, quick: bool = False, cold: bool = True) -> Cpu | Gpu:
    return Gpu(quick, cold) if device == "cuda" else Cpu(quick, cold)


def in_turn(
    ticks: Cpu | Gpu, calls: Calls, budget: float, most: int = 50, least: int = 5, warm_up: int = 2
) -> dict[str, Times]:
    """A B A B ... until the budget of seconds is spent: at least `least` rounds and at most `most`, after `warm_up`."""
    for call in list(calls.values()) * warm_up:
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + budget
    for done in range(most):
        if done >= least and time.perf_counter() > stop:
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
