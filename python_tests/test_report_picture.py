"""The PNG of importance over position: its size, and the right colour at the right place."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from readings import PROTECTED, comparison, reading

from specprefill_kernels.report import picture
from specprefill_kernels.report.data import LayerImportance, Piece, Reading

np = pytest.importorskip("numpy")

HEX = {"light": picture.LIGHT, "dark": picture.DARK}


def plain(total: int = 64, chunk: int = 8, **changes: Any) -> Reading:
    """`total` tokens; chunks 1 and 5 are kept, and tokens 20, 21 for themselves; importance grows along the prompt."""
    kept = [token // chunk in (1, 5) or token in (20, 21) for token in range(total)]
    pieces = [Piece("x", 0.1 + 0.9 * token / total, keep, token, token + 1) for token, keep in enumerate(kept)]
    values = {"pieces": pieces, "prompt_tokens": total, "kept_tokens": sum(kept), "chunk_size": chunk, "title": "T"}
    return replace(reading(), **{**values, **changes})


def colour(code: str) -> Any:
    return np.array([int(code[at : at + 2], 16) for at in (1, 3, 5)])


class Drawn:
    """The pixels of a saved picture, and where in them the panels lie (see the margins in `picture.save`)."""

    def __init__(self, file: Path) -> None:
        image = pytest.importorskip("matplotlib.image")
        self.pixels = np.round(image.imread(file)[:, :, :3] * 255).astype(int)
        self.height, self.width = self.pixels.shape[:2]

    def near(self, code: str, tolerance: int = 2) -> Any:
        return (abs(self.pixels - colour(code)) <= tolerance).all(axis=2)

    def columns(self, code: str, top: float, bottom: float, least: int = 4) -> list[int]:
        """Where along the axis a colour stands in at least `least` rows between two heights, in pixels."""
        found = self.near(code)[int(top) : int(bottom)].sum(axis=0) >= least
        return [x for x in range(130, self.width - 40) if found[x]]

    def tokens(self, columns: list[int], total: int) -> set[int]:
        return {int((x + 0.5 - 130) / (self.width - 170) * total) for x in columns}


def save(report: Reading, folder: Path, **options: Any) -> Drawn:
    pytest.importorskip("matplotlib")
    return Drawn(picture.save(report, folder / "picture.png", **options))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_kept_and_skipped_tokens_are_coloured_where_they_are(tmp_path: Path, scheme: str) -> None:
    colours = HEX[scheme]
    drawn = save(plain(), tmp_path, dark=scheme == "dark")
    assert (drawn.width, drawn.height) == (1600, 560)
    kept = drawn.tokens(drawn.columns(colours["kept"], 150, 480), 64)
    skipped = drawn.tokens(drawn.columns(colours["skipped"], 150, 480), 64)
    expected = {*range(8, 16), 20, 21, *range(40, 48)}
    assert kept == expected
    assert skipped == set(range(64)) - expected
    assert (drawn.pixels[2, 2] == colour(colours["background"])).all()


def test_bars_are_as_high_as_the_square_root_of_their_means(tmp_path: Path) -> None:
    report = plain()
    drawn = save(report, tmp_path)
    bars = drawn.near(picture.LIGHT["kept"]) | drawn.near(picture.LIGHT["skipped"])
    heights = []
    for chunk in range(8):
        x = int(130 + (chunk + 0.5) / 8 * (drawn.width - 170))
        heights.append(int(bars[150:484, x].sum()))
    means = [sum(piece.importance for piece in report.pieces[8 * n : 8 * n + 8]) / 8 for n in range(8)]
    # 1.08: the room above the highest bar
    expected = [(560 - 150 - 76) * (mean / max(means) / 1.08) ** 0.5 for mean in means]
    assert heights == pytest.approx(expected, abs=3)


def test_protected_tokens_and_the_answer_have_their_own_strip(tmp_path: Path) -> None:
    report = plain(protected=PROTECTED, evidence=[(50, 54)])
    drawn = save(report, tmp_path)
    below = (560 - 76 + 4, 560 - 76 + 18)
    assert drawn.tokens(drawn.columns(picture.LIGHT["protected"], *below), 64) == {0, 1, 2, 3, 4, 5, 34, 35, 36}
    assert drawn.tokens(drawn.columns(picture.LIGHT["evidence"], *below), 64) == {50, 51, 52, 53}
    none = save(plain(), tmp_path)
    assert none.columns(picture.LIGHT["protected"], *below) == []
    assert none.columns(picture.LIGHT["evidence"], *below) == []


def test_the_layer_panel_is_dark_where_that_layer_looks(tmp_path: Path) -> None:
    rows = [[1e-9] * 64 for _ in range(4)]
    for row, tokens in enumerate([range(3), range(10, 12), [30], range(60, 64)]):
        for token in tokens:
            rows[row][token] = 0.5
    drawn = save(plain(layers=LayerImportance([0, 5, 6, 7], rows)), tmp_path)
    assert (drawn.width, drawn.height) == (1600, 1000)
    hot = drawn.near(picture.LIGHT["heat"], 3)
    lines = np.flatnonzero(hot[:, 130:1560].sum(axis=1) >= 10)
    top, bottom = lines.min(), lines.max() + 1
    assert 1000 - 76 - 2 <= bottom <= 1000 - 76 + 2  # the lower panel ends where its margin begins
    seen = []
    for row in range(4):
        y = int(top + (row + 0.5) / 4 * (bottom - top))
        seen.append(drawn.tokens([x for x in range(130, 1560) if hot[y, x]], 64))
    assert seen == [{0, 1, 2}, {10, 11}, {30}, {60, 61, 62, 63}]
    assert save(plain(layers=LayerImportance([0], rows[:1])), tmp_path, layers=False).height == 560


def test_more_tokens_than_pixels_keep_their_darkest(tmp_path: Path) -> None:
    row = [0.0] * 6_000
    row[4_321] = 0.5
    drawn = save(plain(6_000, 32, layers=LayerImportance([0], [row])), tmp_path)
    hot = drawn.near(picture.LIGHT["heat"], 3)[:, 130:1560].sum(axis=0) >= 50
    places = [(x + 0.5) / 1430 * 6_000 for x in range(1430) if hot[x]]
    assert places
    assert all(abs(place - 4_321) < 12 for place in places)


@pytest.mark.filterwarnings("error")
def test_foreign_text_is_neither_a_formula_nor_wider_than_the_picture(tmp_path: Path) -> None:
    report = comparison(layers=2, protected=PROTECTED, title="$\\frac{1}{2}$ 語 " * 60, base="^_$" * 90)
    drawn = save(report, tmp_path, width=800, height=600)
    assert (drawn.width, drawn.height) == (800, 600)
    assert (abs(drawn.pixels[:140, 775:] - colour(picture.LIGHT["background"])) <= 2).all()


def test_nothing_scored_is_drawn_as_well(tmp_path: Path) -> None:
    report = plain(mode="dense", reason="short")
    flat = [replace(piece, importance=0.0, kept=True) for piece in report.pieces]
    assert save(replace(report, pieces=flat), tmp_path).width == 1600
    odd = [replace(piece, importance=float("nan")) for piece in report.pieces[:4]]
    assert save(replace(report, pieces=[*odd, *report.pieces[4:]]), tmp_path).width == 1600


def test_a_picture_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width: expected at least 640 pixels, got 100"):
        picture.save(plain(), tmp_path / "x.png", width=100)
    with pytest.raises(ValueError, match="height: expected at least 320 pixels, got 10"):
        picture.save(plain(), tmp_path / "x.png", height=10)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "specprefill-kernels\[plot\]"'):
        picture.save(plain(), tmp_path / "x.png")
