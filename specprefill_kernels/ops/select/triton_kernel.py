# mypy: allow-untyped-defs
"""Chunk selection in Triton: three launches, whatever the length, and nothing read on the host.

1. keys: importance, once, to one ordered integer per chunk (and its fp64 mass, for a budget by mass);
2. rank: one program per sequence finds the smallest key that is kept, bit by bit, and lists the kept chunks in order;
3. expand: chunk ids to token positions.

Bytes that must move, for a sequence of T tokens and C chunks: 4T (+T with `protect`) in, 4K indices out; between the
launches 4C keys (+8C masses) and the kept chunk ids, all out of the second-level cache.
"""

import struct
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _checks, _triton
from specprefill_kernels.ops.finalize.triton_kernel import importance_of, length_of, reduction, window
from specprefill_kernels.ops.select.budget import MASS_SLACK, RATIO_SLACK, RATIO_UNITS, Budget
from specprefill_kernels.ops.select.reference import _non_negative
from specprefill_kernels.ops.select.triton_config import choose_expand, choose_keys, choose_rank

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE

# Keys are unsigned 32-bit integers in the order of the fp32 they stand for.
_ABSENT = tl.constexpr(0)  # no number has this key
_NAN = tl.constexpr(0xFFFFFFFE)  # the largest value, as in torch.topk
_FORCED = tl.constexpr(0xFFFFFFFF)

_UNITS = tl.constexpr(RATIO_UNITS)
# Three counts of a block, in one int64.
_COUNT_BITS = tl.constexpr(21)
_TWO_COUNTS_BITS = tl.constexpr(42)
_COUNT_MASK = tl.constexpr(2**21 - 1)


@triton.jit
def _ordered(x):
    """fp32 to an integer of the same order. -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    key = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, _NAN, key)


@triton.jit
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
    length = length_of(seq_lens, b, capacity)
    start = chunk * CHUNK_SIZE
    stop = tl.minimum(start + CHUNK_SIZE, length)
    mass = tl.zeros((CHUNKS,), tl.float64)
    protected = tl.zeros((CHUNKS,), tl.int32)
    source += b * stride_b
    for first in range(0, CHUNK_SIZE, PIECE):
        lane = first + tl.arange(0, PIECE)[None, :]
        t = start[:, None] + lane
        inside = t < length
        if CHUNK_SIZE % PIECE != 0:
            inside = inside & (lane < CHUNK_SIZE)
        if FINALIZE:
            rows = length_of(num_look_ahead, b, look_ahead)
            x = importance_of(
                source, t, length, rows, capacity, stride_n, stride_t, half, divisor, REDUCE_MAX, POOL, VALID_EDGE
            )
            written = t < capacity
            if CHUNK_SIZE % PIECE != 0:
                written = written & (lane < CHUNK_SIZE)
            tl.store(importance + b * capacity + t, x, mask=written)
        else:
            # As in `importance_of`: a mask that leaves the loads wide; what is read too much is dropped.
            readable = tl.minimum((length + 15) // 16 * 16, capacity)
            x = tl.load(source + t * stride_t, mask=t < readable, other=0.0)
        mass += tl.sum(tl.where(inside, x, 0.0).to(tl.float64), axis=1)
        if protect is not None:
            at = protect + b * protect_stride_b + t * protect_stride_t
            protected = tl.maximum(protected, tl.max(tl.load(at, mask=inside, other=0).to(tl.int32), axis=1))
    if masses is None:
        # a chunk behind the end has no tokens, and no key either
        key = _ordered((mass / tl.maximum(stop - start, 1).to(tl.float64)).to(tl.float32))
    else:
        key = _ordered(mass.to(tl.float32))
        tl.store(masses + b * num_chunks + chunk, mass, mask=chunk < num_chunks)
    forced = (start < sink) | (stop > length - tail) | (protected != 0)
    key = tl.where(forced, _FORCED, key)
    key = tl.where(start < length, key, _ABSENT)
    tl.store(keys + b * num_chunks + chunk, key.to(tl.int32, bitcast=True), mask=chunk < num_chunks)


@triton.jit
def _ratio_chunks(num_chunks, units_per_chunk, rounding):
    """(units_per_chunk * num_chunks + rounding) // RATIO_UNITS, as `budget.ratio_chunks`, with no product over 2^63."""
    high, low = (num_chunks >> 16).to(tl.int64), (num_chunks & 0xFFFF).to(tl.int64)
    product = high * units_per_chunk
    rest = ((product % _UNITS) << 16) + low * units_per_chunk + rounding
    return (((product // _UNITS) << 16) + rest // _UNITS).to(tl.int32)


@triton.jit
def _keys_from(keys, start, num_chunks, BLOCK: tl.constexpr):
    chunk = start + tl.arange(0, BLOCK)
    return tl.load(keys + chunk, mask=chunk < num_chunks, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _masses_from(masses, start, num_chunks, BLOCK: tl.constexpr):
    chunk = start + tl.arange(0, BLOCK)
    return tl.load(masses + chunk, mask=chunk < num_chunks, other=0.0)


# Whatever looks at all chunks of a sequence takes them from registers (`held`) or from memory, block by block.


@triton.jit
def _reached_thrice(keys, low, step):
    """Whether each key is at least low, low + step, low + 2 step: three counts of a block in one sum."""
    one = (keys >= low).to(tl.int64)
    two = (keys >= low + step).to(tl.int64) << _COUNT_BITS
    three = (keys >= low + 2 * step).to(tl.int64) << _TWO_COUNTS_BITS
    return one + two + three


@triton.jit
def _count_thrice(keys, held, num_chunks, low, step, BLOCK: tl.constexpr, HELD: tl.constexpr):
    if HELD:
        packed = tl.sum(_reached_thrice(held, low, step))
        one, two, three = packed & _COUNT_MASK, (packed >> _COUNT_BITS) & _COUNT_MASK, packed >> _TWO_COUNTS_BITS
    else:
        one, two, three = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        for start in range(0, num_chunks, BLOCK):
            packed = tl.sum(_reached_thrice(_keys_from(keys, start, num_chunks, BLOCK), low, step))
            one += packed & _COUNT_MASK
            two += (packed >> _COUNT_BITS) & _COUNT_MASK
            three += packed >> _TWO_COUNTS_BITS
    return one.to(tl.int32), two.to(tl.int32), three.to(tl.int32)


@triton.jit
def _count(keys, held, num_chunks, low, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """How many keys are at least low."""
    if HELD:
        count = tl.sum((held >= low).to(tl.int32))
    else:
        count = tl.full((), 0, tl.int32)
        for start in range(0, num_chunks, BLOCK):
            count += tl.sum((_keys_from(keys, start, num_chunks, BLOCK) >= low).to(tl.int32))
    return count


@triton.jit
def _mass(keys, masses, held, held_mass, num_chunks, low, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The mass of the chunks whose keys are at least low."""
    if HELD:
        total = tl.sum(tl.where(held >= low, held_mass, 0.0))
    else:
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, num_chunks, BLOCK):
            mass = _masses_from(masses, start, num_chunks, BLOCK)
            total += tl.sum(tl.where(_keys_from(keys, start, num_chunks, BLOCK) >= low, mass, 0.0))
    return total


@triton.jit
def _search_count(keys, held, num_chunks, wanted, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """A key with at most `wanted` keys above it, and at least as many not below it. Two bits a round."""
    threshold = tl.full((), 0, tl.uint32)
    count = num_chunks
    shift = tl.full((), 30, tl.int32)
    # Once as many as wanted are left, the lower bits do not matter: half of the rounds for keys that differ.
    while (shift >= 0) & (count != wanted):
        step = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
        one, two, three = _count_thrice(keys, held, num_chunks, threshold + step, step, BLOCK, HELD)
        steps = (one >= wanted).to(tl.uint32) + (two >= wanted).to(tl.uint32) + (three >= wanted).to(tl.uint32)
        threshold += steps * step
        count = tl.where(one >= wanted, one, count)
        count = tl.where(two >= wanted, two, count)
        count = tl.where(three >= wanted, three, count)
        shift -= 2
    return threshold


@triton.jit
def _search_mass(keys, masses, held, held_mass, num_chunks, needed, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The largest key such that the chunks not below it, at least one, hold `needed`. ABSENT if none does (NaN)."""
    if HELD:
        largest = tl.max(held)
    else:
        largest = tl.full((), 0, tl.uint32)
        for start in range(0, num_chunks, BLOCK):
            largest = tl.maximum(largest, tl.max(_keys_from(keys, start, num_chunks, BLOCK)))
    threshold = tl.full((), 0, tl.uint32)
    for bit in range(32):
        tried = threshold | (tl.full((), 0x80000000, tl.uint32) >> bit)
        reached = _mass(keys, masses, held, held_mass, num_chunks, tried, BLOCK, HELD) >= needed
        threshold = tl.where(reached & (tried <= largest), tried, threshold)
    return threshold


@triton.jit
def _ties_short(key, mass, threshold, before, needed):
    """(how many chunks at the threshold have less than `needed` before them, the mass of all at it)"""
    tie = key == threshold
    mass = tl.where(tie, mass, 0.0)
    short = tie & (before + (tl.cumsum(mass, 0) - mass) < needed)
    return tl.sum(short.to(tl.int32)), tl.sum(mass)


@triton.jit
def _ties_for_mass(
    keys, masses, held, held_mass, num_chunks, threshold, above, needed, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """How many of the chunks at the threshold are kept, when those above it hold `above`."""
    if HELD:
        ties, _ = _ties_short(held, held_mass, threshold, above, needed)
    else:
        ties = tl.full((), 0, tl.int32)
        for start in range(0, num_chunks, BLOCK):
            key = _keys_from(keys, start, num_chunks, BLOCK)
            mass = _masses_from(masses, start, num_chunks, BLOCK)
            short, at_it = _ties_short(key, mass, threshold, above, needed)
            ties += short
            above += at_it
    ties = tl.maximum(ties, 1)  # one chunk is kept even if nothing is needed
    forced = _count(keys, held, num_chunks, tl.full((), _FORCED, tl.uint32), BLOCK, HELD)
    ties = tl.where(threshold == _FORCED, forced, ties)
    return tl.where(threshold == _ABSENT, 0, ties)


@triton.jit
def _list_block(key, start, chunk_ids, threshold, ties, above_before, ties_before, BLOCK: tl.constexpr):
    """Appends a block's kept chunks to the list: those above the threshold, and the first `ties` of those at it."""
    chunk = start + tl.arange(0, BLOCK)
    above = key > threshold
    tie = (key == threshold) & (key != _ABSENT)
    own = (above.to(tl.int32) << 16) | tie.to(tl.int32)
    before = tl.cumsum(own, 0) - own  # both counts, each below 2^15
    tie_rank = ties_before + (before & 0xFFFF)
    kept = above | (tie & (tie_rank < ties))
    at = above_before + (before >> 16) + tl.minimum(tie_rank, ties)
    tl.store(chunk_ids + at, chunk, mask=kept)
    last = tl.max(tl.where(kept, chunk, -1))
    return tl.sum(above.to(tl.int32)), tl.sum(tie.to(tl.int32)), last


@triton.jit
def rank_kernel(
    keys,  # [B, C] int32
    masses,  # [B, C] fp64 or None
    seq_lens,  # [B] int32 or None
    chunk_ids,  # [B, W] int32, out: kept chunks in order
    num_kept,  # [B] int32, out: kept tokens
    overflow,  # [B] bytes, out
    capacity,
    num_chunks,  # C
    width,  # W
    units_per_chunk,  # of a budget by ratio, see `_ratio_chunks`
    rounding,
    budget,  # chunks, of a budget by tokens
    mass_bits,  # of a budget by mass: the fraction's 64 bits, as Triton would pass a float in 32
    BY_RATIO: tl.constexpr,
    BY_MASS: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    length = length_of(seq_lens, b, capacity)
    own = (length + (CHUNK_SIZE - 1)) // CHUNK_SIZE
    keys += b * num_chunks
    chunk_ids += b * width
    held = _keys_from(keys, 0, own, BLOCK) if HELD else 0
    if BY_MASS:
        masses += b * num_chunks
        held_mass = _masses_from(masses, 0, own, BLOCK) if HELD else 0
        fraction = tl.full((), mass_bits, tl.int64).to(tl.float64, bitcast=True)
        needed = fraction * _mass(keys, masses, held, held_mass, own, tl.full((), 0, tl.uint32), BLOCK, HELD)
        threshold = _search_mass(keys, masses, held, held_mass, own, needed, BLOCK, HELD)
        over = _mass(keys, masses, held, held_mass, own, threshold + 1, BLOCK, HELD)
        ties = _ties_for_mass(keys, masses, held, held_mass, own, threshold, over, needed, BLOCK, HELD)
        tl.store(overflow + b, tl.full((), 0, tl.uint8))
    else:
        wanted = _ratio_chunks(own, units_per_chunk, rounding) if BY_RATIO else tl.full((), budget, tl.int32)
        wanted = tl.minimum(tl.maximum(wanted, 1), own)
        forced = _count(keys, held, own, tl.full((), _FORCED, tl.uint32), BLOCK, HELD)
        tl.store(overflow + b, (forced > wanted).to(tl.uint8))
        wanted = tl.maximum(wanted, forced)  # they have the largest keys, and all of them are kept
        threshold = _search_count(keys, held, own, wanted, BLOCK, HELD)
        above = _count(keys, held, own, threshold + 1, BLOCK, HELD)
        ties = wanted - tl.where(threshold == _FORCED, 0, above)  # past the largest key, `+ 1` is the smallest
    if HELD:
        above, tied, last = _list_block(held, 0, chunk_ids, threshold, ties, 0, 0, BLOCK)
    else:
        above = tl.full((), 0, tl.int32)
        tied = tl.full((), 0, tl.int32)
        last = tl.full((), -1, tl.int32)
        for start in range(0, own, BLOCK):
            key = _keys_from(keys, start, own, BLOCK)
            more, more_tied, last_here = _list_block(key, start, chunk_ids, threshold, ties, above, tied, BLOCK)
            above += more
            tied += more_tied
            last = tl.maximum(last, last_here)
    # Only the prompt's last chunk may be short.
    kept = (above + tl.minimum(tied, ties)) * CHUNK_SIZE
    tl.store(num_kept + b, tl.where(last == own - 1, kept - (own * CHUNK_SIZE - length), kept))


@triton.jit
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
    check_importance_values(importance, seq_lens, budget)
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
    size = min(budget.chunk_size, capacity)  # one chunk either way
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


def check_importance_values(importance: Tensor, seq_lens: Tensor | None, budget: Budget) -> None:
    """What the definition refuses in a CPU tensor's contents."""
    if not _triton.checks_values():
        return
    lengths = _checks.length_values(seq_lens, importance.shape[1], len(importance))
    for b, length in enumerate(lengths):
        _checks.finite_values("importance", importance[b, :length], b)
    if budget.keep_mass is not None:
        _non_negative(importance, lengths)
