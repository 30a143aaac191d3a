"""Seconds per stage, with the device's queue drained at both ends: a launch is not a computation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageClock:
    """Adds up the seconds of named stages, in the order in which they first ran.

    A stage inside another one takes its seconds away from it, so that the stages add up to the time that passed.
    """

    def __init__(self, *devices: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._running: list[str] = []
        self._since = 0.0

    def _now(self) -> float:
        for device in self._cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _charge(self) -> None:
        """What passed since the last call goes to the innermost stage."""
        now = self._now()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def switch(self, name: str) -> None:
        """From here to its end the innermost stage is another one: for a forward that does two stages' work."""
        self._charge()
        self._running[-1] = name
