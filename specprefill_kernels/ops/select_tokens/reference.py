"""The composite by its definition: the three ops one after the other."""

from torch import Tensor

from specprefill_kernels.ops.finalize.reference import finalize_importance
from specprefill_kernels.ops.gather.reference import gather_tokens
from specprefill_kernels.ops.select.budget import Budget
from specprefill_kernels.ops.select.reference import select_chunks


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
