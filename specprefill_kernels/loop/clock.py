"""Seconds per stage, with the device's queue drained at both ends: a launch is not a computation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageClock:
    """Adds up the seconds of named stages, in the order in which they first ran."""

    def __init__(self, *devices: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)

    def _now(self) -> float:
        for device in self._cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start
