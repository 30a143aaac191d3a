"""Intervals against published and independently computed values, and what they must not do with few prompts."""

from __future__ import annotations

import math
import random

import pytest

from specprefill_kernels.quality.intervals import mean, newcombe, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_published_values(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_bounds_solve_the_score_equation() -> None:
    """A bound p is where |rate - p| = z sqrt(p (1 - p) / n): the definition, not the closed form."""
    for bound in wilson(17, 40):
        assert abs(17 / 40 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 40), rel=1e-6)


@pytest.mark.parametrize(("successes", "count"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_refuses_what_is_no_rate(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="successes: expected"):
        wilson(successes, count)


def test_newcombe_gives_the_published_value() -> None:
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_newcombe_negates_when_the_methods_are_swapped() -> None:
    low, high = newcombe(11, 7, 3, 9)
    assert newcombe(11, 3, 7, 9) == pytest.approx((-high, -low))


def test_newcombe_is_narrower_for_answers_that_agree() -> None:
    """The same rates, 20 and 16 of 40; only how they go together differs."""
    together, apart = newcombe(16, 4, 0, 20), newcombe(0, 20, 16, 4)
    assert together[1] - together[0] < 0.6 * (apart[1] - apart[0])


def test_newcombe_corrects_a_positive_correlation_for_continuity() -> None:
    """16 both, 4 the first alone, 20 neither, of 40: phi = (16 * 20 - 40 / 2) / sqrt(20 * 20 * 16 * 24)."""
    phi = 300 / math.sqrt(20 * 20 * 16 * 24)
    (low1, high1), (low2, high2) = wilson(20, 40), wilson(16, 40)
    below = math.sqrt((0.5 - low1) ** 2 - 2 * phi * (0.5 - low1) * (high2 - 0.4) + (high2 - 0.4) ** 2)
    above = math.sqrt((high1 - 0.5) ** 2 - 2 * phi * (high1 - 0.5) * (0.4 - low2) + (0.4 - low2) ** 2)
    assert newcombe(16, 4, 0, 20) == pytest.approx((0.1 - below, 0.1 + above))


def test_newcombe_covers_the_true_difference() -> None:
    """95% intervals of 20 prompts hold the truth in about 95% of 2,000 draws."""
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        cells = [0, 0, 0, 0]
        for _ in range(20):
            cells[rng.choices(range(4), (0.6, 0.2, 0.05, 0.15))[0]] += 1
        low, high = newcombe(*cells)
        held += low <= 0.15 <= high
    assert 0.93 <= held / 2000 <= 0.985


def test_equal_answers_of_few_prompts_leave_room_for_a_difference() -> None:
    """A bootstrap would say exactly 0, and call any two prompts proof."""
    few, many = paired_difference([1] * 5, [1] * 5), paired_difference([1] * 50, [1] * 50)
    assert few.estimate == many.estimate == 0
    assert few.low < -0.4
    assert -0.1 < many.low < 0 < many.high < 0.1


def test_right_and_wrong_get_score_intervals() -> None:
    assert mean([1, 0, 1, 1]).method == "wilson"
    assert (mean([1, 0, 1, 1]).low, mean([1, 0, 1, 1]).high) == wilson(3, 4)
    difference = paired_difference([1, 1, 0, 1, 0], [1, 0, 0, 0, 1])
    assert difference.method == "newcombe"
    assert difference.estimate == pytest.approx(0.2)
    assert (difference.low, difference.high) == newcombe(1, 2, 1, 1)


def test_other_scores_get_the_normal_interval_for_many_prompts() -> None:
    rng = random.Random(1)
    scores = [rng.betavariate(2, 3) for _ in range(600)]
    interval = mean(scores)
    assert interval.method == "adjusted"
    centre = sum(scores) / 600
    half = 1.96 * math.sqrt(sum((x - centre) ** 2 for x in scores) / 599 / 600)
    assert interval.estimate == pytest.approx(centre)
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half), abs=0.1 * half)


def test_adjusted_intervals_are_agrestis_for_rates() -> None:
    """A score of 1/2 among wrong and right ones; by hand from the sums with the invented prompts."""
    interval = mean([0.5, 1, 1, 0, 1, 0])  # sum 3.5 + 2, squares 3.25 + 2, of 10
    half = 1.959964 * math.sqrt((0.525 - 0.55**2) / 10)
    assert (interval.low, interval.high) == pytest.approx((0.55 - half, 0.55 + half), abs=1e-6)
    difference = paired_difference([0.5, 1, 1, 0], [0, 1, 0, 0])  # 1.5 and 1.25 + 1, of 6
    half = 1.959964 * math.sqrt((2.25 / 6 - 0.25**2) / 6)
    assert difference.estimate == pytest.approx(0.375)
    assert (difference.low, difference.high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-6)


def test_adjusted_intervals_cover_mixed_scores_of_few_prompts() -> None:
    """Half of the prompts right or wrong, the others in between: 95% intervals hold the truth in about 95% of draws."""
    rng = random.Random(2)

    def pair() -> tuple[float, float]:
        if rng.random() < 0.5:
            return rng.choices([(1, 1), (1, 0), (0, 1), (0, 0)], (0.5, 0.2, 0.1, 0.2))[0]
        return rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.8)

    truth, held = 0.5 * 0.1 + 0.5 * 0.1, 0
    for _ in range(2000):
        difference = paired_difference(*zip(*(pair() for _ in range(12)), strict=True))
        held += difference.low <= truth <= difference.high
    assert 0.93 <= held / 2000 <= 0.99


def test_equal_pairs_of_any_scores_leave_room_for_a_difference() -> None:
    scores = [0.27, 1, 0, 0, 1, 0, 0, 0]
    difference = paired_difference(scores, scores)
    assert difference.method == "adjusted"
    assert difference.low < -0.15
    assert difference.high > 0.15


def test_differences_are_those_of_pairs() -> None:
    """A constant shift between prompts of very different difficulty: the spread of the prompts does not count."""
    easy = [0.05 + 0.8 * i / 99 for i in range(100)]
    shifted = [score + 0.1 for score in easy]
    difference = paired_difference(shifted, easy)
    assert difference.estimate == pytest.approx(0.1)
    assert 0.07 < difference.low < 0.1 < difference.high < 0.13
    assert paired_difference(easy, shifted).estimate == pytest.approx(-0.1)


def test_bounds_stay_within_what_is_possible() -> None:
    interval = mean([0.99, 1.0, 0.98, 0.2])
    assert 0 <= interval.low < interval.estimate < interval.high <= 1
    assert mean([1.0, 0.999]).high == 1
    one = paired_difference([0.99], [0.0])
    assert -1 <= one.low < 0.3 < one.estimate <= one.high <= 1


def test_scores_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="scores: expected at least one"):
        mean([])
    with pytest.raises(ValueError, match=r"first: expected scores in \[0, 1\], got 1.5"):
        paired_difference([1.5], [1])
    with pytest.raises(ValueError, match="second: expected 2 scores"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match="got nan"):
        mean([float("nan")])
