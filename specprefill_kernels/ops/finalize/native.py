"""Finalize's arguments as the compiled module takes them, for its CPU and its CUDA function alike."""

from types import ModuleType
from typing import Any

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.score.options import POOL_EDGES

_REDUCE_CODES = {"mean": 0, "max": 1}


def arguments(
    compiled: ModuleType,
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
    importance: Tensor,
) -> Any:
    """A `Finalize`: addresses, so the tensors must outlive the call that it is for."""
    return compiled.Finalize(
        state.data_ptr(),
        state.stride(),
        state.shape,
        _native.address(seq_lens),
        _native.address(num_look_ahead),
        _REDUCE_CODES[reduce],
        POOL_EDGES.index(pool_edge),
        pool_kernel_size,
        importance.data_ptr(),
    )


def new_importance(state: Tensor) -> Tensor:
    return state.new_empty(state.shape[0], state.shape[2])
