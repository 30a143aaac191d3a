"""`show_config`: what is installed and which backend runs which op. It always answers, even on a broken install."""

import platform
import sys
from importlib import metadata

from specprefill_kernels import _backends, _native
from specprefill_kernels._version import __version__

_PACKAGES = ("torch", "triton", "transformers", "numpy")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build() -> str:
    try:
        from specprefill_kernels._build_info import BUILD_INFO
    except ImportError:
        return "not built: pure Python"
    return ", ".join(f"{key}={value}" for key, value in BUILD_INFO.items())


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _guarded(question: object) -> str:
    try:
        return str(question())  # type: ignore[operator]
    except Exception as error:  # a diagnosis that dies of what it should report helps nobody
        return f"failed: {type(error).__name__}: {error}"


def _instruction_set() -> str:
    reason = _native.unavailable()
    return reason if reason else str(_native.module().instruction_set())


def show_config() -> str:
    """Versions, build, processor, and op x backend with the reason where one is missing, as plain text."""
    lines = [
        f"specprefill_kernels {__version__}",
        f"python              {sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        *(f"{package:<20}{_version(package)}" for package in _PACKAGES),
        f"build               {_guarded(_build)}",
        f"instruction set     {_guarded(_instruction_set)}",
        f"gpu                 {_guarded(_gpu)}",
        "",
        f"{'op':<22}" + "".join(f"{backend:<12}" for backend in _backends.BACKENDS),
    ]
    missing: dict[tuple[str, str], list[str]] = {}
    for op in _backends.ROOMS:
        reasons = _backends.available_backends(op)
        lines.append(f"{op:<22}" + "".join(f"{'no' if reason else 'yes':<12}" for reason in reasons.values()))
        for backend, reason in reasons.items():
            if reason:
                missing.setdefault((backend, reason), []).append(op)
    if missing:
        lines.append("")
    for (backend, reason), ops in missing.items():
        where = "all ops" if len(ops) == len(_backends.ROOMS) else ", ".join(ops)
        lines.append(f"no {backend} for {where}: {reason}")
    return "\n".join(lines)
