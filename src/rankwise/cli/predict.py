"""``rankwise predict``: answer texts with the labels on which a model was trained."""

from __future__ import annotations

from typing import Any

from rankwise.cli.options import Command
from rankwise.errors import ConfigError, warn
from rankwise.evaluation.settings import LoadingOptions
from rankwise.labels import NUMBER, in_words, measures
from rankwise.reports.numbers import plural, visible
from rankwise.verbs.output import Document, Output, light_table
from rankwise.verbs.settings import PredictSettings, check_paths

# Of a text in the table.
SHOWN_CHARACTERS = 60
# From this number of rows on, one label for all of them is told.
MANY = 20


def run(settings: PredictSettings, output: Output) -> Document:
    check_paths(model=settings.model, data=(settings.data, None))
    if settings.adapter is None and settings.model is None:
        raise ConfigError("RW121", "there is nothing to answer with; give --adapter A, or --model M with a head.")
    from rankwise.acceleration.loss import chosen, logits_of, probabilities
    from rankwise.adapters.saving import labels_of
    from rankwise.data import read_rows
    from rankwise.data.objectives import UNANSWERED, encode_labelled
    from rankwise.evaluation.engine import LoadOptions, base_of, load_as_trained, max_length_of
    from rankwise.models.load import table_rows

    adapters = [] if settings.adapter is None else [settings.adapter]
    rows = read_rows(settings.data, split="test", skip_bad_rows=settings.skip_bad_rows, formats=UNANSWERED)
    given = settings.model_dump(include={*LoadingOptions.model_fields})
    options, named = LoadOptions(**given, labels=True), settings.model is not None
    with output.waiting("loading the model"):
        loaded = load_as_trained(settings.model or base_of(adapters), adapters, options, named=named)
    labels = labels_of(loaded.model)
    length = settings.max_length or max_length_of(adapters)
    length = min(length, table_rows(loaded.model) or length)
    encoded = encode_labelled(
        rows, loaded.tokenizer, labels, max_length=length, name="data", skip_bad_rows=settings.skip_bad_rows
    )
    table = encoded.dataset.to_list()
    with output.waiting("answering"):
        pad = int(loaded.tokenizer.pad_token_id or 0)
        logits = logits_of(loaded.model, table, pad=pad, size=settings.batch_size)
    answers = chosen(logits, labels.problem)
    shares = [None] * len(table) if labels.problem == NUMBER else probabilities(logits, labels.problem).tolist()
    bad = {problem["row"] for problem in encoded.report.skipped}
    kept = [row for row in rows if row.place not in bad]
    found: list[dict[str, Any]] = []
    for row, answer, share in zip(kept, answers, shares, strict=True):
        each = {} if share is None else {"probabilities": dict(zip(labels.names, share))}
        likely = {} if share is None or isinstance(answer, list) else {"probability": share[answer]}
        found.append({"row": row.place, "text": row.text, "label": labels.words(answer), **likely, **each})
    known = [place for place, row in enumerate(table) if row["label"] is not None]
    targets, chosen_ones = [table[place]["label"] for place in known], [answers[place] for place in known]
    agreement = measures(targets, chosen_ones, labels.problem) if known else {}
    if len(answers) >= MANY and len({str(answer) for answer in answers}) == 1:
        warn("RW262", f"the model answers all {len(answers)} rows with the same label ({found[0]['label']}).")
    _print(output, found)
    if known:
        output.line(f"{in_words(agreement, len(known))} on {plural(len(known), 'row')} with labels")
    return {"predictions": found, "measures": agreement, "labels": list(labels.names)}


def _print(output: Output, found: list[dict[str, Any]]) -> None:
    table = light_table()
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("text")
    for one in found:
        label = ", ".join(one["label"]) if isinstance(one["label"], list) else one["label"]
        shown = f"{label:.4f}" if isinstance(label, float) else visible(label)
        share = f"{one['probability']:.4f}" if "probability" in one else ""
        table.add_row(shown, share, visible(" ".join(one["text"].split()))[:SHOWN_CHARACTERS])
    output.console.print(table)


COMMAND = Command(
    name="predict",
    settings=PredictSettings,
    run=run,
    summary="Answer texts with the labels that an adapter was trained on, and measure the answers if rows have labels.",
    examples=(
        "rankwise predict --adapter runs/labels --data texts.jsonl",
        "rankwise predict --adapter runs/labels --data test.jsonl --json > answers.json",
    ),
)
