"""Property tests where hypothesis is installed; where it is not, they are skipped and say so."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError:

    class _Nothing:
        """Stands for any strategy while the skipped tests are collected."""

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

    st: Any = _Nothing()  # type: ignore[no-redef]

    def given(**_: Any) -> pytest.MarkDecorator:  # type: ignore[no-redef]
        return pytest.mark.skip(reason="hypothesis is not installed")


__all__ = ["given", "st"]
