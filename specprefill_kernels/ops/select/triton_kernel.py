# mypy: allow-untyped-defs
"""Chunk selection in Triton: three launches, whatever the length, and nothing read on the host.

1. keys: importance, once, to one ordered integer per chunk (and its fp64 mass, for a budget by mass);
2. rank: one program per sequence finds the smallest key that is kept, bit by bit, and lists the kept chunks in order;
3. expand: chunk ids to token positions.

Bytes that must move, for a sequence of T tokens and C chunks: 4T (+T with `protect`) in, 4K indices out; between the
launches 4C keys (+8C masses) and the kept chunk ids, all out of the second-level cache.

fp64 sums are taken in the order of a tile's layout, which follows alignment: a batch equals its sequences alone, and
this backend the others, unless a sum lies within 2^-53 of where its rounding to fp32 changes.
"""

import struct
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _triton
from specprefill_kernels.ops.finalize.triton_kernel import importance_of, length_of, reduction, window
from specprefill_kernels.ops.select.budget import MASS_SLACK, RATIO_SLACK, RATIO_UNITS, Budget
from specprefill_kernels.ops.select.reference import check_contents
from specprefill_kernels.ops.select.triton_config import choose_expand, choose_keys, choose_rank
from specprefill_kernels.ops.select.triton_rank import ABSENT, FORCED, NAN, rank_kernel

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE


@triton.jit
def _ordered(x):
    """The key of an fp32 (see triton_rank). -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    key = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, NAN, key)


# Not specialized, here and below: numbers that differ from call to call and widen no load. A kernel for 1 and for
# multiples of 16 of each would gain nothing.
@triton.jit(
    do_not_specialize=["look_ahead", "num_chunks", "tiles", "half", "sink", "tail"],
    do_not_specialize_on_alignment=["seq_lens", "num_look_ahead"],
)
def keys_kernel(
    source,  # [B, T] fp32, or with FINALIZE the state [B, N, T] fp32; any strides
    seq_lens,  # [B] int32 or None
    num_look_ahead,  # [B] int32 or None
    protect,  # [B, T] bytes or None, any strides
    importance,  # [B, T] fp32, contiguous, out with FINALIZE
    keys,  # [B, C] int32, out
    masses,  # [B, C] fp64 or None, out
    look_ahead,
    capacity,
    num_chunks,  # C
    tiles,
    stride_b,
    stride_n,
    stride_t,
    half,
    divisor,
    protect_stride_b,
    protect_stride_t,
    sink,
    tail,
    FINALIZE: tl.constexpr,
    REDUCE_MAX: tl.constexpr,
    POOL: tl.constexpr,
    VALID_EDGE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,  # per program
    PIECE: tl.constexpr,  # positions of a chunk at a time
):
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    chunk = (program % tiles).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    length = length_of(seq_lens, b, capacity, 0)
    start = chunk * CHUNK_SIZE
    stop = tl.minimum(start + CHUNK_SIZE, length)
    mass = tl.zeros((CHUNKS,), tl.float64)
    protected = tl.zeros((CHUNKS,), tl.int32)
    source += b * stride_b
    # As in `importance_of`: a mask that leaves the loads wide; what is read too much is dropped.
    readable = tl.minimum((length + 15) // 16 * 16, capacity)
    for first in range(0, CHUNK_SIZE, PIECE):
        lane = first + tl.arange(0, PIECE)[None, :]
        t = start[:, None] + lane
        inside = t < length
        if CHUNK_SIZE % PIECE != 0:
            inside = inside & (lane < CHUNK_SIZE)
        if FINALIZE:
            rows = length_of(num_look_ahead, b, look_ahead, 1)
            x = importance_of(
                source, t, length, rows, capacity, stride_n, stride_t, half, divisor, REDUCE_MAX, POOL, VALID_EDGE
            )
            written = t < capacity
            if CHUNK_SIZE % PIECE != 0:
                written = written & (lane < CHUNK_SIZE)
            tl.store(importance + b * capacity + t, x, mask=written)
        else:
            x = tl.load(source + t * stride_t, mask=t < readable, other=0.0)
        mass += tl.sum(tl.where(inside, x, 0.0).to(tl.float64), axis=1)
        if protect is not None:
            at = protect + b * protect_stride_b + t * protect_stride_t
            marks = tl.where(inside, tl.load(at, mask=t < readable, other=0), 0)
            protected = tl.maximum(protected, tl.max(marks.to(tl.int32), axis=1))
    if masses is None:
        # a chunk behind the end has no tokens, and no key either
        key = _ordered((mass / tl.maximum(stop - start, 1).to(tl.float64)).to(tl.float32))
    else:
        key = _ordered(mass.to(tl.float32))
        tl.store(masses + b * num_chunks + chunk, mass, mask=chunk < num_chunks)
    forced = (start < sink) | (stop > length - tail) | (protected != 0)
    key = tl.where(forced, FORCED, key)
    key = tl.where(start < length, key, ABSENT)
    tl.store(keys + b * num_chunks + chunk, key.to(tl.int32, bitcast=True), mask=chunk < num_chunks)


@triton.jit(do_not_specialize=["chunks_width", "tiles"])
def expand_kernel(
    chunk_ids,  # [B, W] int32
    num_kept,  # [B] int32
    indices,  # [B, K] int32, out
    chunks_width,  # W
    width,  # K
    tiles,
    CHUNK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    slot = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = slot < tl.load(num_kept + b)
    chunk = tl.load(chunk_ids + b * chunks_width + slot // CHUNK_SIZE, mask=kept, other=0)
    position = tl.where(kept, chunk * CHUNK_SIZE + (slot % CHUNK_SIZE).to(tl.int32), -1)
    tl.store(indices + b * width + slot, position, mask=slot < width)


@dataclass(frozen=True)
class Chunks:
    """Kept chunks of each sequence, on the device.

    Attributes:
        ids: [B, W] int32, in order; what lies behind the last is not set.
        size: tokens per chunk.
        width: K, the tokens that W chunks may have.
        num_kept: [B] int32, kept tokens.
        overflow: [B] bool.
    """

    ids: Tensor
    size: int
    width: int
    num_kept: Tensor
    overflow: Tensor


def select_chunks(
    importance: Tensor, seq_lens: Tensor | None, protect: Tensor | None, budget: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    if _triton.checks_values():
        check_contents(importance, seq_lens, budget)
    chunks = rank_chunks(importance, seq_lens, protect, budget)
    batch, width = len(importance), chunks.width
    indices = torch.empty(batch, width, dtype=torch.int32, device=importance.device)
    config = choose_expand(_triton.target_of(importance))
    tiles = triton.cdiv(width, config.block)
    _triton.launch(
        expand_kernel,
        (batch * tiles,),
        chunks.ids,
        chunks.num_kept,
        indices,
        chunks.ids.shape[1],
        width,
        tiles,
        on=importance,
        CHUNK_SIZE=chunks.size,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return indices, chunks.num_kept, chunks.overflow


@dataclass(frozen=True)
class Finalize:
    """Importance is computed on the way, from the state."""

    num_look_ahead: Tensor | None
    reduce: str
    pool_kernel_size: int
    pool_edge: str
    importance: Tensor  # [B, T] fp32, contiguous, written


def rank_chunks(
    source: Tensor, seq_lens: Tensor | None, protect: Tensor | None, budget: Budget, finalize: Finalize | None = None
) -> Chunks:
    """The first two launches.

    Args:
        source: importance [B, T], or with `finalize` the state [B, N, T].
    """
    batch, capacity = source.shape[0], source.shape[-1]
    # A larger chunk holds the whole prompt either way, and a kernel for each length would gain nothing.
    size = min(budget.chunk_size, triton.next_power_of_2(capacity))
    num_chunks = triton.cdiv(capacity, size)
    new = partial(torch.empty, device=source.device)
    keys = new(batch, num_chunks, dtype=torch.int32)
    masses = None if budget.keep_mass is None else new(batch, num_chunks, dtype=torch.float64)
    _launch_keys(source, seq_lens, protect, budget, size, finalize, keys, masses)
    width = budget.width(capacity, protect is not None)
    num_kept, overflow = new(batch, dtype=torch.int32), new(batch, dtype=torch.bool)
    chunks = Chunks(new(batch, triton.cdiv(width, size), dtype=torch.int32), size, width, num_kept, overflow)
    _launch_rank(keys, masses, seq_lens, budget, capacity, chunks)
    return chunks


def _launch_keys(
    source: Tensor,
    seq_lens: Tensor | None,
    protect: Tensor | None,
    budget: Budget,
    chunk_size: int,
    finalize: Finalize | None,
    keys: Tensor,
    masses: Tensor | None,
) -> None:
    batch, num_chunks = keys.shape
    capacity = source.shape[-1]
    config = choose_keys(_triton.target_of(source))
    piece = min(triton.next_power_of_2(chunk_size), config.tokens)
    chunks = min(config.tokens // piece, triton.next_power_of_2(num_chunks))
    tiles = triton.cdiv(num_chunks, chunks)
    look_ahead, stride_n = (1, 0) if finalize is None else (source.shape[1], source.stride(1))
    pool = 1 if finalize is None else finalize.pool_kernel_size
    how = ("mean", 1, "zero") if finalize is None else (finalize.reduce, pool, finalize.pool_edge)
    _triton.launch(
        keys_kernel,
        (batch * tiles,),
        source,
        seq_lens,
        None if finalize is None else finalize.num_look_ahead,
        None if protect is None else protect.view(torch.uint8),
        None if finalize is None else finalize.importance,
        keys,
        masses,
        look_ahead,
        capacity,
        num_chunks,
        tiles,
        source.stride(0),
        stride_n,
        source.stride(-1),
        *window(pool, capacity),
        *((0, 0) if protect is None else protect.stride()),
        min(budget.sink, capacity),
        min(budget.tail, capacity),
        on=source,
        FINALIZE=finalize is not None,
        **reduction(*how),
        CHUNK_SIZE=chunk_size,
        CHUNKS=chunks,
        PIECE=piece,
        num_warps=config.num_warps,
    )


def _launch_rank(
    keys: Tensor, masses: Tensor | None, seq_lens: Tensor | None, budget: Budget, capacity: int, chunks: Chunks
) -> None:
    batch, num_chunks = keys.shape
    config = choose_rank(_triton.target_of(keys), num_chunks, masses is not None)
    _triton.launch(
        rank_kernel,
        (batch,),
        keys,
        masses,
        seq_lens,
        chunks.ids,
        chunks.num_kept,
        chunks.overflow.view(torch.uint8),
        capacity,
        num_chunks,
        chunks.ids.shape[1],
        *_ratio_units(budget),
        budget.chunks(num_chunks),
        0 if budget.keep_mass is None else _bits(budget.keep_mass - MASS_SLACK),
        on=keys,
        BY_RATIO=budget.keep_ratio is not None,
        BY_MASS=masses is not None,
        CHUNK_SIZE=chunks.size,
        BLOCK=config.block,
        HELD=config.held,
        num_warps=config.num_warps,
    )


def _ratio_units(budget: Budget) -> tuple[int, int]:
    """(units per chunk, what is added before they are divided by RATIO_UNITS), as in `budget.ratio_chunks`."""
    if budget.keep_ratio is None:
        return 0, 0
    units = round(budget.keep_ratio * RATIO_UNITS)
    if budget.rounding == "ceil":
        return max(units - RATIO_SLACK, 0), RATIO_UNITS - 1  # nothing is one chunk, as less than nothing is
    return units + RATIO_SLACK, 0


def _bits(x: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", x))
    return int(bits)
