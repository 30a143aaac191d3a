"""The score on the CUDA kernels (csrc/score)."""

from torch import Tensor

from specprefill_kernels import _cuda
from specprefill_kernels.ops.score.native import arguments
from specprefill_kernels.ops.score.options import ScoreOptions, Sequences, head_axis
from specprefill_kernels.ops.score.reference import check_contents, check_scores

unavailable = _cuda.unavailable
DEVICE_TYPE = _cuda.DEVICE_TYPE


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
    if _cuda.checks_values():
        rows = check_contents(state, queries[0].shape[1], keys, sequences, options)
    compiled = _cuda.module()
    score, layers = arguments(compiled, state, queries, keys, sequences, windows, lse, key_scales, options)
    size = 0 if workspace is not None else _workspace_size(state, queries, keys, options)
    memory, bytes_there = _cuda.scratch(size, workspace, state)
    _cuda.call(compiled.score_layers_cuda, score, layers, memory.data_ptr(), bytes_there, on=state)
    if _cuda.checks_values():
        check_scores(state, rows, bool(lse))


def _workspace_size(state: Tensor, queries: list[Tensor], keys: list[Tensor], options: ScoreOptions) -> int:
    heads = head_axis(options.layout)
    return score_workspace_size(
        state.shape[0],
        queries[0].shape[1],
        max(query.shape[2] for query in queries),
        min(key.shape[heads] for key in keys),
        max(query.shape[3] for query in queries),
        state.shape[2],
        len(queries),
        options.pool_kernel_size,
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
    size = _cuda.module().score_workspace_size_cuda
    return int(size(batch, look_ahead, num_q_heads, num_kv_heads, head_dim, max_len, layers, pool_kernel_size))
