"""`show-config` says where Triton's kernels would run, and what backend="auto" takes and why."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

from specprefill_kernels import _backends, _diagnosis

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def row(name: str) -> str:
    return dict(_diagnosis.config_rows())[name]


def reasons(monkeypatch: pytest.MonkeyPatch, missing: dict[str, str]) -> None:
    """Pretend that these backends are missing, for these reasons, and all others there."""
    answer = {backend: missing.get(backend) for backend in _backends.BACKENDS}
    monkeypatch.setattr(_backends, "available_backends", lambda op: answer)
    monkeypatch.setattr(_backends, "takes_others", lambda op, backend, device: None)


def test_auto_takes_the_first_backend_that_runs(monkeypatch):
    reasons(monkeypatch, {})
    assert row("auto on cpu tensors") == "all ops: cpu"
    assert row("auto on cuda tensors") == "all ops: cuda"


def test_auto_says_why_it_passes_others_over(monkeypatch):
    reasons(monkeypatch, {"cuda": "not compiled", "triton": "no GPU", "cpu": "no compiler"})
    assert row("auto on cpu tensors") == "all ops: reference (cpu: no compiler)"
    assert row("auto on cuda tensors") == "all ops: reference (cuda: not compiled; triton: no GPU)"


def test_ops_that_differ_are_told_apart(monkeypatch):
    def available(op):
        missing = "too slow" if op.startswith("gather") else None
        return {backend: missing if backend == "cpu" else None for backend in _backends.BACKENDS}

    monkeypatch.setattr(_backends, "available_backends", available)
    shown = row("auto on cpu tensors")
    assert "gather_tokens, gather_kv: reference (cpu: too slow)" in shown
    assert "score_layer, " in shown


def test_it_shows_what_auto_really_takes():
    for device in _backends.PREFERENCE:
        for op in _backends.ROOMS:
            assert f"{_backends._automatic(op, device)}" in row(f"auto on {device} tensors")


@pytest.mark.skipif(HAS_TRITON, reason="triton is installed")
def test_without_triton_it_says_so():
    assert row("triton kernels") == "no: triton is not installed"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_where_tritons_kernels_run():
    shown = row("triton kernels")
    if INTERPRETED:
        assert "interpreter" in shown
    elif torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in shown
    else:
        assert shown.startswith("no: no GPU")


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="triton is not installed, or interpreted")
def test_a_gpu_is_named_with_its_architecture(monkeypatch):
    from specprefill_kernels import _triton

    monkeypatch.setattr(_triton, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "_device_target", lambda index: _triton.Target("cuda", 90, 132))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    assert row("triton kernels") == "on NVIDIA H100 (sm_90, 132 processors)"
    monkeypatch.setattr(_triton, "_device_target", lambda index: _triton.Target("hip", 942, 304))
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert "gfx942" in row("triton kernels")


def test_a_broken_part_costs_its_own_line_only(monkeypatch):
    def broken(op):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(_backends, "available_backends", broken)
    rows = dict(_diagnosis.config_rows())
    assert rows["auto on cpu tensors"] == "failed: RuntimeError: broken on purpose"
    assert rows["specprefill_kernels"]
