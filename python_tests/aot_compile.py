"""Compile recorded Triton launches without a GPU and read from the result what would hurt on one.

What is compiled is what `kernel[grid](...)` would compile: Triton's own binder turns the arguments into a signature,
constants and attributes (divisible by 16, equal to one, 32 or 64 bits). Neither it nor the compiler asks a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from cuobjdump import INSTRUCTION, STACK_ACCESSES, TENSOR_CORE, resources
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from specprefill_kernels._triton import Launch, Target

KIB = 1024
# Columns of tensor memory; there is such memory on sm_100 only.
TENSOR_MEMORY = 512
GRID_LIMIT = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Arch:
    """One architecture to compile for."""

    name: str  # "sm_90", "gfx942"
    target: Target  # what the heuristics see
    gpu: GPUTarget  # what the compiler sees
    shared_limit: int  # bytes of shared memory a block may have


def _cuda(arch: int, processors: int, shared_kib: int) -> Arch:
    return Arch(f"sm_{arch}", Target("cuda", arch, processors), GPUTarget("cuda", arch, 32), shared_kib * KIB)


# Multiprocessors of a common card: A100, A10, L40S, H100, B200, RTX 5090, MI300X. Limits: CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability", maximum shared memory per block (opt-in).
ARCHS = {
    arch.name: arch
    for arch in (
        _cuda(80, 108, 163),
        _cuda(86, 72, 99),
        _cuda(89, 142, 99),
        _cuda(90, 132, 227),
        _cuda(100, 148, 227),
        _cuda(120, 170, 99),
        Arch("gfx942", Target("hip", 942, 304), GPUTarget("hip", "gfx942", 64), 64 * KIB),
    )
}


@dataclass(frozen=True, eq=False)
class Job:
    """One kernel to compile: what triton.jit would make of a launch on `arch`."""

    room: str
    config: str  # the heuristic's choice, for the table
    call: str  # the first call that led here
    arch: Arch
    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def row(self) -> tuple[str, str, str]:
        """The row of the table that this belongs to."""
        return self.room, self.name, self.config

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attrs)

    def key(self) -> tuple[str, str, str]:
        """Equal for launches that run the same binary."""
        return self.arch.name, self.source().hash(), str(self.options)


@dataclass
class Result:
    """What the compiler made of a job. Counts are of instructions in the binary, not of executions."""

    registers: int = 0
    stack: int = 0  # bytes per thread; registers are spilled there
    spilled: int = 0  # instructions that touch the stack, or registers spilled where the compiler tells that
    shared: int = 0  # bytes per block
    tensor_memory: int = 0
    has_dot: bool = False
    tensor_core: int = 0
    accesses: int = 0  # of global memory
    wide: int = 0  # of them with 128 bits or more
    disassembled: bool = False
    seconds: float = 0.0
    error: str = ""
    tensor_core_ptx: int = 0


def prepare(launch: Launch, arch: Arch, room: str, config: str, call: str) -> Job:
    """The job that a launch stands for; raises what Triton would raise for arguments it cannot take."""
    kernel = launch.kernel
    backend = make_backend(arch.gpu)
    # The two options that JITFunction.run adds to every launch.
    meta = dict(launch.meta, debug=bool(kernel.debug), instrumentation_mode=knobs.compilation.instrumentation_mode)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.arguments, **meta)
    options, signature, constants, attrs = kernel._pack_args(backend, meta, bound, specialization, None)
    for size, limit in zip(launch.grid, GRID_LIMIT):
        if not 1 <= size <= limit:
            raise ValueError(f"{kernel.__name__}: grid {launch.grid}: expected 1 to {limit}, got {size}")
    return Job(room, config, call, arch, kernel, signature, constants, attrs, options)


def compile_job(job: Job, disassemble: bool) -> Result:
    """Compile; with `disassemble`, or if registers are spilled, read the instructions (0.4 s for any binary) too."""
    compiled = triton.compile(job.source(), target=job.arch.gpu, options=job.options.__dict__)
    result = Result(shared=compiled.metadata.shared, tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0)
    result.has_dot = "tt.dot" in compiled.asm["ttir"]
    if job.arch.gpu.backend == "hip":
        _read_amd(compiled.asm["amdgcn"], result)
    else:
        _read_ptx(compiled.asm["ptx"], result)
        _read_cubin(compiled.asm["cubin"], result, disassemble)
    return result


def _read_amd(text: str, result: Result) -> None:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    result.disassembled = True
    result.registers = number("vgpr_count")  # accumulation registers included
    result.stack = number("private_segment_fixed_size")
    result.spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    result.tensor_core = len(re.findall(r"^\s*v_s?mfma", text, re.MULTILINE))
    widths = re.findall(r"^\s*(?:global|buffer)_(?:load|store)_(\w+)", text, re.MULTILINE)
    result.accesses, result.wide = len(widths), sum(width.startswith("dwordx4") for width in widths)


def _read_ptx(text: str, result: Result) -> None:
    """Good enough where the binary is not disassembled: what ptxas makes of these is their SASS namesakes."""
    result.tensor_core = result.tensor_core_ptx = len(
        re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", text)
    )
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\S*\s+\[[^]]*\], \[[^]]*\], (\w+)", text)
    accesses = re.findall(r"\b(?:ld|st)\.global(\S*)", text)
    result.accesses = len(copies) + len(accesses)
    result.wide = sum(copy in ("16", "0x10") for copy in copies)
    for suffix in accesses:
        parts = suffix.split(".")
        vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        bits = next((int(part[1:]) for part in reversed(parts) if re.fullmatch(r"[busf]\d+", part)), 32)
        result.wide += vector * bits >= 128


@cache
def _cuobjdump() -> str:
    return str(knobs.nvidia.cuobjdump.path)


def _dump(cubin: Path, what: str) -> str:
    done = subprocess.run([_cuobjdump(), what, str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {what}: {done.stderr.strip()[-200:]}")
    return done.stdout


def _read_cubin(binary: bytes, result: Result, disassemble: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        (kernel,) = resources(_dump(cubin, "-res-usage").splitlines())
        result.registers, result.stack = kernel.registers, kernel.stack
        if disassemble or result.stack:
            _read_sass(_dump(cubin, "-sass"), result)


def _read_sass(text: str, result: Result) -> None:
    result.disassembled = True
    result.tensor_core = result.accesses = result.wide = result.spilled = 0
    for name, suffix in INSTRUCTION.findall(text):
        if TENSOR_CORE.fullmatch(name):
            result.tensor_core += 1
        elif name in ("LDG", "STG", "LDGSTS"):
            result.accesses += 1
            result.wide += ".128" in suffix or ".256" in suffix
        elif name in STACK_ACCESSES:
            result.spilled += 1
