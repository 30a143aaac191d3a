"""The page shows every token once, escaped, with the marks of what was kept; and asks nothing of anyone."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from properties import given, st
from readings import NASTY, PROTECTED, comparison, measured, reading

from specprefill_kernels.report import page
from specprefill_kernels.report.data import Comparison, LayerImportance, Piece, Protected, Reading, make_pieces


class Page(HTMLParser):
    """Tokens of the document with their chunk's classes, and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tokens: list[tuple[str, str, dict]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.chunks: list[dict] = []
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
            self.chunks.append(values)
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


def facts(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.S)[1])


@pytest.mark.parametrize("make", [reading, comparison])
def test_every_token_is_there_once_and_escaped(make) -> None:
    report = make(layers=3, protected=PROTECTED)
    parsed = Page(page.render(report))
    assert "".join(text for text, _, _ in parsed.tokens) == NASTY * 8
    assert [text for text, _, _ in parsed.tokens] == [piece.text for piece in report.pieces]
    assert parsed.tags.count("script") == 2  # ours: the numbers and the program
    assert "img" not in parsed.tags
    assert "b" in parsed.tags
    assert parsed.tags.count("html") == parsed.tags.count("body") == 1


def test_marks_match_the_pieces() -> None:
    report = comparison()
    values = [piece.importance for piece in report.pieces]
    for (_, chunk, attributes), piece in zip(Page(page.render(report)).tokens, report.pieces, strict=True):
        assert ("kept" in chunk) == piece.kept
        assert ("dropped" in chunk) != piece.kept
        assert int(attributes["data-p"]) == piece.position
        assert float(attributes["data-s"]) == pytest.approx(piece.importance, rel=1e-2)
        assert int(attributes["data-r"]) == 1 + sum(value > piece.importance for value in values)


def test_protected_tokens_carry_their_label_and_are_counted_once() -> None:
    overlapping = (*PROTECTED, Protected(35, 40, "user"))
    report = reading(protected=overlapping)
    text = page.render(report)
    labels = facts(text)["labels"]
    marked = {int(v["data-p"]): labels[int(v["data-l"])] for _, _, v in Page(text).tokens if "data-l" in v}
    assert [label for _, label in sorted(marked.items())] == (
        ["markers"] * 3 + ["system <prompt>"] * 3 + ["markers"] * 3 + ["user"] * 3
    )
    assert sorted(marked) == [0, 1, 2, 3, 4, 5, 34, 35, 36, 37, 38, 39]
    assert all((" g" in v["class"]) == ("data-l" in v) for _, _, v in Page(text).tokens)
    assert report.protected_tokens == 12
    assert report.protected_counts == {"markers": 6, "system <prompt>": 3, "user": 5}
    assert "12 tokens, kept whatever" in text
    assert "system &lt;prompt&gt; <b>3</b>" in text
    assert "kept whatever" not in page.render(reading())


def test_gaps_count_the_tokens_that_were_left_out() -> None:
    flags = [False] * 5 + [True] * 4 + [False] * 12 + [True] * 2 + [False] * 7
    pieces = [Piece("x", 0.1, kept, n, n + 1) for n, kept in enumerate(flags)]
    report = reading(pieces=pieces, prompt_tokens=30, kept_tokens=6, chunk_size=4)
    assert [chunk["data-gap"] for chunk in Page(page.render(report)).chunks if "data-gap" in chunk] == ["5", "12", "7"]
    assert report.kept_spans == [(5, 9), (21, 23)]
    assert facts(page.render(report))["spans"] == [[5, 9], [21, 23]]


def test_chunks_of_the_map_are_as_wide_as_their_tokens_and_say_how_much_is_kept() -> None:
    flags = [True] * 4 + [False] * 4 + [False, True, False, False] + [True] * 2
    pieces = [Piece("x", 0.1 + n, kept, n, n + 1) for n, kept in enumerate(flags)]
    text = page.render(reading(pieces=pieces, prompt_tokens=14, kept_tokens=7, chunk_size=4))
    bars = re.findall(r'<a href="#c(\d)" class="(\w+)" .*?style="(.*?)height', text)
    assert bars == [
        ("0", "kept", "flex-grow:4;"),
        ("1", "dropped", "flex-grow:4;"),
        ("2", "part", "--share:25%;--stops:var(--rest) 0% 25%,var(--kept) 25% 50%,var(--rest) 50% 100%;flex-grow:4;"),
        ("3", "kept", "flex-grow:2;"),
    ]


@pytest.mark.parametrize("make", [reading, comparison])
def test_nothing_is_requested_from_anywhere(make) -> None:
    text = page.render(make(layers=2))
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


def test_a_reading_alone_has_a_page_without_times_and_answers() -> None:
    report = reading()
    text = page.render(report)
    assert f"The base model reads {report.kept_tokens:,} of {report.prompt_tokens:,} tokens." in text
    assert "would read" in text
    assert "1.50" in text  # the speculator's seconds
    assert "Is &lt;i&gt;this" in text
    for absent in ("Time to first token", "full prefill", "speed-up", "blockquote>"):
        assert absent not in text, absent
    assert "The question" not in page.render(replace(report, question=""))
    assert "Nothing is skipped: short." in page.render(replace(report, mode="dense", reason="short"))


def test_a_comparison_takes_all_of_its_reading() -> None:
    report = reading(layers=2, protected=PROTECTED, evidence=[(1, 2)])
    joined = Comparison.of(report, full=measured(), sparse=measured(ttft=2.0))
    assert {name: getattr(joined, name) for name in vars(report)} == vars(report)
    assert isinstance(joined, Reading)
    assert joined.speedup == 4.0


def test_the_inserted_sentence_is_outlined() -> None:
    report = comparison(inserted="quotes", evidence=[(3, 6)])
    parsed = Page(page.render(report))
    assert [int(v["data-p"]) for _, _, v in parsed.tokens if " f" in v["class"]] == [3, 4, 5]
    assert report.evidence_kept is True
    assert replace(report, evidence=[(7, 9)]).evidence_kept is False
    assert replace(report, evidence=[(3, 6), (8, 9)]).evidence_kept is False
    assert replace(report, evidence=()).evidence_kept is None
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


def test_importance_that_is_not_finite_has_a_page() -> None:
    report = reading(layers=2)
    broken = [replace(piece, importance=float("nan")) for piece in report.pieces[:3]]
    broken += [replace(piece, importance=float("inf")) for piece in report.pieces[3:5]]
    rows = [list(row) for row in report.layers.values]
    rows[0][:2] = [float("nan"), float("inf")]
    layers = LayerImportance([0, 1], rows)
    text = page.render(replace(report, pieces=[*broken, *report.pieces[5:]], layers=layers))
    assert facts(text)["layers"]["tops"][0] == max(rows[0][2:])


def test_two_thousand_tokens_and_thirty_layers_stay_well_under_a_megabyte() -> None:
    text = "".join(random.Random(0).choices("abcdefgh <&", k=6_300))
    report = comparison(text, layers=30)
    assert report.prompt_tokens >= 2_048
    assert len(page.render(report).encode()) < 450_000


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
    assert [token for piece in pieces for token in range(piece.position, piece.end)] == list(range(len(offsets)))


def test_pieces_of_one_character_become_one() -> None:
    pieces = make_pieces("a😀b", [(0, 1), (1, 2), (1, 2), (2, 3)], [0.1, 0.2, 0.7, 0.3], [False, False, True, False])
    assert pieces == [Piece("a", 0.1, False, 0, 1), Piece("😀", 0.7, True, 1, 3), Piece("b", 0.3, False, 3, 4)]


def test_text_after_the_last_token_goes_with_it() -> None:
    assert make_pieces("abc", [(0, 1), (1, 2)], [0.1, 0.2], [False, True])[-1] == Piece("bc", 0.2, True, 1, 2)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"importance, kept: expected one for each of 2 offsets, got 1 and 2"):
        make_pieces("ab", [(0, 1), (1, 2)], [0.1], [True, False])
    with pytest.raises(ValueError, match=r"values: expected a row for each of 2 layers, got 1"):
        LayerImportance([0, 1], [[0.0]])


def test_the_terminal_table_has_both_sides() -> None:
    rich = pytest.importorskip("rich.console")
    from specprefill_kernels.report import terminal

    console = rich.Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.show(comparison(inserted="quotes", evidence=[(3, 6)]), console)
    text = console.export_text()
    for expected in ("time to first token", "8.00", "2.00", "4.00\u00d7", "right", "wrong", "kept whole"):
        assert expected in text, expected
