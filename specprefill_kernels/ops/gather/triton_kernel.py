# mypy: allow-untyped-defs
"""Gathering in Triton: `gather_tokens` and `gather_kv` are one launch and one pass each.

Bytes that must move: what is kept, in and out, and for `gather_tokens` the zeros behind it; 4 bytes a slot of indices,
once for each slice that precedes the tokens (heads of a cache in bhtd), and 8 of `position_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _checks, _triton
from specprefill_kernels.ops.gather.reference import _check_source_blocks, kept_positions, kv_rooms, token_rooms
from specprefill_kernels.ops.gather.triton_config import Config, choose
from specprefill_kernels.ops.gather.triton_words import as_words, merge
from specprefill_kernels.ops.score.options import head_axis, token_axis

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE


@triton.jit
def _kept_of(num_kept, b, stride, width):
    """Kept tokens of sequence(s) b, within [0, width], int64."""
    return tl.minimum(tl.maximum(tl.load(num_kept + b * stride), 0), width).to(tl.int64)


@triton.jit
def _kept_before(num_kept, b, batch, stride, width, BATCH: tl.constexpr):
    """(kept tokens of all sequences before b, kept tokens of all)"""
    before = tl.full((), 0, tl.int64)
    total = tl.full((), 0, tl.int64)
    for first in range(0, batch, BATCH):
        other = first + tl.arange(0, BATCH)
        there = other < batch
        kept = tl.where(there, _kept_of(num_kept, tl.where(there, other, 0), stride, width), 0)
        before += tl.sum(tl.where(other < b, kept, 0))
        total += tl.sum(kept)
    return before, total


@triton.jit
def _copy_rows(
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


@triton.jit
def gather_tokens_kernel(
    x,  # [outer..., B, T, inner...] or [outer..., sum T, inner...], words
    values,  # [outer..., B * K, inner...], words, out
    indices,  # [B, K] int32; out with CHUNK_SIZE
    chunk_ids,  # [B, W] int32 with CHUNK_SIZE, else None
    num_kept,  # [B] int32
    cu_seqlens,  # [B + 1] int32, or None for a batch
    position_ids,  # [B * K] int64, out
    offsets,  # [B + 1] int32, out
    batch,
    tokens,  # T or sum T
    width,  # K
    slot_tiles,
    inner_tiles,
    minor_outer,
    inner,
    minor_inner,
    indices_strides,  # batch, slot
    kept_stride,
    chunks_width,
    x_strides,  # outer, outer, batch, token, inner, inner
    values_strides,  # outer, outer, slot, inner, inner
    CHUNK_SIZE: tl.constexpr,  # not 0: positions come from chunk ids, and indices are written too
    FIRST: tl.constexpr,  # of several launches: writes what is not values
    OUTER_TWO: tl.constexpr,
    INNER_TWO: tl.constexpr,
    SLOTS: tl.constexpr,
    INNER: tl.constexpr,
    BATCH: tl.constexpr,
):
    program = tl.program_id(0)
    inner_tile = program % inner_tiles
    slot_tile = program // inner_tiles % slot_tiles
    b = (program // (inner_tiles * slot_tiles) % batch).to(tl.int64)
    outer = (program // (inner_tiles * slot_tiles) // batch).to(tl.int64)
    slot = slot_tile.to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    there = slot < width
    before, total = _kept_before(num_kept, b, batch, kept_stride, width, BATCH)
    kept_here = _kept_of(num_kept, b, kept_stride, width)
    kept = slot < kept_here
    if CHUNK_SIZE:
        chunk = tl.load(chunk_ids + b * chunks_width + slot // CHUNK_SIZE, mask=kept, other=0)
        position = chunk * CHUNK_SIZE + (slot % CHUNK_SIZE).to(tl.int32)
    else:
        at = b * indices_strides[0] + slot * indices_strides[1]
        position = tl.load(indices + at, mask=kept, other=0)
    # Slots that keep nothing share the room behind the last token, so that one pass writes every slot once.
    behind = total + (b * width - before) - kept_here
    target_slot = slot + tl.where(kept, before, behind)
    if cu_seqlens is None:
        start = tl.full((), 0, tl.int64)
        room = tl.full((), tokens, tl.int64)
    else:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        room = tl.minimum(tl.load(cu_seqlens + b + 1), tokens) - start
        room = tl.where(start < 0, 0, room)
    readable = kept & (position >= 0) & (position < room)
    if OUTER_TWO:
        source_outer = outer // minor_outer * x_strides[0] + outer % minor_outer * x_strides[1]
        target_outer = outer // minor_outer * values_strides[0] + outer % minor_outer * values_strides[1]
    else:
        source_outer = outer * x_strides[1]
        target_outer = outer * values_strides[1]
    _copy_rows(
        x + (source_outer + b * x_strides[2]),
        values + target_outer,
        (start + position) * x_strides[3],
        target_slot * values_strides[2],
        readable,
        there,
        inner_tile,
        inner,
        minor_inner,
        (x_strides[4], x_strides[5]),
        (values_strides[3], values_strides[4]),
        INNER_TWO,
        INNER,
    )
    if FIRST:
        writes = (inner_tile == 0) & (outer == 0)
        there = there & writes
        tl.store(position_ids + target_slot, tl.where(kept, position, 0).to(tl.int64), mask=there)
        if CHUNK_SIZE:
            tl.store(indices + b * width + slot, tl.where(kept, position, -1), mask=there)
        writes = writes & (slot_tile == 0)
        tl.store(offsets + b, before.to(tl.int32), mask=writes)
        tl.store(offsets + batch, total.to(tl.int32), mask=writes & (b == batch - 1))


def gather_tokens(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    if _triton.checks_values():
        _, room = token_rooms(x, len(indices), cu_seqlens, token_dim)
        kept_positions(indices, num_kept, room)
    return launch_gather_tokens(x, indices, num_kept, cu_seqlens, token_dim)


def launch_gather_tokens(
    x: Tensor,
    indices: Tensor,
    num_kept: Tensor,
    cu_seqlens: Tensor | None,
    token_dim: int,
    chunk_ids: Tensor | None = None,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """With `chunk_ids` the positions follow from kept chunks, and `indices` is written."""
    batch, width = indices.shape
    axis = token_dim - 1  # of the packed tokens in the result
    after = axis + (1 if cu_seqlens is not None else 2)
    x = x.resolve_conj().resolve_neg()
    values = torch.empty([*x.shape[:axis], batch * width, *x.shape[after:]], dtype=x.dtype, device=x.device)
    position_ids = torch.empty(batch * width, dtype=torch.int64, device=x.device)
    offsets = torch.empty(batch + 1, dtype=torch.int32, device=x.device)
    rows = (indices, chunk_ids, num_kept, cu_seqlens, position_ids, offsets)
    source, target = as_words(x, values, wide=x.ndim > after)
    _gather_slices(source, target, axis, rows, chunk_size, first=True)
    return values, position_ids, offsets


def _gather_slices(
    x: Tensor, values: Tensor, axis: int, rows: tuple[Any, ...], chunk_size: int, *, first: bool
) -> None:
    """One launch for at most two strided dimensions on each side of the tokens, else one for each slice."""
    packed = rows[3] is not None
    after = axis + (1 if packed else 2)
    outer = merge(list(x.shape[:axis]), list(x.stride()[:axis]), list(values.stride()[:axis]))
    inner = merge(list(x.shape[after:]), list(x.stride()[after:]), list(values.stride()[axis + 1 :]))
    if values.numel() == 0:  # positions and offsets are still to be written
        outer, inner = [], [(0, 1, 1)]
    if len(outer) > 2 or len(inner) > 2:
        dim = 0 if len(outer) > 2 else after
        to_dim = 0 if len(outer) > 2 else axis + 1
        for i in range(x.shape[dim]):
            source, target = x.select(dim, i), values.select(to_dim, i)
            below = axis - 1 if len(outer) > 2 else axis
            _gather_slices(source, target, below, rows, chunk_size, first=first and i == 0)
        return
    _launch_slice(x, values, axis, packed, _two(outer), _two(inner), rows, chunk_size, first)


def _two(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Exactly two (size, stride, stride), of size 1 where fewer are enough. Stride 0 leaves pointers aligned."""
    return [*[(1, 0, 0)] * (2 - len(dims)), *dims]


def _launch_slice(
    x: Tensor,
    values: Tensor,
    axis: int,
    packed: bool,
    outer: list[tuple[int, ...]],
    inner: list[tuple[int, ...]],
    rows: tuple[Any, ...],
    chunk_size: int,
    first: bool,
) -> None:
    indices, chunk_ids, num_kept, cu_seqlens, position_ids, offsets = rows
    batch, width = indices.shape
    outer_size, inner_size = outer[0][0] * outer[1][0], inner[0][0] * inner[1][0]
    config = choose(_triton.target_of(x), inner_size)
    slot_tiles, inner_tiles = triton.cdiv(width, config.slots), max(1, triton.cdiv(inner_size, config.inner))
    token_axis = axis if packed else axis + 1
    x_strides = (outer[0][1], outer[1][1], 0 if packed else x.stride(axis), x.stride(token_axis))
    _triton.launch(
        gather_tokens_kernel,
        (outer_size * batch * slot_tiles * inner_tiles,),
        x,
        values,
        indices,
        chunk_ids,
        num_kept,
        cu_seqlens,
        position_ids,
        offsets,
        batch,
        x.shape[token_axis],
        width,
        slot_tiles,
        inner_tiles,
        outer[1][0],
        inner_size,
        inner[1][0],
        indices.stride(),
        num_kept.stride(0),
        0 if chunk_ids is None else chunk_ids.shape[1],
        (*x_strides, inner[0][1], inner[1][1]),
        (outer[0][2], outer[1][2], values.stride(axis), inner[0][2], inner[1][2]),
        on=x,
        CHUNK_SIZE=chunk_size,
        FIRST=first,
        OUTER_TWO=outer[0][0] > 1,
        INNER_TWO=inner[0][0] > 1,
        SLOTS=config.slots,
        INNER=config.inner,
        BATCH=_batch_block(batch),
        num_warps=config.num_warps,
    )


def _batch_block(batch: int) -> int:
    """Sequences whose counts are added at a time: one step for common batches, and few versions of the kernel."""
    return 1 if batch == 1 else 128


@triton.jit
def _copy_cache(
    program,
    source,
    target,
    indices,
    num_kept,
    cu_seqlens,  # [B + 1] int32 where packed, else None
    block_table,  # [B, max_blocks] int32 where paged, else None
    out_block_table,
    batch,
    width,  # K
    indices_strides,
    kept_stride,
    slot_tiles,
    inner_tiles,
    heads,
    inner,  # words of a head, or of all heads where they lie side by side
    source_shape,  # blocks (1 where not paged), tokens (of a block where paged), table width
    target_shape,
    source_strides,  # batch or block, head, token, word
    target_strides,
    SLOTS: tl.constexpr,
    INNER: tl.constexpr,
    BATCH: tl.constexpr,
):
    """One tile: some kept tokens of one sequence, of one head."""
    inner_tile = program % inner_tiles
    slot_tile = program // inner_tiles % slot_tiles
    head = (program // (inner_tiles * slot_tiles) % heads).to(tl.int64)
    b = (program // (inner_tiles * slot_tiles) // heads).to(tl.int64)
    slot = slot_tile.to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    kept = slot < _kept_of(num_kept, b, kept_stride, width)
    at = b * indices_strides[0] + slot * indices_strides[1]
    position = tl.load(indices + at, mask=kept, other=0).to(tl.int64)
    if block_table is not None:
        valid = (position >= 0) & (position < tl.full((), source_shape[1], tl.int64) * source_shape[2])
        entry = b * source_shape[2] + position // source_shape[1]
        block = tl.load(block_table + entry, mask=kept & valid, other=-1).to(tl.int64)
        valid = valid & (block >= 0) & (block < source_shape[0])
        source_at = block * source_strides[0] + position % source_shape[1] * source_strides[2]
        entry = b * target_shape[2] + slot // target_shape[1]
        out_block = tl.load(out_block_table + entry, mask=kept & (slot // target_shape[1] < target_shape[2]), other=-1)
        kept = kept & (out_block >= 0) & (out_block < target_shape[0])
        target_at = out_block.to(tl.int64) * target_strides[0] + slot % target_shape[1] * target_strides[2]
    elif cu_seqlens is not None:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        stop = tl.minimum(tl.load(cu_seqlens + b + 1), source_shape[1])
        valid = (position >= 0) & (start >= 0) & (start + position < stop)
        source_at = (start + position) * source_strides[2]
        before, _ = _kept_before(num_kept, b, batch, kept_stride, width, BATCH)
        target_at = (before + slot) * target_strides[2]
    else:
        valid = (position >= 0) & (position < source_shape[1])
        source_at = b * source_strides[0] + position * source_strides[2]
        target_at = b * target_strides[0] + slot * target_strides[2]
    _copy_rows(
        source + head * source_strides[1],
        target + head * target_strides[1],
        source_at,
        target_at,
        kept & valid,
        kept,
        inner_tile,
        inner,
        inner,
        (0, source_strides[3]),
        (0, target_strides[3]),
        False,
        INNER,
    )


@triton.jit
def gather_kv_kernel(
    caches,  # keys, values: any layout, words
    outs,
    indices,  # [B, K] int32
    num_kept,  # [B] int32
    cu_seqlens,
    block_table,
    out_block_table,
    batch,
    width,
    indices_strides,
    kept_stride,
    key_programs,  # the first ones copy keys, the others values
    # Of keys and of values: (slot tiles, inner tiles, heads, inner), shapes and strides, see `_copy_cache`.
    key_tiles,
    value_tiles,
    source_shape,
    target_shape,
    key_source_strides,
    key_target_strides,
    value_source_strides,
    value_target_strides,
    KEY_SLOTS: tl.constexpr,
    KEY_INNER: tl.constexpr,
    VALUE_SLOTS: tl.constexpr,
    VALUE_INNER: tl.constexpr,
    BATCH: tl.constexpr,
):
    program = tl.program_id(0)
    # Two bodies, of which a program runs one: each knows its own word, unit strides and alignment.
    if program < key_programs:
        _copy_cache(
            program,
            caches[0],
            outs[0],
            indices,
            num_kept,
            cu_seqlens,
            block_table,
            out_block_table,
            batch,
            width,
            indices_strides,
            kept_stride,
            key_tiles[0],
            key_tiles[1],
            key_tiles[2],
            key_tiles[3],
            source_shape,
            target_shape,
            key_source_strides,
            key_target_strides,
            KEY_SLOTS,
            KEY_INNER,
            BATCH,
        )
    else:
        _copy_cache(
            program - key_programs,
            caches[1],
            outs[1],
            indices,
            num_kept,
            cu_seqlens,
            block_table,
            out_block_table,
            batch,
            width,
            indices_strides,
            kept_stride,
            value_tiles[0],
            value_tiles[1],
            value_tiles[2],
            value_tiles[3],
            source_shape,
            target_shape,
            value_source_strides,
            value_target_strides,
            VALUE_SLOTS,
            VALUE_INNER,
            BATCH,
        )


@dataclass(frozen=True)
class _Side:
    """Keys or values as the kernel takes them."""

    cache: Tensor
    out: Tensor
    tiles: tuple[int, int, int, int]  # slot tiles, inner tiles, heads, inner
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    config: Config

    def programs(self, batch: int) -> int:
        return batch * self.tiles[0] * self.tiles[1] * self.tiles[2]


def _side(cache: Tensor, out: Tensor, layout: str, width: int) -> _Side:
    cache, out = as_words(cache, out, wide=True)
    head, token = head_axis(layout), token_axis(layout)
    dims = merge([cache.shape[head], cache.shape[-1]], *([x.stride(head), x.stride(-1)] for x in (cache, out)))
    # Heads that lie side by side in both are one row; a token of bthd or NHD is then copied at once.
    heads, inner = ((1, 0, 0), *(dims or [(1, 1, 1)])) if len(dims) < 2 else dims
    config = choose(_triton.target_of(cache), inner[0])
    tiles = (triton.cdiv(width, config.slots), triton.cdiv(inner[0], config.inner), heads[0], inner[0])
    outermost = 0 if layout == "packed" else 1
    strides = tuple(
        (outermost * x.stride(0), heads[1 + i], x.stride(token), inner[1 + i]) for i, x in enumerate((cache, out))
    )
    return _Side(cache, out, tiles, (strides[0], strides[1]), config)


def gather_kv(
    caches: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    out_block_table: Tensor | None,
) -> None:
    batch, width = indices.shape
    if _triton.checks_values():
        _check_kv_values(caches[0], outs[0], indices, num_kept, layout, block_table, cu_seqlens, out_block_table)
    keys, values = (_side(cache, out, layout, width) for cache, out in zip(caches, outs))
    token = token_axis(layout)
    shapes = [
        (x.shape[0], x.shape[token], 0 if table is None else table.shape[1])
        for x, table in ((caches[0], block_table), (outs[0], out_block_table))
    ]
    _triton.launch(
        gather_kv_kernel,
        (keys.programs(batch) + values.programs(batch),),
        (keys.cache, values.cache),
        (keys.out, values.out),
        indices,
        num_kept,
        cu_seqlens,
        block_table,
        out_block_table,
        batch,
        width,
        indices.stride(),
        num_kept.stride(0),
        keys.programs(batch),
        keys.tiles,
        values.tiles,
        *shapes,
        *keys.strides,
        *values.strides,
        on=caches[0],
        KEY_SLOTS=keys.config.slots,
        KEY_INNER=keys.config.inner,
        VALUE_SLOTS=values.config.slots,
        VALUE_INNER=values.config.inner,
        BATCH=_batch_block(batch),
        num_warps=max(keys.config.num_warps, values.config.num_warps),
    )


def _check_kv_values(
    cache: Tensor,
    out: Tensor,
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    out_block_table: Tensor | None,
) -> None:
    """What the definition refuses in the contents of CPU tensors."""
    _, room = kv_rooms(cache, len(indices), layout, block_table, cu_seqlens)
    kept = kept_positions(indices, num_kept, room)
    token = token_axis(layout)
    if block_table is not None:
        for b, positions in enumerate(kept):
            _check_source_blocks(block_table, b, positions // cache.shape[token], cache.shape[0])
    if out_block_table is not None:
        written = [len(positions) for positions in kept]
        _checks.block_table_values(
            out_block_table, written, out.shape[token], out.shape[0], name="out_block_table", exclusive=True
        )
