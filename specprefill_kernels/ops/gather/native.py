"""Gathering's arguments and results as the compiled module takes them, for its CPU and its CUDA functions alike."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.score.native import LAYOUT_CODES, table_shape
from specprefill_kernels.ops.score.options import head_axis, token_axis


def readable(indices: Tensor, num_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of contiguous indices and contiguous counts, as the kernels read them; hold on to what comes back."""
    return indices if indices.stride(1) == 1 else indices.contiguous(), num_kept.contiguous()


def new_packed(x: Tensor, indices: Tensor, packed: bool, token_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """values, position_ids and offsets, to be written."""
    batch, width = indices.shape
    axis = token_dim - 1  # of the packed tokens in the result
    return (
        _native.prefer_huge_pages(
            x.new_empty([*x.shape[:axis], batch * width, *x.shape[axis + (1 if packed else 2) :]])
        ),
        x.new_empty(batch * width, dtype=torch.int64),
        x.new_empty(batch + 1, dtype=torch.int32),
    )


def token_arguments(
    compiled: ModuleType,
    x: Tensor,
    indices: Tensor,
    num_kept: Tensor,
    cu_seqlens: Tensor | None,
    token_dim: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> Any:
    """A `GatherTokens`: addresses, so the tensors must outlive the call that it is for."""
    axis = token_dim - 1
    inner = axis + (1 if cu_seqlens is not None else 2)
    values, position_ids, offsets = out
    return compiled.GatherTokens(
        x.data_ptr(),
        x.element_size(),
        (indices.shape[0], x.shape[inner - 1]),
        (x.stride(axis), x.stride(inner - 1)),
        x.shape[:axis],
        x.stride()[:axis],
        x.shape[inner:],
        x.stride()[inner:],
        _native.address(cu_seqlens),
        indices.data_ptr(),
        indices.stride(0),
        indices.shape[1],
        num_kept.data_ptr(),
        values.data_ptr(),
        position_ids.data_ptr(),
        offsets.data_ptr(),
    )


def kv_arguments(
    compiled: ModuleType,
    caches: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    indices: Tensor,
    num_kept: Tensor,
    layout: str,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    out_block_table: Tensor | None,
) -> list[Any]:
    """A `GatherKv` for keys and one for values; as `token_arguments`."""
    return [
        compiled.GatherKv(
            _cache(compiled, cache, layout),
            _cache(compiled, out, layout),
            LAYOUT_CODES[layout],
            indices.shape[0],
            _native.address(cu_seqlens),
            _native.address(block_table),
            table_shape(block_table),
            _native.address(out_block_table),
            table_shape(out_block_table),
            indices.data_ptr(),
            indices.stride(0),
            indices.shape[1],
            num_kept.data_ptr(),
        )
        for cache, out in zip(caches, outs)
    ]


def _cache(compiled: ModuleType, cache: Tensor, layout: str) -> Any:
    heads, tokens = head_axis(layout), token_axis(layout)
    packed = layout == "packed"
    return compiled.Cache(
        cache.data_ptr(),
        cache.element_size(),
        (1 if packed else cache.shape[0], cache.shape[tokens], cache.shape[heads], cache.shape[-1]),
        (0 if packed else cache.stride(0), cache.stride(heads), cache.stride(tokens), cache.stride(-1)),
    )
