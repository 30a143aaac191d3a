"""Code blocks of the Markdown pages, by language and heading, so that tests run them as they stand.

>>> blocks("README.md", None, "python")[0].splitlines()[0]
'import torch'
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", flags=re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    """The whole page; `page` is a path from the repository's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under one heading ("## vLLM" or "vLLM"), up to the next one of its level or above.

    Raises:
        ValueError: the page has no such heading, or several.
    """
    text = text_of(page)
    # A comment in a block of shell looks like a heading.
    bare = _FENCE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    headings = [(found.start(), found[1], found[2].strip()) for found in re.finditer(r"^(#+) +(.+)$", bare, re.M)]
    there = [at for at, (_, marks, name) in enumerate(headings) if heading in (name, f"{marks} {name}")]
    if len(there) != 1:
        raise ValueError(f"heading: expected one of {page}, got {heading!r}, which it has {len(there)} times")
    start, marks, _ = headings[there[0]]
    ends = [position for position, other, _ in headings[there[0] + 1 :] if len(other) <= len(marks)]
    return text[text.index("\n", start) + 1 : ends[0] if ends else len(text)]


def blocks(page: str, heading: str | None, language: str) -> list[str]:
    """The code blocks of one language in the section under `heading`, or in the whole page where that is None."""
    text = text_of(page) if heading is None else section(page, heading)
    return [found[2] for found in _FENCE.finditer(text) if found[1] == language]


def languages(page: str, heading: str | None = None) -> list[str]:
    """The language of each code block; "" where a block names none."""
    text = text_of(page) if heading is None else section(page, heading)
    return [found[1] for found in _FENCE.finditer(text)]
