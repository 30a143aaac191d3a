"""The chat that a prompt of ids was made of, read back from the text that they decode to.

An inference stack hands over ids; what its chat template wrote into them nobody says. Here the template says it: it is
rendered for short chats of made-up words, and what stands between two words is what it writes between two turns. The
prompt's text is cut there. Nothing rests on a guess: the chat that was found has to give the very same ids, and a
content with a marker in it that the template writes between turns is none: it may be a turn that nobody looked for.

Tool definitions become part of the system prompt, tool calls and results part of their turns: the text is the same. A
system prompt that the template writes inside a user turn, with no marker of its own, stays a part of that turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels.loop.prompts import Prompt, read_prompt, render

# Chats as they mostly are: every beginning of them is rendered.
_USUAL = (("system", "user", "assistant", "user", "assistant"), ("user", "assistant", "user", "assistant"))
# Ways to come to a role that most templates take; any role may follow.
_HEADS = (
    ("system",),
    ("user",),
    ("assistant",),
    ("system", "user"),
    ("user", "system"),
    ("user", "assistant"),
    ("user", "assistant", "system"),
    ("user", "assistant", "tool"),
)
_ROLES = ("user", "assistant", "system", "tool")
_UNUSUAL = tuple((*head, role) for head in _HEADS for role in _ROLES)
# What templates are given beside the messages, as far as it changes how an answer is opened.
_OPTIONS: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False})
_MOST_TURNS = 10_000

Turn = tuple[str, str]  # role and content


def recognize(input_ids: Tensor, tokenizer: Any) -> Prompt | None:
    """The prompt with its messages; None where the ids are no chat of the tokenizer's template, or one that it cannot
    give again, or whose contents hold markers of the template.

    Args:
        input_ids: [1, T].
    """
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    ids = input_ids[0].tolist()
    template = tokenizer.chat_template
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    wanted = input_ids.to("cpu", torch.int64)
    readings = [
        (messages, {**options, **ending})
        for options in _OPTIONS
        if all(name in template for name in options)
        for messages, ending in _readings(text, tokenizer, options)
    ]
    # What a template writes to open an answer could also be an answer that is to go on: the former first.
    for messages, given in sorted(readings, key=lambda reading: "continue_final_message" in reading[1]):
        found = _given_again(messages, tokenizer, given)
        if found is not None and torch.equal(found.input_ids, wanted):
            return found
    return None


def _given_again(messages: Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any]) -> Prompt | None:
    try:
        return read_prompt(messages, tokenizer, options)
    except Exception:  # a template is the user's program and may refuse a chat in any way it likes
        return None


def _readings(
    text: str, tokenizer: Any, options: Mapping[str, Any]
) -> Iterator[tuple[list[dict[str, str]], dict[str, bool]]]:
    """Chats that may have given the text, each with how it ends."""
    grammar = _Grammar(tokenizer, options)
    bos = getattr(tokenizer, "bos_token", None) or ""
    nothing = len(bos) if text.startswith(bos) else 0
    for start, role in grammar.starts(text):
        for turns, opened in grammar.turns(text, start, role):
            if any(marker in content for marker in grammar.markers for _, content in turns):
                continue
            written = len(text) - sum(len(content) for _, content in turns)
            # A text with nothing of a template but BOS is no chat, even where the template would write no more.
            if any(role == "user" for role, _ in turns) and written > nothing:
                yield [{"role": role, "content": content} for role, content in turns], opened


class _Grammar:
    """What a template writes before the first turn, between two turns, and after the last."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._first: dict[str, set[str]] = {}
        self._between: dict[str, set[tuple[str, str]]] = {}  # role -> (text, next role)
        self._last: dict[str, set[tuple[str, bool]]] = {}  # role -> (text, whether it opens the answer)
        for roles in _USUAL:
            for count in range(1, len(roles) + 1):
                self._probe(tokenizer, roles[:count], options)
        known = {role: {text for text, _ in borders} for role, borders in self._between.items()}
        for roles in _UNUSUAL:
            self._probe(tokenizer, roles, options, known)
        self.markers = self._find_markers(tokenizer)

    def _probe(
        self,
        tokenizer: Any,
        roles: Sequence[str],
        options: Mapping[str, Any],
        known: Mapping[str, set[str]] | None = None,
    ) -> None:
        """Learn from one chat. A border of `known` goes on to the role that it is known for, whoever else has it."""
        for opened in (True, False):
            own = _between_words(tokenizer, roles, {**options, "add_generation_prompt": opened})
            if own is None:
                continue
            self._first.setdefault(roles[0], set()).add(own[0])
            for role, following, text in zip(roles, roles[1:], own[1:-1]):
                if text.strip() and text not in (known or {}).get(role, ()):  # white space is no border
                    self._between.setdefault(role, set()).add((text, following))
            self._last.setdefault(roles[-1], set()).add((own[-1], opened))

    def _find_markers(self, tokenizer: Any) -> tuple[str, ...]:
        """What no content holds: whole borders, and added tokens in the least that stands between two turns.

        Around tool results stand tags that answers may hold too, and before some answers an empty thought.
        """
        shortest: dict[tuple[str, str], str] = {}
        for role, borders in self._between.items():
            for text, following in borders:
                if "tool" not in (role, following):
                    pair = role, following
                    shortest[pair] = min(shortest.get(pair, text), text, key=len)
        added = [token for token in tokenizer.get_added_vocab() if token.strip()]
        found = {token for token in added if any(token in text for text in shortest.values())}
        return (*sorted(found), *sorted(set(shortest.values())))

    def starts(self, text: str) -> list[tuple[int, str]]:
        """(where the first content starts, its role), the longest text of the template first."""
        found = {(len(own), role) for role, owns in self._first.items() for own in owns if text.startswith(own)}
        return sorted(found, reverse=True)

    def turns(self, text: str, start: int, role: str) -> Iterator[tuple[list[Turn], dict[str, bool]]]:
        """The text cut wherever the template goes from one turn to another."""
        turns: list[Turn] = []
        while len(turns) < _MOST_TURNS:
            border = self._next_border(text, start, role)
            rest = len(text) if border is None else border[0]
            for own, opened in sorted(self._last.get(role, ()), key=lambda last: len(last[0]), reverse=True):
                end = len(text) - len(own)
                if text.endswith(own) and start <= end <= rest:
                    yield [*turns, (role, text[start:end])], {"add_generation_prompt": opened}
            if border is None:
                if role == "assistant" and start < len(text):
                    yield [*turns, (role, text[start:])], {"continue_final_message": True}
                return
            end, own, following = border
            turns.append((role, text[start:end]))
            start, role = end + len(own), following

    def _next_border(self, text: str, start: int, role: str) -> tuple[int, str, str] | None:
        found = [(text.find(own, start), -len(own), own, following) for own, following in self._between.get(role, ())]
        there = [border for border in found if border[0] >= 0]
        if not there:
            return None
        end, _, own, following = min(there)
        return end, own, following


def _between_words(tokenizer: Any, roles: Sequence[str], options: Mapping[str, Any]) -> list[str] | None:
    """What the template writes around words in place of contents; None where it refuses such a chat."""
    words = [f"qzx{index}k" for index in range(len(roles))]
    try:
        rest = render(tokenizer, [{"role": role, "content": word} for role, word in zip(roles, words)], options)
    except Exception:
        return None
    own = []
    for word in words:
        if rest.count(word) != 1:
            return None
        before, rest = rest.split(word)
        own.append(before)
    return [*own, rest]
