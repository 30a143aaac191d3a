"""Peak extra memory of a call: what it needs beside its inputs, its outputs included.

On a CPU the highest resident size that the kernel saw during the call (/proc/self/clear_refs resets it) less the
resident size before. Memory that earlier calls freed and the C library kept is given back first; otherwise it would be
used again and not be seen. Linux counts resident pages in batches for each thread, so small figures are rough: below
RESOLUTION nothing can be told. On a GPU torch's allocator says it exactly.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

RESOLUTION = 2**18
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """None where this system does not tell."""
    call()  # what is allocated once and kept, by the first call, is no cost of a call
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        RESET.write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def free_bytes(device: str) -> int:
    """What could be allocated now."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 * 2**30


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024
