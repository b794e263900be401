"""The report of a comparison: ``report.html``, ``report.md`` and ``report.json``, each whole or not at all."""

from __future__ import annotations

from pathlib import Path

from rankwise.foreign import Fields, JsonObject
from rankwise.records import write_json, write_text
from rankwise.reports.comparison import Comparison, as_expected, load_comparison
from rankwise.reports.markdown import markdown
from rankwise.reports.page import page

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"
REPORTED = (
    *("methods", "differences", "recommendation", "primary_metric", "minimum_detectable_effect", "learning_rates"),
    *("base", "command", "created", "settings", "model", "data", "versions", "device", "warnings"),
)


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the three reports of the comparison in ``folder`` to ``output`` (default: the folder itself).

    Returns their paths: HTML, Markdown, JSON. Raises RunError (RW593) if there is no comparison, or it cannot be read.
    """
    return write_reports(load_comparison(folder), output or folder)


def write_reports(comparison: Comparison, output: Path) -> list[Path]:
    """Raises RunError (RW593) if a part of the comparison has a form that cannot be shown."""
    with as_expected(comparison):
        html, text = page(comparison), markdown(comparison)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / HTML_FILE, html)
    write_text(output / MARKDOWN_FILE, text)
    write_json(output / JSON_FILE, report_json(comparison))
    return [output / name for name in (HTML_FILE, MARKDOWN_FILE, JSON_FILE)]


def report_json(comparison: Comparison) -> JsonObject:
    """The report for programs. ``runs`` holds the record of each run and its place in the comparison."""
    return {
        "runs": [_flat(run) for run in comparison["runs"]],
        **{key: comparison[key] for key in REPORTED},
    }


def _flat(run: Fields) -> JsonObject:
    """The fields of the record, overridden by what the comparison says of the run."""
    record = run["record"] or {}
    return {**record, **{key: value for key, value in run.items() if key != "record" and value is not None}}
