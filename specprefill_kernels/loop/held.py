"""The base's cache between two turns of a conversation: what is in it, what of it a turn may keep, and how to go on.

A cache entry depends on the tokens in front of it that the base has read, and on nothing else. So the entries that a
new prompt may use are the longest run from the first on whose ids stand in the new prompt at the same positions, as far
as no token between them is to be read too. Everything behind that is computed again.

    held     the cached positions that the new prompt may use
    anew     what a run from scratch would keep
    wanted   of `anew`: what is protected, and the best `bring_back` of the rest
    cut      the first wanted position that is not held; the end of the held ones if there is none
    kept     held in front of the cut, `anew` from the cut on

Then the base never computes more tokens than a run from scratch; nothing is computed twice unless something wanted was
dropped before; and kept tokens do not pile up, since each stretch of the cache comes from ONE turn's selection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.budgets import budget_tokens, spans_of_mask
from specprefill_kernels.loop.cache import layers_of
from specprefill_kernels.loop.prefill import BaseRun
from specprefill_kernels.loop.results import PromptSelection


@dataclass(frozen=True)
class Joined:
    """What a turn keeps: `selection` with `kept_indices` [K]; the first `reused` of them are in the cache already."""

    selection: PromptSelection
    reused: int


class HeldRun(BaseRun):
    """A `BaseRun` that outlives its prompt: it knows the id and position of each cache entry, and can be cut back.

    Every layer's whole cache is kept, in dense turns too, so that a sparse turn may follow.

    The record is written after a forward that came to its end. `crop` cuts every layer back to the record, so a forward
    that was interrupted in its middle leaves nothing behind.
    """

    def __init__(self, model: Any, room: int = 256) -> None:
        super().__init__(model, 0, sparse=True, room=room)
        self._ids: list[Tensor] = []
        self._positions: list[Tensor] = []

    def entries(self) -> tuple[Tensor, Tensor]:
        """(ids [E], positions [E]) of the cached tokens, ascending, on the CPU."""
        if len(self._ids) > 1 or (self._ids and self._ids[0].device.type != "cpu"):
            self._ids, self._positions = [torch.cat(self._ids).cpu()], [torch.cat(self._positions).cpu()]
        if not self._ids:
            nothing = torch.zeros(0, dtype=torch.int64)
            return nothing, nothing
        return self._ids[0], self._positions[0]

    def usable(self, input_ids: Tensor) -> Tensor:
        """Positions [U] of the leading entries that stand in `input_ids` [T], its last token apart.

        The last token is always computed: the answer is read off its logits.
        """
        ids, positions = self.entries()
        inside = int((positions < input_ids.shape[0] - 1).sum())
        same = input_ids.cpu()[positions[:inside]] == ids[:inside]
        return positions[: int(same.int().cumprod(0).sum())]

    def go_on(self, entries: int, prompt_len: int) -> None:
        """Keep the first `entries` entries, for a prompt of `prompt_len` tokens."""
        ids, positions = self.entries()
        self._ids, self._positions = [ids[:entries]], [positions[:entries]]
        for layer in layers_of(self.cache):
            layer.truncate(entries)
        self._key_positions = positions[:entries].to(self._model.device) if entries else None
        self._next_position = prompt_len

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        logits = super()._forward(input_ids, positions)
        self._ids.append(input_ids[0])
        self._positions.append(positions)
        return logits


def join(
    anew: PromptSelection,
    held: Tensor,
    config: SpecPrefillConfig,
    *,
    bring_back: float = 1.0,
    growth: float | None = None,
) -> Joined:
    """What this turn keeps, see this file's head.

    Args:
        anew: what a run from scratch would keep.
        held: [U] ascending positions whose cache entries the prompt may use.
        bring_back: fraction of what a run from scratch would keep of the earlier turns, best chunks first, that must be
            kept even where that means to compute again what comes after it; one chunk at least. 1 brings back whatever
            a run from scratch would keep; 0 nothing but protected tokens.
        growth: kept tokens may be this many times `anew`'s, and `config.min_prompt_tokens` in any case; where they
            would be more, the cut comes earlier. None: no limit.
    """
    seq_len = anew.prompt_tokens
    chosen, cached = _mask(anew.kept_indices, seq_len), _mask(held, seq_len)
    end = int(held[-1]) + 1 if held.shape[0] else 0
    missing = _wanted(anew, chosen, end, config, bring_back) & ~cached
    cut = min(end, int(missing.int().argmax()) if bool(missing.any()) else end)
    room = None if growth is None else max(int(growth * anew.kept_tokens), config.min_prompt_tokens)
    bound = cut if room is None or anew.mode == "dense" else _bounded(cached, chosen, cut, room)
    kept = torch.where(torch.arange(seq_len) < bound, cached, chosen)
    reused, count = int(cached[:bound].sum()), int(kept.sum())
    selection = replace(
        anew,
        kept_indices=kept.nonzero()[:, 0].to(anew.kept_indices.device),
        spans=spans_of_mask(kept),
        mode="dense" if count == seq_len else "sparse",
        reason=_reason(anew, count, reused, end=end, cut=cut, bound=bound),
        overflow=anew.overflow or count > (budget_tokens(config, seq_len) or seq_len),
    )
    return Joined(selection, reused)


def _wanted(anew: PromptSelection, chosen: Tensor, end: int, config: SpecPrefillConfig, bring_back: float) -> Tensor:
    """[T] bool: what of `chosen` must not be missing in front of `end`."""
    if anew.importance is None or anew.mode == "dense" or bring_back >= 1:
        return chosen
    protected = torch.zeros_like(chosen)
    for first, last in anew.protected:
        protected[first:last] = True
    wanted = chosen & protected
    # The rest in whole chunks, best first. The new turn's own tokens take no part: they are kept anyway.
    rest = (chosen & ~protected)[:end].nonzero()[:, 0]
    if not bring_back or not rest.shape[0]:
        return wanted
    chunk = rest // config.chunk_size
    sizes = chunk.bincount()
    sums = chunk.bincount(anew.importance.cpu().double()[rest])
    ranked = (sums / sizes).nan_to_num(-1.0).argsort(descending=True, stable=True)
    best = ranked[sizes[ranked].cumsum(0) <= bring_back * rest.shape[0]]
    best = best if best.shape[0] else ranked[:1]
    wanted[rest[torch.isin(chunk, best)]] = True
    return wanted


def _bounded(cached: Tensor, chosen: Tensor, cut: int, room: int) -> int:
    """The last place up to `cut` where going over from `cached` to `chosen` keeps at most `room` tokens."""
    zero = torch.zeros(1, dtype=torch.int64)
    before = torch.cat([zero, cached.cumsum(0)])
    after = chosen.sum() - torch.cat([zero, chosen.cumsum(0)])
    fits = (before + after <= room)[: cut + 1].nonzero()[:, 0]
    return int(fits[-1]) if fits.shape[0] else 0


def _mask(positions: Tensor, seq_len: int) -> Tensor:
    mask = torch.zeros(seq_len, dtype=torch.bool)
    mask[positions.cpu()] = True
    return mask


def _reason(anew: PromptSelection, count: int, reused: int, *, end: int, cut: int, bound: int) -> str:
    if not end:
        return anew.reason
    if bound < cut:
        why = f", computed anew from position {bound} on because the cache has outgrown the budget"
    elif cut < end:
        why = f", computed anew from position {cut} on, where dropped tokens come back"
    else:
        why = ""
    total = anew.prompt_tokens
    return f"kept {count} of {total} tokens, {reused} of them from the cache{why}; from scratch: {anew.reason}"
