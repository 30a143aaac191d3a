"""The page in a real browser: what it shows, on every way of asking it, is what was computed."""

from __future__ import annotations

import itertools

import pytest
from readings import CHUNK, EVIDENCE, PROTECTED, full

from specprefill_kernels.report.data import Reading
from specprefill_kernels.report.shades import chunks, decode, encode, heights, layers_of_pieces, ranks, scale_of, shade

pytest_plugins = ["browser"]


def levels(report: Reading, row: int) -> list[int]:
    """Every token's shade: over all layers, or by the byte that the page has for one layer."""
    if row < 0:
        values = [piece.importance for piece in report.pieces]
        return [shade(value, scale_of(values)) for value in values]
    values = byte_values(report, row)
    return [shade(value, scale_of(values)) for value in values]


def byte_values(report: Reading, row: int) -> list[float]:
    top, codes = encode(layers_of_pieces(report.layers, report.pieces)[row])
    return [decode(code, top) for code in codes]


def test_every_token_is_rendered_with_its_marks(show) -> None:
    report = full()
    tokens = show(report).tokens()
    assert [token["text"] for token in tokens] == [piece.text for piece in report.pieces]
    assert [token["kept"] for token in tokens] == [piece.kept for piece in report.pieces]
    assert [int(token["css"].split()[0][1:]) for token in tokens] == levels(report, -1)
    protected = {n for part in PROTECTED for n in range(part.start, part.end)}
    assert {token["position"] for token in tokens if "g" in token["css"].split()} == protected
    assert {token["position"] for token in tokens if "f" in token["css"].split()} == set(range(*EVIDENCE))


def test_the_layer_control_shades_by_exactly_that_layers_bytes(show) -> None:
    report = full()
    opened = show(report)
    before = opened.tokens()
    slider = opened.page.locator("#layer")
    assert slider.get_attribute("max") == "5"
    for row in (0, 3, 4):
        opened.choose(row)
        tokens = opened.tokens()
        assert [int(token["css"].split()[0][1:]) for token in tokens] == levels(report, row)
        assert [token["css"].split()[1:] for token in tokens] == [token["css"].split()[1:] for token in before]
        assert opened.page.locator("#layername").text_content() == f"layer {10 + row}"
        assert slider.get_attribute("aria-valuetext") == f"layer {10 + row}"
    assert levels(report, 3) != levels(report, 4) != levels(report, -1)
    opened.page.locator("#all").click()
    assert opened.tokens() == before
    assert opened.page.locator("#all").get_attribute("aria-pressed") == "true"
    assert slider.input_value() == "0"


def test_a_shade_is_a_colour_and_darker_for_more(show) -> None:
    opened = show(full())
    alphas = opened.page.evaluate(
        """() => Array.from({ length: 13 }, (_, level) => {
             const token = document.querySelector("#document .dropped i");
             token.className = "h" + level;
             const numbers = getComputedStyle(token).backgroundColor.match(/[\\d.]+/g).map(Number);
             return numbers.length === 4 ? numbers[3] : 1;
           })"""
    )
    assert alphas[0] == 0
    assert all(a < b for a, b in itertools.pairwise(alphas))


def test_the_slider_works_with_arrow_keys(show) -> None:
    report = full()
    opened = show(report)
    opened.page.locator("#layer").focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator("#layername").text_content() == "layer 11"
    assert [int(token["css"].split()[0][1:]) for token in opened.tokens()] == levels(report, 1)
    opened.page.keyboard.press("Home")
    assert opened.page.locator("#layername").text_content() == "all layers"
    assert [int(token["css"].split()[0][1:]) for token in opened.tokens()] == levels(report, -1)


def test_a_row_of_the_layer_map_chooses_its_layer_and_lets_it_go(show) -> None:
    opened = show(full())
    box = opened.still("#heat").bounding_box()
    at = (box["x"] + box["width"] / 2, box["y"] + box["height"] * 3.5 / 5)
    opened.page.mouse.click(*at)
    assert opened.page.locator("#layername").text_content() == "layer 13"
    mark = opened.page.locator("#row").bounding_box()
    assert mark["y"] < at[1] < mark["y"] + mark["height"] < box["y"] + box["height"] * 4.5 / 5
    opened.page.mouse.click(*at)
    assert opened.page.locator("#layername").text_content() == "all layers"
    assert opened.page.locator("#row").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_layer_map_has_every_tokens_shade(show, scheme: str) -> None:
    report = full()
    opened = show(report, color_scheme=scheme)
    drawn = opened.page.evaluate(
        """() => { const canvas = document.getElementById("heat");
             const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
             return [canvas.width, canvas.height, [...data].filter((_, n) => n % 4 === 3)]; }"""
    )
    assert drawn[:2] == [report.prompt_tokens, 5]  # a column per token
    for row in range(5):
        expected = [round(255 * level / 12) for level in levels(report, row)]
        got = drawn[2][row * report.prompt_tokens : (row + 1) * report.prompt_tokens]
        assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1  # halves round up in a browser


def test_the_chunk_map_follows_the_layer(show) -> None:
    report = full()
    opened = show(report)

    def drawn() -> list[float]:
        return opened.page.evaluate(
            "[...document.querySelectorAll('#bars a')].map((bar) => parseFloat(bar.style.height))"
        )

    def expected(values: list[float]) -> list[float]:
        by_position = {piece.position: value for piece, value in zip(report.pieces, values, strict=True)}
        groups = [[by_position[piece.position] for piece in group] for _, group in chunks(report.pieces, CHUNK)]
        return heights([sum(group) / len(group) for group in groups])

    all_layers = expected([piece.importance for piece in report.pieces])
    assert drawn() == pytest.approx(all_layers, abs=0.06)  # written with one decimal
    opened.choose(2)
    assert drawn() == pytest.approx(expected(byte_values(report, 2)), rel=1e-4)
    assert drawn() != pytest.approx(all_layers, abs=0.06)
    opened.choose(-1)
    assert drawn() == pytest.approx(all_layers, abs=0.06)


@pytest.mark.parametrize("position", [1, 7, 9, 35, 42])
def test_pointing_at_a_token_shows_its_numbers(show, position: int) -> None:
    report = full()
    opened = show(report)
    n = next(n for n, piece in enumerate(report.pieces) if piece.position == position)
    piece = report.pieces[n]
    token = f'#document i[data-p="{position}"]'
    opened.point(token)
    values = [byte_values(report, row)[n] for row in range(5)]
    best = values.index(max(values))
    label = {1: "kept: protected, markers", 7: "kept", 9: "skipped", 35: "kept: protected, markers"}.get(
        position, "skipped"
    )
    everywhere = ranks([piece.importance for piece in report.pieces])[n]
    lines = opened.tip()
    assert lines[1:3] == [f"importance {piece.importance:.3g}", f"rank {everywhere} of {len(report.pieces)}"]
    assert lines[3] == f"strongest in layer {10 + best}: {number(values[best])}"
    assert lines[4:] == [f"token {position}, chunk {position // CHUNK}", label]
    chart = opened.page.locator("#tip .bylayer span")
    assert chart.count() == 5
    assert [name == "on" for name in chart.evaluate_all("all => all.map((bar) => bar.className)")].index(True) == best

    opened.choose(1)
    opened.page.mouse.move(2, 2)
    opened.point(token)
    rank = ranks(byte_values(report, 1))[n]
    assert opened.tip()[3] == f"layer 11: {number(values[1])}, rank {rank}"
    opened.page.mouse.move(2, 2)
    assert opened.page.locator("#tip").is_hidden()


def number(value: float) -> str:
    """Two significant digits as JavaScript writes them."""
    text = f"{value:.2g}"
    return f"{float(text):.10f}".rstrip("0").rstrip(".") if float(text) >= 1e-6 or not float(text) else text


def test_pointing_at_a_bar_shows_its_chunk(show) -> None:
    report = full()
    opened = show(report)
    opened.point("#bars a:nth-child(5)")
    group = dict(chunks(report.pieces, CHUNK))[4]
    mean = float(opened.tip()[1].removeprefix("mean importance "))
    assert mean == pytest.approx(sum(piece.importance for piece in group) / len(group), rel=1e-2)
    assert opened.tip()[0] == "chunk 4, 38% kept"  # three protected tokens of eight
    assert opened.tip()[2] == "tokens 32 to 39"
    opened.point("#bars a:nth-child(4)")
    assert opened.tip()[0] == "chunk 3, kept"


def test_kept_text_only_hides_the_rest_and_counts_it(show) -> None:
    report = full()
    opened = show(report)
    assert all(token["shown"] for token in opened.tokens() if token["text"].strip())
    opened.page.locator("#only").check()
    for token, piece in zip(opened.tokens(), report.pieces, strict=True):
        if piece.text.strip():
            assert token["shown"] == piece.kept
    gap = opened.page.evaluate("""getComputedStyle(document.querySelector('#document .gap'), '::before').content""")
    spans = report.kept_spans
    assert str(spans[1][0] - spans[0][1]) in gap
    opened.page.locator("#bars a.dropped").first.click()  # what it leads to is shown again
    assert not opened.page.locator("#only").is_checked()
    assert all(token["shown"] for token in opened.tokens() if token["text"].strip())


def test_the_buttons_jump_between_kept_spans_and_round(show) -> None:
    report = full()
    opened = show(report)
    starts = [start for start, _ in report.kept_spans]
    focused = "document.activeElement.dataset.p"
    seen = []
    for _ in range(len(starts) + 1):
        opened.page.locator("#next").click()
        seen.append(int(opened.page.evaluate(focused)))
    assert seen == [*starts, starts[0]]
    assert opened.page.locator("#place").text_content() == f"span 1 of {len(starts)}"
    opened.page.locator("#previous").click()
    assert int(opened.page.evaluate(focused)) == starts[-1]
    assert opened.page.locator("#document i:focus").is_visible()
    assert opened.tip()[-1].startswith("kept")


def test_the_document_works_with_the_keyboard_alone(show) -> None:
    report = full()
    opened = show(report)
    keyboard = opened.page.keyboard
    focused = "document.activeElement.dataset.p"
    for _ in range(20):
        keyboard.press("Tab")
        if opened.page.evaluate("document.activeElement.id") == "document":
            break
    assert opened.page.evaluate("document.activeElement.id") == "document"

    keyboard.press("ArrowRight")
    keyboard.press("ArrowRight")
    assert int(opened.page.evaluate(focused)) == 1
    assert opened.tip()[1] == f"importance {report.pieces[1].importance:.3g}"
    said = opened.page.locator("#say").text_content()
    assert f"importance {report.pieces[1].importance:.3g}" in said
    assert "kept: protected, markers" in said
    keyboard.press("ArrowLeft")
    assert int(opened.page.evaluate(focused)) == 0
    keyboard.press("n")
    assert int(opened.page.evaluate(focused)) == report.kept_spans[1][0]
    keyboard.press("ArrowRight")
    keyboard.press("p")  # to the start of the span it is in, then to the one before
    assert int(opened.page.evaluate(focused)) == report.kept_spans[1][0]
    keyboard.press("p")
    assert int(opened.page.evaluate(focused)) == 0
    keyboard.press("End")
    assert int(opened.page.evaluate(focused)) == report.pieces[-1].position
    keyboard.press("Home")
    assert int(opened.page.evaluate(focused)) == 0
    keyboard.press("Escape")
    assert opened.page.locator("#tip").is_hidden()


def test_the_note_follows_its_token_when_the_page_scrolls_until_it_is_closed(show) -> None:
    opened = show(full())
    opened.still("#document i[data-p='100']")
    opened.page.locator("#document").focus()
    opened.page.keyboard.press("ArrowRight")

    def scroll(by: int) -> None:
        opened.page.evaluate(f"scrollBy(0, {by})")
        opened.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    before = opened.page.locator("#tip").bounding_box()["y"]
    scroll(-60)
    assert opened.page.locator("#tip").bounding_box()["y"] == pytest.approx(before + 60, abs=1)
    opened.page.keyboard.press("Escape")
    scroll(60)
    assert opened.page.locator("#tip").is_hidden()


def test_with_kept_text_only_the_arrows_pass_what_is_hidden(show) -> None:
    report = full()
    opened = show(report)
    opened.page.locator("#only").check()
    opened.page.locator("#document").focus()
    seen = []
    for _ in range(30):
        opened.page.keyboard.press("ArrowRight")
        seen.append(int(opened.page.evaluate("document.activeElement.dataset.p")))
    assert seen == [piece.position for piece in report.pieces if piece.kept][:30]


def test_a_protected_part_in_the_legend_leads_to_its_spans(show) -> None:
    opened = show(full())
    button = opened.page.locator(".part", has_text="markers")
    assert button.text_content().split() == ["markers", "6"]
    seen = []
    for _ in range(3):
        button.click()
        seen.append(int(opened.page.evaluate("document.activeElement.dataset.p")))
    assert seen == [0, 34, 0]
    opened.page.locator(".part", has_text="system <prompt>").click()
    assert int(opened.page.evaluate("document.activeElement.dataset.p")) == 3


def test_a_tap_shows_the_numbers(show) -> None:
    report = full()
    opened = show(report, has_touch=True, is_mobile=True, viewport={"width": 390, "height": 800})
    opened.still('#document i[data-p="42"]').tap()
    assert f"importance {report.pieces[42].importance:.3g}" in opened.tip()
    box = opened.page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
