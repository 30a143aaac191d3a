"""The composite on the compiled CPU kernels: one call, which sums chunks while their importance is in L1."""

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.finalize import native as finalize_native
from specprefill_kernels.ops.gather import native as gather_native
from specprefill_kernels.ops.select import native as select_native
from specprefill_kernels.ops.select.budget import Budget

unavailable = _native.unavailable


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
    compiled, importance = _native.module(), finalize_native.new_importance(state)
    indices, num_kept, overflow = selection = select_native.new_selection(importance, protect, budget)
    packed = gather_native.new_packed(x, indices, False, token_dim)
    options = (reduce, pool_kernel_size, pool_edge)
    compiled.select_tokens(
        finalize_native.arguments(compiled, state, seq_lens, num_look_ahead, *options, importance),
        select_native.arguments(compiled, importance, seq_lens, protect, budget, selection),
        gather_native.token_arguments(compiled, x, indices, num_kept, None, token_dim, packed),
        _native.threads(),
    )
    return importance, indices, num_kept, overflow, *packed
