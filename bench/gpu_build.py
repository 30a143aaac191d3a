"""Build in place for this machine's GPU, then say which backends run: python -m bench.gpu_build

All GPU backends must. Where the CUDA kernels cannot be built, that is said and fails, and the package is built without
them, so that whatever comes next still has its CPU kernels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    ("-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps", "-q", "--disable-pip-version-check"),
    ("setup.py", "-q", "build_ext", "--inplace"),  # a Python that pip may not write to
)
BACKENDS = ("triton", "cuda")


def architecture() -> str:
    """What the CUDA kernels are compiled for: this GPU alone, as six architectures take minutes."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def install(mode: str, architectures: str) -> bool:
    """Whether the package could be built with SPECPREFILL_BUILD=mode."""
    env = {**os.environ, "SPECPREFILL_BUILD": mode, "SPECPREFILL_CUDA_ARCHITECTURES": architectures}
    return any(subprocess.run([sys.executable, *command], cwd=ROOT, env=env).returncode == 0 for command in COMMANDS)


def absent(backends: tuple[str, ...] = BACKENDS) -> list[str]:
    """A line for each op that one of the backends does not run."""
    importlib.invalidate_caches()
    import specprefill_kernels as spk
    from specprefill_kernels import _backends

    print(spk.show_config())
    lines = []
    for op in _backends.ROOMS:
        reasons = spk.available_backends(op)
        # A room without CUDA kernels of its own runs on Triton.
        written = [name for name in backends if not (reasons[name] or "").startswith("this version has no")]
        lines += [f"{op} does not run on {name}: {reasons[name]}" for name in written if reasons[name] is not None]
    return lines


def main(build: Callable[[str, str], bool] = install, backends: tuple[str, ...] = BACKENDS) -> int:
    architectures, started = architecture(), time.monotonic()
    print(f"CUDA kernels for {architectures}", flush=True)
    built = build("cuda", architectures)
    if not built:
        print("FAILED: no CUDA kernels, the reason is above; building without them", flush=True)
        build("cpu", architectures)
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)
    missing = absent(backends)
    for line in missing:
        print(f"FAILED: {line}")
    return 0 if built and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
