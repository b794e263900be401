"""``python -m rankwise_article``: score texts, convert loralib's adapters, show and check the article's ledger."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise.errors import RankwiseError, RankwiseWarning, heard, warn
from rankwise.foreign import JsonObject

LABEL_WIDTH = 18
# What a scorer returns: lines of (label, text) for people, and the document of --json.
Scored = tuple[list[tuple[str, str]], JsonObject]


def _e2e(given: argparse.Namespace) -> Scored:
    from rankwise_article.e2e_files import read_e2e
    from rankwise_article.e2e_scores import METRICS, ON_JAVA, score_e2e

    predictions, references = read_e2e(given.predictions, given.references)
    scores = score_e2e(predictions, references)
    if scores.missing:
        warn("RA236", f"{', '.join(ON_JAVA)} are left out: {scores.missing}.")
    document = scores.to_json()
    lines = [("predictions", f"{scores.count:,} texts against {sum(map(len, references)):,} references")]
    values = {name: document[name] for name in METRICS}
    lines += [(name, "not computed" if value is None else f"{value:.4f}") for name, value in values.items()]
    return lines, document


def _gsm8k(given: argparse.Namespace) -> Scored:
    from rankwise_article.gsm8k_scores import read_gsm8k, score_gsm8k

    scores = score_gsm8k(*read_gsm8k(given.predictions, given.references))
    lines = [("correct", f"{scores.correct:,} of {scores.total:,}  ({scores.correct / scores.total:.2%})")]
    if scores.unanswered:
        lines.append(("without a number", f"{scores.unanswered:,}"))
    return lines, scores.to_json()


def _vicuna(given: argparse.Namespace) -> Scored:
    from rankwise_article.vicuna_scores import read_vicuna, relative_score, warn_of_failed

    score = relative_score(*read_vicuna(given.ratings, given.reference_answers))
    warn_of_failed(score)
    document = score.to_json()
    lines = [("ratings", f"{score.count:,} used, {score.failed:,} failed")]
    for name in ("reference_first", "system_first", "mean"):
        value = document[name]
        none = "none: no rating, or none but 0 for the reference"
        lines.append((name.replace("_", " "), none if value is None else f"{value:.2f} % of the reference"))
    return lines, document


def _convert(given: argparse.Namespace) -> Scored:
    from rankwise_article.converter import convert

    parts = [part == "1" for part in given.parts.split(":")]
    document = convert(given.file, given.output, given.model, given.lora_alpha, parts)
    return [(label.replace("_", " "), str(value)) for label, value in document.items()], document


def _ledger(given: argparse.Namespace) -> Scored:
    from rankwise_article.ledger import ledger

    return ledger(given.file, given.output, every=given.every)


def _table(given: argparse.Namespace) -> Scored:
    from rankwise_article.table import table

    return table(given.state, given.data, given.work, runs=given.runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rankwise_article", description=__doc__)
    commands = parser.add_subparsers(required=True)
    converts = commands.add_parser("convert", help="write an adapter that loralib saved (.pt) as a PEFT folder")
    converts.set_defaults(run=_convert)
    converts.add_argument("file", type=Path)
    converts.add_argument("--model", required=True, help="the base: hub id or folder; its shapes are compared")
    converts.add_argument("--output", type=Path, required=True, help="PEFT folder to write")
    converts.add_argument("--lora-alpha", type=float, required=True, help="the file does not hold it; 32 on E2E")
    converts.add_argument("--parts", default="1:0:1", help="adapted parts of fused layers; default: q and v of q, k, v")
    ledgers = commands.add_parser("ledger", help="run the commands behind the article's figures and render the ledger")
    ledgers.set_defaults(run=_ledger)
    ledgers.add_argument("file", type=Path, help="ledger.toml")
    ledgers.add_argument("--output", type=Path, help="Markdown page to write")
    ledgers.add_argument("--every", action="store_true", help="run the commands that take hours or a card too")
    tables = commands.add_parser("table", help="carry out the next runs of the article's table 1, and make its page")
    tables.set_defaults(run=_table)
    tables.add_argument("state", type=Path, help="folder of settings.toml and of the finished runs")
    tables.add_argument("--data", type=Path, required=True, help="folder of E2E's three .csv files")
    tables.add_argument("--work", type=Path, default=Path("runs/table"), help="adapters and checkpoints")
    tables.add_argument("--runs", type=int, default=1, help="how many runs; 0 only makes the page")
    for command in (converts, ledgers, tables):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    benchmarks = commands.add_parser("score", help="score texts that you have already").add_subparsers(required=True)
    files: Mapping[str, tuple[Callable[[argparse.Namespace], Scored], Mapping[str, str]]] = {
        "e2e": (
            _e2e,
            {
                "predictions": ".tsv or .csv (MR, output), .jsonl, or one text on each line",
                "references": ".csv or .tsv (mr, ref), `context||reference` lines, or groups",
            },
        ),
        "gsm8k": (_gsm8k, {"predictions": ".jsonl with `prediction`", "references": ".jsonl with `answer`"}),
        "vicuna": (
            _vicuna,
            {
                "ratings": "a judge's ratings, .jsonl; may be given several times",
                "reference_answers": "answers of the reference system, .jsonl with `answer_id`",
            },
        ),
    }
    for name, (score, options) in files.items():
        benchmark = benchmarks.add_parser(name)
        benchmark.set_defaults(run=score)
        benchmark.add_argument("--json", action="store_true", help="print one JSON document")
        for option, text in options.items():
            action = "append" if option == "ratings" else "store"
            flag = f"--{option.replace('_', '-')}"
            benchmark.add_argument(flag, type=Path, required=True, action=action, metavar="FILE", help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)

    def tell(warning: RankwiseWarning) -> bool:
        print(f"warning {warning.code}: {warning.message}", file=sys.stderr)
        return False

    try:
        with heard(tell):
            lines, document = given.run(given)
    except RankwiseError as error:
        print(f"error {error.code}: {error.message}", file=sys.stderr)
        if given.json:
            print(json.dumps({"error": {"code": error.code, "message": error.message}}))
        return error.exit_code
    print(json.dumps(document) if given.json else "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
