"""The score on the compiled CPU kernels."""

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.score.native import arguments
from specprefill_kernels.ops.score.options import ScoreOptions, Sequences

unavailable = _native.unavailable


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
    compiled.score_layers(
        *arguments(compiled, state, queries, keys, sequences, windows, lse, key_scales, options),
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
