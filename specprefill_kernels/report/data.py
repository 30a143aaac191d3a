"""What a page, a picture and a table need to know about one prompt: plain numbers, and nothing about how they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

TIMES = "\u00d7"
NOTHING = "\u2013"

# Stages in the order in which they run, with what a reader calls them.
STAGES: Mapping[str, str] = {
    "tokenize": "tokenize",
    "speculator_prefill": "speculator reads the prompt",
    "look_ahead": "look-ahead",
    "score": "score",
    "select": "select and gather",
    "base_prefill": "base prefill",
}


def seconds_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is drawn as one: a token, or the tokens `position` .. `end` - 1 that share a character."""

    text: str
    importance: float
    kept: bool
    position: int
    end: int


@dataclass(frozen=True)
class Protected:
    """Tokens `start` .. `end` - 1, which were kept whatever their importance, and what they are in words."""

    start: int
    end: int
    label: str = "protected"


@dataclass(frozen=True)
class LayerImportance:
    """Every prompt token's importance as single layers see it: `values[row][token]` for layer `numbers[row]`."""

    numbers: Sequence[int]
    values: Sequence[Sequence[float]] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.numbers) != len(self.values):
            raise ValueError(f"values: expected a row for each of {len(self.numbers)} layers, got {len(self.values)}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the base model reads of one prompt, and why. Spans are token positions (start, end), end exclusive."""

    title: str
    base: str
    speculator: str
    prompt_tokens: int
    kept_tokens: int
    chunk_size: int
    mode: str
    reason: str
    backend: str
    pieces: Sequence[Piece] = field(repr=False)
    question: str = ""
    budget: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    protected: Sequence[Protected] = ()
    evidence: Sequence[Span] = ()
    layers: LayerImportance | None = field(default=None, repr=False)
    machine: str = ""
    command: str = ""
    version: str = ""

    @property
    def kept_share(self) -> float:
        return self.kept_tokens / self.prompt_tokens

    @property
    def kept_spans(self) -> list[Span]:
        """Merged spans of kept tokens."""
        spans: list[Span] = []
        for piece in self.pieces:
            if not piece.kept:
                continue
            if spans and spans[-1][1] == piece.position:
                spans[-1] = (spans[-1][0], piece.end)
            else:
                spans.append((piece.position, piece.end))
        return spans

    @property
    def evidence_kept(self) -> bool | None:
        """Whether every token of the evidence was kept; None when nobody said where it lies."""
        if not self.evidence:
            return None
        return all(
            piece.kept
            for piece in self.pieces
            if any(start < piece.end and piece.position < end for start, end in self.evidence)
        )

    @property
    def protected_counts(self) -> dict[str, int]:
        """Tokens under each label, in the order in which the labels come in the prompt."""
        counts: dict[str, int] = {}
        for part in sorted(self.protected, key=lambda part: part.start):
            counts[part.label] = counts.get(part.label, 0) + part.end - part.start
        return counts

    @property
    def protected_tokens(self) -> int:
        """Protected tokens; one under two labels counts once."""
        return len({token for part in self.protected for token in range(part.start, part.end)})

    @property
    def verdict(self) -> str:
        """One sentence that is true of these numbers, good or bad."""
        if self.mode != "sparse":
            return f"Nothing is skipped: {self.reason}."
        return f"The base model reads {self.kept_tokens:,} of {self.prompt_tokens:,} tokens."


@dataclass(frozen=True)
class Measured:
    """One way of answering: its time to first token with stages, and its answer."""

    ttft: float
    seconds: Mapping[str, float]
    tokens_read: int
    answer: str
    right: bool | None
    rounds: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison(Reading):
    """A reading with both ways of answering, timed."""

    full: Measured
    sparse: Measured
    expected: str | None = None
    inserted: str | None = None  # a sentence that was put into the document; `evidence` says where
    same_model: bool = False

    @classmethod
    def of(cls, reading: Reading, **measured: Any) -> Comparison:
        return cls(**{entry.name: getattr(reading, entry.name) for entry in fields(Reading)}, **measured)

    @property
    def speedup(self) -> float:
        return self.full.ttft / self.sparse.ttft

    @property
    def verdict(self) -> str:
        if self.mode != "sparse":
            return f"Nothing was skipped: {self.reason}."
        times = f"{self.speedup:.1f}{TIMES}"
        if self.same_model:
            return f"One model on both sides cannot gain: {times} the speed, and the same page to look at."
        if self.speedup < 1.05:
            return f"No gain here: the first token came at {times} the speed of full prefill."
        return f"The first token came {times} sooner."


def make_pieces(text: str, offsets: Sequence[Span], importance: Sequence[float], kept: Sequence[bool]) -> list[Piece]:
    """Cuts `text` at token borders; joined, the pieces are `text` again, whatever the tokenizer's offsets leave out.

    Tokens that share their characters (pieces of one multi-byte character) and tokens without characters join the piece
    before them; characters that no token claims go with the token after them, those at the end with the last token.

    Args:
        text: the prompt as the tokenizer saw it.
        offsets: [T] (start, end) of each token in `text`.
        importance: [T].
        kept: [T].

    Raises:
        ValueError: the three have different lengths.
    """
    if not len(offsets) == len(importance) == len(kept):
        raise ValueError(
            f"importance, kept: expected one for each of {len(offsets)} offsets, got {len(importance)} and {len(kept)}"
        )
    pieces: list[Piece] = []
    end = 0
    for position, ((_, token_end), value, keep) in enumerate(zip(offsets, importance, kept)):
        if token_end <= end and pieces:
            last = pieces[-1]
            pieces[-1] = Piece(last.text, max(last.importance, value), last.kept or keep, last.position, position + 1)
            continue
        pieces.append(Piece(text[end:token_end], value, keep, position, position + 1))
        end = max(end, token_end)
    if end < len(text) and pieces:
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text + text[end:])
    elif end < len(text):
        pieces.append(Piece(text, 0.0, False, 0, 0))
    return pieces
