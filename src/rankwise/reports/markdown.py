"""``report.md``: the short report, for a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rankwise.foreign import Json
from rankwise.reports import summary
from rankwise.reports.comparison import Comparison
from rankwise.reports.examples import answers_of
from rankwise.reports.naming import method_name, metric_name
from rankwise.reports.numbers import listed, p_value, plural, significant, visible
from rankwise.reports.plotted import pairs_of, with_best
from rankwise.reports.words import heading, headline

# An underscore within a word means nothing.
SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~&]|(?<!\w)_|_(?!\w))")


def markdown(comparison: Comparison) -> str:
    """The report as headings, a table of methods, a table of differences, and one line for each other fact."""
    parts = [
        f"# {escaped(summary.title(comparison))}",
        f"**{escaped(heading(comparison.document))}.** {escaped(headline(comparison.document))}",
        "\n".join(
            f"- {fact.title}: **{escaped(fact.value)}** ({escaped(fact.note)})" for fact in summary.trust(comparison)
        ),
        section("Methods", _methods(comparison)),
        section("Differences", _differences(comparison)),
        section(
            "Learning rates stopped", "\n".join(f"- {escaped(line)}" for line in summary.stopped_rates(comparison))
        ),
        section(f"Answers against {comparison.reference}", _answers(comparison)),
        section("Warnings, failures, what was left out", _messages(comparison)),
        section("To repeat it", _commands(comparison)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _methods(comparison: Comparison) -> str:
    head = ["Method", *(heading for _, heading in summary.columns(comparison))]
    rows = [
        [
            f"{method_name(row.method)}{f' ({row.mark})' if row.mark else ''}",
            *(f"{cell.text} {cell.note}".strip() for cell in row.cells),
        ]
        for row in summary.rows(comparison)
    ]
    better = "higher is better" if comparison.is_higher_better(comparison.metric) else "lower is better"
    note = f"{metric_name(comparison.metric)}: {better}. {summary.verdict_note(comparison)}"
    return f"{table(head, rows, escaped)}\n\n{escaped(note)}" if rows else ""


def _differences(comparison: Comparison) -> str:
    pairs = with_best(comparison, pairs_of(comparison, comparison.metric))
    rows = [
        [f"{method_name(pair.a)} vs {method_name(pair.b)}", pair.text, pair.verdict, p_value(pair.p_value)]
        for pair in pairs
    ]
    if not rows:
        return ""
    unit = f" in {comparison.unit}" if comparison.unit else ""
    note = f"{metric_name(comparison.metric)} of the first minus the second{unit}."
    margin = f" Within ±{significant(pairs[0].margin, 2)} they count as equivalent." if pairs[0].margin else ""
    return f"{table(('pair', 'difference', 'verdict', 'p (corrected)'), rows, escaped)}\n\n{escaped(note + margin)}"


def _answers(comparison: Comparison) -> str:
    return "\n".join(
        f"- {escaped(method_name(item.method))} on {escaped(item.place)}: "
        f"{escaped(listed(f'{count} {outcome}' for outcome, count in item.counts.items()))} "
        f"of {plural(item.total, 'example')}"
        for item in answers_of(comparison)
    )


def _messages(comparison: Comparison) -> str:
    lines = [
        f"- {item['kind']}: {escaped(item['what'])}{' ' + item['code'] if item['code'] else ''}: {escaped(item['why'])}"
        for item in summary.left_out(comparison)
    ]
    for item in summary.told_warnings(comparison):
        runs = f" ({item['runs']})" if item["runs"] else ""
        lines.append(f"- {escaped(item['code'])}{runs}: {escaped(item['message'])}")
    return "\n".join(lines)


def _commands(comparison: Comparison) -> str:
    found = comparison["recommendation"]
    commands = [comparison["command"], (found.get("deciding") or {}).get("command"), found.get("command")]
    text = "\n".join(visible(command) for command in commands if command)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}" if text else ""


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Json]], as_text: Callable[[Json], str]) -> str:
    """A table of such cells; nothing without rows."""
    lines = ["| " + " | ".join(map(as_text, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines) if rows else ""


def escaped(text: Json) -> str:
    """The text on one line, with every character escaped that Markdown or HTML would interpret."""
    return SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))
