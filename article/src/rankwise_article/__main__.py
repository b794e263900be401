"""``python -m rankwise_article``: score texts, convert loralib's adapters, show and check the article's ledger."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import RankwiseError, RankwiseWarning, heard
from rankwise.foreign import JsonObject

LABEL_WIDTH = 18


def _e2e(given: argparse.Namespace) -> JsonObject:
    from rankwise_article.e2e_scores import read_e2e, score_e2e

    return score_e2e(*read_e2e(given.predictions, given.references)).to_json()


def _gsm8k(given: argparse.Namespace) -> JsonObject:
    from rankwise_article.scores import score_gsm8k

    return {**score_gsm8k(given.predictions, given.references)}


def _vicuna(given: argparse.Namespace) -> JsonObject:
    from rankwise_article.scores import score_vicuna

    return score_vicuna(given.ratings, given.reference_answers).to_json()


def _convert(given: argparse.Namespace) -> JsonObject:
    from rankwise_article.converter import convert

    parts = [part == "1" for part in given.parts.split(":")]
    return convert(given.file, given.output, given.model, given.lora_alpha, parts)


def _ledger(given: argparse.Namespace) -> JsonObject:
    from rankwise_article.ledger import ledger

    return ledger(given.file, given.output, every=given.every)


def _table(given: argparse.Namespace) -> JsonObject:
    from rankwise_article.table import table

    work = given.work or Path("runs", given.state.name)
    return table(given.state, given.data, work, runs=given.runs, times=given.times, model=given.model)


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
    ledgers.add_argument("--every", action="store_true", help="run the commands that take hours or a GPU too")
    tables = commands.add_parser("table", help="carry out the next runs of the article's table 1, and make its page")
    tables.set_defaults(run=_table)
    tables.add_argument("state", type=Path, help="folder of settings.toml and of the finished runs")
    tables.add_argument("--data", type=Path, required=True, help="folder of E2E's three .csv files")
    tables.add_argument("--model", help="where the model of settings.toml lies, if elsewhere")
    tables.add_argument("--work", type=Path, help="adapters and checkpoints; default: runs/STATE")
    tables.add_argument("--runs", type=int, default=1, help="how many runs; 0 only makes the page")
    tables.add_argument("--times", action="store_true", help="measure each method's speed, alone on the machine")
    benchmarks = commands.add_parser("score", help="score texts that you have already").add_subparsers(required=True)
    e2e, gsm8k, vicuna = (benchmarks.add_parser(name) for name in ("e2e", "gsm8k", "vicuna"))
    e2e.set_defaults(run=_e2e, decimals=4)
    _file(e2e, "--predictions", ".tsv or .csv (MR, output), .jsonl, or one text on each line")
    _file(e2e, "--references", ".csv or .tsv (mr, ref), or groups of lines")
    gsm8k.set_defaults(run=_gsm8k)
    _file(gsm8k, "--predictions", ".jsonl with `prediction`")
    _file(gsm8k, "--references", ".jsonl with `answer`")
    vicuna.set_defaults(run=_vicuna, decimals=2)
    _file(vicuna, "--ratings", "a judge's ratings, .jsonl; may be given several times", action="append")
    _file(vicuna, "--reference-answers", "answers of the reference system, .jsonl with `answer_id`")
    for command in (converts, ledgers, tables, e2e, gsm8k, vicuna):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _file(command: argparse.ArgumentParser, flag: str, text: str, action: str = "store") -> None:
    command.add_argument(flag, type=Path, required=True, metavar="FILE", help=text, action=action)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)

    def tell(warning: RankwiseWarning) -> bool:
        print(f"warning {warning.code}: {warning.message}", file=sys.stderr)
        return False

    try:
        with heard(tell):
            document = given.run(given)
    except RankwiseError as error:
        print(f"error {error.code}: {error.message}", file=sys.stderr)
        if given.json:
            print(json.dumps({"error": {"code": error.code, "message": error.message}}))
        return error.exit_code
    if given.json:
        print(json.dumps(document))
        return 0
    for name, value in document.items():
        text = f"{value:.{given.decimals}f}" if isinstance(value, float) and "decimals" in given else str(value)
        print(f"{name.replace('_', ' ') if name.islower() else name:<{LABEL_WIDTH}}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
