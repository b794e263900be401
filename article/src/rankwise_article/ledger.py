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
SHARED = (
    "`../shared/data` lies beside a developer's copy, not in the repository: `e2e` has the files of the E2E challenge, "
    "`vicuna` the ratings that QLoRA's authors published, `models/stories260K` the smallest model of tinyllamas. "
    "Without it `make article` leaves these commands out."
)
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def ledger(file: Path, output: Path | None, *, every: bool) -> JsonObject:
    """Run the commands of the rows, and write the page. Dear rows, which take hours or a GPU, run with ``every`` only.

    Raises RunError (RA261) with every row whose command fails or no longer gives its figures.
    """
    document = tomllib.loads(file.read_text(encoding="utf-8"))
    rows = document["rows"]
    if output is not None:
        output.write_text(page(document), encoding="utf-8")
    root = file.resolve().parents[1]
    asked = [row for row in rows if "command" in row and (every or not row.get("dear"))]
    if not (root.parent / "shared").is_dir():
        asked = [row for row in asked if "../shared" not in row["command"]]
    told = {command: _run(command, root) for command in dict.fromkeys(row["command"] for row in asked)}
    wrong = [f"{row['id']}: {reason}" for row in asked if (reason := _fault(row, told[row["command"]]))]
    if wrong:
        raise RunError("RA261", f"{len(wrong)} rows of {file} do not hold: {'; '.join(wrong)}")
    return {"rows": len(rows), "checked": len(asked), "commands": len(told)}


def _run(command: str, folder: Path) -> tuple[int, str]:
    """(exit code, what it printed) of a shell command, with this Python's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        encoding="utf-8",
        check=False,
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


def page(document: JsonObject) -> str:
    """The ledger as Markdown: the answer, a table for each part of the article, and the commands below, each once."""
    rows: Sequence[Row] = document["rows"]
    commands = list(dict.fromkeys(row["command"] for row in rows if "command" in row))
    counts = Counter(row["verdict"] for row in rows)
    without = sum(row["verdict"] == "misquoted" and row.get("source", "").startswith("none") for row in rows)
    lines = [
        "# What the article says, and what is true",
        "",
        f"Of {len(rows)} numbers and claims of an article on LoRA, QLoRA and DoRA, {counts['equal']} equal their "
        f"sources, {counts['misquoted']} do not ({without} of these have none), {counts['measured here']} are measured "
        f"here, and {counts['needs a GPU']} need a GPU. Each row below has its source and, where there is one, the "
        "command that checks it; `make article` runs those that take no hours and no GPU.",
        "",
        "## Which method to take",
        "",
        *(f"- {line}" for line in document["advice"]),
        "",
        "## Where the article is right, and where it is not",
        "",
        *(f"- {row['short']}" for row in rows if "short" in row),
    ]
    for part in document["parts"]:
        lines += ["", f"## {part['heading']}", "", part["sources"], ""]
        lines += ["| claim | article | source | ours | verdict | how |", "|---|---|---|---|---|---|"]
        for row in rows:
            if row["id"].partition("-")[0] == part["id"]:
                how = f"[{commands.index(row['command']) + 1}](#commands)" if "command" in row else ""
                cells = (row["claim"], row["article"], row.get("source", ""), row.get("ours", ""), row["verdict"], how)
                lines.append(f"| {' | '.join(cells)} |")
    numbered = [f"{number}. `{command}`" for number, command in enumerate(commands, 1)]
    lines += ["", "## Commands", "", SHARED, "", *numbered, ""]
    return "\n".join(lines)
