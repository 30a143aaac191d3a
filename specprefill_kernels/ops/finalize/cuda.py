"""Importance on the CUDA kernel (csrc/finalize): one launch."""

from torch import Tensor

from specprefill_kernels import _cuda
from specprefill_kernels.ops.finalize.native import arguments, new_importance
from specprefill_kernels.ops.finalize.reference import check_contents

unavailable = _cuda.unavailable
DEVICE_TYPE = _cuda.DEVICE_TYPE


def finalize_importance(
    state: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
) -> Tensor:
    if _cuda.checks_values():
        check_contents(state, seq_lens, num_look_ahead)
    compiled, importance = _cuda.module(), new_importance(state)
    options = (reduce, pool_kernel_size, pool_edge)
    args = arguments(compiled, state, seq_lens, num_look_ahead, *options, importance)
    _cuda.call(compiled.finalize_cuda, args, on=state)
    return importance
