"""The report in a real browser: no error, nothing wider than the screen, sorting and filters work, dark is dark.

Needs the package playwright and Debian's Chromium (`make browser`); another Chromium through RANKWISE_CHROMIUM.
"""

from __future__ import annotations

import re

import pytest
from comparison_folders import write_comparison

from rankwise.reports.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", params=["plain", "hostile", "one seed"])
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(
        folder, hostile=request.param == "hostile", seeds=(0,) if request.param == "one seed" else (0, 1, 2)
    )
    return write_report(folder)[0]


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
                .filter((element) => !element.closest(".scroll > *"))
                .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
                .map((element) => element.outerHTML.slice(0, 120))"""
        )
        assert reaching_out == []


def figures(page, column: str) -> list[float]:
    cells = page.locator(f'table.methods td[data-label="{column}"]')
    return [float(cells.nth(index).get_attribute("data-sort")) for index in range(cells.count())]


@pytest.mark.parametrize("width", [380, 1280])
def test_columns_sort_in_both_directions_by_click_and_by_key(opened, width):
    page = opened(width)
    header = page.locator("table.methods thead th", has_text="Peak memory")
    button = header.locator("button")
    button.click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert figures(page, "Peak memory") == sorted(figures(page, "Peak memory"))
    button.focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert figures(page, "Peak memory") == sorted(figures(page, "Peak memory"), reverse=True)
    page.locator("table.methods thead th", has_text="Method").locator("button").click()
    assert page.locator("table.methods [aria-sort]").count() == 1
    assert page.locator("table.methods tbody tr").count() == 4


def test_examples_are_filtered_by_method_and_outcome(opened):
    page = opened()
    tally = page.locator(".answers:visible .tally").inner_text()
    assert tally.startswith("DoRA")
    for outcome, words in (("better", "higher BLEU"), ("worse", "lower BLEU"), ("same", "same BLEU")):
        page.locator(f'.choices button[data-value="{outcome}"]').click()
        shown = page.locator(".example:visible")
        assert shown.count() > 0
        kinds = {shown.nth(index).get_attribute("data-outcome") for index in range(shown.count())}
        assert kinds == {outcome}
        assert int(re.search(rf"(\d+) {words}", tally)[1]) >= shown.count()
    page.locator(".choices button", has_text=re.compile("^QLoRA")).click()
    assert page.locator(".answers:visible .tally").inner_text().startswith("QLoRA")
    page.locator(".choices button", has_text=re.compile("^All")).click()
    outcomes = page.locator(".example:visible").evaluate_all("all => all.map((one) => one.dataset.outcome)")
    assert set(outcomes) == {"better", "worse", "same"}


def test_nothing_of_a_hostile_text_runs(opened):
    assert opened().evaluate("window.hacked") is None


def test_dark_is_dark_and_paper_is_white(opened):
    page = opened(scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(18, 22, 27)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(colour) == "rgb(255, 255, 255)"


def test_paper_shows_what_was_folded_and_no_buttons(opened):
    page = opened()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator(".filters").is_hidden()
    assert page.locator("#reproduce details:not([open])").count() == 0
    assert page.locator("text=Every pair on every metric").is_visible()


def test_without_a_script_everything_that_matters_is_there(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("table.methods tbody tr").count() == 4
    assert page.locator(".filters").is_hidden()
    assert page.locator(".example:visible").count() > 0
    context.close()


def test_on_a_phone_sort_controls_look_like_controls_and_no_mark_stands_alone(opened):
    page = opened(375)
    style = page.evaluate(
        """() => {
            const button = document.querySelector(".methods thead button");
            const found = getComputedStyle(button);
            return [parseFloat(found.borderTopWidth), button.getBoundingClientRect().height];
        }"""
    )
    assert style[0] >= 1
    assert style[1] >= 32
    marks = page.evaluate(
        """() => [...document.querySelectorAll(".trust .weak strong")]
            .map((strong) => getComputedStyle(strong, "::after").content)"""
    )
    assert all(mark == '"\u00a0!"' for mark in marks)
