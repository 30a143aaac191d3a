"""Choosing a backend: by name, by default, automatically; never silently another one."""

from __future__ import annotations

import pytest
from calls import CALLS
from grid import EMULATED, INTERPRETED, REQUIRED, Backend, backends

import specprefill_kernels as spk
from specprefill_kernels import _backends

OPS = [
    "score_layer",
    "score_layers",
    "finalize_importance",
    "select_chunks",
    "gather_tokens",
    "gather_kv",
    "select_tokens",
]


def call(name: str, **changes):
    return CALLS[name].function(**{**CALLS[name].arguments(), **changes})


@pytest.mark.parametrize("op", OPS)
def test_every_backend_runs_or_says_why_not(op):
    reasons = spk.available_backends(op)
    assert set(REQUIRED) <= set(reasons)
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())
    assert spk.available_backends(op) == reasons


@pytest.mark.parametrize("name", spk.available_backends("score_layer"))
@pytest.mark.parametrize("op", OPS)
def test_the_grid_has_every_backend_that_runs_here(op, name):
    """The op tests leave out what cannot run; here it is skipped, once, with its reason."""
    Backend(name, op).require()
    assert name in [backend.name for backend in backends(op)]


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match=r"op: expected one of .*, got 'score'"):
        spk.available_backends("score")


@pytest.mark.parametrize("name", CALLS)
def test_a_named_backend_that_cannot_run_raises_with_its_reason(name):
    for backend, reason in spk.available_backends(CALLS[name].op).items():
        if reason is not None:
            with pytest.raises(spk.BackendUnavailable, match=backend):
                call(name, backend=backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_backend_does_not_take_cpu_tensors(backend):
    """Where Triton's interpreter or the emulation is on, kernels take CPU tensors, and others they do not take."""
    reason = spk.available_backends("select_chunks")[backend]
    if {"triton": INTERPRETED, "cuda": EMULATED}[backend] and reason is None:
        call("select", backend=backend)
        with pytest.raises(spk.BackendUnavailable, match="takes cpu tensors, got cuda tensors"):
            _backends.resolve("select_chunks", backend, "cuda")
        return
    with pytest.raises(spk.BackendUnavailable, match="takes cuda tensors, got cpu tensors"):
        call("select", backend=backend)
    assert issubclass(spk.BackendUnavailable, RuntimeError)


def test_use_backend_decides_where_backend_is_left_out():
    """A default that cannot run here raises; the context restores what was before, after an error too."""
    missing = [name for name, reason in spk.available_backends("select_chunks").items() if reason is not None]
    if not missing:
        pytest.skip("every backend runs here")
    with pytest.raises(spk.BackendUnavailable, match=missing[0]), spk.use_backend(missing[0]):
        call("select")
    call("select")


def test_use_backend_as_a_setter():
    spk.use_backend("reference")
    try:
        call("select")
    finally:
        spk.use_backend("auto")


def chosen() -> str:
    """The backend that a call without one would take."""
    return _backends.resolve("select_chunks", "auto", "cpu")


def test_use_backend_restores_what_was_set_when_it_was_entered():
    automatic = chosen()
    with spk.use_backend("reference"):
        with spk.use_backend("cpu"):
            with spk.use_backend("reference"):
                assert chosen() == "reference"
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == automatic


def test_use_backend_entered_late_restores_what_was_set_meanwhile():
    try:
        context = spk.use_backend("reference")
        spk.use_backend("cpu")
        with context:
            assert chosen() == "reference"
            with context:
                assert chosen() == "reference"
            assert chosen() == "reference"
        assert chosen() == "cpu"
    finally:
        spk.use_backend("auto")


@pytest.mark.parametrize("name", ["gpu", "", None])
def test_use_backend_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got "):
        spk.use_backend(name)


def test_show_config_names_every_op_and_reason():
    text = spk.show_config()
    for op in OPS:
        assert op.removesuffix("s") in text or op in text
    for backend in spk.available_backends("score_layer"):
        assert backend in text


def test_auto_does_not_give_gpu_tensors_to_the_interpreter(monkeypatch):
    """A backend that takes CPU tensors here is passed over, and the next one is taken."""
    taken = {"cuda": None, "triton": type("module", (), {"DEVICE_TYPE": "cpu"}), "reference": type("module", (), {})}
    monkeypatch.setattr(_backends, "_load", lambda op, backend: (taken[backend], None if taken[backend] else "none"))
    assert _backends._automatic.__wrapped__("select_chunks", "cuda") == "reference"
    taken["triton"].DEVICE_TYPE = "cuda"
    assert _backends._automatic.__wrapped__("select_chunks", "cuda") == "triton"


def test_a_triton_that_is_too_old_says_so(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from specprefill_kernels import _triton

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1 is older than 3.6" in _triton.unavailable.__wrapped__()
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
    assert "older" not in (_triton.unavailable.__wrapped__() or "")
