"""Microbenchmarks: the score of one layer, and of all that fit. See conftest.py and README.md."""

from __future__ import annotations

from collections.abc import Callable


def test_score(run_case: Callable[[], None]) -> None:
    run_case()


test_score.OPS = ("score_layer", "score_layers")  # type: ignore[attr-defined]
