"""The text around the evidence: the documentation that every CPython carries, its standard library, or own files."""

from __future__ import annotations

import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

Sources = Sequence[str | os.PathLike[str]]

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"\S+\s*")
_SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data")


@dataclass(frozen=True)
class Document:
    """A title and its sentences, each with the white space that follows it."""

    title: str
    sentences: tuple[str, ...]


def documents(draw: random.Random, sources: Sources | None) -> Iterator[Document]:
    """Documents in the seed's order. Without sources: the documentation first, then the standard library's code."""
    if sources is not None:
        yield from _shuffled(_files(sources), draw, lambda file: _document(file.name, _read(file)))
        return
    topics = _topics()
    yield from _shuffled(sorted(topics), draw, lambda name: _document(name, topics[name]))
    yield from _shuffled(library(), draw, lambda file: _document(file.name, _read(file)))


class Filler:
    """Sentences of `documents`, read as far as asked for.

    Args:
        avoid: no sentence with one of these texts is given out, so that an answer lies in its evidence alone.
    """

    def __init__(self, texts: Iterable[Document], avoid: Sequence[str] = ()) -> None:
        self._texts = iter(texts)
        self._avoid = tuple(avoid)
        self._sentences: list[str] = []
        self._words: list[int] = []

    def words(self, count: int) -> list[str]:
        """Sentences with `count` words in all; the last may be cut.

        Raises:
            ValueError: the documents hold fewer.
        """
        taken: list[str] = []
        for index in range(1_000_000_000):
            if count <= 0:
                return taken
            while index >= len(self._sentences):
                self._more()
            if self._words[index] > count:
                taken.append("".join(_WORD.findall(self._sentences[index])[:count]).rstrip() + " ")
                return taken
            taken.append(self._sentences[index])
            count -= self._words[index]
        raise AssertionError("unreachable")

    def _more(self) -> None:
        document = next(self._texts, None)
        if document is None:
            raise ValueError(f"sources: expected more text, got {sum(self._words)} words in all")
        for sentence in document.sentences:
            if not any(text in sentence for text in self._avoid):
                self._sentences.append(sentence)
                self._words.append(len(_WORD.findall(sentence)))


def library() -> list[Path]:
    """The standard library's modules, without tests."""
    return _library()


@lru_cache(maxsize=1)
def _library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = (file for file in root.rglob("*.py") if not set(file.relative_to(root).parts) & set(_SKIPPED))
    return sorted(file for file in found if 4_000 < file.stat().st_size < 400_000)


def code_files(sources: Sources | None) -> list[Path]:
    return library() if sources is None else _files(sources)


def read(file: Path) -> str:
    return _read(file)


def _files(sources: Sources) -> list[Path]:
    if isinstance(sources, (str, os.PathLike)) or not sources:
        raise ValueError(f"sources: expected a list of text files, got {sources!r}")
    files = [Path(source) for source in sources]
    for file in files:
        if not file.is_file():
            raise ValueError(f"sources: expected text files, got {str(file)!r}, which is none")
    return files


@lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError("this Python came without pydoc_data, whose text fills the prompts; give sources") from error
    return topics


def _shuffled(items: Sequence[object], draw: random.Random, make: Callable[..., Document]) -> Iterator[Document]:
    order = list(items)
    draw.shuffle(order)
    for item in order:
        document = make(item)
        if document.sentences:
            yield document


@lru_cache(maxsize=64)
def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


@lru_cache(maxsize=512)
def _document(title: str, text: str) -> Document:
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        # A row of dashes or a table's border is no sentence.
        if sum(letter.isalnum() or letter.isspace() for letter in paragraph) < 0.7 * max(len(paragraph), 1):
            continue
        if not paragraph.strip():
            continue
        if re.search(r"^ {4}|^\t|^(def|class|import|from) ", paragraph, re.MULTILINE):  # code keeps its lines
            sentences.append(paragraph.strip("\n") + "\n\n")
            continue
        parts = _SENTENCE.split(" ".join(paragraph.split()))
        sentences += [*(part + " " for part in parts[:-1]), parts[-1] + "\n\n"]
    return Document(title, tuple(sentences))
