"""A pytest plugin (-p fake_cuda): a GPU as far as `pytest bench/ --device cuda` looks at it, on CPU tensors.

Its events count 1000 seconds from one to the next, which no host clock would.
"""

from __future__ import annotations

import itertools
import types

import torch

import specprefill_kernels as spk
from bench import measure, problems, roofline

ticks = itertools.count()


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(ticks)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e6 * (other.at - self.at)  # in milliseconds


class Gpu(measure.Gpu):
    def __init__(self, quick: bool, cold: bool = True) -> None:
        self._flush = torch.empty(16)


def ceilings(device: str, threads: int, quick: bool) -> dict:
    return on_cpu("cpu", threads, quick) | {"device": device}


on_cpu, grid = roofline.ceilings, problems.grid_problems
roofline.ceilings = ceilings
problems.grid_problems = lambda device, *args, **more: grid("cpu", *args, **more)
spk.available_backends = lambda op: dict.fromkeys(("cpu", "reference"))
measure.Gpu, measure.graph_of = Gpu, lambda call: call
properties = types.SimpleNamespace(name="Some GPU", major=9, minor=0, multi_processor_count=1, total_memory=2**31)
for name, value in {
    "Event": Event,
    "is_available": lambda: True,
    "synchronize": lambda: None,
    "memory_allocated": lambda: 100,
    "max_memory_allocated": lambda: 1100,
    "reset_peak_memory_stats": lambda: None,
    "mem_get_info": lambda: (2**30, 2**31),
    "get_device_properties": lambda device: properties,
}.items():
    setattr(torch.cuda, name, value)
