"""Which characters of a rendered chat the template wrote, and which came from the messages.

Templates are programs: they strip contents, repeat them, drop reasoning, insert system prompts. So nothing is guessed
from the look of markers. The messages are rendered a second time with unique words in place of their contents: what is
left is the template's own text. Three ways, the first that works:

    1. all contents at once; putting them back (as they are, stripped, or JSON-escaped) must give the real text again;
       one that the template changes reaches to where the template's own text goes on
    2. one content at a time; what the two renderings do not share is what that content became
    3. contents that stand in the real text exactly once; `notes` name what could not be found
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from specprefill_kernels.loop.budgets import Span
from specprefill_kernels.loop.prompts import Prompt, render

# Fields of a message, and of what goes to the template beside the messages, that hold text and not structure.
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")
_OPTION_TEXTS = ("documents",)
_PLACES = 8  # where a changed content may end: beyond that its marker is no marker
_SYSTEM = ("system", "developer")


class Slot(NamedTuple):
    """A text that goes into a template: where it is, and what it says. `message` is None for the options' texts."""

    message: int | None
    role: str
    path: tuple[Any, ...]
    text: str


class Region(NamedTuple):
    """Characters [start, end) of the rendered text, which one slot became."""

    start: int
    end: int
    slot: Slot


@dataclass(frozen=True)
class TemplateText:
    """A rendered chat taken apart.

    Attributes:
        regions: what came from the messages, in the text's order, without overlaps.
        own: the characters that the template wrote, as ranges; None when some content could not be found, so that it is
            not known which they are.
        notes: what could not be found, in words.
    """

    regions: tuple[Region, ...]
    own: tuple[Span, ...] | None
    notes: tuple[str, ...]


def take_apart(prompt: Prompt, tokenizer: Any) -> TemplateText:
    """Find what the template wrote into `prompt.text`."""
    assert prompt.text is not None
    assert prompt.messages is not None
    source = _Source(prompt.messages, prompt.template_options, tokenizer)
    slots = source.slots
    words = _unique_words(len(slots), prompt.text)
    rendered = source.render(dict(zip(slots, words)))
    if rendered is not None:
        regions = _put_back(prompt.text, rendered, dict(zip(words, slots)))
        if regions is not None:
            return TemplateText(tuple(regions), complement(regions, len(prompt.text)), _dropped(slots, regions))
    return _one_by_one(prompt.text, source, words)


class _Source:
    """The messages and options of a chat, which may be rendered with other texts in them."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], tokenizer: Any) -> None:
        self._messages = messages
        self._options = options
        self._tokenizer = tokenizer
        self.slots = [slot for slot in self._find() if slot.text.strip()]

    def _find(self) -> Iterator[Slot]:
        for index, message in enumerate(self._messages):
            role = str(message.get("role", ""))
            for path, text in _message_texts(message):
                yield Slot(index, role, path, text)
        for name in _OPTION_TEXTS:
            for path, text in _leaves(self._options.get(name), (name,)):
                yield Slot(None, name, path, text)

    def render(self, texts: Mapping[Slot, str]) -> str | None:
        """The chat with these texts in these slots; None where the template refuses them."""
        messages, options = _copied(list(self._messages)), dict(self._options)
        for name in _OPTION_TEXTS:
            if name in options:
                options[name] = _copied(options[name])
        for slot, text in texts.items():
            owner: Any = options if slot.message is None else messages[slot.message]
            for step in slot.path[:-1]:
                owner = owner[step]
            owner[slot.path[-1]] = text
        try:
            return render(self._tokenizer, messages, options)
        except Exception:  # a template is the user's program and may refuse a text in any way it likes
            return None


def _copied(value: Any) -> Any:
    """New containers around the same leaves: an image among the parts of a message is not copied."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _message_texts(message: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    for name in _TEXTS:
        value = message.get(name)
        if isinstance(value, str):
            yield (name,), value
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield (name, index, "text"), part["text"]
                elif isinstance(part, str):
                    yield (name, index), part
    calls = message.get("tool_calls")
    for index, call in enumerate(calls if isinstance(calls, (list, tuple)) else ()):
        inner = call.get("function", call) if isinstance(call, dict) else {}
        where = ("tool_calls", index, "function") if inner is not call else ("tool_calls", index)
        yield from _leaves(inner.get("arguments"), (*where, "arguments"))


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, (*path, name))


def _unique_words(count: int, text: str) -> list[str]:
    """Words that no text, template or JSON escape changes, none of which is in `text` or in another."""
    stem = "qzx"
    while stem in text:
        stem += "qzx"
    return [f"{stem}{index}k" for index in range(count)]


def _put_back(text: str, rendered: str, words: Mapping[str, Slot]) -> list[Region] | None:
    """Regions of `text` when it is `rendered` with texts in place of words; None when it is not."""
    stem = next(iter(words))[:-2] if words else "\0"  # the first word is the stem and "0k"
    found = re.split(f"({stem}[0-9]+k)", rendered)
    if not all(word in words for word in found[1::2]):
        return None
    own, slots = found[::2], [words[word] for word in found[1::2]]
    if not text.startswith(own[0]):
        return None
    seen: set[tuple[int, int]] = set()
    # Depth first over the few forms that a text may have; `trail` is a linked list of the regions so far.
    stack: list[tuple[int, int, Any]] = [(0, len(own[0]), None)]
    while stack:
        index, position, trail = stack.pop()
        if index == len(slots):
            if position == len(text):
                return _unwound(trail)
            continue
        following = own[index + 1]
        ends = [position + len(form) for form in _forms(slots[index].text) if text.startswith(form, position)]
        # A text that is there as it was comes before one that the template changed.
        steps = []
        for end in dict.fromkeys([*ends, *_ends_of_changed(text, position, following)]):
            behind = end + len(following)
            if (index + 1, behind) not in seen and text.startswith(following, end):
                seen.add((index + 1, behind))
                steps.append((index + 1, behind, (trail, Region(position, end, slots[index]))))
        stack += reversed(steps)
    return None


def _ends_of_changed(text: str, position: int, following: str) -> list[int]:
    """Where a changed text may end that starts at `position`: the first few places of what follows it."""
    if not following.strip():
        return []
    ends: list[int] = []
    end = text.find(following, position)
    while end >= 0 and len(ends) < _PLACES:
        ends.append(end)
        end = text.find(following, end + 1)
    return ends


def _unwound(trail: Any) -> list[Region]:
    regions = []
    while trail is not None:
        trail, region = trail
        regions.append(region)
    return regions[::-1]


def _forms(text: str) -> list[str]:
    """What templates make of a text without changing what it says, likeliest first."""
    forms = [text, text.strip(), text.lstrip(), text.rstrip()]
    for ascii_only in (False, True):
        forms += [json.dumps(form, ensure_ascii=ascii_only)[1:-1] for form in forms[:2]]
    return list(dict.fromkeys(forms))


# Slots at both ends of a chat that are rendered one by one.
_FIRST, _LAST = 16, 48


def _one_by_one(text: str, source: _Source, words: Sequence[str]) -> TemplateText:
    regions: list[Region] = []
    lost: list[Slot] = []
    notes: list[str] = []
    looked_for = {*source.slots[:_FIRST], *source.slots[-_LAST:]}
    for slot, word in zip(source.slots, words):
        # Each costs a rendering of the whole chat. In the middle of a long one a slot is found by its text, or not.
        rendered = source.render({slot: word}) if slot in looked_for else None
        if rendered is None:
            span = None
        elif word in rendered:
            span = _replaced(text, rendered, word)
        elif rendered == source.render({slot: word + word}):
            continue  # the template drops it, whatever it says
        else:
            span = _difference(text, rendered)
        if span is None:
            span = _only_place(text, slot.text)
        if span is None:
            lost.append(slot)
        else:
            regions.append(Region(*span, slot))
            if rendered is not None and rendered.count(word) > 1:
                notes.append(f"{_called(slot)} is there more than once, changed; what is between counts as content")
    regions = _disjoint(regions)
    notes += [f"{_called(slot)} was not found in the chat template's text" for slot in lost]
    own = complement(regions, len(text))
    if lost:
        notes.append("of the template's text only special tokens are protected")
    return TemplateText(tuple(regions), None if lost else own, (*notes, *_dropped(source.slots, [*regions, *lost])))


def _replaced(text: str, rendered: str, word: str) -> Span | None:
    """What stands in `text` where `rendered` has the word: all that the two do not share."""
    front, back = rendered.split(word)[0], rendered.split(word)[-1]
    start = shared_start(text, front)
    end = len(text) - shared_end(text[start:], back)
    return (start, end) if start < end else None


def _only_place(text: str, content: str) -> Span | None:
    for form in _forms(content):
        # "user" may stand just once too, in a marker
        if len(form) >= 16 and text.count(form) == 1:
            start = text.index(form)
            return start, start + len(form)
    return None


def _disjoint(regions: list[Region]) -> list[Region]:
    """In the text's order; where two overlap (both were repeated around each other) the later one loses its start."""
    result: list[Region] = []
    for region in sorted(regions):
        start = max(region.start, result[-1].end if result else 0)
        if start < region.end:
            result.append(Region(start, region.end, region.slot))
    return result


def complement(regions: Sequence[Region], length: int) -> tuple[Span, ...]:
    """The characters of a text of `length` that are in no region."""
    edges = [0, *(edge for region in regions for edge in region[:2]), length]
    return tuple((start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end)


def _dropped(slots: Sequence[Slot], found: Sequence[Region | Slot]) -> tuple[str, ...]:
    """Notes on system prompts and user turns that the template left out: those are never left out on purpose."""
    there = {item.slot if isinstance(item, Region) else item for item in found}
    gone = [slot for slot in slots if slot not in there and slot.role in (*_SYSTEM, "user")]
    return tuple(f"{_called(slot)} is not in the chat template's text" for slot in gone)


def _called(slot: Slot) -> str:
    if slot.message is None:
        return f"a text of {slot.role}"
    return f"the {slot.path[0]} of message {slot.message} ({slot.role})"


def shared_start(a: str, b: str) -> int:
    """How many characters a and b begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared_end(a: str, b: str) -> int:
    """How many characters a and b end with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[len(a) - middle : len(a) - low] == b[len(b) - middle : len(b) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def tool_definitions(prompt: Prompt, tokenizer: Any) -> Span | None:
    """Where the template wrote `tools`: what a rendering without them does not have. Messages may lie inside."""
    assert prompt.text is not None
    assert prompt.messages is not None
    if not prompt.template_options.get("tools"):
        return None
    options = {name: value for name, value in prompt.template_options.items() if name != "tools"}
    return _difference(prompt.text, _Source(prompt.messages, options, tokenizer).render({}))


def inserted_system_prompt(prompt: Prompt, tokenizer: Any) -> Span | None:
    """Where the template wrote a system prompt of its own: what another one would stand in place of."""
    assert prompt.text is not None
    assert prompt.messages is not None
    if prompt.messages and prompt.messages[0].get("role") in _SYSTEM:
        return None
    word = _unique_words(1, prompt.text)[0]
    messages = [{"role": "system", "content": word}, *prompt.messages]
    rendered = _Source(messages, prompt.template_options, tokenizer).render({})
    if rendered is None or rendered.count(word) != 1:
        return None
    return _difference(prompt.text, rendered)


def generation_prompt(prompt: Prompt, tokenizer: Any) -> Span | None:
    """Where the template opens the answer."""
    assert prompt.text is not None
    assert prompt.messages is not None
    options = {**prompt.template_options, "add_generation_prompt": False}
    without = _Source(prompt.messages, options, tokenizer).render({})
    if without is None or not prompt.text.startswith(without) or len(without) == len(prompt.text):
        return None
    return len(without), len(prompt.text)


def _difference(text: str, other: str | None) -> Span | None:
    if other is None:
        return None
    start = shared_start(text, other)
    end = len(text) - shared_end(text[start:], other[start:])
    return (start, end) if start < end else None


def is_system(slot: Slot) -> bool:
    return slot.role in _SYSTEM
