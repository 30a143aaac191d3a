"""Models by name, folder, GGUF file or hub id: fetched once, checked, converted once, then used offline.

>>> from specprefill_kernels import models
>>> model, tokenizer = models.load("smollm2-135m")  # doctest: +SKIP
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specprefill_kernels.models import cache
from specprefill_kernels.models.progress import LogProgress, Progress, RichProgress, default_progress
from specprefill_kernels.models.registry import REGISTRY, ModelEntry
from specprefill_kernels.models.sources import FetchError, fetch, sha256
from specprefill_kernels.models.unpack import convert, quiet

if TYPE_CHECKING:
    import torch

__all__ = [
    "REGISTRY",
    "FetchError",
    "LogProgress",
    "ModelEntry",
    "Progress",
    "RichProgress",
    "check_name",
    "ensure",
    "fastest_dtype",
    "load",
]


def ensure(name_or_path: str | os.PathLike[str], progress: Progress | None = None) -> Path | str:
    """Where Transformers finds the model: a folder on this machine, or the hub id as it came.

    A registry name is fetched and converted at the first call. So is a ``.gguf`` file, which stays where it is.

    Raises:
        FetchError: a registry model could not be had from any source.
        RuntimeError: no room on the disk, or Transformers or gguf is missing.
        ValueError: neither a registry name, a folder, a GGUF file, nor a hub id.
    """
    check_name(name_or_path)
    progress = progress or default_progress()
    text = os.fspath(name_or_path)
    if text in REGISTRY:
        entry = REGISTRY[text]
        return cache.make_once(
            cache.folder_of(entry.name, entry.sha256),
            lambda folder: fetch(entry, folder, progress),
            convert,
            progress,
            title=entry.title,
            disk_needed=entry.disk_needed,
            record={"name": entry.name, "hub_id": entry.hub_id, "sha256": entry.sha256, "license": entry.license},
        )
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.suffix == ".gguf":
        digest = sha256(path)
        return cache.make_once(
            cache.folder_of(path.stem, digest),
            lambda folder: path.resolve(),
            convert,
            progress,
            title=path.name,
            disk_needed=5 * path.stat().st_size,
            record={"name": path.name, "sha256": digest},
        )
    return text


def check_name(name_or_path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless this can name a model, without fetching anything."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text in REGISTRY or (text and path.is_dir()):
        return
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"name_or_path: expected a GGUF file, got {text!r}, which does not exist")
        return
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(
            f"name_or_path: expected one of {sorted(REGISTRY)}, a folder, a .gguf file or a hub id (owner/name), "
            f"got {text!r}"
        )


def load(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer), ready to generate.

    Args:
        name_or_path: a registry name, a folder, a ``.gguf`` file, or a hub id.
        dtype: what the model computes in. None: fp32 if its weights are stored so, else `fastest_dtype`.
        device: where the model goes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where = ensure(name_or_path, progress)
    local = isinstance(where, Path)
    with quiet(logging):
        if dtype is None:
            stored = getattr(AutoConfig.from_pretrained(where, local_files_only=local), "dtype", None)
            dtype = torch.float32 if stored in (None, torch.float32) else _computing_dtype(where, torch.device(device))
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=local)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _computing_dtype(where: Path | str, device: torch.device) -> torch.dtype:
    import torch

    if device.type != "cpu":
        return torch.bfloat16
    if isinstance(where, Path):
        weights = sum(file.stat().st_size for file in where.glob("*.safetensors"))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        if memory is not None and 2 * weights > 0.7 * memory:
            return torch.bfloat16  # slower perhaps, but it fits
    return fastest_dtype()


@lru_cache(maxsize=1)
def fastest_dtype() -> torch.dtype:
    """fp32 or bf16, whichever multiplies faster on this processor: measured, in about a tenth of a second.

    On one processor a 1.5B prefill ran 2.4 times faster in bf16; on another, with AVX-512 but no bf16 instructions,
    3.5 times slower (71 against 20 tokens a second). No list of flags stays right for long, so it is measured.
    """
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(192, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    # bf16 has to win clearly: outside the matmuls it costs conversions.
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32
