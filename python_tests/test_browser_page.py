"""The page in a real browser: readable by everyone, in any width, and nothing leaves it."""

from __future__ import annotations

import http.server
import threading

import pytest
from readings import NASTY, PROTECTED, WORDS, full, reading

from specprefill_kernels.report.shades import ranks

pytest_plugins = ["browser"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_kept_protected_and_skipped_tokens_look_different(show, scheme: str) -> None:
    opened = show(full(), color_scheme=scheme)
    looks = {}
    for name, position in (("protected", 1), ("kept", 7), ("protected alone", 35), ("skipped", 9)):
        looks[name] = opened.page.evaluate(
            """(position) => {
                 const token = document.querySelector(`#document i[data-p="${position}"]`);
                 for (let at = token; at.id !== "document"; at = at.parentElement) {
                   const style = getComputedStyle(at);
                   if (style.textDecorationLine === "none") continue;
                   return [style.textDecorationStyle, style.textDecorationColor];
                 }
                 return ["none", ""];
               }""",
            position,
        )
    assert looks["protected"][0] == "dashed"
    assert looks["protected alone"] == looks["protected"]
    assert looks["kept"][0] == "solid"
    assert looks["kept"][1] != looks["protected"][1]
    assert looks["skipped"] == ["none", ""]


@pytest.mark.parametrize("width", [320, 390, 700, 1400])
def test_no_width_scrolls_sideways(show, width: int) -> None:
    report = full(title="x" * 200, machine="y" * 300, evidence=[(0, 1)])
    opened = show(report, viewport={"width": width, "height": 800})
    opened.page.locator("#next").click()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    # No part of the page sticks out to the left either.
    assert (
        opened.page.evaluate(
            "Math.min(...[...document.querySelectorAll('main *')].map((e) => e.getBoundingClientRect().left))"
        )
        >= -1
    )


CONTRAST = """
(selector) => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 4 ? n : [...n, 1]; };
  const over = (top, under) => under.map((value, n) => top[n] * top[3] + value * (1 - top[3]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll(selector)) {
    if (!element.textContent.trim() || !element.getClientRects().length) continue;
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(getComputedStyle(at));
    let under = [255, 255, 255];
    for (const style of chain) {
      under = over(parse(style.backgroundColor), under);
      if (style.backgroundImage.startsWith("linear-gradient(rgb")) {
        under = over(parse(style.backgroundImage.match(/rgba?\\([^)]*\\)/)[0]), under);
      }
    }
    const ink = over(parse(getComputedStyle(element).color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 90) + " in " + element.parentElement.className];
  }
  return worst;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_readers_need(show, scheme: str) -> None:
    """WCAG 2 AA: 4.5 to 1, for every shade in every state of a token, and for all other text."""
    opened = show(full(), color_scheme=scheme)
    for row in (-1, 0, 4):
        opened.choose(row)
        ratio, where = opened.page.evaluate(CONTRAST, "#document i")
        assert ratio >= 4.5, where
    for level in range(13):
        opened.page.evaluate(
            """(level) => document.querySelectorAll("#document i").forEach((token) => {
                 token.className = token.className.replace(/^h\\d+/, "h" + level); })""",
            level,
        )
        ratio, where = opened.page.evaluate(CONTRAST, "#document i")
        assert ratio >= 4.5, where
    opened.point('#document i[data-p="1"]')
    ratio, where = opened.page.evaluate(
        CONTRAST, "main p, main h1, main h2, main td, main th, main dt, main dd, main button, main span:not(.chunk),"
        " main figcaption, main blockquote, main li, main li b, main output, main b.badge, kbd, #tip b, #tip div"
    )  # fmt: skip
    assert ratio >= 4.5, where


def test_a_page_without_layers_has_no_layer_control_and_works(show) -> None:
    report = reading(WORDS * 4)
    opened = show(report)
    for absent in ("#layer", "#heat", "#all"):
        assert opened.page.locator(absent).count() == 0
    opened.point('#document i[data-p="5"]')
    assert opened.tip()[1:] == [
        f"importance {report.pieces[5].importance:.3g}",
        f"rank {ranks([piece.importance for piece in report.pieces])[5]} of {len(report.pieces)}",
        "token 5, chunk 0",
        "kept",
    ]
    opened.page.locator("#next").click()
    assert int(opened.page.evaluate("document.activeElement.dataset.p")) == 0


def test_hostile_text_stays_text(show) -> None:
    hostile = NASTY * 4
    label = '</script><script>alert("label")</script>'
    report = full(title=hostile, question=hostile, reason=hostile, base=hostile, command=hostile,
                  protected=[*PROTECTED[:1], type(PROTECTED[0])(3, 6, label)])  # fmt: skip
    opened = show(report)
    assert opened.page.locator("script").count() == 2
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator(".question").text_content() == hostile
    opened.point('#document i[data-p="4"]')
    assert opened.tip()[-1] == f"kept: protected, {label}"


def test_the_page_is_readable_without_scripts(show) -> None:
    report = full()
    opened = show(report, java_script_enabled=False)
    text = opened.page.locator("#document").inner_text()
    assert "The quick brown fox" in text
    assert opened.page.locator("#tools").is_hidden()
    assert opened.page.locator("#layermap").is_hidden()
    assert opened.page.locator(".mapbars a").first.is_visible()


def test_nothing_can_leave_the_page(show) -> None:
    """The page's own policy stops what a script in it would try; a server that would answer hears nothing."""
    heard = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        opened = show(full())
        url = f"http://127.0.0.1:{server.server_port}/"
        tried = opened.page.evaluate(
            """async (url) => {
                 const image = new Promise((done) => {
                   const element = new Image();
                   element.onload = () => done("in");
                   element.onerror = () => done("stopped");
                   element.src = url + "image"; });
                 const fetched = fetch(url + "fetch").then(() => "in", () => "stopped");
                 return Promise.all([image, fetched]);
               }""",
            url,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert tried == ["stopped", "stopped"]
    assert heard == []
    assert all("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    opened.requests[:] = opened.requests[:1]
