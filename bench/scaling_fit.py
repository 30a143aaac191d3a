"""Exponents of growth: how many times more time, or memory, a longer prompt takes.

What a call costs whatever the length flattens a straight line through the logarithms: with a millisecond of it, an op
that is quadratic between 1K and 32K tokens can look linear, and cheap ops do not get rid of it up to 1M. So times are
fitted by t = a + b * T^p, with a term of its own for that; errors are relative, as those of times are.

- `with_overhead` fits all lengths. The short ones say what a is.
- `longer_half` keeps that a and fits b and p to the longer half of the lengths alone. It sees an op that is linear on
  the whole and bends upward at its end, which one p for all lengths averages away.
- `power` is the straight line, for memory: what is small is left out there, and nothing is flattened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the last is a little too wide.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
EXPONENTS = tuple(i / 500 for i in range(50, 1501))  # 0.1 to 3, which is as finely as any figure here is shown

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Growth:
    """overhead + slope * T^exponent, with the 95% interval of the exponent (None: too few points for one)."""

    exponent: float
    interval: tuple[float, float] | None
    overhead: float
    slope: float


def with_overhead(points: Points) -> Growth | None:
    """The a >= 0, b >= 0 and p of t = a + b * T^p with the least squares of relative errors; None for too few points.

    The interval holds all p whose own best a and b fit nearly as well: with S(p) their sum of squares, those with
    S(p) <= S(best) * (1 + t^2 / df), df = points - 3. Where p and a cannot be told apart, it is wide.
    """
    return _fitted(points, None, len(points) - 3)


def longer_half(points: Points) -> Growth | None:
    """b and p for the longer half of the lengths, with the a of all of them; the interval as above, df = points - 2."""
    whole = with_overhead(points)
    upper = upper_half(points) if points else []
    return None if whole is None else _fitted(upper, whole.overhead, len(upper) - 2)


def _fitted(points: Points, overhead: float | None, freedom: int) -> Growth | None:
    if freedom < 0 or not points:
        return None
    longest = max(tokens for tokens, _ in points)
    tried = []
    for p in EXPONENTS:
        scaled = [((tokens / longest) ** p, value) for tokens, value in points]
        tried.append((p, *(_line(scaled) if overhead is None else _slope(scaled, overhead))))
    p, a, b, least = min(tried, key=lambda one: one[3])
    inside = EXPONENTS
    if freedom:
        limit = least * (1 + _t975(freedom) ** 2 / freedom) + 1e-15
        inside = tuple(one[0] for one in tried if one[3] <= limit)
    return Growth(p, (inside[0], inside[-1]), a, b / longest**p)


def _line(points: Points) -> tuple[float, float, float]:
    """(a, b, sum of squared relative errors) of value = a + b * x, none of them negative."""
    ones = [1 / value for _, value in points]
    slopes = [x / value for x, value in points]
    aa, ab, bb = (sum(map(mul, *pair)) for pair in ((ones, ones), (ones, slopes), (slopes, slopes)))
    at, bt = sum(ones), sum(slopes)
    determinant = aa * bb - ab * ab
    if determinant > 0:
        a, b = (at * bb - bt * ab) / determinant, (bt * aa - at * ab) / determinant
        if a >= 0 and b >= 0:
            return a, b, _error(points, a, b)
    return min(((a, b, _error(points, a, b)) for a, b in ((at / aa, 0.0), (0.0, bt / bb))), key=lambda found: found[2])


def _slope(points: Points, a: float) -> tuple[float, float, float]:
    """The same with a given."""
    wanted = sum(x / value * (1 - a / value) for x, value in points)
    b = max(0.0, wanted / sum((x / value) ** 2 for x, value in points))
    return a, b, _error(points, a, b)


def _error(points: Points, a: float, b: float) -> float:
    return sum(((a + b * x) / value - 1) ** 2 for x, value in points)


def power(points: Points) -> Growth | None:
    """The line through the logarithms; None for fewer than two lengths."""
    if len({tokens for tokens, _ in points}) < 2:
        return None
    x = [math.log(tokens) for tokens, _ in points]
    y = [math.log(value) for _, value in points]
    mid_x, mid_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((one - mid_x) ** 2 for one in x)
    exponent = math.fsum((one - mid_x) * (two - mid_y) for one, two in zip(x, y)) / spread
    interval = None
    if len(points) > 2:
        rest = math.fsum((two - mid_y - exponent * (one - mid_x)) ** 2 for one, two in zip(x, y))
        half = _t975(len(points) - 2) * math.sqrt(rest / (len(points) - 2) / spread)
        interval = exponent - half, exponent + half
    return Growth(exponent, interval, 0.0, math.exp(mid_y - exponent * mid_x))


def upper_half(points: Points) -> list[tuple[float, float]]:
    """The longer half of the lengths on a logarithmic scale, the middle one included."""
    lengths = [tokens for tokens, _ in points]
    middle = math.sqrt(min(lengths) * max(lengths))
    return [point for point in points if point[0] >= middle * 0.999]


def _t975(freedom: int) -> float:
    return T975[min(freedom, len(T975)) - 1]
