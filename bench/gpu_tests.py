"""The GPU tests in many processes that share one GPU: most of their time is Triton's compiler, one core each.

python -m bench.gpu_tests --seconds 200
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "python_tests"
# In a process of its own: the one that may lose the GPU, and those that hold much memory or measure it.
ALONE = ("test_gpu_bad_values.py", "test_gpu_long.py", "test_gpu_large_offsets.py", "test_gpu_graphs.py")
USES_GRID = ("on_backends(", "on_gpu_backends(", "backends(CALLS")


@dataclass
class Part:
    """One process's share of the tests, and what it has told so far."""

    name: str
    files: list[str]
    part: str = "1/1"
    process: subprocess.Popen | None = None
    restarts: int = 0
    lines: list[dict] = field(default_factory=list)

    def start(self, out: Path, after: str | None = None) -> None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "bench.pytest_parts",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",  # a file that does not import must not keep the others from running
        ]
        command += ["--part", self.part, "--lines", str(self.lines_file(out)), *(["--after", after] if after else [])]
        log = open(out / f"{self.name}.log", "a")  # noqa: SIM115  # the process writes to it as long as it lives
        self.process = subprocess.Popen(
            [*command, *self.files],
            cwd=TESTS,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": _path(), "OMP_NUM_THREADS": "1"},
        )

    def lines_file(self, out: Path) -> Path:
        return out / f"{self.name}.jsonl"

    def read(self, out: Path) -> None:
        file = self.lines_file(out)
        if file.exists():
            self.lines = []
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a process that died in the middle of a line
                    self.lines.append(json.loads(line))

    def tests(self) -> list[dict]:
        return [line for line in self.lines if "test" in line]


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def parts(processes: int, only: list[str]) -> list[Part]:
    """The files that need care, each alone, and the op grid cut into as many parts as there are processes left."""
    files = only or sorted(file.name for file in TESTS.glob("test_*.py") if _on_the_grid(file))
    alone = [name for name in ALONE if name in files]
    grid = [name for name in files if name not in alone]
    count = max(1, processes - len(alone))
    found = [Part(Path(name).stem, [name]) for name in alone]
    return found + ([Part(f"grid_{i:02}", grid, f"{i}/{count}") for i in range(1, count + 1)] if grid else [])


def _on_the_grid(file: Path) -> bool:
    text = file.read_text()
    return file.name in ALONE or any(use in text for use in USES_GRID)


def run(found: list[Part], out: Path, seconds: float) -> bool:
    """Start all, restart those that lost the GPU behind the test that lost it; False where time ran out."""
    stop = time.monotonic() + seconds
    for part in found:
        part.start(out)
    told = time.monotonic()
    while running := [part for part in found if part.process and part.process.poll() is None]:
        if time.monotonic() > stop:
            with ThreadPoolExecutor(len(running)) as pool:
                list(pool.map(lambda part: _end(part.process), running))
            return False
        time.sleep(0.5)
        if time.monotonic() > told + 15:
            told = time.monotonic()
            for part in found:
                part.read(out)
            done = sum(len(part.tests()) for part in found)
            print(f"  {done} tests done, {len(running)} processes at work, {stop - told:.0f} s left", flush=True)
        for part in found:
            _restart_if_lost(part, out)
    return True


def _restart_if_lost(part: Part, out: Path) -> None:
    if part.process is None or part.process.poll() in (None, 0) or part.restarts >= 5:
        return
    part.read(out)
    tests = part.tests()
    begun = next((line["begun"] for line in reversed(part.lines) if "begun" in line), None)
    if part.process.returncode < 0 and begun and (not tests or tests[-1]["test"] != begun):
        died = f"E  the process ended in this test, by signal {-part.process.returncode}"
        with part.lines_file(out).open("a") as file:
            file.write(json.dumps({"test": begun, "outcome": "failed", "seconds": 0, "why": died}) + "\n")
    elif not (tests and tests[-1].get("lost")):
        return
    part.restarts += 1
    part.start(out, begun)


def _end(process: subprocess.Popen | None) -> None:
    if process is None:
        return
    process.send_signal(signal.SIGINT)  # pytest then writes what it has
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    process.kill()  # what it started itself ends with this program's group: see gpu_check.py


def summary(found: list[Part], finished: bool) -> tuple[dict, str]:
    """Counts, the failures and the slowest tests, as JSON and as text."""
    tests = [line for part in found for line in part.tests()]
    counts = {how: sum(line["outcome"] == how for line in tests) for how in ("passed", "failed", "skipped")}
    # A process that was started again says how many it had left: the first line counts all.
    selected = sum(next((line["selected"] for line in part.lines if "selected" in line), 0) for part in found)
    silent = [part.name for part in found if not part.lines]
    report = {
        "counts": counts,
        "selected": selected,
        "not_run": max(0, selected - len({line["test"] for line in tests})),
        "finished": finished,
        "processes_without_a_word": silent,
        "failures": [line for line in tests if line["outcome"] == "failed"],
        "slowest": sorted(tests, key=lambda line: -line["seconds"])[:20],
    }
    text = (
        ", ".join(f"{count} {how}" for how, count in counts.items()) + f" of {selected}; not run: {report['not_run']}"
    )
    for name in silent:
        text += f"\n  {name}: said nothing, see its log"
    for line in report["failures"][:40]:
        last = [part for part in line["why"].splitlines() if part.startswith("E  ")] or line["why"].splitlines()[-1:]
        text += f"\n  FAILED {line['test']}\n    {last[0][:200] if last else ''}"
    return report, text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    parser.add_argument("files", nargs="*", help="test files, as named in python_tests; default: all that use a GPU")
    options = parser.parse_args(argv)
    logs = options.out.resolve() / "logs/tests"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*"):
        old.unlink()
    found = parts(options.processes, options.files)
    finished = run(found, logs, options.seconds)
    for part in found:
        part.read(logs)
    report, text = summary(found, finished)
    (options.out / "tests.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "tests.txt").write_text(text + "\n")
    print(text)
    good = finished and not report["failures"] and not report["processes_without_a_word"] and report["not_run"] == 0
    return 0 if good and report["counts"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
