"""What of a prompt must survive: a chat template's parts by default, and whatever a call names.

Protection counts in tokens: a role marker costs its own tokens, see `budgets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.budgets import spans_of_mask
from specprefill_kernels.loop.prompts import Prompt, encoded_prompt
from specprefill_kernels.loop.results import Span


@dataclass(frozen=True)
class Characters:
    """A range of characters, end exclusive: of the prompt's text, or of messages[message]["content"]."""

    start: int
    end: int
    message: int | None = None


@dataclass(frozen=True)
class Protection:
    """What must survive of one prompt.

    Attributes:
        mask: [T] bool on the CPU; None when nothing is protected.
        spans: the same as merged (start, end) token pairs.
        parts: label -> tokens ("system", "tools", "markers", "turn end", "user"); a token counts once, for the first.
        notes: what could not be found, in words.
    """

    mask: Tensor | None = field(default=None, repr=False)
    spans: tuple[Span, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_protection(
    prompt: Prompt, user_spans: Sequence[Any] | None, tokenizer: Any, config: SpecPrefillConfig
) -> Protection:
    """What must survive of this prompt.

    Args:
        user_spans: (start, end) token pairs, end exclusive; passages of the prompt's text, in all their occurrences; or
            `Characters`.

    Raises:
        ValueError: a span is empty, leaves the prompt, or is not in its text.
    """
    seq_len = prompt.input_ids.shape[1]
    masks: dict[str, Tensor] = {}
    for index, span in enumerate(user_spans or ()):
        mask = _user_mask(prompt, span, f"protect[{index}]", tokenizer, seq_len)
        masks["user"] = masks["user"] | mask if "user" in masks else mask
    return _protection(masks, ())


def _protection(masks: Mapping[str, Tensor], notes: tuple[str, ...]) -> Protection:
    union: Tensor | None = None
    parts = {}
    for label, mask in masks.items():
        fresh = mask if union is None else mask & ~union
        if bool(fresh.any()):
            parts[label] = int(fresh.sum())
        union = mask if union is None else mask | union
    if union is None or not parts:
        return Protection(notes=notes)
    return Protection(union, spans_of_mask(union), parts, notes)


def _user_mask(prompt: Prompt, span: Any, name: str, tokenizer: Any, seq_len: int) -> Tensor:
    if isinstance(span, (str, Characters)):
        if prompt.text is None:
            raise ValueError(f"{name}: expected (start, end) token spans where the prompt came as ids, got {span!r}")
        text, spans = encoded_prompt(prompt, tokenizer)
        ranges = _occurrences(text, span, name) if isinstance(span, str) else _characters(text, span, name)
        mask = tokens_of(ranges, spans, len(text))
        if not bool(mask.any()):
            raise ValueError(f"{name}: expected characters that have tokens, got {span!r}")
        return mask
    try:
        start, end = span
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a pair (start, end), a passage or Characters, got {span!r}") from None
    if not 0 <= start < end <= seq_len:
        raise ValueError(f"{name}: expected 0 <= start < end <= {seq_len}, got ({start}, {end})")
    mask = torch.zeros(seq_len, dtype=torch.bool)
    mask[start:end] = True
    return mask


def tokens_of(ranges: Sequence[Span], spans: Tensor, length: int) -> Tensor:
    """[T] bool: the tokens that hold a character of one of these ranges.

    Args:
        spans: [T, 2], each token's characters.
        length: characters of the text.
    """
    wanted = torch.zeros(length + 1, dtype=torch.int64)
    for start, end in ranges:
        wanted[start + 1 : end + 1] = 1
    before = wanted.cumsum(0)
    return before[spans[:, 1]] > before[spans[:, 0]]


def _occurrences(text: str, passage: str, name: str) -> list[Span]:
    found: list[Span] = []
    start = text.find(passage) if passage else -1
    while start >= 0:
        found.append((start, start + len(passage)))
        start = text.find(passage, start + 1)  # they may overlap
    if not found:
        raise ValueError(f"{name}: expected a passage of the prompt's text, got {passage!r}")
    return found


def _characters(text: str, characters: Characters, name: str) -> list[Span]:
    start, end = characters.start, characters.end
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{name}: expected 0 <= start < end <= {len(text)} characters, got ({start}, {end})")
    return [(start, end)]
