"""Write ``command-line.md``, the reference of all commands, from the tables that ``--help`` is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.cli.main import COMMANDS, COMMON_OPTIONS
from rankwise.cli.options import Command, panels_of

HEAD = """# Command line

`rankwise COMMAND [options]`. Every option below is also a key of a YAML file that `--config` reads: `--max-length 512`
is `max-length: 512`. The command line wins over the file, and the file over the default.

Exit codes: 0 done, 2 a mistake in the input, 1 a fault of rankwise, 130 interrupted.
"""


def reference() -> str:
    """The whole page as Markdown."""
    common = _table("Every command", list(COMMON_OPTIONS))
    return "\n".join([HEAD, common, *(_section(command) for command in COMMANDS)])


def _section(command: Command) -> str:
    parts = [f"## {command.name}", command.summary, "```\n" + "\n".join(command.examples) + "\n```"]
    for panel, options in panels_of(command).items():
        parts.append(_table(str(panel), [(option.label, option.help) for option in options]))
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {title} | |", "|---|---|"]
    bar = {ord("|"): "\\|"}
    lines += [f"| `{label.translate(bar)}` | {text.translate(bar)} |" for label, text in rows]
    return "\n".join(lines) + "\n"


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this: the page is written before the sources are read."""
    app.connect(
        "builder-inited", lambda app: (Path(app.srcdir) / "command-line.md").write_text(reference(), encoding="utf-8")
    )
    return {"parallel_read_safe": True}
