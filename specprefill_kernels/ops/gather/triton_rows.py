# mypy: allow-untyped-defs
"""Device code that both gathers share: how many tokens are kept, and the copying of rows."""

import triton
import triton.language as tl


@triton.jit
def kept_of(num_kept, b, stride, width):
    """Kept tokens of sequence(s) b, within [0, width], int64."""
    return tl.minimum(tl.maximum(tl.load(num_kept + b * stride), 0), width).to(tl.int64)


@triton.jit
def kept_before(num_kept, b, batch, stride, width, BATCH: tl.constexpr):
    """(kept tokens of all sequences before b, kept tokens of all)"""
    before = tl.full((), 0, tl.int64)
    total = tl.full((), 0, tl.int64)
    for first in range(0, batch, BATCH):
        other = first + tl.arange(0, BATCH)
        there = other < batch
        kept = tl.where(there, kept_of(num_kept, tl.where(there, other, 0), stride, width), 0)
        before += tl.sum(tl.where(other < b, kept, 0))
        total += tl.sum(kept)
    return before, total


@triton.jit
def copy_rows(
    source,
    target,
    source_at,  # int64 [SLOTS], where each row starts
    target_at,
    readable,  # bool [SLOTS]; what is not readable is 0
    writable,
    tile,
    size,  # of a row, in words
    minor,  # size of its last dimension, where it has two
    source_strides,
    target_strides,
    TWO_DIMS: tl.constexpr,
    INNER: tl.constexpr,
):
    word = tile * INNER + tl.arange(0, INNER)
    if TWO_DIMS:
        major = (word // minor).to(tl.int64)
        rest = (word % minor).to(tl.int64)
        source_word = major * source_strides[0] + rest * source_strides[1]
        target_word = major * target_strides[0] + rest * target_strides[1]
    else:
        source_word = word.to(tl.int64) * source_strides[1]
        target_word = word.to(tl.int64) * target_strides[1]
    there = (word < size)[None, :]
    x = tl.load(source + (source_at[:, None] + source_word[None, :]), mask=readable[:, None] & there, other=0)
    tl.store(target + (target_at[:, None] + target_word[None, :]), x, mask=writable[:, None] & there)


def batch_block(batch: int) -> int:
    """Sequences whose counts are added at a time: one step for common batches, and few versions of the kernel."""
    return 1 if batch == 1 else 128
