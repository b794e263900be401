"""The ledger as a page: what the article says, what its sources say, what we measured; and whether that still holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.errors import RunError
from rankwise.foreign import JsonObject

Row = Mapping[str, str]
# {first word of a row's id: (the heading of its table, where its sources are)}, in the page's order.
HEADINGS = {
    "memory": ("Memory", "The article cites nobody. Ours is the memory plan of this project."),
    "lora": ("LoRA", "LoRA paper: Hu et al. 2021, arXiv 2106.09685. loralib: github.com/microsoft/LoRA."),
    "e2e": ("LoRA on E2E", "Source: LoRA paper, table 3, GPT-2 Medium."),
    "qlora": ("QLoRA", "QLoRA paper: Dettmers et al. 2023, arXiv 2305.14314; Vicuna scores: its table 6."),
    "dora": ("DoRA", "DoRA paper: Liu et al. 2024, arXiv 2402.09353. NVlabs: github.com/NVlabs/DoRA."),
    "commonsense": ("DoRA on commonsense reasoning", "Source: DoRA paper, table 1; LoRA there is LLM-Adapters'."),
    "speed": ("Speed", "The article cites nobody. PEFT's suite: method_comparison of github.com/huggingface/peft."),
    "choice": ("Which method to choose", "The papers above."),
}
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def ledger(file: Path, output: Path | None, *, every: bool) -> tuple[list[tuple[str, str]], JsonObject]:
    """Run the commands of the rows, and write the page. Dear rows, which take hours or a card, run with ``every`` only.

    Raises RunError (RA261) with every row whose command fails or no longer gives its figures.
    """
    rows = tomllib.loads(file.read_text(encoding="utf-8"))["rows"]
    if output is not None:
        output.write_text(page(rows), encoding="utf-8")
    root = file.resolve().parents[1]
    asked = [row for row in rows if "command" in row and (every or not row.get("dear"))]
    if not (root.parent / "shared").is_dir():
        asked = [row for row in asked if "../shared" not in row["command"]]
    told = {command: _run(command, root) for command in dict.fromkeys(row["command"] for row in asked)}
    wrong = [f"{row['id']}: {reason}" for row in asked if (reason := _fault(row, told[row["command"]]))]
    if wrong:
        raise RunError("RA261", f"{len(wrong)} rows of {file} do not hold: {'; '.join(wrong)}")
    document: JsonObject = {"rows": len(rows), "checked": len(asked), "commands": len(told)}
    return [(label, str(value)) for label, value in document.items()], document


def _run(command: str, folder: Path) -> tuple[int, str]:
    """(exit code, what it printed) of a shell command, with this Python's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr * (done.returncode != 0)


def _fault(row: Row, told: tuple[int, str]) -> str:
    """Why a row does not hold, or an empty string: each number of ``ours`` has to be among those that the command
    printed, rounded to as many digits. A test prints no figures.
    """
    code, text = told
    if code:
        return f"`{row['command']}` ended with {code}: {text.strip().splitlines()[-1:]}"
    if row["command"].startswith("pytest"):
        return ""
    printed = [float(number.replace(",", "")) for number in NUMBER.findall(text)]
    for number in NUMBER.findall(row.get("ours", "").partition("(")[0]):
        digits = len(number.partition(".")[2])
        if float(number.replace(",", "")) not in {round(value, digits) for value in printed}:
            return f"`{row['command']}` no longer prints {number}"
    return ""


def page(rows: Sequence[Row]) -> str:
    """The ledger as Markdown: a table for each part of the article, and the commands below, each once."""
    commands = list(dict.fromkeys(row["command"] for row in rows if "command" in row))
    verdicts = Counter(row["verdict"] for row in rows).most_common()
    lines = [
        "# What the article says, and what is true",
        "",
        "Made from ledger.toml by `make article`, which also runs the commands that take no hours and no card.",
        f"{len(rows)} figures and claims: {', '.join(f'{count} {verdict}' for verdict, count in verdicts)}.",
        "",
        "## In short",
        "",
        *(f"- {row['short']}" for row in rows if "short" in row),
        "- LoRA, QLoRA, DoRA, full fine-tuning and two baselines on E2E, measured: [table 1](table/README.md).",
    ]
    for word, (heading, sources) in HEADINGS.items():
        lines += [
            "",
            f"## {heading}",
            "",
            sources,
            "",
            "| claim | article | source | ours | verdict | how |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["id"].partition("-")[0] == word:
                how = f"[{commands.index(row['command']) + 1}](#commands)" if "command" in row else ""
                cells = (row["claim"], row["article"], row.get("source", ""), row.get("ours", ""), row["verdict"], how)
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Commands", "", *(f"{number}. `{command}`" for number, command in enumerate(commands, 1)), ""]
    return "\n".join(lines)
