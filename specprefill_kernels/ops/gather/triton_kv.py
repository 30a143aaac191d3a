# mypy: allow-untyped-defs
"""`gather_kv` in Triton: keys and values in one launch and one pass.

Bytes that must move: what is kept, in and out; 4 bytes of indices a slot, for each head where heads do not lie side by
side.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from specprefill_kernels import _triton
from specprefill_kernels.ops.gather.reference import check_kv_contents
from specprefill_kernels.ops.gather.triton_config import Config, choose
from specprefill_kernels.ops.gather.triton_rows import batch_block, copy_rows, kept_before, kept_of
from specprefill_kernels.ops.gather.triton_words import as_words, merge
from specprefill_kernels.ops.score.options import head_axis, token_axis


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
    source_shape,  # blocks (1 where not paged), tokens (of a block where paged), table width, table stride
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
    kept = slot < kept_of(num_kept, b, kept_stride, width)
    at = b * indices_strides[0] + slot * indices_strides[1]
    position = tl.load(indices + at, mask=kept, other=0).to(tl.int64)
    if block_table is not None:
        valid = (position >= 0) & (position < tl.full((), source_shape[1], tl.int64) * source_shape[2])
        entry = b * source_shape[3] + position // source_shape[1]
        block = tl.load(block_table + entry, mask=kept & valid, other=-1).to(tl.int64)
        valid = valid & (block >= 0) & (block < source_shape[0])
        source_at = block * source_strides[0] + position % source_shape[1] * source_strides[2]
        entry = b * target_shape[3] + slot // target_shape[1]
        out_block = tl.load(out_block_table + entry, mask=kept & (slot // target_shape[1] < target_shape[2]), other=-1)
        kept = kept & (out_block >= 0) & (out_block < target_shape[0])
        target_at = out_block.to(tl.int64) * target_strides[0] + slot % target_shape[1] * target_strides[2]
    elif cu_seqlens is not None:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        stop = tl.minimum(tl.load(cu_seqlens + b + 1), source_shape[1])
        valid = (position >= 0) & (start >= 0) & (start + position < stop)
        source_at = (start + position) * source_strides[2]
        before, _ = kept_before(num_kept, b, batch, kept_stride, width, BATCH)
        target_at = (before + slot) * target_strides[2]
    else:
        valid = (position >= 0) & (position < source_shape[1])
        source_at = b * source_strides[0] + position * source_strides[2]
        target_at = b * target_strides[0] + slot * target_strides[2]
    copy_rows(
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


@triton.jit(
    do_not_specialize=["batch", "width", "kept_stride", "key_programs", "source_shape", "target_shape"],
    do_not_specialize_on_alignment=["indices", "num_kept", "cu_seqlens", "block_table", "out_block_table"],
)
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
        check_kv_contents(caches[0], outs[0], indices, num_kept, layout, block_table, cu_seqlens, out_block_table)
    keys, values = (_side(cache, out, layout, width) for cache, out in zip(caches, outs))
    token = token_axis(layout)
    shapes = [
        (x.shape[0], x.shape[token], *((0, 0) if table is None else (table.shape[1], table.stride(0))))
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
        BATCH=batch_block(batch),
        num_warps=max(keys.config.num_warps, values.config.num_warps),
    )
