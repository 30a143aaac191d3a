#!/usr/bin/env python3
"""Does all the set-up, then the job. Needs nothing but Python 3.10+, a C++ compiler and a network for the first call.

    python3 run.py demo [args]      speculative prefill on a real model and a real document (specprefill demo [args])
    python3 run.py eval [args]      what answers lose, measured (specprefill eval [args])
    python3 run.py test [args]      the tests (pytest python_tests [args])
    python3 run.py bench [JOB args] the measurements of bench/: ops, goals, peers, roofline, scaling, ttft, timing or
                                    report; without a job ops, then report
    python3 run.py vllm [args]      the plugin inside real vLLM servers and engines: its tests, in an environment of its
                                    own, .venv-vllm (1.3 GB to fetch; on a machine without a GPU vLLM's CPU build)
    python3 run.py triton [args]    the Triton kernels without a GPU: their tests in Triton's interpreter, then all of
                                    them compiled for every architecture (python_tests/aot.py [args])
    python3 run.py kvpress [args]   the press for kvpress: its tests, in an environment beside this one (1.4 GB)
    python3 run.py setup [extras]   only the set-up
    python3 run.py lint             ruff, clang-format and mypy, check-only
    python3 run.py sanitize         the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer
    python3 run.py python ARGS      the environment's own Python

The environment is .venv beside this file (SPECPREFILL_VENV names another place). It is made once and brought up to date
when the build's sources change. On a machine without an NVIDIA GPU it gets a CPU build of torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environments import CPP_SUFFIXES, PYTHON, ROOT, VENV, SetupError, install_kvpress, set_up

EXTRAS = {
    "demo": "demo",
    "eval": "eval",
    "test": "test",
    "bench": "bench",
    "triton": "test,triton",
    "kvpress": "test",
    "vllm": "vllm",
    "lint": "dev",
    "sanitize": "dev",
    "setup": "demo,test",
    "python": "test",
}
# What `bench JOB` runs.
BENCHES = {
    "ops": ("-m", "pytest", "bench"),
    "goals": ("-m", "bench.score_goals"),
    "peers": ("-m", "bench.peers"),
    "roofline": ("-m", "bench.roofline"),
    "scaling": ("-m", "bench.scaling"),
    "ttft": ("-m", "bench.ttft"),
    "timing": ("-m", "bench.timing"),
    "report": ("-m", "bench.report"),
}
# torch's threads spin while they wait for each other. With another program on the same cores they then wait for a
# thread that their spinning keeps from running: seven tokens of a 135M model took 12 s, and 0.5 s when they sleep.
QUIET_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def call(*command: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> int:
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.run(command, cwd=cwd, env={**QUIET_WAITING, **os.environ, "PATH": path, **(env or {})}).returncode


def lint() -> int:
    cpp = [
        str(path)
        for folder in ("csrc", "examples")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in CPP_SUFFIXES
    ]
    checks = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["clang-format", "--dry-run", "-Werror", *cpp],
        ["mypy"],
    ]
    failed = []
    for command in checks:
        print(f"$ {' '.join(command[:3])}", flush=True)
        if call(str(VENV / "bin" / command[0]), *command[1:]):
            failed.append(command[0])
    print(f"lint: {'failed: ' + ', '.join(failed) if failed else 'clean'}", flush=True)
    return 1 if failed else 0


def triton(args: list[str]) -> int:
    """Both parts run, so that one that fails does not hide the other."""
    python = str(PYTHON)
    interpreter = {"TRITON_INTERPRET": "1"}  # it must be in the environment before triton is imported
    tests = call(python, "-m", "pytest", "-q", "python_tests", "-k", "triton", env=interpreter)
    compiled = call(python, str(ROOT / "python_tests" / "aot.py"), *args)
    return tests or compiled


def kvpress(args: list[str]) -> int:
    """Tests that skip without kvpress, with this checkout as the library."""
    tests = sorted(str(path) for path in (ROOT / "python_tests").glob("test_kvpress*.py"))
    python = install_kvpress()
    return call(python, "-m", "pytest", *(args or ["-q", *tests]), env={"PYTHONPATH": str(ROOT)}) if python else 1


def bench(args: list[str]) -> int:
    """One job with its arguments, or the microbenchmarks and the report."""
    job = args[0] if args else ""
    if not args:
        return bench(["ops"]) or bench(["report"])
    if job not in BENCHES:
        print(f"run.py bench: expected one of {', '.join(BENCHES)}, got {job}", file=sys.stderr)
        return 2
    command = [str(PYTHON), *BENCHES[job], *args[1:]]
    if job == "ops" and not any(arg.startswith(("--benchmark-json", "--help", "--co")) for arg in args):
        (ROOT / "bench" / "results").mkdir(exist_ok=True)
        command.append("--benchmark-json=bench/results/ops.json")
    if job == "peers" and not any(arg.startswith("--kvpress-python") or arg in ("-h", "--help") for arg in args):
        python = install_kvpress()
        if python is None:
            print("run.py: peers are measured without kvpress", file=sys.stderr)
        command += ["--kvpress-python", python] if python else []
    return call(*command)


def main(argv: list[str]) -> int:
    job, args = (argv[0], argv[1:]) if argv else ("help", [])
    if job not in EXTRAS:
        print(__doc__)
        return 0 if job in ("help", "-h", "--help") else 2
    try:
        set_up(args[0] if job == "setup" and args else EXTRAS[job])
    except SetupError as error:
        print(f"\nrun.py: {error}", file=sys.stderr)
        return 1
    python = str(PYTHON)
    if job in ("demo", "eval"):
        return call(str(VENV / "bin" / "specprefill"), job, *args)
    if job == "test":
        return call(python, "-m", "pytest", *args)
    if job == "bench":
        return bench(args)
    if job == "triton":
        return triton(args)
    if job == "kvpress":
        return kvpress(args)
    if job == "lint":
        return lint()
    if job == "vllm":
        tests = sorted(str(path) for path in (ROOT / "python_tests").glob("test_vllm_*.py"))
        # The tests skip where vLLM is missing. Here it must not be.
        return call(python, "-c", "import vllm, openai") or call(python, "-m", "pytest", *(args or ["-q", *tests]))
    if job == "sanitize":
        return call(python, str(ROOT / "csrc" / "check" / "sanitize.py"), *args)
    if job == "python":
        return call(python, *args)
    print(f"ready: {PYTHON}")
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036  (whoever has an older one should read why)
        sys.exit("run.py needs Python 3.10 or newer, this is " + sys.version.split()[0])
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
