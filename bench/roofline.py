"""This machine's two ceilings, measured: bytes per second of a stream, operations per second of a matmul.

    python -m bench.roofline                      both thread counts, printed and as JSON
    python -m bench.roofline --device cuda        of a GPU

An op cannot be faster than max(bytes it must move / bytes per second, operations / operations per second): its floor.
A call's fraction of the roofline is floor / measured time. Ceilings are plain torch: a copy (bytes read and written
counted) and a sum (bytes read) of what no cache holds; a square matmul in fp32 and in bf16. The floor takes the faster
of copy and sum, and for bf16 the faster of both matmuls, as a kernel may always widen bf16 to fp32: a ceiling that can
be exceeded would be none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.environment import caches, command, environment

DTYPES = ("float32", "bfloat16")


def ceilings(device: str, threads: int, quick: bool = False) -> dict[str, Any]:
    """{"threads", "sizes": {where: bytes}, "copy": {where: bytes per second}, "read": ..., "matmul": {dtype: rate}}."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Warm: a stream that fits a cache is to be found there, one that does not is cold by itself.
        ticks = measure.clock(device, quick, cold=False)
        found: dict[str, Any] = {"device": device, "threads": threads, "sizes": {}, "copy": {}, "read": {}}
        found["sizes"] = working_sets(device, quick)
        for where, size in found["sizes"].items():
            found["copy"][where], found["read"][where] = _streams(ticks, device, size, quick)
        found["matmul"] = {name: _matmul(ticks, device, name, quick) for name in DTYPES}
        return found
    finally:
        torch.set_num_threads(before)


def working_sets(device: str, quick: bool = False) -> dict[str, int]:
    """Bytes of source and target together: doubling from half of the L2 cache on, and what no cache holds."""
    if quick:
        return {"memory": 2**21}
    if device == "cuda":
        return {"memory": 2**31}
    last = measure.last_cache()
    sizes = [caches().get("L2", 2**20) // 2]
    # On a virtual machine the last cache may be a hundred processors', most of it in use by others.
    while 2 * sizes[-1] <= min(last // 2, 2**27):
        sizes.append(2 * sizes[-1])
    return {_mib(size): size for size in sizes} | {"memory": min(max(2**28, 4 * last), 2**30)}


def _mib(size: int) -> str:
    return f"{size / 2**20:g} MiB"


def _streams(ticks: Any, device: str, size: int, quick: bool) -> tuple[float, float]:
    source = torch.ones(size // 8, device=device)
    target = torch.zeros_like(source)
    half = source.nbytes
    calls = max(1, 2**22 // half) if device == "cpu" else 1  # a small copy is repeated: its call would be most of it

    def copy() -> None:
        for _ in range(calls):
            target.copy_(source)

    def read() -> None:
        for _ in range(calls):
            source.sum()

    times = measure.in_turn(ticks, {"copy": copy, "read": read}, 0.01 if quick else 0.3, most=30)
    return 2 * half * calls / times["copy"].p20, half * calls / times["read"].p20


def _matmul(ticks: Any, device: str, dtype: str, quick: bool) -> float:
    n = 128 if quick else 8192 if device == "cuda" else 1536
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        left, right = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(left)
        times = measure.in_turn(ticks, {"matmul": lambda: torch.mm(left, right, out=out)}, 0.01 if quick else 0.6)
        return 2 * n**3 / times["matmul"].p20
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def bandwidth(found: dict[str, Any], where: str = "memory") -> float:
    """The faster of copy and read."""
    return max(found["copy"][where], found["read"][where])


def peak(found: dict[str, Any], dtype: str) -> float:
    """Operations per second that a kernel for this dtype may reach."""
    known = found["matmul"]
    return max(known["float32"], known.get(dtype, 0.0)) if dtype != "float32" else known["float32"]


def level(found: dict[str, Any], nbytes: int) -> str:
    """The largest of the measured streams that is no longer than so many bytes, so that none is slower by its size."""
    sizes = {name: size for name, size in found.get("sizes", {}).items() if name in found["copy"]}
    fits = [name for name in sizes if sizes[name] <= nbytes]
    return (
        max(fits, key=lambda name: sizes[name]) if fits else min(sizes, key=lambda name: sizes[name], default="memory")
    )


def floor(found: dict[str, Any], nbytes: int, operations: int, dtype: str, cold: bool = True) -> float:
    """The fewest seconds: with cold caches from memory, with warm ones as fast as a stream of as many bytes."""
    where = "memory" if cold else level(found, nbytes)
    return max(nbytes / bandwidth(found, where), operations / peak(found, dtype))


def text(found: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    rows = [
        (way, ", ".join(f"{where} {rate / 1e9:.1f}" for where, rate in found[way].items())) for way in ("copy", "read")
    ]
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["matmul"].items())
    lines = [f"  {way}, GB/s       {rates}" for way, rates in rows]
    return "\n".join([f"{found['device']}, {found['threads']} threads", *lines, f"  matmul, GFLOP/s  {products}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", default="1,2", help="comma-separated; for a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny: tries the harness, measures nothing")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of roofline.json")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.roofline: no GPU that torch can use", file=sys.stderr)
        return 2
    counts = [torch.get_num_threads()] if options.device == "cuda" else [int(n) for n in options.threads.split(",")]
    rows = []
    for threads in counts:
        rows.append(ceilings(options.device, threads, options.quick))
        print(text(rows[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    called = command("python -m bench.roofline", sys.argv[1:] if argv is None else argv)
    report = {"environment": environment(options.device), "command": called, "ceilings": rows}
    (options.out / "roofline.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
