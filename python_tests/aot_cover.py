"""Few calls that stand for many options: each value of each option at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Options = dict[str, Any]
# Random combinations that compete for each place, and those that show what can occur at all.
COMPETING, DRAWS = 60, 1000


def candidates(factors: Mapping[str, Sequence[Any]], seed: str, usable: Callable[[Options], bool]) -> Iterator[Options]:
    """Random combinations that a user may ask for, without end; the same seed gives the same ones."""
    draw = random.Random(seed)
    while True:
        options = {name: draw.choice(values) for name, values in factors.items()}
        if usable(options):
            yield options


def covering(factors: Mapping[str, Sequence[Any]], seed: str, usable: Callable[[Options], bool]) -> Iterator[Options]:
    """Combinations of options in which each value occurs that can occur.

    Greedy: of some random combinations the one that brings most that is new. Different architectures get different
    seeds, so that together they see more combinations.
    """
    draws = candidates(factors, seed, usable)
    # Found by drawing, as `usable` is any function.
    wanted = {item for _ in range(DRAWS) for item in next(draws).items()}
    while wanted:
        best = max((next(draws) for _ in range(COMPETING)), key=lambda options: len(options.items() & wanted))
        if best.items() & wanted:
            wanted -= best.items()
            yield best


def product(
    factors: Mapping[str, Sequence[Any]], whole: Sequence[str], seed: str, usable: Callable[[Options], bool]
) -> Iterator[Options]:
    """The whole product of the options in `whole`, each combination with random values of the others."""
    draw = random.Random(seed)
    for values in itertools.product(*(factors[name] for name in whole)):
        for _ in range(20):  # an unusable combination of the others may become a usable one
            options = {name: draw.choice(choices) for name, choices in factors.items()} | dict(zip(whole, values))
            if usable(options):
                yield options
                break
