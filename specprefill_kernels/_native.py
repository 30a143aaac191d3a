"""The compiled module, if this installation has one, and how tensors become what it takes: addresses and strides."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_C: ModuleType | None = None
_reason: str | None = None
try:
    _C = importlib.import_module("._C", __package__)
except ImportError as error:
    _reason = (
        f"the compiled module is not there ({error}); reinstall with a C++17 compiler, "
        "and without SPECPREFILL_BUILD=none"
    )

# specprefill_dtype in specprefill.h
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}


def unavailable() -> str | None:
    """Why the compiled module cannot be used, or None."""
    return _reason


def module() -> ModuleType:
    if _C is None:
        raise RuntimeError(_reason)
    return _C


def build_info() -> dict[str, Any]:
    """What setup.py wrote down about this build; empty where it did not build one."""
    try:
        return dict(importlib.import_module("._build_info", __package__).BUILD_INFO)
    except ImportError:
        return {}


def left_out(what: str) -> str:
    """Why the build left out "cpu" or "cuda"."""
    reasons: dict[str, str] = build_info().get("left_out") or {}
    return reasons.get(what, "it was built without setup.py, which would have said why")


def address(x: Tensor | None) -> int:
    """0 (a null pointer) for None."""
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def prefer_huge_pages(fresh: Tensor) -> Tensor:
    """A tensor in CPU memory that was just allocated and not touched yet: large ones are then mapped in huge pages."""
    if _C is not None and fresh.device.type == "cpu" and fresh.nbytes >= 1 << 25:
        _C.prefer_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh
