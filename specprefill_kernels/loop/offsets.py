"""Which characters of a text each token stands for, for any tokenizer.

Fast tokenizers report spans, but not all characters have one: GPT-2's post-processor trims the space off " word", a
normalizer may delete characters, and tokens that a post-processor adds (BOS, EOS) all report (0, 0). Importance would
be lost there. Here every character belongs to a token: white space to the one behind it, as in " word"; anything else,
a combining mark for instance, to the one before it; and an added token is a point between its neighbours.

A tokenizer without spans is decoded token by token; the pieces have to join to the text, or it is an error.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class NoSpans(ValueError):
    """A tokenizer does not know which characters its tokens stand for."""


class Encoded(NamedTuple):
    """One text in one tokenizer's tokens.

    Attributes:
        ids: T token ids.
        spans: [T, 2] int64, characters (start, end) of each, end exclusive; start == end for one that has none.
        added: [T] bool, which of them the tokenizer put around the text (BOS, EOS).
    """

    ids: list[int]
    spans: Tensor
    added: Tensor


def encode(tokenizer: Any, text: str, *, special: bool, name: str = "tokenizer") -> Encoded:
    """Tokens and spans of a text.

    Args:
        special: whether the tokenizer adds its special tokens around the text.
        name: what an error calls the tokenizer.

    Raises:
        NoSpans: the tokenizer knows no spans, and its tokens do not decode to the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _decoded(tokenizer, text, special, name)
    return told(tokenizer(text, add_special_tokens=special).encodings[0], text)


def told(encoding: Any, text: str) -> Encoded:
    """What a fast tokenizer's own record of an encoded text says. Its lists are long; nothing else asks for them."""
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
    spans = torch.from_numpy(offsets)
    added = torch.from_numpy(np.array(encoding.special_tokens_mask, dtype=bool))
    return Encoded(encoding.ids, complete(spans, added, text), added)


def complete(spans: Tensor, added: Tensor, text: str) -> Tensor:
    """Spans that leave no character out: see the top of this file."""
    own = (~added).nonzero()[:, 0]
    result = spans.clone()
    if own.numel():
        result[own] = _without_gaps(spans[own], text)
    # An added token stands behind every character before it.
    reached = torch.where(added, torch.zeros_like(result[:, 1]), result[:, 1]).cummax(0).values if len(spans) else None
    if reached is not None:
        result[added] = reached[added][:, None].expand(-1, 2)
    return result


def _without_gaps(spans: Tensor, text: str) -> Tensor:
    start, end = spans[:, 0].clone(), spans[:, 1].clone()
    count = len(text)
    steps = torch.zeros(count + 1, dtype=torch.int64)
    steps.index_add_(0, start, torch.ones_like(start)).index_add_(0, end, -torch.ones_like(end))
    covered = steps.cumsum(0) > 0
    before = torch.cat([end.new_zeros(1), end.cummax(0).values[:-1]])
    # A token may stand behind its neighbour's end and yet nothing be missing: a later one may have what is between.
    gap = ((start > before) & ~covered[before]).nonzero()[:, 0]
    if gap.numel():
        closed = _next(covered[:-1])[before[gap]].minimum(start[gap])
        spaces = torch.tensor([char.isspace() for char in text], dtype=torch.bool)
        border = _next(spaces)[before[gap]].minimum(closed)
        border[gap == 0] = 0  # nothing stands before the first token
        inner = gap > 0
        end[gap[inner] - 1] = end[gap[inner] - 1].maximum(border[inner])
        start[gap] = torch.where(closed == start[gap], border, start[gap])
    end[-1] = end[-1].maximum(torch.tensor(count)) if not bool(covered[count - 1 :].any()) else end[-1]
    return torch.stack([start, end], dim=1)


def _next(flags: Tensor) -> Tensor:
    """[N + 1]: the first True at or behind each place; N where there is none."""
    count = flags.shape[0]
    where = torch.where(flags, torch.arange(count), count)
    where = torch.cat([where, torch.tensor([count])])
    return where.flip(0).cummin(0).values.flip(0)


def _decoded(tokenizer: Any, text: str, special: bool, name: str) -> Encoded:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(text, add_special_tokens=True)["input_ids"]) if special else ids
    front = next((i for i in range(len(full) - len(ids) + 1) if full[i : i + len(ids)] == ids), None)
    joined, spans = pieces(tokenizer, ids)
    # sentencepiece puts a space before the first word; its decoder may or may not take it off again
    if joined.startswith(" ") and joined[1:] == text:
        joined, spans = text, (spans - 1).clamp(min=0)
    if front is None or joined != text:
        raise NoSpans(
            f"{name}: expected a fast tokenizer, which knows each token's characters, or one whose tokens decode to "
            f"the text exactly; {type(tokenizer).__name__} does not"
        )
    behind = len(full) - len(ids) - front
    added = torch.tensor([True] * front + [False] * len(ids) + [True] * behind, dtype=torch.bool)
    points = torch.tensor([[0, 0]] * front, dtype=torch.int64).reshape(-1, 2)
    ends = torch.tensor([[len(text)] * 2] * behind, dtype=torch.int64).reshape(-1, 2)
    return Encoded(full, torch.cat([points, spans, ends]), added)


def pieces(tokenizer: Any, ids: list[int]) -> tuple[str, Tensor]:
    """The text that ids stand for, decoded one by one, and each id's span in it.

    Tokens that only together make a character all have its span.
    """

    def decode(start: int, end: int) -> str:
        text: str = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    found: list[str] = []
    spans: list[tuple[int, int]] = []
    context = done = position = 0
    for end in range(1, len(ids) + 1):
        # A piece is what the newest tokens add to the text of those before them, so that spaces come out right.
        before, now = decode(context, done), decode(context, end)
        if now.endswith(_INCOMPLETE) and end < len(ids):
            continue
        piece = now[len(before) :]
        spans += [(position, position + len(piece))] * (end - done)
        found.append(piece)
        position += len(piece)
        context, done = done, end
    return "".join(found), torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
