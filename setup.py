"""Builds specprefill_kernels._C with CMake and Ninja. The rest of the metadata is in pyproject.toml.

SPECPREFILL_BUILD says what is compiled:
  auto  (default) whatever this machine can build; what was left out is printed and kept in the package
  cpu   the CPU kernels only
  cuda  CPU and CUDA kernels; an error where CUDA cannot be built
  none  nothing: no compiler is run, the package is pure Python (reference and Triton backends)

SPECPREFILL_CUDA_ARCHITECTURES says what for, as in "90" or "80-real,120" (CMake's words; "native": this machine's GPU).
Without it: every supported architecture that nvcc knows, which takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()
PACKAGE = "specprefill_kernels"
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("SPECPREFILL_BUILD", "").strip().lower() or "auto"


class BuildError(SetupError):
    """Shown by pip as one line that says what to do, without a traceback."""


def say(message: str) -> None:
    print(f"specprefill_kernels: {message}", file=sys.stderr, flush=True)


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


# What a toolkit needs: the runtime's headers, a host compiler that nvcc takes, and the static runtime to link.
NVCC_PROBE = """
#include <cuda_runtime.h>
__global__ void probe(int* out) { *out = 1; }
int main() { probe<<<1, 1>>>(nullptr); return cudaGetLastError() != cudaSuccess; }
"""


def why_nvcc_fails(nvcc: str) -> str | None:
    """What nvcc says when it is to compile a kernel, or None where it does."""
    host = os.environ.get("CUDAHOSTCXX")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(NVCC_PROBE)
        command = [nvcc, "-std=c++17", "-cudart=static", *(["-ccbin", host] if host else []), str(source)]
        try:
            done = subprocess.run(
                [*command, "-o", str(source.with_suffix(""))], capture_output=True, text=True, timeout=300, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return None
    said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    # The first error is the cause; others follow from it.
    errors = [line for line in said if "error" in line.lower()] or said or [f"exit status {done.returncode}"]
    return errors[0]


def cuda_left_out(nvcc: str | None) -> str | None:
    """Why CUDA kernels are not built, or None where they are."""
    if MODE == "cpu":
        return "SPECPREFILL_BUILD=cpu"
    if nvcc is None:
        return "nvcc not found: install the CUDA toolkit and put nvcc on PATH, or set CUDA_HOME or CUDACXX"
    failure = why_nvcc_fails(nvcc)
    return f"{nvcc} does not compile a kernel here: {failure}" if failure else None


def tool(name: str) -> str:
    """A build tool's path: the pip package in the build environment first, then PATH."""
    try:
        module = __import__(name)
        directory = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        directory = None
    found = (shutil.which(name, path=directory) if directory else None) or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} not found: pip install {name} (or build without --no-build-isolation)")
    return found


def check_compiler() -> None:
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        raise BuildError(
            f"no C++ compiler found (looked for {', '.join(candidates)}): install one (Debian, Ubuntu: apt-get install "
            "g++; Fedora: dnf install gcc-c++) or set CXX; SPECPREFILL_BUILD=none installs without compiled kernels"
        )
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise BuildError(
            f"Python.h not found in {include}: install Python's headers (Debian, Ubuntu: apt-get install python3-dev; "
            "Fedora: dnf install python3-devel); SPECPREFILL_BUILD=none installs without compiled kernels"
        )


def write_build_info(package_dir: Path, info: dict[str, object]) -> None:
    lines = [f"    {key!r}: {value!r}," for key, value in info.items()]
    text = "\n".join(
        ['"""Written by setup.py: what this build holds."""', "", "BUILD_INFO: dict[str, object] = {", *lines, "}", ""]
    )
    package_dir.mkdir(parents=True, exist_ok=True)
    (package_dir / "_build_info.py").write_text(text)


class BuildPackage(build_py):
    """Python files. Starts from an empty folder, so a file removed from the tree does not linger in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()
        if MODE == "none":
            package_dir = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
            if self.editable_mode:
                for stale in package_dir.glob("_C.*.so"):
                    stale.unlink()
            reason = "SPECPREFILL_BUILD=none"
            left_out = {"cpu": reason, "cuda": reason}
            write_build_info(package_dir, {"mode": MODE, "compiled": False, "cuda": False, "left_out": left_out})
            say("SPECPREFILL_BUILD=none: nothing compiled; the reference and Triton backends remain")


class BuildKernels(build_ext):
    def copy_extensions_to_source(self) -> None:
        """For an editable install, which runs from the source folder."""
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib, PACKAGE, "_build_info.py"), ROOT / PACKAGE / "_build_info.py")

    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        nvcc = find_nvcc()
        reason = cuda_left_out(nvcc)
        if MODE == "cuda" and reason:
            raise BuildError(f"SPECPREFILL_BUILD=cuda: {reason}. SPECPREFILL_BUILD=auto builds what this machine can")

        import pybind11

        package_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        package_dir.mkdir(parents=True, exist_ok=True)
        cmake, ninja = tool("cmake"), tool("ninja")
        # --fresh: with build isolation the last configure's cache names a ninja and a pybind11 that no longer exist.
        configure = [
            cmake,
            "--fresh",
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        build = [cmake, "--build", str(build_dir), "--target", "_C"]

        def attempt(*with_cuda: str) -> subprocess.CalledProcessError | None:
            try:
                subprocess.run([*configure, *with_cuda], check=True)
                subprocess.run(build, check=True)
            except subprocess.CalledProcessError as error:
                return error
            return None

        failure = attempt() if reason else attempt("-DSPECPREFILL_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if failure and reason is None and MODE == "auto":
            say(f"the build with CUDA failed (exit {failure.returncode}, see above): trying without")
            reason = f"the build with {nvcc} failed; SPECPREFILL_BUILD=cuda shows how"
            failure = attempt()
        if failure:
            without = "=none installs without compiled kernels" if reason else "=cpu builds the CPU kernels alone"
            raise BuildError(
                f"the {'C++' if reason else 'CUDA'} build failed (exit {failure.returncode}; the compiler's own "
                f"message is above). SPECPREFILL_BUILD{without}"
            )

        left_out = {"cuda": reason} if reason else {}
        info = {"mode": MODE, "compiled": True, "cuda": reason is None, "left_out": left_out}
        info.update(json.loads((build_dir / "build_info.json").read_text()))
        write_build_info(package_dir, info)
        say(f"built the CPU kernels ({info['compiler']}; {', '.join(info['isas'])})")
        if info["cuda"]:
            say(f"built the CUDA kernels ({info['cuda_compiler']}; {info['cuda_architectures']})")
        for what, why in left_out.items():
            say(f"{what.upper()} left out: {why}")


if MODE not in MODES:
    raise SystemExit(f"SPECPREFILL_BUILD: expected one of {', '.join(MODES)}, got {MODE!r}")

setup(
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels},
    ext_modules=[] if MODE == "none" else [Extension(f"{PACKAGE}._C", sources=[])],
)
