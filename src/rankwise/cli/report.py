"""``rankwise report``: the report of a comparison, from its records. Needs no torch."""

from __future__ import annotations

from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output, one_line
from rankwise.cli.settings import ReportSettings
from rankwise.disk import hold
from rankwise.foreign import read_json
from rankwise.records import check_writable
from rankwise.reports.words import headline


def run(settings: ReportSettings, output: Output) -> Document:
    from rankwise.reports.report import JSON_FILE, write_report

    target = settings.output or settings.folder
    if settings.output is not None:
        check_writable(target)
    with output.waiting("writing the report"), hold(target):
        files = write_report(settings.folder, target)
    found = read_json(target / JSON_FILE)
    output.line(f"{'verdict':<12}{one_line(headline(found))}")
    for path in files:
        output.line(f"{'written':<12}{path}")
    return {"files": [str(path) for path in files], "recommendation": found["recommendation"]}


COMMAND = Command(
    name="report",
    settings=ReportSettings,
    run=run,
    summary="Write the report of a comparison again.",
    examples=("rankwise report runs/comparison",),
)
