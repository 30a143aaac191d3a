"""Where converted models live, and how a half-made one can never be mistaken for a whole one.

<cache>/models/<name>-<first 12 of the GGUF's sha256>/      a finished model; it appears by one rename
<cache>/models/<same>.lock                                  held by the one process that makes it
<cache>/models/<same>.download/                             what arrived so far; deleted when the model is there
<cache>/models/<same>.partial/                              a conversion under way; deleted by the next try
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from specprefill_kernels.models.progress import Progress

RECORD = "specprefill.json"


def cache_folder() -> Path:
    """`SPECPREFILL_CACHE`, else the platform's cache folder."""
    if named := os.environ.get("SPECPREFILL_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "specprefill"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "specprefill"


def folder_of(name: str, sha256: str) -> Path:
    return cache_folder() / "models" / f"{name}-{sha256[:12]}"


def is_complete(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def make_once(
    folder: Path,
    fetch: Callable[[Path], Path],
    convert: Callable[[Path, Path, str, Progress], None],
    progress: Progress,
    *,
    title: str,
    disk_needed: int,
    record: dict[str, object],
) -> Path:
    """The finished model folder; made if it is not there. One process works, the others wait and then share it."""
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"the cache folder {folder.parent} cannot be written ({error}); set SPECPREFILL_CACHE to one that can"
        ) from error
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress.task(f"{title}: waiting for another process that is preparing it"):
            lock.acquire()
    try:
        if is_complete(folder):  # made by the process we waited for
            return folder
        free = shutil.disk_usage(folder.parent).free
        if free < disk_needed:
            raise RuntimeError(
                f"{title}: expected {disk_needed / 1e9:.1f} GB free in {folder.parent}, got {free / 1e9:.1f} GB; "
                "set SPECPREFILL_CACHE to a folder with more room"
            )
        download, partial = folder.with_name(folder.name + ".download"), folder.with_name(folder.name + ".partial")
        source = fetch(download)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        convert(source, partial, title, progress)
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
        shutil.rmtree(download, ignore_errors=True)
    finally:
        lock.release()
    return folder
