"""The report of a comparison from its records: ``report.html``, ``report.md`` and ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rankwise.foreign import Fields, JsonObject
from rankwise.records import write_json, write_text
from rankwise.reports.folder import Comparison, as_expected, load_comparison
from rankwise.reports.markdown import markdown
from rankwise.reports.merging import Summarise, merge
from rankwise.reports.page import page

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the three reports of the comparison in ``folder`` to ``output`` (default: the folder itself).

    Returns their paths: HTML, Markdown, JSON. Raises RunError: RW592 no comparison here, RW593 it cannot be read.
    """
    return write_reports(load_comparison(folder), output or folder)


def merged_report(folders: Sequence[Path], output: Path, summarise: Summarise) -> list[Path]:
    """Write one report of several folders of the same comparison.

    ``summarise(document, place_of_run)`` computes methods, differences and the recommendation of the joined runs again.

    Raises RunError: RW592, RW593 as ``write_report``; RW594 the folders are of different comparisons.
    """
    joined = merge([load_comparison(folder) for folder in folders])
    document = {**joined.document, **summarise(joined.document, joined.place_of)}
    return write_reports(Comparison(document, joined.folder, joined.places), output)


def write_reports(comparison: Comparison, output: Path) -> list[Path]:
    """The three files, each whole or not at all.

    Raises RunError (RW593) when a part of the comparison has a form that cannot be shown.
    """
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
        "methods": comparison["methods"],
        "differences": comparison["differences"],
        "recommendation": {key: value for key, value in comparison["recommendation"].items() if key != "config_text"},
        **{key: comparison[key] for key in ("primary_metric", "minimum_detectable_effect", "learning_rates", "base")},
        **{key: comparison[key] for key in ("command", "created", "settings", "model", "data", "versions", "device")},
        "warnings": comparison["warnings"],
    }


def _flat(run: Fields) -> JsonObject:
    """The fields of the record, overridden by what the comparison says of the run."""
    record = run["record"] or {}
    return {**record, **{key: value for key, value in run.items() if key != "record" and value is not None}}
