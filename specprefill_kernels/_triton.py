"""Where Triton kernels run and how they are launched: the only way from a room to a launch.

With TRITON_INTERPRET=1 in the environment before triton is imported, Triton's interpreter runs the same kernels on CPU
tensors, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor


@triton.jit
def _probe():  # type: ignore[no-untyped-def]  # never launched: its type shows what triton.jit makes here
    pass


OLDEST = (3, 6)  # Triton: as in pyproject.toml
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
# The device type whose tensors the kernels take.
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class Target:
    """The processor that kernels are launched for: the key of every launch heuristic.

    Attributes:
        vendor: "cuda", "hip" or "interpreter".
        arch: compute capability, 90 for sm_90; for hip the number in its name, 942 for gfx942; 0 for the interpreter.
        processors: streaming multiprocessors (compute units).
    """

    vendor: str
    arch: int
    processors: int

    @property
    def interpreted(self) -> bool:
        return self.vendor == "interpreter"


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    meta: dict[str, Any]  # constexprs, num_warps, num_stages


class _Recorder:
    """While a recording goes on: the target that heuristics see, and the launches so far."""

    target: Target | None = None
    launches: list[Launch]


@cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}, the oldest that compiles them"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, to test them)"
    if torch.version.hip is None:
        capability = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if capability < (8, 0):
            return f"a GPU of compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


@cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0].removeprefix("gfx")
        return Target("hip", int(name, 16) if not name.isdigit() else int(name), properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(x: Tensor) -> Target:
    """The target that x lies on."""
    return default_target() if INTERPRETED or _Recorder.target is not None else _device_target(x.device.index)


def default_target() -> Target:
    """The target of the current device."""
    if _Recorder.target is not None:
        return _Recorder.target
    return Target("interpreter", 0, 1) if INTERPRETED else _device_target(torch.cuda.current_device())


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, on: Tensor, **meta: Any) -> None:
    """Run `kernel` on the device of `on`, on the caller's current stream of that device.

    Args:
        arguments: what the kernel takes before its constexprs; a tuple of tensors is one argument.
        meta: its constexprs by name, num_warps and num_stages.
    """
    if _Recorder.target is not None:
        _Recorder.launches.append(Launch(kernel, grid, arguments, meta))
        return
    if INTERPRETED or on.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **meta)
        return
    with torch.cuda.device(on.device):
        kernel[grid](*arguments, **meta)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Inside, launches are recorded, as they would be made on `target`, and nothing runs.

    For ahead-of-time compilation: what is compiled is what would be launched. CPU tensors will do.
    """
    before = _Recorder.target
    _Recorder.target, _Recorder.launches = target, []
    try:
        yield _Recorder.launches
    finally:
        _Recorder.target = before


def checks_values() -> bool:
    """Whether the contents of tensors are checked: on CPU tensors, as every backend does, but not in a recording."""
    return INTERPRETED and _Recorder.target is None
