"""The verdict on compiled kernels, and the table: one row per kernel and configuration, one column per architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aot_compile import TENSOR_MEMORY, Arch, Job, Result

# Bytes a thread that are no spill: ptxas parks a saved predicate, an index or half an address that a loop does not
# change, even at 48 of 255 registers, so no smaller tile avoids it. One store and one load. The table shows it.
PARKED = 16


def problems(job: Job, result: Result, needs_tensor_cores: bool) -> list[str]:
    """What is wrong with one kernel; nothing if all is well."""
    found = []
    if result.error:
        found.append(result.error)
    elif result.stack > PARKED and job.arch.gpu.backend != "hip":  # AMD is compiled and shown, no more
        found.append(f"spills registers: {result.stack} bytes a thread, {result.spilled} instructions")
    if result.shared > job.arch.shared_limit:
        found.append(f"shared memory {result.shared} bytes, {job.arch.name} has {job.arch.shared_limit}")
    if result.tensor_memory > TENSOR_MEMORY:
        found.append(f"tensor memory {result.tensor_memory} columns, there are {TENSOR_MEMORY}")
    if needs_tensor_cores and result.has_dot and not result.tensor_core:
        found.append("a dot, but no tensor-core instruction")
    where = f"{job.room}: {job.name} [{job.config}] {job.arch.name}, {job.call}"
    return [f"{where}: {what}" for what in found]


def cell(results: Sequence[Result]) -> str:
    """The worst of a kernel's variants: registers, KiB shared, tensor-core instructions, 128-bit share, spills."""
    if not results:
        return "-"
    if any(result.error for result in results):
        return "FAILED"
    parts = [str(max(result.registers for result in results)), f"{max(r.shared for r in results) / 1024:.0f}K"]
    if any(result.has_dot for result in results):
        parts.append(f"{min(result.tensor_core for result in results if result.has_dot)}t")
    shares = [result.wide / result.accesses for result in results if result.accesses]
    if shares:
        parts.append(f"{100 * min(shares):.0f}-{100 * max(shares):.0f}%" if len(shares) > 1 else f"{shares[0]:.0%}")
    spills = max(result.stack for result in results)
    if spills:
        parts.append(f"SPILL {spills}" if spills > PARKED else f"park {spills}")
    return " ".join(parts)


def table(outcomes: Iterable[tuple[Job, Result]], archs: Sequence[Arch]) -> str:
    """Compact text; what a cell says is in its first line."""
    rows: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for job, result in outcomes:
        rows.setdefault(job.row, {}).setdefault(job.arch.name, []).append(result)
    lines = [["kernel", "configuration", "variants", *(arch.name for arch in archs)]]
    for (room, name, config), by_arch in sorted(rows.items()):
        count = sum(map(len, by_arch.values()))
        cells = [cell(by_arch.get(arch.name, [])) for arch in archs]
        lines.append([f"{room}.{name}", config, str(count), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(entry.ljust(width) for entry, width in zip(line, widths)).rstrip() for line in lines]
    legend = (
        "A cell: most registers a thread (AMD: vector registers), most shared memory a block, fewest tensor-core "
        "instructions (t) where there is a dot,\nand the share of global memory instructions that move 128 bits or "
        "more, least and most over the variants. SPILL: bytes a thread on the stack; park: as many as "
        f"{PARKED}, of values\nthat do not change in a loop."
    )
    return "\n".join([legend, "", *text])


def as_json(outcomes: Iterable[tuple[Job, Result]]) -> list[dict[str, Any]]:
    return [
        {
            "room": job.room,
            "kernel": job.name,
            "configuration": job.config,
            "arch": job.arch.name,
            "call": job.call,
            "num_warps": job.options.num_warps,
            "num_stages": job.options.num_stages,
            **vars(result),
        }
        for job, result in outcomes
    ]
