"""The blocks of docs/integrations.md's section on kvpress run as they stand. Needs kvpress."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest
import torch

PAGE, HEADING = "docs/integrations.md", "## kvpress"


def test_nothing_escapes_these_tests() -> None:
    assert pages.languages(PAGE, HEADING) == ["python", "python"]
    for block in pages.blocks(PAGE, heading=HEADING, language="python"):
        assert len([line for line in block.splitlines() if line]) <= 12


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As they stand, but for the models."""
    pytest.importorskip("kvpress", reason="kvpress is not installed (run.py kvpress tests it)")
    from loop_models import stand_ins

    from specprefill_kernels.integrations.kvpress import SpeculativePrefillPress

    stand_ins(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text("The report was signed by the treasurer. " * 20)
    seen = []
    score = SpeculativePrefillPress.score
    monkeypatch.setattr(
        SpeculativePrefillPress, "score", lambda *args: seen.append(score(*args)) or seen[-1], raising=True
    )
    values: dict = {}
    first, second = pages.blocks(PAGE, heading=HEADING, language="python")
    exec(first, values)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert len(seen) == 4
    assert any(not torch.equal(one, seen[0]) for one in seen[1:]), "each layer for itself"
    seen.clear()
    exec(second, values)
    assert values["press"].importance.shape == values["ids"].shape[1:]
    assert len(seen) == 4
    assert all(torch.equal(one, seen[0]) for one in seen)
