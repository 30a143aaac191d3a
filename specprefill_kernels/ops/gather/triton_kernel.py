# mypy: allow-untyped-defs
"""Gathering in Triton: `gather_tokens`, one launch and one pass; `gather_kv` is in triton_kv.py.

Bytes that must move: what is kept, in and out, and the zeros behind it; 4 bytes a slot of indices, once for each slice
that precedes the tokens, and 8 of `position_ids`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _triton
from specprefill_kernels.ops.gather.reference import check_token_contents
from specprefill_kernels.ops.gather.triton_config import choose
from specprefill_kernels.ops.gather.triton_kv import gather_kv as gather_kv  # the room's other op
from specprefill_kernels.ops.gather.triton_rows import batch_block, copy_rows, kept_before, kept_of
from specprefill_kernels.ops.gather.triton_words import as_words, merge

unavailable = _triton.unavailable
DEVICE_TYPE = _triton.DEVICE_TYPE


@triton.jit(
    do_not_specialize=["batch", "tokens", "slot_tiles", "kept_stride", "chunks_width"],
    do_not_specialize_on_alignment=["num_kept", "cu_seqlens"],
)
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
    before, total = kept_before(num_kept, b, batch, kept_stride, width, BATCH)
    kept_here = kept_of(num_kept, b, kept_stride, width)
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
    copy_rows(
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
        check_token_contents(x, indices, num_kept, cu_seqlens, token_dim)
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
        BATCH=batch_block(batch),
        num_warps=config.num_warps,
    )
