"""Importance on the compiled CPU kernels."""

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.finalize.native import arguments, new_importance

unavailable = _native.unavailable


def finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
) -> Tensor:
    compiled, importance = _native.module(), new_importance(state)
    options = (reduce, pool_kernel_size, pool_edge)
    compiled.finalize(
        arguments(compiled, state, seq_lens, num_look_ahead, *options, importance),
        _native.threads(),
    )
    return importance
