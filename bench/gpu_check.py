"""Everything a GPU machine can tell, in parts with time limits of their own, within nine minutes: see gpu_check.sh.

Needs nothing but what stands there: torch, Triton, pytest; CMake, Ninja, pybind11, a C++ compiler and nvcc for the
kernels, which are compiled for this machine's GPU alone; Transformers for times to first token; compute-sanitizer where
it is. This file itself imports the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = shlex.quote(sys.executable)
MODULES = ("torch", "triton", "pytest", "numpy")
GPU = "a GPU that torch can use"
# One question to one process: a broken torch must not take this one along.
PROBE = f"""
import importlib, sys
missing = []
for name in {MODULES!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        missing.append(f"{{name}} ({{error}})")
if "torch" in sys.modules and not sys.modules["torch"].cuda.is_available():
    missing.append({GPU!r})
print("; ".join(missing))
"""
SHOWN = ("timing.txt", "ttft.txt", "scaling.txt", "tests.txt")  # in the table that is printed last
OTHERS = ("timing.json", "ttft.json", "scaling.json", "tests.json", "ops.json", "roofline.json")
RESULTS = (*SHOWN, *OTHERS, "check.json", "check.txt", "logs.tar.gz")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = ("cuda", "triton")  # each backend in processes of its own: a fault in one hides none in the other


@dataclass(frozen=True)
class Part:
    """One command and the seconds it may take; `beside` starts it together with the part before it."""

    name: str
    command: str
    seconds: float
    beside: bool = False


@dataclass
class Outcome:
    name: str
    verdict: str  # passed, failed, "out of time"
    seconds: float
    log: str


def the_parts(out: Path) -> list[Part]:
    """Their limits add to 535 s: what runs beside another part has that one's time.

    About a thousand Triton kernels are compiled by the tests, a second of one core each: 85 s and what it takes to
    start 16 processes. `ttft` starts no row that would end after its own, shorter limit.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    where = shlex.quote(str(out))
    found = [
        Part("build", f"{PYTHON} -m bench.gpu_build", 75),
        Part("gpu tests", f"{PYTHON} -m bench.gpu_tests --seconds 175 --out {where}", 190),
    ]
    if sanitizer:
        # Without a tool first, beside the tests: it compiles what all four tools would compile at once.
        found.append(Part("sanitizer none", f"{PYTHON} -m bench.sanitize --backend triton", 190, beside=True))
        for i, (backend, tool) in enumerate(itertools.product(SANITIZED, SANITIZER_TOOLS)):
            # API errors are left out: torch asks the driver for things that it may not have.
            how = f"--tool {tool} --error-exitcode 9 --report-api-errors no --target-processes application-only"
            command = f"{sanitizer} {how} {PYTHON} -m bench.sanitize --backend {backend}"
            found.append(Part(f"{tool} {backend}", command, 60, beside=i > 0))
    found.append(Part("roofline", f"{PYTHON} -m bench.roofline --device cuda --out {where}", 25))
    found.append(Part("timing", f"{PYTHON} -m bench.timing --limit 75 --out {where}", 95))
    found.append(Part("ttft", f"{PYTHON} -m bench.ttft --device cuda --plan gpu --limit 75 --out {where}", 90))
    return found


def more_parts(out: Path) -> list[Part]:
    """The long measurements, as far as they come within the same time: 535 s again."""
    where, json_file = shlex.quote(str(out)), shlex.quote(str(out / "ops.json"))
    models = "--model Llama-3.1-8B --verify 16384"
    micro = "--device cuda --roofline {0}/roofline.json --benchmark-json={1} -q -p no:cacheprovider"
    return [
        Part("build", f"{PYTHON} -m bench.gpu_build", 75),
        Part("roofline", f"{PYTHON} -m bench.roofline --device cuda --out {where}", 25),
        Part("ttft", f"{PYTHON} -m bench.ttft --device cuda --plan gpu-full --limit 165 --out {where}", 180),
        Part("scaling", f"{PYTHON} -m bench.scaling --device cuda {models} --out {where}", 105),
        Part("ops", f"{PYTHON} -m pytest bench/ {micro.format(where, json_file)}", 150),
    ]


def missing() -> str:
    """What stands in the way, in one line; empty where nothing does."""
    try:
        asked = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "a Python that answers: importing torch and asking it for a GPU took more than 60 s"
    if asked.returncode:
        return f"a Python that can be asked ({asked.stderr.strip().splitlines()[-1:]})"
    return asked.stdout.strip()


def environment(root: Path = ROOT) -> dict[str, str]:
    """The tree itself is imported, whether or not the build installs it; nothing is fetched."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}


def run(parts: list[Part], out: Path) -> list[Outcome]:
    """One part after the other, those `beside` together; a failed one stops none. Each one's output is in a log."""
    outcomes = []
    while parts:
        count = 1 + next((i for i, part in enumerate(parts[1:]) if not part.beside), len(parts) - 1)
        together, parts = parts[:count], parts[count:]
        outcomes += _run_together(together, out)
    return outcomes


def _run_together(parts: list[Part], out: Path) -> list[Outcome]:
    started, extra = time.monotonic(), environment()
    for part in parts:
        print(f"\n== {part.name}: at most {part.seconds:.0f} s", flush=True)
    logs = [out / "logs" / f"{part.name.replace(' ', '_')}.log" for part in parts]
    running = []
    for part, log in zip(parts, logs):
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", part.command],
                cwd=ROOT,
                env=extra,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        running.append(process)
    shown = [0] * len(parts)
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(parts):
        time.sleep(0.1)
        passed = time.monotonic() - started
        for i, (part, process) in enumerate(zip(parts, running)):
            if i in outcomes:
                continue
            status = process.poll()
            if status is None and passed > part.seconds:
                _end(process)
                outcomes[i] = Outcome(part.name, "out of time", passed, str(logs[i]))
            elif status is not None:
                verdict = "passed" if status == 0 else f"failed ({status})"
                outcomes[i] = Outcome(part.name, verdict, passed, str(logs[i]))
                _end(process)  # processes that it left behind
            if len(parts) == 1:  # several at once would be a muddle: their logs have it
                shown[i] = _show(logs[i], shown[i])
    for i in outcomes:
        if len(parts) == 1:
            _show(logs[i], shown[i])
        elif outcomes[i].verdict != "passed":
            print("\n".join(logs[i].read_text(errors="replace").splitlines()[-12:]))
    return [outcomes[i] for i in range(len(parts))]


def _show(log: Path, start: int) -> int:
    """Print what has come since; where the next call goes on."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(text)


def _end(process: subprocess.Popen) -> None:
    """The part and all that it started: asked, if it still runs, then killed."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(4)
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(4)


def table(outcomes: list[Outcome], out: Path) -> str:
    """What is printed last: the tables, the tests' counts, and each part's verdict."""
    blocks = [file.read_text().strip() for name in SHOWN if (file := out / name).exists()]
    verdicts = [f"{outcome.name:22}{outcome.verdict:14}{outcome.seconds:6.0f} s" for outcome in outcomes]
    return "\n\n".join([*blocks, "\n".join(verdicts)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench/results"))
    parser.add_argument("--more", action="store_true", help="the long measurements instead: see more_parts")
    parser.add_argument("--only", default="", help="comma-separated beginnings of the names of parts to run")
    parser.add_argument(
        "--parts", type=Path, help="JSON list of parts to run instead, on any machine: tries this script"
    )
    options = parser.parse_args(argv)
    started, out = time.monotonic(), options.out.resolve()
    if options.parts is None:
        lacking = missing()
        if lacking:
            print(f"gpu_check: missing here: {lacking}", file=sys.stderr)
            return 2
    shutil.rmtree(out / "logs", ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)  # an earlier run's results are no results of this one
    if options.parts:
        parts = [Part(**part) for part in json.loads(options.parts.read_text())]
    else:
        parts = more_parts(out) if options.more else the_parts(out)
    wanted = tuple(filter(None, options.only.split(",")))
    if wanted:
        parts = [part for part in parts if part.name.startswith(wanted)]
    outcomes = run(parts, out)
    report = {"seconds": round(time.monotonic() - started, 1), "parts": [asdict(outcome) for outcome in outcomes]}
    (out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(outcomes, out)
    (out / "check.txt").write_text(text + "\n")
    # One file, as easy to carry away as the tables are.
    shutil.make_archive(str(out / "logs"), "gztar", out, "logs")
    shutil.rmtree(out / "logs")
    print(f"\n{text}\n{'all':22}{'':14}{report['seconds']:6.0f} s, results in {out}")
    return 0 if outcomes and all(outcome.verdict == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
