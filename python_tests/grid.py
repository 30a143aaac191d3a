"""The grid of backends that the op tests run on, and how they compare.

Columns: `reference` and `cpu` on CPU tensors, always. With TRITON_INTERPRET=1 also `triton` on CPU tensors, and with
SPECPREFILL_EMULATION=<module> (csrc/emulation/build.py makes it) `cuda`. On a machine with a GPU also every backend
that takes its tensors, and the reference on them (`reference_gpu`); those parameters carry the marker `gpu`, so that
`pytest -m gpu` runs exactly what needs one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

import specprefill_kernels as spk
from specprefill_kernels import _backends, _native

REQUIRED = ("reference", "cpu")
# An escape for machines without a compiler; nothing else may hide a missing backend.
MAY_LACK_CPU = os.environ.get("SPECPREFILL_ALLOW_MISSING_CPU") == "1"
# Triton's interpreter runs its kernels on CPU tensors: 50 microseconds for each tensor operation of each program.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# CUDA kernels compiled as C++ run on CPU tensors: a fiber for each thread, 20 ns for each meeting of two.
EMULATED = bool(os.environ.get("SPECPREFILL_EMULATION"))

T = TypeVar("T")


def written(op: str, name: str) -> bool:
    """Whether this version has the op on a backend at all: a room may have no CUDA kernels of its own."""
    module = f"specprefill_kernels.ops.{_backends.ROOMS[op]}.{_backends.SUBMODULES[name]}"
    return name != "cuda" or importlib.util.find_spec(module) is not None


def must_run(name: str) -> bool:
    """Whether a backend has to be there: a room that does not import must fail, not drop out of the grid."""
    if name == "triton":
        return INTERPRETED or (torch.cuda.is_available() and importlib.util.find_spec("triton") is not None)
    if name == "cuda":
        built = bool(_native.build_info().get("cuda")) and torch.version.hip is None
        return EMULATED or (torch.cuda.is_available() and built)
    return name in REQUIRED


@dataclass(frozen=True)
class Backend:
    """One column of the grid."""

    name: str
    op: str
    device: str = "cpu"

    @property
    def id(self) -> str:
        return "reference_gpu" if (self.name, self.device) == ("reference", "cuda") else self.name

    @property
    def marks(self) -> tuple[pytest.MarkDecorator, ...]:
        return (pytest.mark.gpu,) if self.device == "cuda" else ()

    @property
    def interpreted(self) -> bool:
        """Whether code for a GPU runs on CPU tensors: by Triton's interpreter, or emulated."""
        return self.name in ("triton", "cuda") and self.device == "cpu"

    @property
    def checks_values(self) -> bool:
        """Whether bad contents of tensors raise: on a GPU nothing is read on the host."""
        return self.device == "cpu"

    def sized(self, full: T, small: T, smallest: T | None = None) -> T:
        """`full`, or `small` where an interpreter or emulation would take too long: the one way in which tests differ.

        (Beside it, its property tests draw fewer examples: see conftest.py.) `smallest` is for Triton's interpreter
        alone, by far the slower one.
        """
        if not self.interpreted:
            return full
        return smallest if smallest is not None and self.name == "triton" else small

    def require(self) -> None:
        """Skip with the backend's own reason; a backend that must be there fails instead."""
        reason = spk.available_backends(self.op).get(self.name, "not known to this op")
        if reason is None:
            return
        if must_run(self.name) and not (self.name == "cpu" and MAY_LACK_CPU):
            pytest.fail(f"backend {self.name} must run {self.op}, but: {reason}")
        pytest.skip(f"{self.name}: {reason}")


def _device(op: str, name: str) -> str:
    """The type of the tensors that a backend takes."""
    module, _ = _backends._load(op, name)
    on_cpu = (name == "triton" and INTERPRETED) or (name == "cuda" and EMULATED)
    default = "cpu" if on_cpu else _backends.DEVICE_OF_BACKEND.get(name, "cpu")
    return getattr(module, "DEVICE_TYPE", default)


def backends(op: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Backend]:
    """Those that must be there and all others that can run; ``test_backends.py`` shows why the rest cannot."""
    reasons = spk.available_backends(op).items()
    able = [name for name, reason in reasons if reason is None or (must_run(name) and written(op, name))]
    columns = [Backend(name, op, _device(op, name)) for name in dict.fromkeys([*REQUIRED, *able])]
    if torch.cuda.is_available():
        columns.append(Backend("reference", op, "cuda"))
    return [column for column in columns if column.device in devices]


def on_backends(op: str, devices: tuple[str, ...] = ("cpu", "cuda")):
    """Parametrise over every backend that the op knows (and those it must know)."""
    columns = [pytest.param(backend, id=backend.id, marks=backend.marks) for backend in backends(op, devices)]
    return pytest.mark.parametrize("backend", columns, indirect=True)


def on_gpu_backends(op: str):
    """Parametrise over the backends that are written for a GPU; without one, one skipped parameter for all of them."""
    able = [b for b in backends(op, ("cuda",)) if b.name != "reference"] or [Backend("triton", op, "cuda")]
    columns = [pytest.param(backend, id=backend.id, marks=backend.marks) for backend in able]
    return pytest.mark.parametrize("backend", columns, indirect=True)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory is NaN (or the largest integer), so that an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def untouched_memory() -> Iterator[None]:
    """Inside `poisoned`, for a buffer too large to be filled."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def same(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal bit for bit: shape, dtype and every element, NaN included."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    left, right = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (actual, expected))
    assert torch.equal(left, right), f"{what}: differ in {int((left != right).sum())} bytes"
