"""Finalize: from the state of all layers to one importance per prompt token."""

import torch
from torch import Tensor

from specprefill_kernels import _backends, _checks
from specprefill_kernels._ops import ops
from specprefill_kernels.ops.score.options import POOL_EDGES

__all__ = ["finalize_importance"]

REDUCES = ("mean", "max")


def finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None = None,
    num_look_ahead: Tensor | None = None,
    *,
    reduce: str = "mean",
    pool_kernel_size: int | None = None,
    pool_edge: str = "zero",
    backend: str = "auto",
) -> Tensor:
    """Importance of each prompt token: the mean over the valid look-ahead rows of `state`.

    ``importance[b, t] = (1 / n_b) * sum_{n < n_b} state[b, n, t]`` for t < length_b, and 0 behind (Liu, Chen, Zhang,
    arXiv 2502.02789, section 3).

    Args:
        state: [B, N, T] fp32, from `score_layer_`.
        seq_lens: [B] integers in [1, T]. Default: T.
        num_look_ahead: [B] integers in [1, N], valid rows. Default: N.
        reduce: "mean" as in the paper, or "max" over the rows.
        pool_kernel_size: odd; pools each row before the reduction, for a state made with pool_order="after_max".
            Default: no pooling.
        pool_edge: "zero" or "valid", as in `score_layer_`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, T] fp32.

    Raises:
        ValueError: an argument is wrong; on CPU tensors also NaN or Inf among the valid entries of `state`, which on
            CUDA tensors stay in the importance of their positions.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    _backends.check_name(backend)
    check_finalize(state, seq_lens, num_look_ahead, reduce, pool_kernel_size, pool_edge)
    importance: Tensor = ops.finalize_importance(
        state, seq_lens, num_look_ahead, reduce, pool_kernel_size or 1, pool_edge, backend
    )
    return importance


def check_finalize(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int | None,
    pool_edge: str,
) -> None:
    _checks.tensor("state", state, ndim=3, dtypes=(torch.float32,), what="[B, N, T]")
    _checks.supported_device("state", state)
    if any(size == 0 for size in state.shape):
        _checks.fail("state", "no empty dimension [B, N, T]", f"shape {_checks.shape(state)}")
    _checks.per_sequence("seq_lens", seq_lens, state.shape[0], state.device)
    _checks.per_sequence("num_look_ahead", num_look_ahead, state.shape[0], state.device)
    _checks.choice("reduce", reduce, REDUCES)
    _checks.choice("pool_edge", pool_edge, POOL_EDGES)
    if pool_kernel_size is not None:
        _checks.odd("pool_kernel_size", pool_kernel_size)
