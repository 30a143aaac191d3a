"""Selections that are known already: the same prompt again, or one that goes on a little, runs no speculator."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.budgets import spans_of_mask
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.results import PromptSelection

if TYPE_CHECKING:
    from specprefill_kernels.loop.prompts import Prompt
    from specprefill_kernels.loop.protection import Protection


@dataclass(frozen=True)
class _Key:
    """Everything that decides a selection. Two keys are equal only if all of it is; the hash is a short cut alone."""

    who: Hashable
    ids: bytes
    text: str | None
    protected: bytes
    told: Hashable  # what the result says about the protection: its parts and what was not found


class SelectionCache:
    """The last selections, by prompt, protection, configuration and models. For `SpecPrefill(selection_cache=...)`.

    Several `SpecPrefill` may share one: a selection is only found by those with the same speculator object, an equal
    config, and, where tokens differ, the same tokenizers. Models are not kept alive by it. Prompts that run dense
    without being scored are not stored: there is nothing to spare. After changing a speculator's weights call `clear`.

    An entry holds about 16 bytes of CPU memory per prompt token. Not thread-safe.

    Args:
        entries: how many selections are held; the one unused for longest goes first.
        suffix_tokens: a prompt that begins with a stored one and has at most this many tokens more uses the longest
            such selection, and keeps all of its own suffix and of its protected tokens. The look-ahead has not seen the
            suffix, so this is for suffixes that ask for nothing new: the opening of an answer, a retry with a few
            tokens more. Such a selection has no importance, is not stored itself, and its `reason` says what the budget
            was spent on.

    Attributes:
        hits, suffix_hits, misses: how often a selection was found, used for a longer prompt, or had to be computed.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, entries: int = 64, suffix_tokens: int = 0) -> None:
        for name, value, least in (("entries", entries, 1), ("suffix_tokens", suffix_tokens, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
        self.entries = entries
        self.suffix_tokens = suffix_tokens
        self.hits = self.suffix_hits = self.misses = 0
        self._stored: OrderedDict[_Key, PromptSelection] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def clear(self) -> None:
        """Forget every selection; the counts stay."""
        self._stored.clear()

    def choose(
        self,
        who: Hashable,
        prompt: Prompt,
        protection: Protection,
        clock: StageClock,
        device: torch.device,
        run: Callable[[], PromptSelection],
        *,
        by_text: bool = False,
    ) -> PromptSelection:
        """The stored selection with `cached=True`, or what `run` returns.

        Args:
            who: identity of whatever decides beside the prompt: see `identity`.
            clock: takes the seconds of looking it up, as "select".
            device: where tensors of a stored selection go.
            run: selects with the speculator.
            by_text: the prompt's text decides too, because the speculator has tokens of its own.
        """
        with clock.stage("select"):
            mask = protection.mask
            key = _Key(
                who,
                prompt.input_ids.cpu().numpy().tobytes(),
                prompt.text if by_text else None,
                b"" if mask is None else mask.cpu().numpy().tobytes(),
                (tuple(protection.where.items()), protection.notes),
            )
            found = self._find(key, prompt, protection, device)
        if found is not None:
            return replace(found, input_ids=prompt.input_ids[0], seconds=dict(clock.seconds), cached=True)
        selection = run()
        if selection.importance is not None:
            self.misses += 1
            self._stored[key] = _stored(selection)
            while len(self._stored) > self.entries:
                self._stored.popitem(last=False)
        return selection

    def _find(self, key: _Key, prompt: Prompt, protection: Protection, device: torch.device) -> PromptSelection | None:
        if key in self._stored:
            self._stored.move_to_end(key)
            self.hits += 1
            return _revived(self._stored[key], device)
        start = self._longest_start(key)
        if start is None:
            return None
        self._stored.move_to_end(start)
        self.suffix_hits += 1
        return _continued(self._stored[start], prompt, protection, device)

    def _longest_start(self, key: _Key) -> _Key | None:
        """The longest stored prompt that `key`'s begins with and exceeds by at most `suffix_tokens`."""
        if not self.suffix_tokens:
            return None
        least = len(key.ids) - 8 * self.suffix_tokens
        found = [k for k in self._stored if k.who == key.who and least <= len(k.ids) and key.ids.startswith(k.ids)]
        return max(found, key=lambda k: len(k.ids), default=None)


def identity(*parts: Any) -> Hashable:
    """What `parts` are, objects by identity and without keeping them alive; plain values by value."""
    return tuple(part if _plain(part) else _Same(part) for part in parts)


def _plain(part: Any) -> bool:
    return part is None or isinstance(part, (int, str, tuple, SpecPrefillConfig))


class _Same:
    """Equal to another one of the same living object."""

    def __init__(self, target: Any) -> None:
        self._target = weakref.ref(target)
        self._hash = id(target)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return NotImplemented
        target = self._target()
        return target is not None and target is other._target()


def _stored(selection: PromptSelection) -> PromptSelection:
    """A copy of its own, in CPU memory."""
    assert selection.importance is not None
    return replace(
        selection,
        input_ids=torch.empty(0, dtype=torch.int64),
        importance=selection.importance.detach().to("cpu", copy=True),
        kept_indices=selection.kept_indices.to("cpu", torch.int32, copy=True),
        layer_importance=None,
        reused_tokens=0,
    )


def _revived(stored: PromptSelection, device: torch.device) -> PromptSelection:
    assert stored.importance is not None
    return replace(
        stored,
        importance=stored.importance.to(device, copy=True),
        kept_indices=stored.kept_indices.to(device, torch.int64),
    )


def _continued(
    stored: PromptSelection, prompt: Prompt, protection: Protection, device: torch.device
) -> PromptSelection:
    """The selection of a prompt that goes on after a stored one."""
    assert stored.importance is not None
    seq_len, known = prompt.input_ids.shape[1], stored.importance.shape[0]
    mask = torch.zeros(seq_len, dtype=torch.bool)
    mask[stored.kept_indices.long()] = True
    mask[known:] = True
    if protection.mask is not None:
        mask |= protection.mask.cpu()
    kept: Tensor = mask.nonzero()[:, 0]
    count = kept.shape[0]
    return replace(
        stored,
        importance=None,
        prediction=None,
        kept_indices=kept.to(device),
        spans=spans_of_mask(mask),
        mode="dense" if count == seq_len else "sparse",
        reason=(
            f"kept {count} of {seq_len} tokens: the budget was spent on the first {known}, whose selection was known "
            f"({stored.reason}); all {seq_len - known} tokens after them are kept beside it"
        ),
        protected=protection.spans,
        protected_parts=protection.where,
    )
