"""``rankwise preview``: a row in the model's form, with the trained tokens marked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output, light_table
from rankwise.cli.settings import PreviewSettings
from rankwise.errors import DataError
from rankwise.reports.numbers import plural, visible

if TYPE_CHECKING:
    from rankwise.data import Encoded, EncodingReport, Preview

TRAINED_STYLE = "bold green"
# If there is no colour, trained text is between these.
OPEN, CLOSE = "[[", "]]"
# Bad rows that are shown.
NAMED_ROWS = 10


def run(settings: PreviewSettings, output: Output) -> Document:
    from rankwise.data import encode_preferences, encode_rows, first_good_row, preview_row, read_rows, read_template
    from rankwise.data.preferences import PREFERENCE_FORMATS
    from rankwise.data.prompts import encode_prompts, prompt_formats
    from rankwise.models import load_tokenizer

    if settings.objective == "classify":
        return _of_labels(settings, output)
    asks, prefers = settings.objective == "grpo", settings.objective in PREFERENCE_FORMATS
    layout: dict[str, Any] = {"formats": prompt_formats(**settings.columns)} if asks else settings.columns
    if prefers:
        layout = {"formats": PREFERENCE_FORMATS[settings.objective]}
    rows = read_rows(settings.data, skip_bad_rows=settings.skip_bad_rows, **layout)
    template = None if settings.chat_template is None else read_template(settings.chat_template)
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code, revision=settings.revision)
    limits: dict[str, Any] = {"max_length": settings.max_length, "chat_template": template}
    encode: Callable[..., Encoded] = encode_preferences if prefers else encode_rows
    if asks:
        encode = functools.partial(encode_prompts, room=settings.max_completion_length)
    report = encode(rows, tokenizer, **limits, skip_bad_rows=settings.skip_bad_rows).report
    index = first_good_row(rows, report) if settings.row is None else settings.row
    preview = preview_row(rows, index, tokenizer, **limits, prompt_alone=asks)
    _print(output, preview, report, settings)
    return {
        "row": dataclasses.asdict(preview) | {"index": index, "truncated": preview.truncated},
        "data": dataclasses.asdict(report) | {"source": rows.source, "max_length": settings.max_length},
    }


def _of_labels(settings: PreviewSettings, output: Output) -> Document:
    """A text with its label, and how many rows have each label."""
    from rankwise.data import read_rows
    from rankwise.data.labels import LABELLED, encode_labelled, label_counts, labels_in
    from rankwise.evaluation.loading import needed_tokenizer
    from rankwise.models import load_tokenizer

    rows = read_rows(settings.data, skip_bad_rows=settings.skip_bad_rows, formats=LABELLED)
    labels = labels_in(rows)
    remote = settings.model_dump(include={"trust_remote_code", "revision"})
    tokenizer = needed_tokenizer(load_tokenizer(settings.model, **remote), settings.model)
    index = settings.row or 0
    if index >= len(rows):
        raise DataError("RW217", f"{rows.source} has no row {index}; its {len(rows)} rows count from 0.")
    row = rows[index]
    encoded = encode_labelled(rows, tokenizer, labels, max_length=settings.max_length)
    report, counts = encoded.report, label_counts(rows, labels)
    ids = encoded.dataset[index]["input_ids"]
    label = ", ".join(row.target) if isinstance(row.target, tuple) else row.target
    shares = ", ".join(f"{name} {count:,} ({count / len(rows):.1%})" for name, count in counts.items())
    lengths = f"median {report.median_length:,.0f} tokens, longest {report.longest:,}"
    for name, text in (
        ("row", f"{row.place}: {plural(len(ids), 'token')}"),
        ("label", label),
        ("labels", shares or "numbers"),
        ("data set", f"{plural(report.rows, 'row')}, {lengths}"),
        ("truncation", f"{report.truncated_rows:,} cut at --max-length {settings.max_length}"),
        *(("bad rows", bad) for bad in _bad_rows(report)),
    ):
        output.line(f"{name:<12}{text}")
    output.line(f"\n{visible(str(tokenizer.decode(ids)))}")
    return {
        "row": {"place": row.place, "text": row.text, "label": row.target, "ids": ids},
        "labels": {**labels.to_json(), "counts": counts},
        "data": dataclasses.asdict(report) | {"source": rows.source, "max_length": settings.max_length},
    }


def _print(output: Output, preview: Preview, report: EncodingReport, settings: PreviewSettings) -> None:
    share = f"{report.trained_share:.0%} of the tokens trained on"
    lengths = f"median {report.median_length:,.0f} tokens, longest {report.longest:,}"
    fate = f"{report.truncated_rows:,} cut and {report.dropped_rows:,} left out at --max-length {settings.max_length}"
    if settings.objective == "grpo":
        share = f"each leaves {settings.max_completion_length} for an answer"
    for label, text in (
        *_sides(preview, settings.objective),
        ("format", preview.format),
        ("template", preview.template),
        ("data set", f"{plural(report.rows, 'row')}, {lengths}; {share}"),
        ("truncation", fate),
        *(("bad rows", bad) for bad in _bad_rows(report)),
    ):
        output.line(f"{label:<12}{text}")
    marks = not output.is_terminal or output.console.no_color
    if settings.objective != "grpo":
        output.line(f"{'trained on':<12}what {f'is between {OPEN} and {CLOSE}' if marks else 'is green'}")
    output.line()
    if preview.rejected is None:
        output.console.print(rendered(preview, marks=marks), soft_wrap=True)
        return
    table = light_table()
    for side in ("chosen", "rejected"):
        table.add_column(side)
    table.add_row(rendered(preview, marks=marks), rendered(preview.rejected, marks=marks))
    output.console.print(table)


def _sides(preview: Preview, objective: str) -> Iterator[tuple[str, str]]:
    """The row in figures; for a pair, both sides."""
    if preview.rejected is not None:
        yield "chosen", f"{preview.place}: {_figures(preview, objective)}"
        yield "rejected", _figures(preview.rejected, objective)
        return
    yield "row", f"{preview.place}: {_figures(preview, objective)}"
    if preview.label is not None:
        yield "label", "good" if preview.label else "bad"


def _figures(preview: Preview, objective: str) -> str:
    cut = f", cut from {preview.full_tokens:,}" if preview.truncated else ""
    stop = "the stop token included" if preview.stop_token else "NO stop token among them"
    trained = f"{preview.trained_tokens} trained on ({preview.trained_share:.0%}), {stop}"
    if objective == "grpo":
        trained = "the answer is the model's"
    return f"{plural(preview.tokens, 'token')}{cut}; {trained}"


def _bad_rows(report: EncodingReport) -> Iterator[str]:
    """A line for each bad row, and what ``train`` does about them."""
    for problem in report.skipped[:NAMED_ROWS]:
        yield f"{problem['row']}: {problem['why']} ({problem['code']})"
    if count := report.skipped_rows:
        yield f"{plural(count, 'row')} in all (--json lists them); `train` stops without --skip-bad-rows {count}"


def rendered(preview: Preview, *, marks: bool) -> Text:
    """The row's text; trained pieces green, or between brackets if there is no colour."""
    text = Text()
    for segment in preview.segments:
        piece = visible(segment.text)
        if not segment.trained:
            text.append(piece, style="dim")
        else:
            text.append(f"{OPEN}{piece}{CLOSE}" if marks else piece, style=TRAINED_STYLE)
    return text


COMMAND = Command(
    name="preview",
    settings=PreviewSettings,
    run=run,
    summary="Show a row as the model sees it: template, trained tokens, length, truncation. Trains nothing.",
    examples=(
        "rankwise preview --model demo --data rows.jsonl",
        "rankwise preview --model demo --data rows.jsonl --row 12 --max-length 256",
    ),
)
