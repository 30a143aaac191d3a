"""One prompt with what is known about it, and the means to build one of an exact length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A prompt whose answer and whose evidence are known.

    Attributes:
        task: name in `TASKS`.
        seed: what the sample was drawn with.
        prompt: the user's message; a chat template is not part of it.
        answers: what has to be in the model's answer, or the line it has to write.
        evidence: (start, end) character ranges of `prompt`, ascending, end exclusive: the text without which nobody can
            answer.
        metric: how an answer is judged: "contains_all", "contains_any", "edit_similarity" or "f1".
        max_new_tokens: enough for a short right answer.
        context_tokens: the length that was asked for.
        prompt_tokens: the length of `prompt` by the tokenizer it was made with, without special tokens.
    """

    task: str
    seed: int
    prompt: str
    answers: tuple[str, ...]
    evidence: tuple[tuple[int, int], ...]
    metric: str
    max_new_tokens: int
    context_tokens: int
    prompt_tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    def evidence_texts(self) -> tuple[str, ...]:
        return tuple(self.prompt[start:end] for start, end in self.evidence)


class Draft:
    """A text in the making, which remembers where its evidence lies."""

    def __init__(self, text: str = "") -> None:
        self._parts = [text]
        self._length = len(text)
        self.evidence: list[tuple[int, int]] = []

    def add(self, text: str, *, evidence: bool = False) -> Draft:
        """Appends `text`; with `evidence` all of it counts, but for white space at its end."""
        if evidence:
            self.evidence.append((self._length, self._length + len(text.rstrip())))
        self._parts.append(text)
        self._length += len(text)
        return self

    def break_paragraph(self) -> Draft:
        """Whatever white space the text ends with becomes one empty line."""
        while self._parts and not self._parts[-1].strip():
            self._length -= len(self._parts.pop())
        if self._parts:
            last = self._parts.pop()
            self._length -= len(last)
            self.add(last.rstrip() + "\n\n")
        return self

    @property
    def text(self) -> str:
        return "".join(self._parts)


def count_tokens(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def fit(build: Callable[[int], Draft], tokens: int, tokenizer: Any, most: int | None = None) -> tuple[Draft, int]:
    """The longest draft of at most `tokens` tokens, or the first found within half a percent of them.

    Args:
        build: makes a draft from an amount of filler (words or lines); more filler, more tokens.
        most: the largest amount there is; None: `tokens`, for a word is a token at least.

    Returns:
        The draft and its tokens.

    Raises:
        ValueError: even the draft without filler is longer, or there is not enough filler.
    """
    low, high = 0, tokens if most is None else most
    best = build(0)
    best_count = least = count_tokens(best.text, tokenizer)
    if least > tokens:
        raise ValueError(f"tokens: expected at least {least}, which the question and its evidence take, got {tokens}")
    while low < high and best_count < 0.995 * tokens:
        middle = (low + high + 1) // 2
        draft = build(middle)
        count = count_tokens(draft.text, tokenizer)
        if count > tokens:
            high = middle - 1
        else:
            low, best, best_count = middle, draft, count
    if best_count < 0.98 * tokens and most is not None and low == most:
        raise ValueError(f"sources: expected text for {tokens} tokens, got {best_count} of them")
    return best, best_count


def draw(task: str, seed: int, tokens: int) -> random.Random:
    """A generator of its own for each sample; text seeds are hashed alike in every Python and process."""
    return random.Random(f"{task}/{seed}/{tokens}")


def different(draw_one: Callable[[], str], count: int, taken: Sequence[str] = ()) -> list[str]:
    """`count` values, none within another or within a text of `taken`."""
    found: list[str] = []
    while len(found) < count:
        value = draw_one()
        if not any(value in other or other in value for other in found) and not any(value in text for text in taken):
            found.append(value)
    return found


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())
