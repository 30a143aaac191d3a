"""Where CUDA kernels run and how they are called: the only way from a room to one.

With SPECPREFILL_EMULATION=<path of an _emulated module> in the environment (python csrc/emulation/build.py makes one),
the same kernels, compiled as C++, run on CPU tensors, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels._version import __version__

EMULATION = os.environ.get("SPECPREFILL_EMULATION", "")
EMULATED = bool(EMULATION)
# The device type whose tensors the kernels take.
DEVICE_TYPE = "cpu" if EMULATED else "cuda"


@cache
def _emulated() -> tuple[ModuleType | None, str | None]:
    """The module that SPECPREFILL_EMULATION names, or (None, reason)."""
    path = Path(EMULATION)
    if not path.is_file():
        return None, f"SPECPREFILL_EMULATION={EMULATION}: no such file (python csrc/emulation/build.py makes one)"
    try:
        spec = importlib.util.spec_from_file_location("_emulated", path)
        if spec is None or spec.loader is None:
            return None, f"SPECPREFILL_EMULATION={EMULATION}: not an extension module of this Python"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"SPECPREFILL_EMULATION={EMULATION}: {error}"
    if not hasattr(module, "cuda_unavailable"):
        return None, f"SPECPREFILL_EMULATION={EMULATION}: has no CUDA functions"
    if module.version() != __version__:
        return None, f"SPECPREFILL_EMULATION={EMULATION}: of version {module.version()}, not {__version__}"
    return module, None


def left_out() -> str | None:
    """Why the compiled module has no CUDA kernels, or None where it has."""
    reason = _native.unavailable()
    if reason or hasattr(_native.module(), "cuda_unavailable"):
        return reason
    return f"the compiled module has no CUDA kernels: {_native.left_out('cuda')}"


@cache
def unavailable() -> str | None:
    """Why CUDA kernels cannot run here, or None."""
    if EMULATED:
        module, reason = _emulated()
        return reason if module is None else module.cuda_unavailable() or None
    reason = left_out()
    if reason:
        return reason
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs"
    if not torch.cuda.is_available():
        return "no GPU that torch can use (SPECPREFILL_EMULATION runs the kernels on CPU tensors, to test them)"
    # Every GPU is asked for its capability, which makes no context on it; the current one by CUDA's runtime, too.
    compiled = _native.module()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if reason := compiled.cuda_no_code_for(compiled.cuda_architectures(), *capability):
            return str(reason)
    return compiled.cuda_unavailable() or None


def module() -> ModuleType:
    """The compiled module that has the CUDA functions."""
    if not EMULATED:
        return _native.module()
    found, reason = _emulated()
    if found is None:
        raise RuntimeError(reason)
    return found


def checks_values() -> bool:
    """Whether the contents of tensors are checked: on CPU tensors, as every backend does."""
    return EMULATED


def call(function: Callable[..., None], *arguments: Any, on: Tensor) -> None:
    """Call a function of the module with these arguments and the caller's current stream of the device of `on`."""
    if EMULATED:
        function(*arguments, 0)
        return
    if on.device.index == torch.cuda.current_device():
        function(*arguments, torch.cuda.current_stream(on.device).cuda_stream)
        return
    with torch.cuda.device(on.device):
        function(*arguments, torch.cuda.current_stream(on.device).cuda_stream)


def scratch(size: int, given: Tensor | None, on: Tensor) -> tuple[Tensor, int]:
    """A workspace, the caller's or one of `size` bytes, and its size. It must live until the call has returned: memory
    that is freed then is used again in the stream's order."""
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=on.device) if given is None else given
    return workspace, workspace.numel()
