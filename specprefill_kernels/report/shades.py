"""From importance to what is drawn: shades, ranks, heights of chunks, and layers in a byte per token.

`page.js` has the same formulas: what it draws for a layer is what these functions give for that layer's bytes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence

from specprefill_kernels.report.data import LayerImportance, Piece

LEVELS = 12
# A byte holds a value's logarithm: 1 to 255 for the largest value down to a millionth of it, so that a score read off
# the page is right to 3%, whether large or small. 0 is zero, or less than that.
DECADES = 6


def scale_of(values: Sequence[float]) -> float:
    """The value that is drawn darkest: the 99th percentile, so that one attention sink does not pale the rest."""
    positive = sorted(value for value in values if math.isfinite(value) and value > 0)
    return positive[min(len(positive) - 1, int(0.99 * len(positive)))] if positive else 1.0


def shade(value: float, scale: float) -> int:
    """0 (white) to `LEVELS`, by square root: importance has a long tail, and a linear scale would show only its tip."""
    if not math.isfinite(value) or value <= 0:
        return 0
    return min(LEVELS, int(LEVELS * math.sqrt(value / scale) + 0.5))


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the largest value; equal values share a rank, and those that are not finite come last."""
    clean = [value if math.isfinite(value) else -math.inf for value in values]
    first: dict[float, int] = {}
    for place, value in enumerate(sorted(clean, reverse=True)):
        first.setdefault(value, place + 1)
    return [first[value] for value in clean]


def encode(values: Sequence[float]) -> tuple[float, bytes]:
    """(largest value, a byte per value)."""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    if top <= 0:
        return 0.0, bytes(len(values))
    return top, bytes(_code(value / top) for value in values)


def _code(fraction: float) -> int:
    if not fraction > 0:  # NaN too
        return 0
    return min(255, max(0, round(255 + 254 / DECADES * math.log10(min(1.0, fraction)))))


def decode(code: int, top: float) -> float:
    return top * 10 ** (-(255 - code) * DECADES / 254) if code else 0.0


def layers_of_pieces(layers: LayerImportance, pieces: Sequence[Piece]) -> list[list[float]]:
    """`[layer][piece]`: a piece of several tokens has the largest of their values."""
    return [[max(row[piece.position : piece.end], default=0.0) for piece in pieces] for row in layers.values]


def layers_as_json(layers: LayerImportance, pieces: Sequence[Piece]) -> dict[str, object]:
    """What `page.js` needs: [L] numbers, tops and scales, and the bytes [L, pieces] in base64."""
    tops, scales, codes = [], [], []
    for row in layers_of_pieces(layers, pieces):
        top, coded = encode(row)
        tops.append(top)
        scales.append(scale_of([decode(code, top) for code in coded]))
        codes.append(coded)
    return {
        "numbers": list(layers.numbers),
        "tops": tops,
        "scales": scales,
        "decades": DECADES,
        "codes": base64.b64encode(b"".join(codes)).decode("ascii"),
    }


def chunks(pieces: Sequence[Piece], chunk_size: int) -> Iterator[tuple[int, list[Piece]]]:
    """(chunk number, its pieces), ascending; a piece belongs to the chunk of its first token."""
    grouped: dict[int, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.position // chunk_size, []).append(piece)
    yield from sorted(grouped.items())


def mean(pieces: Sequence[Piece]) -> float:
    """A chunk's mean importance; what is not finite counts as nothing."""
    return sum(piece.importance for piece in pieces if math.isfinite(piece.importance)) / len(pieces)


def heights(means: Sequence[float]) -> list[float]:
    """Percent of the map's height for each chunk's mean importance: square root again, the highest 3% cut off."""
    top = (sorted(means)[int(0.97 * (len(means) - 1))] if means else 0.0) or 1.0
    return [max(3.0, 100 * math.sqrt(min(1.0, max(0.0, value) / top))) for value in means]
