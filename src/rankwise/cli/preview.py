"""``rankwise preview``: a row in the model's form, with the trained tokens marked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rankwise.cli.options import Command
from rankwise.errors import DataError
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.reports.numbers import plural, visible
from rankwise.verbs.output import Document, Output
from rankwise.verbs.settings import PreviewSettings

if TYPE_CHECKING:
    from rankwise.data import Encoded, EncodingReport, Preview

TRAINED_STYLE = "bold green"
# If there is no colour, trained text is between these.
OPEN, CLOSE = "[[", "]]"
# Bad rows that are shown.
NAMED_ROWS = 10


def run(settings: PreviewSettings, output: Output) -> Document:
    from rankwise.data import encode_preferences, encode_rows, first_good_row, preview_row, read_rows, read_template
    from rankwise.data.objectives import encode_prompts, formats_of
    from rankwise.models import load_tokenizer

    facts = OBJECTIVES[settings.objective]
    if facts.of_labels:
        return _of_labels(settings, output)
    formats = formats_of(settings.objective, **settings.columns)
    layout: dict[str, Any] = settings.columns if formats is None else {"formats": formats}
    encode: Callable[..., Encoded] = encode_preferences if facts.of_preferences else encode_rows
    if facts.of_rewards:
        encode = functools.partial(encode_prompts, room=settings.max_completion_length)
    rows = read_rows(settings.data, skip_bad_rows=settings.skip_bad_rows, **layout)
    template = None if settings.chat_template is None else read_template(settings.chat_template)
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code, revision=settings.revision)
    limits: dict[str, Any] = {"max_length": settings.max_length, "chat_template": template}
    report = encode(rows, tokenizer, **limits, skip_bad_rows=settings.skip_bad_rows).report
    index = first_good_row(rows, report) if settings.row is None else settings.row
    preview = preview_row(rows, index, tokenizer, **limits, prompt_alone=facts.of_rewards)
    _print(output, preview, report, settings)
    return {
        "row": dataclasses.asdict(preview) | {"index": index, "truncated": preview.truncated},
        "data": dataclasses.asdict(report) | {"source": rows.source, "max_length": settings.max_length},
    }


def _of_labels(settings: PreviewSettings, output: Output) -> Document:
    """A text with its label, and how many rows have each label."""
    from rankwise.data import read_rows
    from rankwise.data.objectives import LABELLED, encode_labelled, label_counts, labels_in
    from rankwise.evaluation.engine import needed_tokenizer
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
    output.line(f"{'row':<12}{row.place}: {plural(len(ids), 'token')}")
    output.line(f"{'label':<12}{label}")
    output.line(f"{'labels':<12}{shares or 'numbers'}")
    _print_report(output, report, settings)
    output.line(f"\n{visible(str(tokenizer.decode(ids)))}")
    return {
        "row": {"place": row.place, "text": row.text, "label": row.target, "ids": ids},
        "labels": {**labels.to_json(), "counts": counts},
        "data": dataclasses.asdict(report) | {"source": rows.source, "max_length": settings.max_length},
    }


def _print(output: Output, preview: Preview, report: EncodingReport, settings: PreviewSettings) -> None:
    sides = {"row": preview} if preview.rejected is None else {"chosen": preview, "rejected": preview.rejected}
    for name, side in sides.items():
        output.line(f"{name:<12}{preview.place}: {_figures(side, settings.objective)}")
    if preview.label is not None:
        output.line(f"{'label':<12}{'good' if preview.label else 'bad'}")
    output.line(f"{'format':<12}{preview.format}")
    output.line(f"{'template':<12}{preview.template}")
    _print_report(output, report, settings)
    marks = not output.is_terminal or output.console.no_color
    if OBJECTIVES[settings.objective].of_rewards:
        output.line(f"{'answers':<12}each prompt leaves {settings.max_completion_length} tokens for one")
    else:
        share = f"{report.trained_share:.0%} of all tokens"
        output.line(f"{'trained on':<12}{share}; here what {f'is between {OPEN} and {CLOSE}' if marks else 'is green'}")
    for name, side in sides.items():
        output.line(f"\n{name}:" if len(sides) > 1 else "")
        output.console.print(rendered(side, marks=marks), soft_wrap=True)


def _print_report(output: Output, report: EncodingReport, settings: PreviewSettings) -> None:
    """The lengths of the rows, what is cut, and each bad row with what ``train`` does about them."""
    lengths = f"median {report.median_length:,.0f} tokens, longest {report.longest:,}"
    output.line(f"{'data set':<12}{plural(report.rows, 'row')}, {lengths}")
    fate = f"{report.truncated_rows:,} cut and {report.dropped_rows:,} left out at --max-length {settings.max_length}"
    output.line(f"{'truncation':<12}{fate}")
    for problem in report.skipped[:NAMED_ROWS]:
        output.line(f"{'bad rows':<12}{problem['row']}: {problem['why']} ({problem['code']})")
    if count := report.skipped_rows:
        told = f"{plural(count, 'row')} in all (--json lists them); `train` stops without --skip-bad-rows {count}"
        output.line(f"{'bad rows':<12}{told}")


def _figures(preview: Preview, objective: ObjectiveName) -> str:
    cut = f", cut from {preview.full_tokens:,}" if preview.truncated else ""
    stop = "the stop token included" if preview.stop_token else "NO stop token among them"
    trained = f"{preview.trained_tokens} trained on ({preview.trained_share:.0%}), {stop}"
    if OBJECTIVES[objective].of_rewards:
        trained = "the answer is the model's"
    return f"{plural(preview.tokens, 'token')}{cut}; {trained}"


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
