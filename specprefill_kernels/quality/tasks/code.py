"""Code completion: the next line of a real file, which uses a name that was defined much earlier."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from specprefill_kernels.quality.tasks.haystack import Sources, code_files, read
from specprefill_kernels.quality.tasks.sample import Draft, Sample, count_tokens, draw, fit

_INTRODUCTION = "Complete the code below.\n\n"
_QUESTION = "\n\nWrite the next line of this code. Answer with that line only."
_NAME = re.compile(r"[A-Za-z_]\w{4,}")
_DEFINES = re.compile(
    r"\b(?:def|class|func|fn|function|struct|enum|interface|type|const|let|var)\s+([A-Za-z_]\w{4,})"
    r"|^\s*(?:self\.)?([A-Za-z_]\w{4,})\s*(?::[^=]*)?=[^=]"
)
_UNFIT = ("#", '"', "'", "def ", "class ", "import ", "from ")  # comments, texts and beginnings nobody can guess
_SHORTEST = 12  # characters of a line that is worth guessing
_RECENT = 0.25  # of the lines: a definition among so many last lines is no long way back
_DRAWS = 50  # files
_MORE = 1.3  # the window is estimated first, by the file's mean characters a token: so much more is looked at


def code_completion(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """The true next line; evidence is the line that defines a name in it, outside the last quarter of the lines.

    The last quarter does not hold that name, and nothing before the question holds the answer.

    Raises:
        ValueError: the sources are too short, or no line of theirs uses a name defined early enough.
    """
    rng = draw("code_completion", seed, tokens)
    files = code_files(sources)
    for _ in range(_DRAWS):
        lines, first = _lines(rng, files, tokens)
        text = "".join(lines)
        window = tokens * len(text) / max(count_tokens(text, tokenizer), 1)
        code = _Code(lines)
        ends = [end for end in range(first, len(lines)) if code.needs(end, window)]
        rng.shuffle(ends)
        for end in ends[:4]:
            sample = _sample(code, end, window, seed, tokens, tokenizer)
            if sample is not None:
                return sample
    raise ValueError(
        f"sources: expected code of more than {tokens} tokens with a line that uses a name defined well before it, "
        f"found none in {_DRAWS} draws from {len(files)} files"
    )


class _Code:
    """Lines, where each starts, and which define or hold which name."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.starts = [0, *accumulate(map(len, lines))]
        self._held: dict[str, list[int]] = defaultdict(list)
        self._defined: dict[str, list[int]] = defaultdict(list)
        for index, line in enumerate(lines):
            for name in set(_NAME.findall(line)):
                self._held[name].append(index)
            for match in _DEFINES.finditer(line):
                self._defined[match[1] or match[2]].append(index)

    def needs(self, end: int, window: float) -> bool:
        """Whether line `end` needs a definition that about `window` characters before it hold."""
        if self.starts[end] < window:
            return False
        start = end
        while self.starts[end] - self.starts[start] < window:
            start -= 1
        return self.definition(start, end) is not None

    def definition(self, start: int, end: int) -> int | None:
        """The last line of [start, end) that defines a name of line `end`, if no line of the last quarter holds it."""
        answer = self.lines[end].strip()
        if len(answer) < _SHORTEST or answer.startswith(_UNFIT):
            return None
        early = start + int((end - start) * (1 - _RECENT))
        found: list[int] = []
        for name in set(_NAME.findall(answer)):
            if not any(early <= index < end for index in self._held[name]):
                found += [index for index in self._defined[name] if start <= index < early]
        return max(found, default=None)


def _lines(rng: random.Random, files: list[Path], tokens: int) -> tuple[list[str], int]:
    """Lines of one file, with others before it where it alone is short, and where its own begin."""
    own = read(rng.choice(files)).splitlines(keepends=True)
    lines = own
    # A token is rarely more than six characters of code.
    for _ in range(40 if len(files) > 1 else 0):
        if sum(map(len, lines)) >= 6 * tokens:
            break
        lines = read(rng.choice(files)).splitlines(keepends=True) + lines
    return lines, len(lines) - len(own)


def _sample(code: _Code, end: int, window: float, seed: int, tokens: int, tokenizer: Any) -> Sample | None:
    """The sample that guesses line `end`, or None where the exact window turns out not to do."""
    start = end
    while start > 0 and code.starts[end] - code.starts[start] < _MORE * window + 1000:
        start -= 1

    def build(count: int) -> Draft:
        return Draft(_INTRODUCTION + "".join(code.lines[end - count : end]).rstrip() + _QUESTION)

    try:
        draft, length = fit(build, tokens, tokenizer, most=end - start)
    except ValueError:
        return None
    taken = draft.text[len(_INTRODUCTION) : -len(_QUESTION)].splitlines(keepends=True)
    start, answer = end - len(taken), code.lines[end].strip()
    place = code.definition(start, end)
    if place is None or answer in draft.text:
        return None
    line = code.lines[place]
    begin = len(_INTRODUCTION) + code.starts[place] - code.starts[start] + len(line) - len(line.lstrip())
    return Sample(
        task="code_completion",
        seed=seed,
        prompt=draft.text,
        answers=(answer,),
        evidence=((begin, begin + len(line.strip())),),
        metric="edit_similarity",
        max_new_tokens=40,
        context_tokens=tokens,
        prompt_tokens=length,
    )
