"""The report in a real browser: no error, nothing wider than the screen, dark is dark.

Needs the package playwright and Debian's Chromium (`make browser`); another Chromium through RANKWISE_CHROMIUM.
"""

from __future__ import annotations

import pytest
from comparison_folders import write_comparison

from rankwise.reports.comparison import Comparison
from rankwise.reports.page import page as report_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", params=["plain", "hostile", "one seed"])
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    document = write_comparison(
        folder, hostile=request.param == "hostile", seeds=(0,) if request.param == "one seed" else (0, 1, 2)
    )
    (folder / "report.html").write_text(report_page(Comparison(document, folder)))
    return folder / "report.html"


@pytest.fixture
def opened(browser, report):
    """``opened(width, scheme)``: the page, which must say nothing on the console and ask for nothing but itself."""
    said, asked, pages = [], [], []

    def open_at(width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert said == []
    assert all(url == report.as_uri() or url == "data:," for url in asked), asked


@pytest.mark.parametrize("width", [320, 380, 800, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    page = opened(width)
    for unfolded in (False, True):
        if unfolded:
            page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        reaching_out = page.evaluate(
            """() => [...document.querySelectorAll("body *")]
                .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
                .map((element) => element.outerHTML.slice(0, 120))"""
        )
        assert reaching_out == []


def test_nothing_of_a_hostile_text_runs(opened):
    assert opened().evaluate("window.hacked") is None


def test_dark_is_dark_and_paper_is_white(opened):
    page = opened(scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(18, 22, 27)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
