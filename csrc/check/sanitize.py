"""The CPU kernels under Address-, UndefinedBehavior- and ThreadSanitizer: python3 run.py sanitize [cases]

Two things run: specprefill_check, random calls of the C interface, once per instruction set that this processor has;
and the tests of the ops in python_tests, against a sanitized _C that stands in a copy of the package.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
INSTRUCTION_SETS = ("generic", "avx2", "avx512")
OP_TESTS = ("score", "select", "gather", "finalize")
# exitcode: a finding must not look like a failed test of ours. Leaks: Python itself frees little when it ends.
OPTIONS = {
    "ASAN_OPTIONS": "exitcode=99:detect_leaks={leaks}:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "exitcode=99:halt_on_error=1:second_deadlock_stack=1",
}


def environment(leaks: bool = False, **more: str) -> dict[str, str]:
    options = {name: value.format(leaks=int(leaks)) for name, value in OPTIONS.items()}
    return {**os.environ, **options, **more}


def build(sanitizers: str, python: bool) -> Path:
    directory = BUILD / sanitizers.replace(",", "-")
    configure = [
        *("cmake", "--fresh", "-GNinja", f"-S{ROOT}", f"-B{directory}", f"-DSPECPREFILL_SANITIZE={sanitizers}"),
        *(f"-DSPECPREFILL_PYTHON={'ON' if python else 'OFF'}", "-DSPECPREFILL_CHECK=ON"),
        *(
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "--no-warn-unused-cli",
        ),
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    ]
    started = time.monotonic()
    for command in (configure, ["cmake", "--build", str(directory)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}\nfailed: {' '.join(command)}")
    print(f"sanitize: {sanitizers}: built in {time.monotonic() - started:.0f} s", flush=True)
    return directory


def run(title: str, command: list[str], cwd: Path, env: dict[str, str]) -> bool:
    started = time.monotonic()
    status = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL).returncode
    verdict = "clean" if status == 0 else f"FAILED, exit status {status}"
    print(f"sanitize: {title}: {verdict} in {time.monotonic() - started:.0f} s", flush=True)
    return status == 0


def check_interface(directory: Path, cases: str, callers: str) -> bool:
    sanitizers = directory.name
    command = [str(directory / "specprefill_check"), cases, "1", callers]
    if sanitizers == "thread":
        # ThreadSanitizer needs its own places in memory; with much address randomization it does not find them free.
        command = ["setarch", platform.machine(), "-R", *command]
    instruction_sets = INSTRUCTION_SETS if platform.machine() == "x86_64" else ("generic",)
    results = [
        run(
            f"{sanitizers}, C interface, {name} or less",
            command,
            BUILD,
            environment(leaks=True, SPECPREFILL_INSTRUCTION_SET=name),
        )
        for name in instruction_sets
    ]
    return all(results)


def check_python(directory: Path) -> bool:
    copy = BUILD / "package"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        ROOT / "specprefill_kernels",
        copy / "specprefill_kernels",
        ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"),
    )
    for module in directory.glob("_C.*.so"):
        shutil.copy(module, copy / "specprefill_kernels")
    tests = [
        str(path) for path in sorted((ROOT / "python_tests").glob("test_*.py")) if path.stem.split("_")[1] in OP_TESTS
    ]
    # The runtime must be loaded before Python itself; libstdc++ too, or an exception's interceptor is not found.
    compiler = os.environ.get("CXX", "c++").split()[0]
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    env = environment(LD_PRELOAD=":".join(libraries), PYTHONPATH=str(copy), PYTHONMALLOC="malloc")
    # In the copy's folder: it comes before the tree's own package. No compile tests: what they build is not ours.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu and not compile",
        *tests,
    ]
    return run(f"{directory.name}, op tests on the cpu backend", command, copy, env)


def main() -> int:
    cases = sys.argv[1] if len(sys.argv) > 1 else "150"
    BUILD.mkdir(parents=True, exist_ok=True)
    memory = build("address,undefined", python=True)
    threads = build("thread", python=False)
    results = [
        check_interface(memory, cases, callers="1"),
        check_interface(threads, cases, callers="3"),
        check_python(memory),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
