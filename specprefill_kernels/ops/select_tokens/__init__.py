"""The whole tail in one call: from the state of all layers to the packed tokens that the base model prefills."""

from typing import NamedTuple

from torch import Tensor

from specprefill_kernels import _backends
from specprefill_kernels._ops import ops
from specprefill_kernels.ops.finalize import check_finalize
from specprefill_kernels.ops.gather import Packed, check_gather_tokens
from specprefill_kernels.ops.select import Selection, check_budget, check_protect

__all__ = ["TokenSelection", "select_tokens"]


class TokenSelection(NamedTuple):
    """What `select_tokens` returns.

    Attributes:
        packed: the kept tokens of `x`, as `gather_tokens` returns them.
        selection: which they are, as `select_chunks` returns it.
        importance: [B, T] fp32, as `finalize_importance` returns it.
    """

    packed: Packed
    selection: Selection
    importance: Tensor


def select_tokens(
    state: Tensor,
    x: Tensor,
    seq_lens: Tensor | None = None,
    num_look_ahead: Tensor | None = None,
    *,
    reduce: str = "mean",
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    keep_mass: float | None = None,
    chunk_size: int = 32,
    rounding: str = "ceil",
    protect: Tensor | None = None,
    sink: int = 0,
    tail: int = 0,
    token_dim: int = 1,
    pool_kernel_size: int | None = None,
    pool_edge: str = "zero",
    backend: str = "auto",
) -> TokenSelection:
    """`finalize_importance`, `select_chunks` and `gather_tokens` in one call, with their arguments and results.

    Args:
        state: [B, N, T] fp32, from `score_layer_`.
        x: what to pack, [..., B, T, ...] with T on axis `token_dim`; usually input ids [B, T].

    The other arguments and what is raised are those of the three ops.
    """
    _backends.check_name(backend)
    check_finalize(state, seq_lens, num_look_ahead, reduce, pool_kernel_size, pool_edge)
    budget = check_budget(keep_ratio, keep_tokens, keep_mass, chunk_size, rounding, sink, tail)
    check_protect(protect, state.shape[0], state.shape[2], state.device)
    check_gather_tokens(x, state.shape[0], state.device, token_dim, None)
    importance, indices, num_kept, overflow, values, position_ids, offsets = ops.select_tokens(
        state,
        x,
        seq_lens,
        num_look_ahead,
        protect,
        reduce,
        budget.keep_ratio,
        budget.keep_tokens,
        budget.keep_mass,
        chunk_size,
        rounding,
        sink,
        tail,
        token_dim,
        pool_kernel_size or 1,
        pool_edge,
        backend,
    )
    packed = Packed(values, position_ids, offsets, indices.shape[1], token_dim - 1)
    return TokenSelection(packed, Selection(indices, num_kept, overflow), importance)
