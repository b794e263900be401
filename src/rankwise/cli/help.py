"""The text of ``--help``: narrow enough for 80 columns, examples with their line breaks kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from rankwise.cli.options import Verb, panels_of

COMMON_OPTIONS = (
    ("--config FILE.yaml", "Options from a file whose keys are the long options; the command line wins."),
    ("--json", "One JSON document on stdout, everything else on stderr."),
    ("--help", "Show this text."),
)
# The text of wider labels starts on a line of its own.
WIDEST_LABEL = 29


def verb_command(verb: Verb) -> type[TyperCommand]:
    """A typer command class with this module's help."""

    class VerbCommand(TyperCommand):
        def format_help(self, ctx: Any, formatter: object) -> None:
            print_verb_help(verb, ctx.command_path)

    return VerbCommand


def verb_group(verbs: tuple[Verb, ...], summary: str, examples: tuple[str, ...]) -> type[TyperGroup]:
    """The class of ``rankwise`` itself."""

    class VerbGroup(TyperGroup):
        def format_help(self, ctx: object, formatter: object) -> None:
            console = _console()
            _print_head(console, "rankwise VERB [options]", summary, examples)
            _print_rows(console, "Verbs", [(verb.name, verb.summary) for verb in verbs], 11)
            rows = [("VERB --help", "The options of a verb."), ("--version", "Versions of rankwise and what it uses.")]
            # typer's own; --show-completion prints the script instead.
            rows.append(("--install-completion", "Complete verbs and options with Tab in this shell from now on."))
            _print_rows(console, "More", rows, 20)

    return VerbGroup


def print_verb_help(verb: Verb, command_path: str) -> None:
    console = _console()
    panels = panels_of(verb)
    required = [option.label for options in panels.values() for option in options if "(required)" in option.help]
    usage = " ".join([command_path, *required, "[options]"])
    _print_head(console, usage, verb.summary, verb.examples)
    rows = {str(title): [(option.label, option.help) for option in options] for title, options in panels.items()}
    rows["Every verb"] = list(COMMON_OPTIONS)
    labels = (label for group in rows.values() for label, _ in group)
    width = max(len(label) for label in labels if len(label) <= WIDEST_LABEL)
    for title, group in rows.items():
        _print_rows(console, title, group, width)


def _console() -> Console:
    return Console(highlight=False)


def _print_head(console: Console, usage: str, summary: str, examples: Iterable[str]) -> None:
    console.print(Text.assemble(("Usage: ", "bold"), usage))
    console.print(Text(f"\n{summary}\n"))
    for example in examples:
        console.print(Text(f"  {example}", style="green"), soft_wrap=True)


def _print_rows(console: Console, title: str, rows: list[tuple[str, str]], width: int) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=width, max_width=width, overflow="fold")
    table.add_column(ratio=1)
    for label, text in rows:
        _add_row(table, label, text)
    console.print(Padding(table, (0, 0, 0, 2)))


def _add_row(table: Table, label: str, text: str) -> None:
    """A label too wide for its column gets a line of its own."""
    name, _, metavar = label.partition(" ")
    shown = Text.assemble((name, "cyan"), f" {metavar}" if metavar else "")
    if len(label) > WIDEST_LABEL:
        shown = Text.assemble((name, "cyan"))
        text = f"{metavar}\n{text}"
    table.add_row(shown, Text(text))
