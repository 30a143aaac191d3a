"""Fixtures that open a page of ours in a real Chromium and hold it to silence: nothing said, nothing requested.

Needs playwright from the package registry and a Chromium of the system (or of CHROMIUM=/path/to/chromium); none is
fetched. Without them the tests are skipped and say why; with CI_BROWSER=required they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specprefill_kernels.report import page
from specprefill_kernels.report.data import Reading

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--no-default-browser-check", "--disable-dev-shm-usage", "--hide-scrollbars",
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    problem = None
    if sync_playwright is None:
        problem = "playwright is not installed: pip install playwright"
    elif CHROMIUM is None:
        problem = f"no browser found: none of {', '.join(NAMES)} is on PATH, and CHROMIUM is not set"
    if problem is not None:
        if os.environ.get("CI_BROWSER") == "required":
            pytest.fail(f"CI_BROWSER=required, but {problem}")
        pytest.skip(problem)
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, and in most containers.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, context: Any, file: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def tokens(self) -> list[dict[str, Any]]:
        return self.page.evaluate(
            """() => [...document.querySelectorAll("#document i")].map((token) => ({
                 text: token.textContent, css: token.className, kept: token.parentElement.classList.contains("kept"),
                 position: +token.dataset.p, shown: token.getClientRects().length > 0 }))"""
        )

    def choose(self, row: int) -> None:
        """A layer by its row, or -1 for all: as the arrow keys of the slider do."""
        self.page.locator("#layer").fill(str(row + 1))

    def still(self, selector: str) -> Any:
        """Brings an element into view and waits until the scrolling, which closes the note, is over."""
        element = self.page.locator(selector)
        element.scroll_into_view_if_needed()
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return element

    def point(self, selector: str) -> None:
        self.still(selector).hover()

    def tip(self) -> list[str]:
        """The lines of the note, without its chart."""
        assert self.page.locator("#tip").is_visible()
        return [line for line in self.page.locator("#tip > *").all_text_contents() if line]


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """show(reading, **options of the context) -> Opened; afterwards nothing may have been said or requested."""
    contexts, pages = [], []

    def open_page(report: Reading, **options: Any) -> Opened:
        file = tmp_path / f"page{len(pages)}.html"
        file.write_text(page.render(report), encoding="utf-8")
        context = chromium.new_context(
            **{"viewport": {"width": 1000, "height": 900}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        pages.append(Opened(context, file))
        return pages[-1]

    yield open_page
    for context in contexts:
        context.close()
    for opened in pages:
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in opened.requests if url.startswith("file:")]) == 1
