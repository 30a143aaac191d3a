"""What of a prompt must survive: a chat template's parts by default, and whatever a call names.

Protection counts in tokens: a role marker costs its own tokens, see `budgets`.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.budgets import Span, spans_of_mask
from specprefill_kernels.loop.offsets import NoSpans
from specprefill_kernels.loop.prompts import Prompt, encoded_prompt
from specprefill_kernels.loop.template import (
    TemplateText,
    complement,
    generation_prompt,
    inserted_system_prompt,
    is_system,
    take_apart,
    tool_definitions,
)

logger = logging.getLogger("specprefill_kernels")


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
        where: label -> merged (start, end) token pairs of the tokens that `parts` counts.
    """

    mask: Tensor | None = field(default=None, repr=False)
    spans: tuple[Span, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    where: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)


def find_protection(
    prompt: Prompt, user_spans: Sequence[Any] | None, tokenizer: Any, config: SpecPrefillConfig
) -> Protection:
    """What must survive of this prompt.

    Args:
        user_spans: (start, end) token pairs, end exclusive; passages of the prompt's text, in all their occurrences; or
            `Characters`. The text of a prompt of ids is what they decode to.

    Raises:
        ValueError: a span is empty, leaves the prompt, or is not in its text.
    """
    seq_len = prompt.input_ids.shape[1]
    masks: dict[str, Tensor] = {}
    notes: tuple[str, ...] = ()
    chat = _Chat(prompt, tokenizer)
    if config.protect == "template" and prompt.messages is not None:
        try:
            masks, notes = _template_masks(chat, config.turn_end_tokens)
        except NoSpans as problem:
            notes = (f"nothing of the chat template is protected: {problem}",)
    elif config.protect == "template":
        notes = _unread_template(prompt, tokenizer)
    for index, span in enumerate(_listed(user_spans)):
        mask = _user_mask(chat, span, f"protect[{index}]", seq_len)
        masks["user"] = masks["user"] | mask if "user" in masks else mask
    for note in notes:
        logger.warning("protect: %s", note)
    return _protection(masks, notes)


class _Chat:
    """A prompt's text, its tokens' characters, and its template's parts: each found out once, when it is needed."""

    def __init__(self, prompt: Prompt, tokenizer: Any) -> None:
        self.prompt = prompt
        self.tokenizer = tokenizer

    @cached_property
    def encoded(self) -> tuple[str, Tensor]:
        return encoded_prompt(self.prompt, self.tokenizer)

    @cached_property
    def parts(self) -> TemplateText:
        return take_apart(self.prompt, self.tokenizer)

    def tokens(self, ranges: Sequence[Span]) -> Tensor:
        text, spans = self.encoded
        return tokens_of(ranges, spans, len(text))


def _template_masks(chat: _Chat, turn_end_tokens: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    text, spans = chat.encoded
    prompt, tokenizer, parts = chat.prompt, chat.tokenizer, chat.parts
    masks: dict[str, Tensor] = {}

    def add(label: str, ranges: Sequence[Span]) -> None:
        mask = tokens_of(ranges, spans, len(text))
        masks[label] = masks[label] | mask if label in masks else mask

    own = complement(parts.regions, len(text)) if parts.own is None else parts.own
    inserted = inserted_system_prompt(prompt, tokenizer)
    add("system", [(r.start, r.end) for r in parts.regions if is_system(r.slot)] + _within(own, inserted))
    add("tools", _within(own, tool_definitions(prompt, tokenizer)))
    if parts.own is not None:
        add("markers", parts.own)
    else:
        special = torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.int64)
        masks["markers"] = torch.isin(prompt.input_ids[0], special)
        answer = generation_prompt(prompt, tokenizer)
        add("markers", [] if answer is None else [answer])
    turns = [r for r in parts.regions if r.slot.role == "user"]
    if turns and turn_end_tokens:
        last = max(turns, key=lambda region: (region.slot.message, region.end))
        add("turn end", [_turn_end(text, spans, (last.start, last.end), turn_end_tokens)])
    return masks, parts.notes


def _within(ranges: Sequence[Span], limit: Span | None) -> list[Span]:
    if limit is None:
        return []
    cut = [(max(start, limit[0]), min(end, limit[1])) for start, end in ranges]
    return [(start, end) for start, end in cut if start < end]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that were added to the vocabulary: what role markers are made of."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _unread_template(prompt: Prompt, tokenizer: Any) -> tuple[str, ...]:
    """A note where a prompt that is no list of messages has a chat template's markers in it all the same."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return ()
    ids = prompt.input_ids[0].tolist()
    # Plain text has those too, at its ends; inside, they are markers where the template says so.
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    inside = set(ids[1:-1]) | ({ids[0], ids[-1]} - ends)
    found = special_ids(tokenizer).intersection(inside)
    markers = [marker.strip() for marker in tokenizer.convert_ids_to_tokens(sorted(found))]
    if not any(marker and marker in template for marker in markers):
        return ()
    came = "ids" if prompt.text is None else "text"
    return (f"nothing of the chat template is protected: a chat that came as {came}; give messages",)


# Where a long turn may be cut, best first: between paragraphs, lines, sentences.
_BORDERS = tuple(map(re.compile, (r"\n\s*\n\s*", r"\n\s*", r"[.!?\u2026][\"')\]\u201d]*\s+|[\u3002\uff01\uff1f]")))


def _turn_end(text: str, spans: Tensor, turn: Span, most: int) -> Span:
    """The last `most` tokens of a turn at most, cut at the earliest border that leaves at least half of that."""
    start, end = turn
    inside = ((spans[:, 0] < end) & (spans[:, 1] > start)).nonzero()[:, 0]
    if inside.numel() <= most:
        return turn
    # Tokens that share a character, as the bytes of an emoji do, come or go together.
    first = max(int(spans[inside[-most], 0]), int(spans[inside[-most - 1], 1]))
    tail = max(start, first - 16)  # a border may end right where the tokens begin
    for border in _BORDERS:
        for match in border.finditer(text, tail, end):
            if first <= match.end() <= (first + end) // 2:
                return match.end(), end
    word = next((m.end() for m in re.compile(r"\s+").finditer(text, tail, end) if first <= m.end() < end), first)
    return word, end


def _protection(masks: Mapping[str, Tensor], notes: tuple[str, ...]) -> Protection:
    union: Tensor | None = None
    parts: dict[str, int] = {}
    where: dict[str, tuple[Span, ...]] = {}
    for label, mask in masks.items():
        fresh = mask if union is None else mask & ~union
        if bool(fresh.any()):
            parts[label], where[label] = int(fresh.sum()), spans_of_mask(fresh)
        union = mask if union is None else mask | union
    if union is None or not parts:
        return Protection(notes=notes)
    return Protection(union, spans_of_mask(union), parts, notes, where)


def _listed(user_spans: Any) -> list[Any]:
    """A bare passage is refused: as a sequence it would protect each of its letters, wherever they stand."""
    if user_spans is None:
        return []
    if isinstance(user_spans, (str, bytes, Characters)) or not hasattr(user_spans, "__iter__"):
        raise ValueError(f"protect: expected a list of token spans, passages or Characters, got {user_spans!r}")
    return list(user_spans)


def _user_mask(chat: _Chat, span: Any, name: str, seq_len: int) -> Tensor:
    if isinstance(span, (str, Characters)):
        if chat.prompt.text is None and chat.tokenizer is None:
            raise ValueError(
                f"{name}: expected (start, end) token spans where the prompt came as ids and no tokenizer says what "
                f"text they are, got {span!r}"
            )
        text, _ = chat.encoded
        ranges = _occurrences(text, span, name) if isinstance(span, str) else _characters(chat, text, span, name)
        mask = chat.tokens(ranges)
        if not bool(mask.any()):
            raise ValueError(f"{name}: expected characters that have tokens, got {span!r}")
        return mask
    try:
        start, end = map(operator.index, span)
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
    step = _least_step(passage) if passage else 0
    start = text.find(passage) if passage else -1
    while start >= 0:
        end = start + len(passage)
        while text.startswith(passage[-step:], end):  # they may overlap: one range for all that do
            end += step
        found.append((start, end))
        start = text.find(passage, end - len(passage) + 1)
    if not found:
        raise ValueError(f"{name}: expected a passage of the prompt's text, got {passage!r}")
    return found


def _least_step(passage: str) -> int:
    """How far apart two occurrences that overlap are at least."""
    step = passage.find(passage[0], 1)
    while step > 0 and not passage.startswith(passage[step:]):
        step = passage.find(passage[0], step + 1)
    return step if step > 0 else len(passage)


def _characters(chat: _Chat, text: str, wanted: Characters, name: str) -> list[Span]:
    start, end = wanted.start, wanted.end
    if wanted.message is None:
        _check_range(start, end, len(text), name)
        return [(start, end)]
    messages = chat.prompt.messages
    if messages is None:
        raise ValueError(f"{name}: expected message=None for a prompt that is no chat, got {wanted.message}")
    if not -len(messages) <= wanted.message < len(messages):
        raise ValueError(f"{name}: expected a message in [-{len(messages)}, {len(messages)}), got {wanted.message}")
    index = wanted.message % len(messages)
    content = messages[index].get("content")
    if not isinstance(content, str):
        raise ValueError(f"{name}: expected a message whose content is text, got {type(content).__name__}")
    _check_range(start, end, len(content), name)
    found = []
    for region in chat.parts.regions:
        if region.slot.message == index and region.slot.path == ("content",):
            written = text[region.start : region.end]
            # A template may strip a content; what is left stands in it as it was.
            shift = content.find(written)
            if shift < 0 or content.find(written, shift + 1) >= 0:
                raise ValueError(
                    f"{name}: expected a message that the chat template writes as it is, but it changes message "
                    f"{index}; give a passage or characters of the rendered text"
                )
            low, high = max(start - shift, 0), min(end - shift, len(written))
            if low < high:
                found.append((region.start + low, region.start + high))
    if not found:
        raise ValueError(f"{name}: expected characters that the chat template writes, got {wanted!r}")
    return found


def _check_range(start: Any, end: Any, length: int, name: str) -> None:
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (start, end))
    if not whole or not 0 <= start < end <= length:
        raise ValueError(f"{name}: expected 0 <= start < end <= {length} characters, got ({start}, {end})")
