"""What a page and a table need to know about one comparison, and nothing about how it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is drawn as one: a token, or the tokens that share one character."""

    text: str
    importance: float
    kept: bool
    position: int


@dataclass(frozen=True)
class Measured:
    """One way of answering: its time to first token with stages, and its answer."""

    ttft: float
    seconds: Mapping[str, float]
    tokens_read: int
    answer: str
    right: bool | None
    rounds: Sequence[float] = ()


@dataclass(frozen=True)
class Comparison:
    title: str
    question: str
    base: str
    speculator: str
    prompt_tokens: int
    kept_tokens: int
    keep_ratio: float
    chunk_size: int
    full: Measured
    sparse: Measured
    mode: str
    reason: str
    backend: str
    pieces: Sequence[Piece] = field(repr=False)
    expected: str | None = None
    inserted: str | None = None
    inserted_span: tuple[int, int] | None = None  # token positions
    same_model: bool = False
    machine: str = ""
    command: str = ""
    version: str = ""

    @property
    def speedup(self) -> float:
        return self.full.ttft / self.sparse.ttft

    @property
    def kept_share(self) -> float:
        return self.kept_tokens / self.prompt_tokens

    @property
    def fact_kept(self) -> bool | None:
        """Whether every token of the inserted sentence was kept."""
        if self.inserted_span is None:
            return None
        start, end = self.inserted_span
        return all(piece.kept for piece in self.pieces if start <= piece.position < end)

    @property
    def verdict(self) -> str:
        """One sentence that is true of these numbers, good or bad."""
        if self.mode != "sparse":
            return f"Nothing was skipped: {self.reason}."
        times = f"{self.speedup:.1f}{TIMES}"
        if self.same_model:
            return f"One model on both sides cannot gain: {times} the speed, and the same page to look at."
        if self.speedup < 1.05:
            return f"No gain here: the first token came at {times} the speed of full prefill."
        return f"The first token came {times} sooner."


def make_pieces(
    text: str, offsets: Sequence[tuple[int, int]], importance: Sequence[float], kept: Sequence[bool]
) -> list[Piece]:
    """Cuts `text` at token borders; joined, the pieces are `text` again, whatever the tokenizer's offsets leave out.

    Tokens that share their characters (pieces of one multi-byte character) and tokens without characters join the piece
    before them; characters that no token claims go with the token after them.
    """
    pieces: list[Piece] = []
    end = 0
    for position, ((_, token_end), value, keep) in enumerate(zip(offsets, importance, kept)):
        if token_end <= end and pieces:
            last = pieces[-1]
            pieces[-1] = Piece(last.text, max(last.importance, value), last.kept or keep, last.position)
            continue
        pieces.append(Piece(text[end:token_end], value, keep, position))
        end = max(end, token_end)
    if end < len(text):
        pieces.append(Piece(text[end:], 0.0, False, len(offsets)))
    return pieces


def shade_scale(pieces: Sequence[Piece]) -> float:
    """The importance that is drawn darkest: the 99th percentile, so that one attention sink does not pale the rest."""
    values = sorted(piece.importance for piece in pieces if math.isfinite(piece.importance) and piece.importance > 0)
    return values[min(len(values) - 1, int(0.99 * len(values)))] if values else 1.0


def shade(importance: float, scale: float, levels: int = 12) -> int:
    """0 (white) to `levels`, by square root: importance has a long tail, and a linear scale would show only its tip."""
    if not math.isfinite(importance) or importance <= 0:
        return 0
    return min(levels, round(levels * math.sqrt(importance / scale)))
