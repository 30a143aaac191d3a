"""The grid of backends that the op tests run on, and how they compare."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

import specprefill_kernels as spk

REQUIRED = ("reference", "cpu")
# An escape for machines without a compiler; nothing else may hide a missing backend.
MAY_LACK_CPU = os.environ.get("SPECPREFILL_ALLOW_MISSING_CPU") == "1"


@dataclass(frozen=True)
class Backend:
    """One column of the grid."""

    name: str
    op: str

    @property
    def device(self) -> str:
        on_gpu = self.name == "cuda" or (self.name == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
        return "cuda" if on_gpu else "cpu"

    def require(self) -> None:
        """Skip with the backend's own reason; a backend that must be there fails instead."""
        reason = spk.available_backends(self.op).get(self.name, "not known to this op")
        if reason is None:
            return
        if self.name in REQUIRED and not (self.name == "cpu" and MAY_LACK_CPU):
            pytest.fail(f"backend {self.name} must run {self.op}, but: {reason}")
        pytest.skip(f"{self.name}: {reason}")


def backends(op: str) -> list[Backend]:
    """Those that must be there and all others that can run; ``test_backends.py`` shows why the rest cannot."""
    able = [name for name, reason in spk.available_backends(op).items() if reason is None]
    return [Backend(name, op) for name in dict.fromkeys([*REQUIRED, *able])]


def on_backends(op: str):
    """Parametrise over every backend that the op knows (and those it must know)."""
    return pytest.mark.parametrize("backend", backends(op), ids=lambda backend: backend.name, indirect=True)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal bit for bit: shape, dtype and every element, NaN included."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    left, right = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (actual, expected))
    assert torch.equal(left, right), f"{what}: differ in {int((left != right).sum())} bytes"
