"""The score on the compiled CPU kernels: tensors become addresses and strides."""

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

unavailable = _native.unavailable

# specprefill_layout in specprefill.h
LAYOUT_CODES = {"bhtd": 0, "bthd": 0, "packed": 1, "paged_nhd": 2, "paged_hnd": 2}


def score_layers_(
    state: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    sequences: Sequences,
    windows: list[int],
    lse: list[Tensor],
    key_scales: list[Tensor],
    workspace: Tensor | None,
    options: ScoreOptions,
) -> None:
    compiled = _native.module()
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
    table = sequences.block_table
    # With one row in the state the kernel still needs to know how many the query has.
    look_ahead = queries[0].shape[1]
    compiled.score_layers(
        state.data_ptr(),
        state.stride()[:2],
        state.shape[1],
        (state.shape[0], look_ahead, state.shape[2]),
        LAYOUT_CODES[options.layout],
        _native.address(sequences.seq_lens),
        _native.address(sequences.cu_seqlens),
        _native.address(table),
        (0, 0) if table is None else (table.stride(0), table.shape[1]),
        _native.address(sequences.num_look_ahead),
        QUERIES.index(options.queries),
        NORMALIZE_OVER.index(options.normalize_over),
        POOL_EDGES.index(options.pool_edge),
        options.pool_kernel_size if options.pool_order == "before_max" else 1,
        options.softcap or 0.0,
        layers,
        _native.address(workspace),
        0 if workspace is None else workspace.numel(),
        _native.threads(),
    )


def score_workspace_size(
    batch: int,
    look_ahead: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    layers: int,
    pool_kernel_size: int,
) -> int:
    del batch, layers  # one sequence and one layer at a time
    group = -(-num_q_heads // num_kv_heads)
    threads = _native.threads()
    size = _native.module().score_workspace_size(look_ahead, group, head_dim, max_len, pool_kernel_size, threads)
    return int(size)


def _layer(
    compiled: object,
    query: Tensor,
    key: Tensor,
    window: int,
    lse: Tensor | None,
    key_scale: Tensor | None,
    options: ScoreOptions,
) -> object:
    head_dim = query.shape[3]
    heads, tokens = head_axis(options.layout), token_axis(options.layout)
    packed = options.layout == "packed"
    return compiled.Layer(  # type: ignore[attr-defined]
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
