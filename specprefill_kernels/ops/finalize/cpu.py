"""Importance on the compiled CPU kernels."""

import torch
from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.score.options import POOL_EDGES

unavailable = _native.unavailable

_REDUCE_CODES = {"mean": 0, "max": 1}


def finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
) -> Tensor:
    importance = torch.empty(state.shape[0], state.shape[2], dtype=torch.float32)
    _native.module().finalize(
        state.data_ptr(),
        state.stride(),
        state.shape,
        _native.address(seq_lens),
        _native.address(num_look_ahead),
        _REDUCE_CODES[reduce],
        POOL_EDGES.index(pool_edge),
        pool_kernel_size,
        importance.data_ptr(),
        _native.threads(),
    )
    return importance
