"""Hardware, versions and commit: a figure without them cannot be compared with another.

python -m bench.environment    prints them for the CPU, and for the GPU where there is one
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# What decides how fast this library's kernels, and the matmuls they are compared with, can be.
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
    "sve2",
)
PACKAGES = ("specprefill-kernels", "triton", "numpy")
# A path from the root, a home or a drive, also behind "--option=", "scheme:" or a comma.
ABSOLUTE = re.compile(r"(?:^|^-\w|[=:,;\s])(?:[/~\\]|[A-Za-z]:[\\/])")
WAITING = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME")


def environment(device: str) -> dict[str, Any]:
    """What every file of results says about where its figures come from."""
    found: dict[str, Any] = {
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": flags(),
        "caches": caches(),
        "memory_bytes": memory_bytes(),
        "torch": torch.__version__,
        "device": device,
    }
    found |= {name: version(name) for name in PACKAGES}
    found |= {name: os.environ[name] for name in WAITING if name in os.environ}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        }
    return found


def commit() -> str:
    """The checkout's, "-dirty" where files differ from it."""
    told = os.environ.get("SPECPREFILL_COMMIT")
    if told:
        return told
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return "unknown"
    return git.stdout.strip() or "unknown"


def command(name: str, argv: Sequence[str]) -> str:
    """A command as results quote it, without what only this machine has: absolute paths, with their options.

    What stands before such a path is taken for its option, so a flag right before a bare path goes as well.
    """
    kept: list[str] = []
    for argument in argv:
        if not ABSOLUTE.search(argument):
            kept.append(argument)
        elif not argument.startswith("-") and kept and kept[-1].startswith("-") and "=" not in kept[-1]:
            kept.pop()
    return " ".join([name, *map(shlex.quote, kept)])


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The model's name as the system tells it, else the architecture."""
    fields = _cpuinfo()
    return fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()


def flags() -> list[str]:
    """Those of FLAGS that this processor has."""
    fields = _cpuinfo()
    have = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in FLAGS if name in have]


def caches() -> dict[str, int]:
    """Bytes of the first core's caches: {"L1d": 49152, "L2": 2097152, "L3": ...}; empty where the system is silent."""
    found = dict(map(_cache, sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))))
    return {name: size for name, size in found.items() if size}


def _cache(folder: Path) -> tuple[str, int]:
    """("L2", bytes); 0 bytes where a virtual machine hides it."""
    try:
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
        return f"L{level}{'' if kind == 'Unified' else kind[0].lower()}", int(size.rstrip("KMG")) * factor
    except (OSError, ValueError):
        return folder.name, 0


def memory_bytes() -> int | None:
    """Of the whole machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def describe(found: dict[str, Any]) -> str:
    """One line for a table's caption."""
    where = found.get("gpu") or f"{found.get('processor', '?')}, {found.get('cores', '?')} cores"
    if "gpu" not in found:
        flags = found.get("flags", ())
        special = [name for name in flags if name.startswith(("avx512f", "avx512_bf16", "amx_bf16", "sve"))]
        where += f" ({', '.join(special) or ('avx2' if 'avx2' in flags else 'no avx2')})"
    versions = f"torch {found.get('torch', '?')}, Python {found.get('python', '?')}"
    return f"{where}; {versions}; commit {found.get('commit', '?')}; {found.get('time', '?')}"


if __name__ == "__main__":
    print(json.dumps(environment("cuda" if torch.cuda.is_available() else "cpu"), indent=1))
