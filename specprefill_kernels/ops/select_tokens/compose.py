"""`select_tokens` from its three ops, for backends that have no code of their own for the whole."""

from collections.abc import Callable

from torch import Tensor

from specprefill_kernels.ops.select.budget import Budget


def compose(
    finalize_importance: Callable[..., Tensor],
    select_chunks: Callable[..., tuple[Tensor, Tensor, Tensor]],
    gather_tokens: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, ...]]:
    """One backend's three functions, one after the other."""

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

    return select_tokens
