"""What `show_config` and `specprefill show-config` print: versions, build, processor, models, op x backend, `auto`.

Each line is asked for by itself, so a broken part costs its own line only; even torch may be missing.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

_PACKAGES = ("torch", "numpy", "triton", "transformers", "gguf", "huggingface_hub", "typer", "rich")


def config_rows() -> list[tuple[str, str]]:
    """(name, value) of the install, the machine, the models and op x backend; never raises."""
    rows = [
        ("specprefill_kernels", _guarded(_own_version)),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"),
    ]
    rows += [(name, _guarded(lambda name=name: _package(name))) for name in _PACKAGES]  # type: ignore[misc]
    rows += [
        ("torch threads", _guarded(_threads)),
        ("gpu", _guarded(_gpu)),
        ("build", _guarded(_build)),
        ("compiled kernels", _guarded(_compiled)),
        ("cuda kernels", _guarded(_cuda)),
        ("triton kernels", _guarded(_triton)),
        ("model cache", _guarded(_cache)),
        *_models(),
        *_ops(),
        ("auto on cpu tensors", _guarded(lambda: _automatic("cpu"))),
        ("auto on cuda tensors", _guarded(lambda: _automatic("cuda"))),
    ]
    return rows


def show_config() -> str:
    """Versions, build, processor, models, and op x backend with the reason where one is missing, as plain text.

    Always answers: what cannot be found out says why in its own line.
    """
    return "\n".join(f"{name:<26}{value}" for name, value in config_rows())


def _guarded(question: Callable[[], str]) -> str:
    try:
        return question()
    except BaseException as error:  # a package that is broken enough may even raise SystemExit on import
        if isinstance(error, KeyboardInterrupt):
            raise
        text = str(error).strip().splitlines()
        return f"failed: {type(error).__name__}{': ' + text[0] if text else ''}"


def _own_version() -> str:
    from specprefill_kernels._version import __version__

    return __version__


def _package(name: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    importlib.import_module(name)  # installed and importable are two things
    return version


def _threads() -> str:
    import torch

    return str(torch.get_num_threads())


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _build() -> str:
    from specprefill_kernels import _native

    info = _native.build_info()
    if not info:
        return "not built: pure Python"
    left_out: Any = info.get("left_out") or {}
    parts = [f"{info['mode']}, {info.get('compiler', 'nothing compiled')}"]
    if info.get("cuda"):
        parts.append(f"{info.get('cuda_compiler')} for {info.get('cuda_architectures')}")
    parts += [f"no {what}: {why}" for what, why in left_out.items()]
    return "; ".join(parts)


def _compiled() -> str:
    from specprefill_kernels import _native

    reason = _native.unavailable()
    if reason:
        return f"no: {reason}"
    bound = os.environ.get("SPECPREFILL_INSTRUCTION_SET", "")
    known = ("", "generic", "avx2", "avx512")
    note = f" (at most {bound})" if bound else ""
    if bound not in known:
        note = f" (SPECPREFILL_INSTRUCTION_SET={bound} bounds nothing: expected one of {', '.join(known[1:])})"
    return f"yes, {_native.module().instruction_set()}{note}"


def _cuda() -> str:
    """Where CUDA kernels run, and what for they were compiled."""
    import torch

    from specprefill_kernels import _cuda as launcher

    reason = launcher.unavailable()
    if launcher.EMULATED:
        return f"no: {reason}" if reason else f"emulated on CPU tensors, slowly ({launcher.EMULATION})"
    if launcher.left_out():
        return f"no: {reason}"
    code = f"compiled for {_native_module().cuda_architectures()}"
    if reason:
        return f"no: {reason}; {code}"
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return f"on {', '.join(devices)}; {code}"


def _native_module() -> Any:
    from specprefill_kernels import _native

    return _native.module()


def _triton() -> str:
    """Where Triton's kernels run: its version has a line of its own."""
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "no: triton is not installed"
    import torch

    from specprefill_kernels import _triton as launcher

    if launcher.INTERPRETED:
        return "in Triton's interpreter, on CPU tensors, slowly (TRITON_INTERPRET is set)"
    reason = launcher.unavailable()
    if reason:
        return f"no: {reason}"
    devices = []
    for index in range(torch.cuda.device_count()):
        target = launcher._device_target(index)
        arch = f"sm_{target.arch}" if target.vendor == "cuda" else torch.cuda.get_device_properties(index).gcnArchName
        devices.append(f"{torch.cuda.get_device_name(index)} ({arch}, {target.processors} processors)")
    return f"on {', '.join(devices)}"


def _automatic(device: str) -> str:
    """What backend="auto" takes for tensors of a device, and why it passes others over."""
    from specprefill_kernels import _backends

    ops_of: dict[str, list[str]] = {}
    for op in _backends.ROOMS:
        reasons = _backends.available_backends(op)
        passed, chosen = [], "nothing"
        for backend in _backends.PREFERENCE[device]:
            reason = reasons[backend] or _backends.takes_others(op, backend, device)
            if reason is None:
                chosen = backend
                break
            passed.append(f"{backend}: {reason}")
        why = f" ({'; '.join(passed)})" if passed else ""
        ops_of.setdefault(chosen + why, []).append(op)
    if len(ops_of) == 1:
        return f"all ops: {next(iter(ops_of))}"
    return "; ".join(f"{', '.join(ops)}: {choice}" for choice, ops in ops_of.items())


def _cache() -> str:
    from specprefill_kernels.models.cache import cache_folder

    return str(cache_folder())


def _models() -> list[tuple[str, str]]:
    def state(name: str) -> str:
        from specprefill_kernels.models import REGISTRY, cache

        entry = REGISTRY[name]
        ready = cache.is_complete(cache.folder_of(entry.name, entry.sha256))
        return "ready" if ready else f"not fetched yet ({entry.size / 1e6:,.0f} MB)"

    try:
        from specprefill_kernels.models.registry import REGISTRY

        names = list(REGISTRY)
    except Exception as error:
        return [("models", f"failed: {type(error).__name__}: {error}")]
    return [(f"model {name}", _guarded(lambda name=name: state(name))) for name in names]  # type: ignore[misc]


def _ops() -> list[tuple[str, str]]:
    try:
        from specprefill_kernels import _backends

        rooms = list(_backends.ROOMS)
    except Exception as error:
        return [("ops", f"failed: {type(error).__name__}: {error}")]

    def backends(op: str) -> str:
        return ", ".join(name for name, reason in _backends.available_backends(op).items() if reason is None) or "none"

    def missing() -> list[tuple[str, str]]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for op in rooms:
            for backend, reason in _backends.available_backends(op).items():
                if reason is not None:
                    reasons.setdefault((backend, reason), []).append(op)
        return [
            (f"no {backend}", f"{'all ops' if len(ops) == len(rooms) else ', '.join(ops)}: {reason}")
            for (backend, reason), ops in reasons.items()
        ]

    rows = [(f"op {op}", _guarded(lambda op=op: backends(op))) for op in rooms]  # type: ignore[misc]
    try:
        return rows + missing()
    except Exception as error:
        return [*rows, ("missing backends", f"failed: {type(error).__name__}: {error}")]
