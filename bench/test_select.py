"""Microbenchmarks: what follows scoring. See conftest.py and README.md."""

from __future__ import annotations

from collections.abc import Callable


def test_select(run_case: Callable[[], None]) -> None:
    run_case()


test_select.OPS = ("finalize_importance", "select_chunks", "select_tokens")  # type: ignore[attr-defined]
