"""95% intervals for means of scores in [0, 1], and for the difference of two methods on the same prompts.

Scores that are all 0 or 1 (right or wrong) get score intervals: Wilson's for a rate, and Newcombe's for a paired
difference (R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
paired data", Statistics in Medicine 17, 1998, method 10). Both are closed forms, and neither collapses to a point when
every prompt agrees, as a bootstrap or a normal interval would: 20 of 20 equal answers do not show that two methods are
equal, and an evaluation with few prompts has to say so.

Other scores (F1, similarities), and prompts of tasks with and without such scores together, get the normal interval of
the mean after a few invented prompts were added: two with the score 0 and two with 1 for a mean (Agresti and Coull, The
American Statistician 52, 1998), half a prompt with the difference -1, half a one with +1 and one with 0 for a paired
difference (Agresti and Min, Statistics in Medicine 24, 2005). For rates they are close to the intervals above, they
need no resampling, and like those they do not collapse: the bootstrap gave [0, 0] for eight equal pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """An estimate, its 95% bounds, and how they were made: "wilson", "newcombe" or "adjusted"."""

    estimate: float
    low: float
    high: float
    method: str

    def json(self) -> dict[str, float | str]:
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "method": self.method}


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a rate.

    Example:
        >>> low, high = wilson(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"successes: expected 0 <= successes <= count and count >= 1, got {successes} of {count}")
    rate, square = successes / count, Z95 * Z95
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = Z95 * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count)) / (1 + square / count)
    # Rounding must not put a bound past what it bounds.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == count else min(1.0, centre + half)
    return low, high


def mean(scores: Sequence[float]) -> Interval:
    """The mean score over prompts, with its interval.

    Raises:
        ValueError: no scores, or one outside [0, 1].
    """
    _check("scores", scores)
    estimate = math.fsum(scores) / len(scores)
    if _binary(scores):
        low, high = wilson(round(math.fsum(scores)), len(scores))
        return Interval(estimate, low, high, "wilson")
    low, high = _adjusted(scores, added=4, squares=2.0, total=2.0)
    return Interval(estimate, max(0.0, min(low, estimate)), min(1.0, max(high, estimate)), "adjusted")


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of first - second over the same prompts in the same order, with its interval.

    Raises:
        ValueError: no scores, unequal lengths, or a score outside [0, 1].
    """
    _check("first", first)
    _check("second", second)
    if len(first) != len(second):
        raise ValueError(f"second: expected {len(first)} scores, one for each of first, got {len(second)}")
    differences = [a - b for a, b in zip(first, second)]
    estimate = math.fsum(differences) / len(differences)
    if _binary(first) and _binary(second):
        both = sum(1 for a, b in zip(first, second) if a and b)
        only_first = sum(1 for a, b in zip(first, second) if a and not b)
        only_second = sum(1 for a, b in zip(first, second) if b and not a)
        neither = len(first) - both - only_first - only_second
        low, high = newcombe(both, only_first, only_second, neither)
        return Interval(estimate, low, high, "newcombe")
    low, high = _adjusted(differences, added=2, squares=1.0, total=0.0)
    return Interval(estimate, max(-1.0, min(low, estimate)), min(1.0, max(high, estimate)), "adjusted")


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """95% interval of the difference of two paired rates, from the counts of the 2 x 2 table.

    Example (the published table's first row):
        >>> low, high = newcombe(36, 12, 2, 0)
        >>> round(low, 4), round(high, 4)
        (0.0569, 0.3404)
    """
    count = both + only_first + only_second + neither
    if min(both, only_first, only_second, neither) < 0 or count < 1:
        raise ValueError(f"counts: expected none below 0, got {(both, only_first, only_second, neither)}")
    first, second = (both + only_first) / count, (both + only_second) / count
    low1, high1 = wilson(both + only_first, count)
    low2, high2 = wilson(both + only_second, count)
    down1, up1, down2, up2 = first - low1, high1 - first, second - low2, high2 - second
    phi = _phi(both, only_first, only_second, neither)
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return first - second - below, first - second + above


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """The correlation of the two answers, corrected for continuity where it is positive; 0 where a margin is empty."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(product - (both + only_first + only_second + neither) / 2, 0)
    return product / math.sqrt(margins)


def _adjusted(values: Sequence[float], added: int, squares: float, total: float) -> tuple[float, float]:
    """The normal interval with `added` values more, which sum up to `total` and their squares to `squares`."""
    count = len(values) + added
    centre = (math.fsum(values) + total) / count
    variance = (math.fsum(value * value for value in values) + squares) / count - centre * centre
    half = Z95 * math.sqrt(max(variance, 0.0) / count)
    return centre - half, centre + half


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _check(name: str, scores: Sequence[float]) -> None:
    if not scores:
        raise ValueError(f"{name}: expected at least one score, got none")
    for score in scores:
        if not 0 <= score <= 1:
            raise ValueError(f"{name}: expected scores in [0, 1], got {score}")
