"""The page shows every token once, escaped, with the marks of what was kept; and asks nothing of anyone."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill_kernels.report import page
from specprefill_kernels.report.data import Comparison, Measured, make_pieces, shade, shade_scale

NASTY = '<script>alert("1")</script> & "quotes" \'single\' </span></i> $css ${js} 語😀\n\n  end </body>'


def measured(**changes: object) -> Measured:
    values = {"ttft": 8.0, "seconds": {"tokenize": 0.01, "base_prefill": 7.99}, "tokens_read": 100, "answer": "yes",
              "right": True, "rounds": [7.0, 9.0]}  # fmt: skip
    return Measured(**{**values, **changes})


def comparison(text: str = NASTY * 8, seed: int = 0, **changes: object) -> Comparison:
    rng = random.Random(seed)
    cuts = sorted({0, len(text), *rng.sample(range(len(text)), len(text) // 3)})
    offsets = list(itertools.pairwise(cuts))
    kept = [chunk % 3 == 0 for chunk in range(len(offsets) // 8 + 1) for _ in range(8)][: len(offsets)]
    importance = [rng.random() ** 6 for _ in offsets]
    stages = {"tokenize": 0.01, "speculator_prefill": 1.0, "look_ahead": 0.2, "score": 0.05, "select": 0.001,
              "base_prefill": 0.74}  # fmt: skip
    values = {
        "title": "A <b>title</b>",
        "question": "Is <i>this</i> & that escaped?",
        "base": "Base <1.5B>",
        "speculator": "Small & fast",
        "prompt_tokens": len(offsets),
        "kept_tokens": sum(kept),
        "keep_ratio": 0.34,
        "chunk_size": 8,
        "full": measured(answer="<img src=x onerror=alert(1)>", right=True),
        "sparse": measured(ttft=2.0, seconds=stages, tokens_read=sum(kept), answer="no & no", right=False),
        "mode": "sparse",
        "reason": "kept <some>",
        "backend": "cpu",
        "pieces": make_pieces(text, offsets, importance, kept),
        "machine": "a <machine>",
        "command": "specprefill demo",
        "version": "1",
    }
    return Comparison(**{**values, **changes})


class Page(HTMLParser):
    """Tokens of the document with their chunk's classes, and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tokens: list[tuple[str, str, dict]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._chunk = ""
        self._open: dict | None = None
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        self._inside |= values.get("id") == "document"
        if self._inside and tag == "span":
            self._chunk = values["class"]
        if self._inside and tag == "i":
            self._open = values
            self.tokens.append(("", self._chunk, values))

    def handle_endtag(self, tag: str) -> None:
        if tag == "i":
            self._open = None
        if tag == "div":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and self._open is not None:
            text, chunk, values = self.tokens[-1]
            self.tokens[-1] = (text + data, chunk, values)


def test_every_token_is_there_once_and_escaped() -> None:
    report = comparison()
    parsed = Page(page.render(report))
    assert "".join(text for text, _, _ in parsed.tokens) == NASTY * 8
    assert [text for text, _, _ in parsed.tokens] == [piece.text for piece in report.pieces]
    assert parsed.tags.count("script") == 1  # ours
    assert "img" not in parsed.tags
    assert "b" in parsed.tags
    assert parsed.tags.count("html") == parsed.tags.count("body") == 1


def test_kept_marks_match() -> None:
    report = comparison()
    for (_, chunk, values), piece in zip(Page(page.render(report)).tokens, report.pieces, strict=True):
        assert ("kept" in chunk) == piece.kept
        assert ("dropped" in chunk) != piece.kept
        assert int(values["data-p"]) == piece.position
        assert float(values["data-s"]) == pytest.approx(piece.importance, rel=1e-2)


def test_nothing_is_requested_from_anywhere() -> None:
    text = page.render(comparison())
    assert all(link.startswith(("#", "data:")) for link in Page(text).links)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_numbers_answers_and_question_are_shown() -> None:
    text = page.render(comparison())
    for expected in (
        "4.00\u00d7",
        "8.00",
        "2.00",
        "right</b>",
        "wrong</b>",
        "no &amp; no",
        "Is &lt;i&gt;this",
        "7.00, 9.00",
    ):
        assert expected in text, expected


def test_the_inserted_sentence_is_outlined() -> None:
    report = comparison(inserted="quotes", inserted_span=(3, 6))
    parsed = Page(page.render(report))
    assert [int(v["data-p"]) for _, _, v in parsed.tokens if " f" in v["class"]] == [3, 4, 5]
    assert report.fact_kept is True
    assert replace(report, inserted_span=(7, 9)).fact_kept is False
    assert replace(report, inserted_span=None).fact_kept is None
    assert "put into the document for the demo" in page.render(report)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "The first token came 4.0\u00d7 sooner."),
        ({"same_model": True}, "One model on both sides cannot gain"),
        ({"full": measured(ttft=1.0)}, "No gain here"),
        ({"mode": "dense", "reason": "the prompt is short"}, "Nothing was skipped: the prompt is short."),
    ],
)
def test_the_verdict_is_true(changes: dict, expected: str) -> None:
    assert expected in comparison(**changes).verdict
    assert page.render(comparison(**changes))


def test_a_dense_result_without_importance_has_a_page() -> None:
    report = comparison(mode="dense", reason="short")
    flat = [replace(piece, importance=0.0, kept=True) for piece in report.pieces]
    assert "Nothing was skipped" in page.render(replace(report, pieces=flat, sparse=measured()))


@given(
    text=st.text(max_size=40),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=20),
    data=st.randoms(use_true_random=False),
)
def test_pieces_join_to_the_text(text: str, spans: list[tuple[int, int]], data: random.Random) -> None:
    offsets = sorted((min(a, len(text)), min(a + n, len(text))) for a, n in spans)
    kept = [data.random() < 0.5 for _ in offsets]
    pieces = make_pieces(text, offsets, [data.random() for _ in offsets], kept)
    assert "".join(piece.text for piece in pieces) == text or not text
    assert any(piece.kept for piece in pieces) == any(kept)


def test_pieces_of_one_character_become_one() -> None:
    pieces = make_pieces("a😀b", [(0, 1), (1, 2), (1, 2), (2, 3)], [0.1, 0.2, 0.7, 0.3], [False, False, True, False])
    assert [(piece.text, piece.importance, piece.kept) for piece in pieces] == [
        ("a", 0.1, False),
        ("😀", 0.7, True),
        ("b", 0.3, False),
    ]


def test_shades_are_monotonic_and_bounded() -> None:
    pieces = comparison().pieces
    scale = shade_scale(pieces)
    levels = [shade(piece.importance, scale) for piece in sorted(pieces, key=lambda piece: piece.importance)]
    assert levels == sorted(levels)
    assert levels[0] >= 0
    assert levels[-1] == 12
    assert shade(float("nan"), scale) == shade(-1.0, scale) == shade(0.0, scale) == 0
    assert shade_scale([]) == 1.0


def test_the_terminal_table_has_both_sides() -> None:
    rich = pytest.importorskip("rich.console")
    from specprefill_kernels.report import terminal

    console = rich.Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.show(comparison(inserted="quotes", inserted_span=(3, 6)), console)
    text = console.export_text()
    for expected in ("time to first token", "8.00", "2.00", "4.00\u00d7", "right", "wrong", "kept whole"):
        assert expected in text, expected


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_real_browser_runs_the_page(tmp_path: Path) -> None:
    report = comparison()
    file = tmp_path / "page.html"
    file.write_text(page.render(report), encoding="utf-8")
    # fmt: off
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri(),
    ]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0 or not done.stdout:
        pytest.skip(f"Chromium does not start here: {done.stderr.strip()[-200:]}")
    dom = done.stdout
    parsed = Page(dom)
    assert [text for text, _, _ in parsed.tokens] == [piece.text for piece in report.pieces]
    assert 'class="chunk kept gap"' in dom  # only the script adds this one
