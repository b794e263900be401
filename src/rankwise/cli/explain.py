"""``rankwise explain``: print the section about a code, from the page in the package."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from rich.text import Text

from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.cli.settings import ExplainSettings
from rankwise.errors import ConfigError
from rankwise.foreign import Fields

SECTION = re.compile(r"^### (RW\d{3}) — (.+)\n\n((?:(?!<a |#).*\n)*)", re.MULTILINE)


def run(settings: ExplainSettings, output: Output) -> Document:
    sections = read_sections()
    code = _code(settings.code, sections)
    title, text = sections[code]
    output.line(f"{code}: {title}", style="bold")
    # Bold text of the page is between pairs of asterisks.
    parts = enumerate(f"\n{text}".split("**"))
    output.console.print(Text.assemble(*((part, "bold" if index % 2 else "") for index, part in parts)))
    return {"code": code, "title": title, "text": text}


def read_sections() -> dict[str, tuple[str, str]]:
    """{code: (title, text in Markdown)}, from the page that the wheel carries (setup.py) or, in a checkout, docs'."""
    page = files("rankwise").joinpath("errors.md")
    if not page.is_file():
        page = Path(__file__).parents[3] / "docs" / "errors.md"
    return {code: (title, text.strip()) for code, title, text in SECTION.findall(page.read_text(encoding="utf-8"))}


def _code(given: str, sections: Fields) -> str:
    """``203``, ``rw203`` and ``RW203:`` are RW203. Raises ConfigError (RW123) for a text that is not a code."""
    number = re.search(r"\d+", given)
    code = f"RW{number.group()}" if number else given.strip().upper()
    if code in sections:
        return code
    close = difflib.get_close_matches(code, sections, n=3, cutoff=0.6)
    named = ", ".join(f"{one} ({sections[one][0]})" for one in sorted(close))
    advice = f"the closest are {named}" if close else f"codes lie between {min(sections)} and {max(sections)}"
    raise ConfigError("RW123", f"{given!r} is not a code of rankwise; {advice}.")


VERB = Verb(
    name="explain",
    settings=ExplainSettings,
    run=run,
    summary="Print what a message's code means: what happened, why, what to do.",
    examples=("rankwise explain RW203", "rankwise explain 203 --json"),
)
