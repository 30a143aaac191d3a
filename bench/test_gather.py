"""Microbenchmarks: packing what is kept. See conftest.py and README.md."""

from __future__ import annotations

from collections.abc import Callable


def test_gather(run_case: Callable[[], None]) -> None:
    run_case()


test_gather.OPS = ("gather_tokens", "gather_kv")  # type: ignore[attr-defined]
