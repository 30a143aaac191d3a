#!/usr/bin/env python3
"""Builds the CUDA kernels as C++, to run them on CPU tensors, and prints the module's path:

    SPECPREFILL_EMULATION=$(python csrc/emulation/build.py) python -m pytest python_tests -k cuda

    --check none     as fast as it gets (the default)
    --check address  AddressSanitizer; Python must load it first: LD_PRELOAD=$(c++ -print-file-name=libasan.so)
                     ASAN_OPTIONS=detect_leaks=0
    --check race     reports threads that use the same memory with nothing between them
    --output FOLDER  where it goes; default build/emulation-<check>

Needs cmake, ninja, pybind11 and a C++ compiler. A second call compiles only what has changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str:
    """Where a build tool is: beside this Python, or on PATH."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=beside)
    if found is None:
        sys.exit(f"build.py: {name} not found: pip install {name}")
    return found


def build(check: str, folder: Path) -> Path:
    try:
        import pybind11
    except ImportError:
        sys.exit("build.py: pybind11 not found: pip install pybind11")
    folder.mkdir(parents=True, exist_ok=True)
    cmake = tool("cmake")
    configure = [
        cmake,
        f"-S{ROOT}",
        f"-B{folder}",
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DSPECPREFILL_EMULATION=ON",
        f"-DSPECPREFILL_EMULATION_CHECK={check}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, [cmake, "--build", str(folder), "--target", "_emulated"]):
        status = subprocess.run(command, stdout=sys.stderr).returncode
        if status:
            sys.exit(status)
    (module,) = folder.glob("_emulated.*.so")
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", choices=("none", "address", "race"), default="none")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    print(build(given.check, (given.output or ROOT / "build" / f"emulation-{given.check}").absolute()))


if __name__ == "__main__":
    main()
