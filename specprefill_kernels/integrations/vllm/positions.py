"""Where the kept tokens of one prompt stand, as it travels with a request: from the server to scheduler and worker.

The engine counts tokens by index: kept token i of K, then decoded ones. Their positions are others:

    index      0 .. K-1                    K, K+1, ...
    position   those of the kept tokens    T, T+1, ...

Within a span of kept tokens, and in everything decoded, position - index is constant: that is the `shift`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Beside the request's own extra arguments. Nobody outside may set it: see `settings.request_options`.
KEY = "specprefill_positions"


class Positions:
    """The positions of one pruned prompt and of what is decoded behind it.

    Args:
        prompt_tokens: T, tokens of the whole prompt.
        spans: the kept tokens as (start, end) pairs, end exclusive, ascending and apart.

    Raises:
        ValueError: spans are empty, out of order, or leave the prompt.
    """

    def __init__(self, prompt_tokens: int, spans: Sequence[tuple[int, int]]) -> None:
        edges = np.array(spans, dtype=np.int64).reshape(-1)
        if (
            edges.size == 0
            or edges.size % 2
            or edges[0] < 0
            or edges[-1] > prompt_tokens
            or (np.diff(edges) <= 0).any()
        ):
            raise ValueError(
                f"spans: expected ascending (start, end) pairs within {prompt_tokens} tokens, got {spans!r}"
            )
        starts, lengths = edges[0::2], edges[1::2] - edges[0::2]
        self.prompt_tokens = prompt_tokens
        self.kept_tokens = int(lengths.sum())
        self._edges = edges
        # The last segment is what is decoded.
        self._first = np.concatenate([[0], lengths.cumsum()])
        self._shift = np.concatenate([starts, [prompt_tokens]]) - self._first

    def shifts(self, first: int, count: int) -> np.ndarray:
        """[count] int64: position minus index of the tokens with index first, first + 1, ..."""
        if first >= self.kept_tokens:
            return np.full(count, self._shift[-1])
        index = np.arange(first, first + count)
        shifts: np.ndarray = self._shift[np.searchsorted(self._first, index, side="right") - 1]
        return shifts

    def block_key(self, first: int, end: int) -> tuple[int, ...] | None:
        """What tells a cached block of the tokens first to end apart from one of the same tokens at other positions.

        None where every token stands at its own index, as in an ordinary request. Else (length, shift, ...) of its
        runs. With the hash of the blocks before it, which holds theirs, two chains are equal only if all tokens and
        all positions are.
        """
        shifts = self.shifts(first, end - first)
        if not shifts.any():
            return None
        borders = np.concatenate([[0], np.flatnonzero(np.diff(shifts)) + 1, [shifts.size]])
        runs = np.stack([np.diff(borders), shifts[borders[:-1]]], axis=1)
        return tuple(runs.reshape(-1).tolist())

    def to_wire(self) -> list[int]:
        """A list of plain ints for `from_arguments`."""
        return [self.prompt_tokens, *self._edges.tolist()]


def from_arguments(arguments: Mapping[str, Any] | None) -> Positions | None:
    """The positions among a request's extra arguments; None for an ordinary request.

    Raises:
        ValueError: what stands there is not what `to_wire` gave.
    """
    wire = None if not arguments else arguments.get(KEY)
    if wire is None:
        return None
    whole = isinstance(wire, (list, tuple)) and all(type(value) is int for value in wire)
    if not whole or len(wire) < 3 or len(wire) % 2 == 0:
        raise ValueError(f"{KEY}: expected ints [prompt_tokens, start, end, start, end, ...], got {wire!r}")
    return Positions(wire[0], list(zip(wire[1::2], wire[2::2])))
