"""The score's arguments as the compiled module takes them, for its CPU and its CUDA function alike."""

from types import ModuleType
from typing import Any

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.score.options import (
    NORMALIZE_OVER,
    POOL_EDGES,
    QUERIES,
    ScoreOptions,
    Sequences,
    head_axis,
    token_axis,
)

# specprefill_layout in specprefill.h
LAYOUT_CODES = {"bhtd": 0, "bthd": 0, "packed": 1, "paged_nhd": 2, "paged_hnd": 2}


def arguments(
    compiled: ModuleType,
    state: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    sequences: Sequences,
    windows: list[int],
    lse: list[Tensor],
    key_scales: list[Tensor],
    options: ScoreOptions,
) -> tuple[Any, list[Any]]:
    """A `Score` and its `Layer`s: addresses, so the tensors must outlive the call that they are for."""
    table = sequences.block_table
    score = compiled.Score(
        state.data_ptr(),
        state.stride()[:2],
        state.shape[1],
        # With one row in the state the kernel still needs to know how many the query has.
        (state.shape[0], queries[0].shape[1], state.shape[2]),
        LAYOUT_CODES[options.layout],
        _native.address(sequences.seq_lens),
        _native.address(sequences.cu_seqlens),
        _native.address(table),
        table_shape(table),
        _native.address(sequences.num_look_ahead),
        QUERIES.index(options.queries),
        NORMALIZE_OVER.index(options.normalize_over),
        POOL_EDGES.index(options.pool_edge),
        options.pool_kernel_size if options.pool_order == "before_max" else 1,
        options.softcap or 0.0,
    )
    layers = [
        _layer(
            compiled,
            query,
            key,
            windows[i],
            lse[i] if lse else None,
            key_scales[i] if key_scales else None,
            options,
        )
        for i, (query, key) in enumerate(zip(queries, keys))
    ]
    return score, layers


def _layer(
    compiled: ModuleType,
    query: Tensor,
    key: Tensor,
    window: int,
    lse: Tensor | None,
    key_scale: Tensor | None,
    options: ScoreOptions,
) -> Any:
    head_dim = query.shape[3]
    heads, tokens = head_axis(options.layout), token_axis(options.layout)
    packed = options.layout == "packed"
    return compiled.Layer(
        query.data_ptr(),
        _native.DTYPES[query.dtype],
        query.stride(),
        key.data_ptr(),
        _native.DTYPES[key.dtype],
        1 if packed else key.shape[0],
        key.shape[tokens],
        (0 if packed else key.stride(0), key.stride(heads), key.stride(tokens), key.stride(-1)),
        _native.address(key_scale),
        key_scale.stride(0) if key_scale is not None and key_scale.numel() > 1 else 0,
        _native.address(lse),
        (0, 0, 0) if lse is None else lse.stride(),
        (query.shape[2], key.shape[heads], head_dim),
        window,
        head_dim**-0.5 if options.scale is None else options.scale,
    )


def table_shape(table: Tensor | None) -> tuple[int, int]:
    """(stride, width) of a block table."""
    return (0, 0) if table is None else (table.stride(0), table.shape[1])
