"""Which tokens a budget keeps: the best chunks, united with single tokens that must survive.

A chunk that holds a protected token is kept whole by `select_chunks`. That suits a handful of spans; a chat has
hundreds of role markers of a few tokens each, and a chunk of 32 for each of them would eat the budget. So in the loop
protection counts in tokens:

    best(k) = what select_chunks keeps with a budget of k chunks: first those of sink and tail, and the last
    kept    = best(k) united with the protected tokens, k the largest that leaves at most budget * chunk_size tokens

best(k) grows with k and ties have a rule, so there is one such k. With nothing protected k is the budget itself, and
the result select_chunks' own. Where even the forced chunks and the protected tokens are more than the budget, exactly
those are kept and `overflow` is set. keep_mass has no fixed budget: its chunks are united with the protected tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.ops.select import Selection, select_chunks

Span = tuple[int, int]  # [start, end) of tokens or characters


class Kept(NamedTuple):
    """Kept tokens: `mask` [T] bool; `overflow` when they had to exceed the budget."""

    mask: Tensor
    overflow: bool


def budget_tokens(config: SpecPrefillConfig, seq_len: int) -> int | None:
    """Tokens that the budget allows of `seq_len`, in whole chunks. None for keep_mass, which follows the content."""
    chunks = config.budget_chunks(seq_len)
    return None if chunks is None else chunks * config.chunk_size


def keep_tokens(importance: Tensor, must_keep: Tensor | None, config: SpecPrefillConfig) -> Kept:
    """The tokens that `config`'s budget keeps.

    Args:
        importance: [T] fp32.
        must_keep: [T] bool on the same device, or None.

    Work: one `select_chunks`, and about log2(protected chunks) more when tokens are protected.
    """
    seq_len = importance.shape[0]
    chunks = config.budget_chunks(seq_len)
    own = _select(importance, config, **config.budget)
    best = own.mask(seq_len)[0]
    if must_keep is None or not bool(must_keep.any()):
        return Kept(best, bool(own.overflow[0]))
    if chunks is None:
        return Kept(best | must_keep, False)

    def united(k: int) -> Tensor:
        return _select(importance, config, keep_tokens=k * config.chunk_size).mask(seq_len)[0] | must_keep

    limit = chunks * config.chunk_size
    mask = best | must_keep
    if int(mask.sum()) <= limit:
        return Kept(mask, False)
    # So many chunks fit whatever they share with the protected tokens; where they do not, they are the forced ones.
    fits, exceeds = max(1, (limit - int(must_keep.sum())) // config.chunk_size), chunks
    mask = united(fits)
    if int(mask.sum()) > limit:
        return Kept(mask, True)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        trial = united(middle)
        if int(trial.sum()) <= limit:
            fits, mask = middle, trial
        else:
            exceeds = middle
    return Kept(mask, False)


def spans_of_mask(mask: Tensor) -> tuple[Span, ...]:
    """The True stretches of a [T] bool mask as (start, end) pairs, end exclusive."""
    edges = mask.cpu().int().diff(prepend=mask.new_zeros(1).cpu().int(), append=mask.new_zeros(1).cpu().int())
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return tuple(zip(starts, ends))


def _select(importance: Tensor, config: SpecPrefillConfig, **budget: float) -> Selection:
    return select_chunks(
        importance[None],
        chunk_size=config.chunk_size,
        rounding=config.rounding,
        sink=config.sink,
        # The first answer token is read off the last prompt token: without it the answer starts elsewhere.
        tail=max(config.tail, 1),
        backend=config.backend,
        **budget,  # type: ignore[arg-type]
    )
