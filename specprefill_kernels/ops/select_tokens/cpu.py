"""The composite on the compiled CPU kernels: the three ops one after the other, as a launch costs nothing there."""

from torch import Tensor

from specprefill_kernels import _native
from specprefill_kernels.ops.finalize.cpu import finalize_importance
from specprefill_kernels.ops.gather.cpu import gather_tokens
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select.cpu import select_chunks

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
    importance = finalize_importance(state, seq_lens, num_look_ahead, reduce, pool_kernel_size, pool_edge)
    indices, num_kept, overflow = select_chunks(importance, seq_lens, protect, budget)
    return importance, indices, num_kept, overflow, *gather_tokens(x, indices, num_kept, None, token_dim)
