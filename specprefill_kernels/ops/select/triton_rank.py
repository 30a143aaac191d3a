# mypy: allow-untyped-defs
"""Which chunks are kept: one program per sequence searches the smallest kept key bit by bit, and lists the chunks.

A search by bits looks at each key once a round, in registers where all fit, and needs no sort. Two bits a round would
save half of the reductions but count three times as much for each key: no gain, by instructions, and twice the
registers.
"""

import triton
import triton.language as tl

from specprefill_kernels.ops.finalize.triton_kernel import length_of
from specprefill_kernels.ops.select.budget import RATIO_UNITS

# Keys are unsigned 32-bit integers in the order of the fp32 they stand for, and three that stand for none.
ABSENT = tl.constexpr(0)  # below all numbers
NAN = tl.constexpr(0xFFFFFFFE)  # above them, as in torch.topk
FORCED = tl.constexpr(0xFFFFFFFF)  # kept whatever the budget

_UNITS = tl.constexpr(RATIO_UNITS)


@triton.jit
def _ratio_chunks(num_chunks, units_per_chunk, rounding):
    """(units_per_chunk * num_chunks + rounding) // RATIO_UNITS, at most num_chunks; no product passes 2^63."""
    high, low = (num_chunks >> 16).to(tl.int64), (num_chunks & 0xFFFF).to(tl.int64)
    product = high * units_per_chunk
    rest = ((product % _UNITS) << 16) + low * units_per_chunk + rounding
    return tl.minimum(((product // _UNITS) << 16) + rest // _UNITS, num_chunks).to(tl.int32)


@triton.jit
def _keys_from(keys, start, readable, BLOCK: tl.constexpr):
    chunk = start + tl.arange(0, BLOCK)
    return tl.load(keys + chunk, mask=chunk < readable, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _masses_from(masses, start, readable, BLOCK: tl.constexpr):
    chunk = start + tl.arange(0, BLOCK)
    return tl.load(masses + chunk, mask=chunk < readable, other=0.0)


# Whatever looks at all chunks of a sequence takes them from registers (`held`) or from memory, block by block.


@triton.jit
def _count(keys, held, readable, low, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """How many keys are at least low."""
    if HELD:
        reached = (held >= low).to(tl.int32)
    else:
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, readable, BLOCK):
            reached += (_keys_from(keys, start, readable, BLOCK) >= low).to(tl.int32)
    return tl.sum(reached)


@triton.jit
def _mass(keys, masses, held, held_mass, readable, low, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The mass of the chunks whose keys are at least low."""
    if HELD:
        reached = tl.where(held >= low, held_mass, 0.0)
    else:
        reached = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, readable, BLOCK):
            mass = _masses_from(masses, start, readable, BLOCK)
            reached += tl.where(_keys_from(keys, start, readable, BLOCK) >= low, mass, 0.0)
    return tl.sum(reached)


@triton.jit
def _search_count(keys, held, readable, num_chunks, wanted, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """A key with at most `wanted` keys above it, and at least as many not below it."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    count = num_chunks
    # Once as many as wanted are left, the lower bits do not matter: a third fewer rounds for keys that differ.
    while (bit != 0) & (count != wanted):
        tried = threshold | bit
        reached = _count(keys, held, readable, tried, BLOCK, HELD)
        threshold = tl.where(reached >= wanted, tried, threshold)
        count = tl.where(reached >= wanted, reached, count)
        bit = bit >> 1
    return threshold


@triton.jit
def _search_mass(keys, masses, held, held_mass, readable, needed, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The largest key such that the chunks not below it, at least one, hold `needed`. ABSENT if none does (NaN)."""
    if HELD:
        largest = tl.max(held)
    else:
        largest = tl.full((), 0, tl.uint32)
        for start in range(0, readable, BLOCK):
            largest = tl.maximum(largest, tl.max(_keys_from(keys, start, readable, BLOCK)))
    threshold = tl.full((), 0, tl.uint32)
    for bit in range(32):
        tried = threshold | (tl.full((), 0x80000000, tl.uint32) >> bit)
        reached = _mass(keys, masses, held, held_mass, readable, tried, BLOCK, HELD) >= needed
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
    keys, masses, held, held_mass, readable, threshold, above, needed, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """How many of the chunks at the threshold are kept, when those above it hold `above`."""
    if HELD:
        ties, _ = _ties_short(held, held_mass, threshold, above, needed)
    else:
        ties = tl.full((), 0, tl.int32)
        for start in range(0, readable, BLOCK):
            key = _keys_from(keys, start, readable, BLOCK)
            mass = _masses_from(masses, start, readable, BLOCK)
            short, at_it = _ties_short(key, mass, threshold, above, needed)
            ties += short
            above += at_it
    ties = tl.maximum(ties, 1)  # one chunk is kept even if nothing is needed
    forced = _count(keys, held, readable, tl.full((), FORCED, tl.uint32), BLOCK, HELD)
    ties = tl.where(threshold == FORCED, forced, ties)
    return tl.where(threshold == ABSENT, 0, ties)


@triton.jit
def _list_block(key, start, chunk_ids, threshold, ties, above_before, ties_before, BLOCK: tl.constexpr):
    """Appends a block's kept chunks to the list: those above the threshold, and the first `ties` of those at it."""
    chunk = start + tl.arange(0, BLOCK)
    above = key > threshold
    tie = (key == threshold) & (key != ABSENT)
    packed = (above.to(tl.int32) << 16) | tie.to(tl.int32)
    before = tl.cumsum(packed, 0) - packed  # both counts, each below 2^15
    tie_rank = ties_before + (before & 0xFFFF)
    kept = above | (tie & (tie_rank < ties))
    at = above_before + (before >> 16) + tl.minimum(tie_rank, ties)
    tl.store(chunk_ids + at, chunk, mask=kept)
    return tl.sum(above.to(tl.int32)), tl.sum(tie.to(tl.int32))


@triton.jit(
    do_not_specialize=["capacity", "width", "units_per_chunk", "rounding", "budget", "mass_bits"],
    do_not_specialize_on_alignment=["seq_lens"],
)
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
    length = length_of(seq_lens, b, capacity, 0)
    own = (length + (CHUNK_SIZE - 1)) // CHUNK_SIZE
    # The keys behind are ABSENT, so that a mask may end at a multiple of 16 and loads stay wide.
    readable = tl.minimum((own + 15) // 16 * 16, num_chunks)
    keys += b * num_chunks
    chunk_ids += b * width
    held = _keys_from(keys, 0, readable, BLOCK) if HELD else 0
    if BY_MASS:
        masses += b * num_chunks
        held_mass = _masses_from(masses, 0, readable, BLOCK) if HELD else 0
        fraction = tl.full((), mass_bits, tl.int64).to(tl.float64, bitcast=True)
        needed = fraction * _mass(keys, masses, held, held_mass, readable, tl.full((), 0, tl.uint32), BLOCK, HELD)
        threshold = _search_mass(keys, masses, held, held_mass, readable, needed, BLOCK, HELD)
        over = _mass(keys, masses, held, held_mass, readable, threshold + 1, BLOCK, HELD)
        ties = _ties_for_mass(keys, masses, held, held_mass, readable, threshold, over, needed, BLOCK, HELD)
        tl.store(overflow + b, tl.full((), 0, tl.uint8))
    else:
        wanted = _ratio_chunks(own, units_per_chunk, rounding) if BY_RATIO else tl.full((), budget, tl.int32)
        wanted = tl.minimum(tl.maximum(wanted, 1), own)
        forced = _count(keys, held, readable, tl.full((), FORCED, tl.uint32), BLOCK, HELD)
        tl.store(overflow + b, (forced > wanted).to(tl.uint8))
        wanted = tl.maximum(wanted, forced)  # they have the largest keys, and all of them are kept
        threshold = _search_count(keys, held, readable, own, wanted, BLOCK, HELD)
        above = _count(keys, held, readable, threshold + 1, BLOCK, HELD)
        ties = wanted - tl.where(threshold == FORCED, 0, above)  # past the largest key, `+ 1` is the smallest
    if HELD:
        above, tied = _list_block(held, 0, chunk_ids, threshold, ties, 0, 0, BLOCK)
    else:
        above = tl.full((), 0, tl.int32)
        tied = tl.full((), 0, tl.int32)
        for start in range(0, own, BLOCK):
            key = _keys_from(keys, start, readable, BLOCK)
            more, more_tied = _list_block(key, start, chunk_ids, threshold, ties, above, tied, BLOCK)
            above += more
            tied += more_tied
    # Only the prompt's last chunk may be short. It is the last of the ties, if it is one.
    last = tl.load(keys + (own - 1)).to(tl.uint32, bitcast=True)
    has_last = (last > threshold) | ((last == threshold) & (tied <= ties))
    kept = (above + tl.minimum(tied, ties)) * CHUNK_SIZE
    tl.store(num_kept + b, tl.where(has_last, kept - (own * CHUNK_SIZE - length), kept))
