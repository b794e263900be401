"""``rankwise board``: what it refuses, and the page in a real browser (`make browser`)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rankwise.cli import board

sys.path.insert(0, str(Path(__file__).parents[1] / "reports"))

from board_folders import write_run
from comparison_folders import HOSTILE, write_comparison

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")


def test_a_folder_that_is_not_there_is_refused(rankwise, tmp_path):
    done = rankwise("board", tmp_path / "nothing")
    assert (done.code, "error RW797" in done.stderr) == (2, True)


def test_without_gradio_it_says_what_to_install(rankwise, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    done = rankwise("board", tmp_path)
    assert done.code == 2
    assert 'RW795: rankwise board needs Gradio; run pip install "rankwise[board]".' in done.stderr


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("192.168.1.7", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_only_addresses_of_this_machine_need_no_token(host, own):
    assert board.is_loopback(host) is own


@pytest.fixture
def served():
    """``served(folder, host, login)``: the address of a board, which ends with the test."""
    pages = []

    def serve(folder: Path, host: str = "127.0.0.1", login: tuple[str, str] | None = None) -> str:
        from rankwise.cli import board_page

        pages.append(board_page.build(folder))
        return board_page.serve(pages[-1], host, None, login)

    yield serve
    for page in pages:
        page.close(verbose=False)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@needs_gradio
def test_files_of_the_machine_are_not_served(served, tmp_path):
    run = write_run(tmp_path / "runs" / "first")
    (tmp_path / "runs" / "secret.txt").write_text("secret")
    url = served(tmp_path / "runs")
    assert status(url) == 200
    for path in (run / "run.json", tmp_path / "runs" / "secret.txt", Path("/etc/hostname")):
        assert status(f"{url}gradio_api/file={path}") in (403, 404)


@needs_gradio
def test_elsewhere_it_asks_for_the_token(served, tmp_path):
    url = served(tmp_path, "0.0.0.0", (board.USER, "token")).replace("0.0.0.0", "127.0.0.1")
    assert status(f"{url}config") == 401
    assert status(f"{url}gradio_api/info") == 401


@needs_gradio
def test_a_port_that_is_taken_is_told(served, tmp_path):
    from rankwise.cli import board_page
    from rankwise.errors import ConfigError

    port = int(served(tmp_path).rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError) as caught:
        board_page.serve(board_page.build(tmp_path), "127.0.0.1", port, None)
    assert caught.value.code == "RW796"


@pytest.fixture
def opened(browser, served):
    """``opened(folder, width)``: the page, which must say nothing on the console and ask only its own server."""
    said, asked, pages, urls = [], [], [], []

    def open_at(folder: Path, width: int = 1280):
        urls.append(served(folder))
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(urls[-1])
        page.locator(".run").first.wait_for()
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert said == []
    assert all(url.startswith((*urls, "data:", "blob:")) for url in asked), asked


def choose(page, label: str, name: str) -> None:
    menu = page.get_by_label(label, exact=True)
    menu.click()
    menu.fill(name)
    page.get_by_role("option", name=name, exact=True).click()
    # The list fades out; another one must not open beside it.
    page.get_by_role("option").first.wait_for(state="detached")


@pytest.mark.browser
@needs_gradio
@pytest.mark.parametrize("width", [390, 1280])
def test_two_runs_stand_side_by_side_and_nothing_is_wider_than_the_screen(width, opened, tmp_path):
    write_run(tmp_path / "first", steps=40, prompt="What is a list?", answer="word " * 200)
    write_run(tmp_path / "second", steps=20)
    write_comparison(tmp_path / "comparison")
    page = opened(tmp_path, width)
    choose(page, "Run", "first")
    choose(page, "Beside it", "second")
    page.locator("#second-run .run").wait_for()
    left, right = (page.locator(f"#{name} .run").bounding_box() for name in ("first-run", "second-run"))
    if width == 1280:
        assert (right["x"] > left["x"] + 300, abs(right["y"] - left["y"]) < 2) == (True, True)
    else:
        assert (right["y"] > left["y"] + 300, abs(right["x"] - left["x"]) < 2) == (True, True)
    colours = page.evaluate(
        "[...document.querySelectorAll('#first-run .smooth')].map((curve) => getComputedStyle(curve).stroke)"
    )
    assert len(set(colours)) == 5
    assert page.locator("#first-run figure").count() == 5
    choose(page, "Beside it", "(none)")
    if width == 1280:
        page.wait_for_function("document.querySelector('#first-run .run').getBoundingClientRect().width > 1000")
    for tab in ("Runs", "All runs", "Comparisons", "Chat"):
        page.get_by_role("tab", name=tab, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Comparisons", exact=True).click()
    choose(page, "Comparison", "comparison")
    report = page.frame_locator("iframe.report")
    assert "Recommended" in report.locator("h1").inner_text()


@pytest.mark.browser
@needs_gradio
def test_a_run_is_followed_while_it_writes_and_a_new_one_appears(opened, tmp_path):
    write_run(tmp_path / "old")
    folder = write_run(tmp_path / "live", steps=10, status="running")
    page = opened(tmp_path)
    panel = page.locator("#first-run .run")
    panel.get_by_text("10 of 10").wait_for()
    # A menu in use stays open, with what was typed, while the run goes on.
    menu = page.get_by_label("Beside it", exact=True)
    menu.click()
    menu.fill("ol")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "loss": 1.5, "tokens_per_second": 99.0}) + "\n" + '{"step": 12, "lo')
    panel.get_by_text("11 of 10").wait_for(timeout=15_000)
    page.get_by_role("option", name="old", exact=True).click(timeout=5_000)
    page.locator("#second-run .run").wait_for()
    choose(page, "Beside it", "(none)")
    page.locator("#second-run .run").wait_for(state="detached")
    write_run(tmp_path / "newer")
    page.get_by_role("tab", name="All runs", exact=True).click()
    page.locator("#all-runs tbody tr").nth(2).wait_for(timeout=15_000)
    shutil.rmtree(folder)
    page.locator("#all-runs tbody tr").nth(2).wait_for(state="detached", timeout=15_000)


@pytest.mark.browser
@needs_gradio
def test_200_runs_and_a_damaged_one_are_listed(opened, tmp_path):
    for index in range(200):
        write_run(tmp_path / f"run-{index:03}", steps=20)
    (write_run(tmp_path / "damaged") / "run.json").write_text("{")
    page = opened(tmp_path)
    page.get_by_role("tab", name="All runs", exact=True).click()
    assert page.locator("#all-runs tbody tr").count() == 201
    assert page.locator("#all-runs .state.unreadable").count() == 1


@pytest.mark.browser
@needs_gradio
def test_nothing_of_a_hostile_text_runs(opened, tmp_path):
    for index, text in enumerate(HOSTILE):
        write_run(tmp_path / f"hostile-{index}", prompt=text, answer=text)
    page = opened(tmp_path)
    for index in range(len(HOSTILE)):
        choose(page, "Run", f"hostile-{index}")
        page.locator("#first-run h3", has_text=f"hostile-{index}").wait_for()
    assert page.evaluate("window.hacked") is None


@pytest.mark.browser
@needs_gradio
def test_base_and_tuned_model_answer_side_by_side(opened, run_folder):
    page = opened(run_folder.parent)
    page.get_by_role("tab", name="Chat", exact=True).click()
    page.get_by_label("Say something to both").fill("What is 3?")
    page.get_by_role("button", name="Ask both").click()
    for _ in range(2):
        page.locator(".bot.message").nth(1).wait_for(timeout=60_000)
    assert page.locator(".user.message").count() == 2
