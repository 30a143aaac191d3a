"""What nvcc made of the CUDA kernels: a table, and an error where registers spill or the tensor cores stand idle.

    python python_tests/sass.py LIBRARY [--json FILE]     LIBRARY: a compiled module, or any file that cuobjdump reads

Exit status 1: a kernel with a stack frame (spilled registers lie there), or a score kernel without tensor-core
instructions. Nothing is run, so no GPU is needed. Without cuobjdump (CUDA's toolkit and Triton have it) it says so and
ends with 0.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cuobjdump
from cuobjdump import Kernel

ON_TENSOR_CORES = "score_kernel"


def demangled(symbols: Sequence[str]) -> dict[str, str]:
    """symbol -> the kernel's name with its template's arguments, as short as it gets."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    names = list(symbols)
    if tool:
        done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            names = done.stdout.splitlines()
    return dict(zip(symbols, map(short, names), strict=True))


def short(name: str) -> str:
    """Without return type, namespaces, casts and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\bspecprefill::|^void ", "", name)
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # (int)4
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def problems(kernels: Sequence[Kernel], names: dict[str, str]) -> list[str]:
    found = []
    for kernel in kernels:
        where = f"{names[kernel.symbol]} {kernel.arch}"
        if kernel.stack or kernel.stack_accesses:
            found.append(f"{where}: {kernel.stack} bytes of stack a thread, {kernel.stack_accesses} accesses to it")
        if names[kernel.symbol].split("<")[0] == ON_TENSOR_CORES and not kernel.tensor_core:
            found.append(f"{where}: no tensor-core instruction")
    if not any(name.split("<")[0] == ON_TENSOR_CORES for name in names.values()):
        found.append(f"no {ON_TENSOR_CORES} in there")
    return found


def table(kernels: Sequence[Kernel], names: dict[str, str]) -> str:
    """One row a kernel, one column an architecture: registers, instructions, tensor-core instructions, stack."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    cells: dict[str, dict[str, str]] = {}
    for kernel in kernels:
        parts = [f"{kernel.registers}r", f"{kernel.instructions.total()}i"]
        if kernel.tensor_core:
            parts.append(f"{kernel.tensor_core}t")
        if kernel.shared:
            parts.append(f"{kernel.shared}s")
        if kernel.stack or kernel.stack_accesses:
            parts.append(f"STACK {kernel.stack}")
        cells.setdefault(names[kernel.symbol], {})[kernel.arch] = " ".join(parts)
    lines = [["kernel", *archs], *([name, *(row.get(a, "-") for a in archs)] for name, row in sorted(cells.items()))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    legend = (
        "r: registers a thread, i: instructions, t: of them for tensor cores, s: bytes of static shared memory a block "
        "(from sm_90 on 1024 are the system's), STACK: bytes a thread"
    )
    return "\n".join([legend, "", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    tool = cuobjdump.find()
    if tool is None:
        print("left out: the check of the kernels' instructions (cuobjdump is not installed)")
        return 0
    kernels = cuobjdump.read(tool, given.library)
    names = demangled(list(dict.fromkeys(kernel.symbol for kernel in kernels)))
    print(table(kernels, names))
    if given.json:
        rows = [{**vars(k), "name": names[k.symbol], "instructions": dict(k.instructions)} for k in kernels]
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    found = problems(kernels, names)
    for line in found:
        print(f"FAILED: {line}")
    print(f"{len(kernels)} binaries of {len(names)} kernels: {f'{len(found)} problems' if found else 'no problems'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
