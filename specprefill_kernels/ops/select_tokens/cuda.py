"""The composite on the CUDA kernels: one call of the compiled module, one launch (csrc/select)."""

from torch import Tensor

from specprefill_kernels import _cuda
from specprefill_kernels.ops.finalize import native as finalize_native
from specprefill_kernels.ops.finalize.reference import check_contents as check_state
from specprefill_kernels.ops.gather import native as gather_native
from specprefill_kernels.ops.gather.reference import check_token_contents
from specprefill_kernels.ops.select import native as select_native
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select.reference import check_contents as check_importance

unavailable = _cuda.unavailable
DEVICE_TYPE = _cuda.DEVICE_TYPE


def select_tokens(
    state: Tensor,
    x: Tensor,
    seq_lens: Tensor | None,
    num_look_ahead: Tensor | None,
    protect: Tensor | None,
    reduce: str,
    pool_kernel_size: int,
    pool_edge: str,
    budget: Budget,
    token_dim: int,
) -> tuple[Tensor, ...]:
    if _cuda.checks_values():
        check_state(state, seq_lens, num_look_ahead)
    compiled = _cuda.module()
    importance = finalize_native.new_importance(state)
    indices, num_kept, overflow = selection = select_native.new_selection(importance, protect, budget)
    packed = gather_native.new_packed(x, indices, False, token_dim)
    options = (reduce, pool_kernel_size, pool_edge)
    finalize = finalize_native.arguments(compiled, state, seq_lens, num_look_ahead, *options, importance)
    select = select_native.arguments(compiled, importance, seq_lens, protect, budget, selection)
    gather = gather_native.token_arguments(compiled, x, indices, num_kept, None, token_dim, packed)
    memory, size = _cuda.scratch(compiled.select_workspace_size_cuda(select), None, state)
    _cuda.call(compiled.select_tokens_cuda, finalize, select, gather, memory.data_ptr(), size, on=state)
    if _cuda.checks_values():
        check_importance(importance, seq_lens, budget)
        check_token_contents(x, indices, num_kept, None, token_dim)
    return importance, indices, num_kept, overflow, *packed
