"""Which code runs an op: the list of backends, why one is missing, and how one is chosen.

An explicit request ("cpu") runs that backend or raises `BackendUnavailable` with the reason. `auto` takes the first
one available for the tensor's device, in the order of `PREFERENCE`, and logs its choice once per op and device.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

logger = logging.getLogger("specprefill_kernels")

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
DEVICE_OF_BACKEND = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

# op -> the module that holds its backends, one submodule per backend
ROOMS = {
    "score_layer": "score",
    "score_layers": "score",
    "finalize_importance": "finalize",
    "select_chunks": "select",
    "gather_tokens": "gather",
    "gather_kv": "gather",
    "select_tokens": "select_tokens",
    "select_attention_blocks": "sparse_attention",
    "block_sparse_attention": "sparse_attention",
}
SUBMODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_kernel", "cuda": "cuda"}


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@cache
def _import(op: str, backend: str) -> tuple[Any, str | None]:
    """The module that implements `op` on `backend`, whether or not it can run here, or (None, reason)."""
    name = f"{__package__}.ops.{ROOMS[op]}.{SUBMODULES[backend]}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"this version has no {backend} implementation"
        return None, f"{error.name} is not installed"
    except Exception as error:  # a broken install must say what is broken, not take the other backends down
        return None, f"{type(error).__name__}: {error}"
    return module, None


@cache
def _load(op: str, backend: str) -> tuple[Any, str | None]:
    """The module that implements `op` on `backend`, or (None, reason)."""
    module, reason = _import(op, backend)
    if module is None:
        return None, reason
    reason = module.unavailable() if hasattr(module, "unavailable") else None
    return (None, reason) if reason else (module, None)


def available_backends(op: str) -> dict[str, str | None]:
    """Backends of one op: name -> None where it can run, else the reason why it cannot.

    Args:
        op: the op's name without its trailing underscore: "score_layer", "score_layers", "finalize_importance",
            "select_chunks", "gather_tokens", "gather_kv", "select_tokens", "select_attention_blocks" or
            "block_sparse_attention".
    """
    op = op.rstrip("_")
    if op not in ROOMS:
        raise ValueError(f"op: expected one of {sorted(ROOMS)}, got {op!r}")
    return {backend: _load(op, backend)[1] for backend in BACKENDS}


class _Chosen:
    """The process-wide default that `use_backend` sets; "auto" until then."""

    name = "auto"


class use_backend:
    """Make `backend` the default wherever an op is called with backend="auto".

    Call it to set the default for the whole process; use it as a context manager to restore afterwards what was set
    before. Not per thread; contexts nest.
    """

    def __init__(self, backend: str) -> None:
        check_name(backend)
        self._backend = backend
        self._made_after: str | None = _Chosen.name
        self._before: list[str] = []
        _Chosen.name = backend

    def __enter__(self) -> "use_backend":
        # `with use_backend(...)` restores what was set before the call, which has set the backend already. A context
        # that is entered later, or again, restores what it finds.
        fresh = self._made_after is not None and _Chosen.name == self._backend
        self._before.append(str(self._made_after) if fresh else _Chosen.name)
        self._made_after = None
        _Chosen.name = self._backend
        return self

    def __exit__(self, *exc: object) -> None:
        _Chosen.name = self._before.pop()


def check_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")


def _device_of(module: Any, backend: str) -> str | None:
    """The type of the tensors that a backend takes; None for any. A module may know better: Triton's interpreter takes
    CPU tensors."""
    return getattr(module, "DEVICE_TYPE", DEVICE_OF_BACKEND.get(backend))


def takes_others(op: str, backend: str, device: str) -> str | None:
    """Why a backend that can run is not for tensors of this device, or None."""
    module, _ = _load(op, backend)
    taken = None if module is None else _device_of(module, backend)
    return None if taken in (None, device) else f"takes {taken} tensors here"


@cache
def _automatic(op: str, device: str) -> str:
    reasons: dict[str, str | None] = {}
    for backend in PREFERENCE.get(device, ("reference",)):
        _, reason = _load(op, backend)
        reason = reason or takes_others(op, backend, device)
        if reason is None:
            passed_over = "; ".join(f"{name}: {why}" for name, why in reasons.items())
            logger.info("%s on %s runs on backend %s%s", op, device, backend, f" ({passed_over})" if reasons else "")
            return backend
        reasons[backend] = reason
    raise BackendUnavailable(f"{op}: no backend for {device} tensors: {reasons}")


def resolve(op: str, backend: str, device: str) -> str:
    """The backend's name that will run `op` on tensors of `device` ("cpu", "cuda")."""
    check_name(backend)
    if backend == "auto":
        backend = _Chosen.name
    if backend == "auto":
        return _automatic(op, device)
    module, reason = _load(op, backend)
    wanted = _device_of(module or _import(op, backend)[0], backend)
    if wanted not in (None, device):
        raise BackendUnavailable(f"{op}: backend {backend!r} takes {wanted} tensors, got {device} tensors")
    if module is None:
        raise BackendUnavailable(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def implementation_of(op: str, function: str, backend: str) -> Callable[..., Any]:
    """A function of the backend that has this name, whatever the device."""
    module, reason = _load(op, backend)
    if module is None:
        raise BackendUnavailable(f"{op}: backend {backend!r} cannot run here: {reason}")
    found: Callable[..., Any] = getattr(module, function)
    return found


def implementation(op: str, function: str, backend: str, device: str) -> Callable[..., Any]:
    """The function that runs `op`, after `resolve`."""
    return implementation_of(op, function, resolve(op, backend, device))
