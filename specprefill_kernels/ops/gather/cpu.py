"""Gathering on the compiled CPU kernels."""

import torch
from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.score.cpu import LAYOUT_CODES
from specprefill_kernels.ops.score.options import head_axis, token_axis

unavailable = _native.unavailable


def gather_tokens(
    x: Tensor, indices: Tensor, num_kept: Tensor, cu_seqlens: Tensor | None, token_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = indices.shape
    axis = token_dim - 1  # of the packed tokens in the result
    inner = axis + (1 if cu_seqlens is not None else 2)
    values = torch.empty([*x.shape[:axis], batch * width, *x.shape[inner:]], dtype=x.dtype)
    position_ids = torch.empty(batch * width, dtype=torch.int64)
    offsets = torch.empty(batch + 1, dtype=torch.int32)
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    num_kept = num_kept.contiguous()  # a name of its own: a temporary would be freed before the kernel reads it
    _native.module().gather_tokens(
        x.data_ptr(),
        x.element_size(),
        (batch, x.shape[inner - 1]),
        (x.stride(axis), x.stride(inner - 1)),
        x.shape[:axis],
        x.stride()[:axis],
        x.shape[inner:],
        x.stride()[inner:],
        _native.address(cu_seqlens),
        indices.data_ptr(),
        indices.stride(0),
        width,
        num_kept.data_ptr(),
        values.data_ptr(),
        position_ids.data_ptr(),
        offsets.data_ptr(),
        _native.threads(),
    )
    return values, position_ids, offsets


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
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    num_kept = num_kept.contiguous()
    _native.module().gather_kv(
        [(_cache(cache, layout), _cache(out, layout)) for cache, out in zip(caches, outs)],
        LAYOUT_CODES[layout],
        indices.shape[0],
        _native.address(cu_seqlens),
        _native.address(block_table),
        _table_shape(block_table),
        _native.address(out_block_table),
        _table_shape(out_block_table),
        indices.data_ptr(),
        indices.stride(0),
        indices.shape[1],
        num_kept.data_ptr(),
        _native.threads(),
    )


def _cache(cache: Tensor, layout: str) -> object:
    heads, tokens = head_axis(layout), token_axis(layout)
    packed = layout == "packed"
    return _native.module().Cache(
        cache.data_ptr(),
        cache.element_size(),
        (1 if packed else cache.shape[0], cache.shape[tokens], cache.shape[heads], cache.shape[-1]),
        (0 if packed else cache.stride(0), cache.stride(heads), cache.stride(tokens), cache.stride(-1)),
    )


def _table_shape(table: Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.stride(0), table.shape[1])
