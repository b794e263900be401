"""``rankwise compare``: every method on the same model and data, then one recommendation."""

from __future__ import annotations

from rankwise.cli.options import Command
from rankwise.comparison.settings import CompareSettings
from rankwise.verbs.compare import carry_out, report
from rankwise.verbs.output import Document, Output


def run(settings: CompareSettings, output: Output) -> Document:
    comparison = carry_out(settings, output)
    report(comparison, output)
    return comparison.document


COMMAND = Command(
    name="compare",
    settings=CompareSettings,
    run=run,
    summary="Compare methods on your model and data: several seeds, intervals, one recommendation.",
    examples=(
        "rankwise compare --model demo --data rows.jsonl --time 2h --output comparison",
        "rankwise compare --model demo --data train.csv --eval-data dev.csv \\",
        "    --methods lora,dora --learning-rates 1e-4,2e-4,5e-4 --output comparison",
    ),
)
