"""Shades, ranks and the byte in which the page keeps a layer's score."""

from __future__ import annotations

import base64
import math
import random

import pytest
from readings import reading

from specprefill_kernels.report.data import LayerImportance, Piece
from specprefill_kernels.report.shades import (
    DECADES,
    chunks,
    decode,
    encode,
    heights,
    layers_as_json,
    layers_of_pieces,
    ranks,
    scale_of,
    shade,
)


def test_shades_are_monotonic_and_bounded() -> None:
    rng = random.Random(0)
    values = sorted(rng.random() ** 6 for _ in range(500))
    scale = scale_of(values)
    levels = [shade(value, scale) for value in values]
    assert levels == sorted(levels)
    assert set(levels) == set(range(13))
    assert shade(float("nan"), scale) == shade(float("inf"), scale) == shade(-1.0, scale) == shade(0.0, scale) == 0


def test_the_darkest_shade_is_the_99th_percentile() -> None:
    assert scale_of([float(n) for n in range(1, 101)]) == 100.0
    assert scale_of([float(n) for n in range(1, 201)]) == 199.0
    assert scale_of([0.0, -1.0, float("nan"), 3.0]) == 3.0
    assert scale_of([]) == scale_of([0.0]) == 1.0
    assert shade(0.25, 1.0) == 6  # half the levels at a quarter of the scale


def test_ranks_count_what_is_larger() -> None:
    assert ranks([0.2, 0.5, 0.2, 0.9, 0.0]) == [3, 2, 3, 1, 5]
    assert ranks([0.2, float("nan"), 0.1]) == [1, 3, 2]
    assert ranks([]) == []


def test_a_byte_is_right_to_three_percent_over_six_decades() -> None:
    rng = random.Random(0)
    values = [10 ** rng.uniform(-DECADES + 0.02, 0) for _ in range(2_000)] + [1.0]
    values = [value * 0.37 for value in values]
    top, codes = encode(values)
    assert top == 0.37
    assert codes[-1] == 255
    for value, code in zip(values, codes, strict=True):
        assert decode(code, top) == pytest.approx(value, rel=0.028)
    assert all(encode([5.0, decode(code, 5.0)])[1][1] == code for code in range(256))


def test_a_byte_knows_zero_the_tiny_and_what_is_no_number() -> None:
    top, codes = encode([2.0, 0.0, -1.0, 2.0e-7, 2.0e-6, float("nan"), float("inf")])
    assert top == 2.0
    assert list(codes) == [255, 0, 0, 0, 1, 0, 255]
    assert decode(0, top) == 0.0
    assert decode(1, top) == pytest.approx(2.0e-6)
    assert encode([0.0, 0.0]) == (0.0, b"\0\0")
    assert encode([]) == (0.0, b"")


def test_a_piece_of_several_tokens_has_the_largest_of_their_layer_scores() -> None:
    pieces = [Piece("a", 0.0, True, 0, 1), Piece("b", 0.0, True, 1, 3)]
    layers = LayerImportance([4, 9], [[0.5, 0.1, 0.3], [0.2, 0.8, 0.4]])
    assert layers_of_pieces(layers, pieces) == [[0.5, 0.3], [0.2, 0.8]]
    packed = layers_as_json(layers, pieces)
    assert packed["numbers"] == [4, 9]
    assert packed["tops"] == [0.5, 0.8]
    codes = base64.b64decode(packed["codes"])
    decoded = [decode(code, top) for code, top in zip(codes, [0.5, 0.5, 0.8, 0.8], strict=True)]
    assert decoded == pytest.approx([0.5, 0.3, 0.2, 0.8], rel=0.028)


def test_chunks_hold_every_piece_once_in_order() -> None:
    pieces = reading().pieces
    cut = list(chunks(pieces, 8))
    assert [piece for _, group in cut for piece in group] == list(pieces)
    assert all(piece.position // 8 == number for number, group in cut for piece in group)


def test_heights_cut_the_highest_and_keep_the_rest_comparable() -> None:
    means = [float(n) for n in range(101)]
    found = heights(means)
    assert found[97] == found[100] == 100.0
    assert found[24] == pytest.approx(100 * math.sqrt(24 / 97))
    assert found[0] == 3.0
    assert heights([]) == []
    assert heights([0.0, float("nan")]) == [3.0, 3.0]
