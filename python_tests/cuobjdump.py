"""What a compiled kernel needs and which instructions it has, as cuobjdump says (CUDA's toolkit has it, and Triton)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# e.g. "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")
TENSOR_CORE = re.compile(r"[HIQOBD]G?MMA|UTC\w*MMA")
STACK_ACCESSES = ("LDL", "STL")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass
class Kernel:
    """One kernel's binary for one architecture. Bytes of stack are a thread's, of shared memory a block's."""

    arch: str
    symbol: str
    registers: int = 0
    stack: int = 0  # its frame, and what registers are spilled to
    shared: int = 0  # static; what a launch asks for comes on top
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def tensor_core(self) -> int:
        return sum(count for name, count in self.instructions.items() if TENSOR_CORE.fullmatch(name))

    @property
    def stack_accesses(self) -> int:
        return sum(self.instructions[name] for name in STACK_ACCESSES)


def find() -> str | None:
    """cuobjdump on PATH, in the toolkit, or in an installed Triton, which is not imported."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    paths = [os.environ.get("PATH", ""), *map(str, folders)]
    return shutil.which("cuobjdump", path=os.pathsep.join(paths))


def read(tool: str, file: Path) -> list[Kernel]:
    """Every kernel of a library or binary."""
    kernels = list(resources(_lines(tool, "-res-usage", str(file))))
    by_name = {(kernel.arch, kernel.symbol): kernel for kernel in kernels}
    for arch in dict.fromkeys(kernel.arch for kernel in kernels):
        count_instructions(_lines(tool, "-sass", "-arch", arch, str(file)), by_name)
    return kernels


def _lines(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        yield from process.stdout
        said = process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.strip()[-200:] or f'exit status {process.returncode}'}")


def resources(lines: Iterable[str]) -> Iterator[Kernel]:
    """From the output of -res-usage."""
    arch = symbol = ""
    for line in lines:
        word = line.strip()
        if word.startswith("arch = "):
            arch = word.removeprefix("arch = ")
        elif word.startswith("Function "):
            symbol = word.removeprefix("Function ").rstrip(":")
        elif symbol and (found := RESOURCES.search(word)):
            registers, stack, shared, local = (int(number) for number in found.groups())
            yield Kernel(arch, symbol, registers, stack + local, shared)
            symbol = ""


def count_instructions(lines: Iterable[str], kernels: dict[tuple[str, str], Kernel]) -> None:
    """From the output of -sass into the kernels."""
    arch, kernel = "", None
    for line in lines:
        if found := INSTRUCTION.search(line):
            if kernel is not None:
                kernel.instructions[found.group(1)] += 1
        elif "arch = " in line:
            arch, kernel = line.strip().removeprefix("arch = "), None
        elif "Function : " in line:
            kernel = kernels.get((arch, line.split("Function : ")[1].strip()))
