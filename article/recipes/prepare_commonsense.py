"""Write ``commonsense_170k.json`` of LLM-Adapters as text rows in the layout that the DoRA paper trained on.

    python article/recipes/prepare_commonsense.py commonsense_170k.json data/commonsense

The paper trains on question and answer alike, so a row is one text; it holds out 120 rows, as
this does.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

from rankwise.records import write_text

HELD_OUT = 120
SEED = 42
INDENT = " " * 16


def text_of(row: Mapping[str, str]) -> str:
    """One row in Alpaca's words. Lines between sections hold the indent; in evaluation's template they are empty."""
    given = ", paired with an input that provides further context" if row["input"] else ""
    opening = (
        f"Below is an instruction that describes a task{given}. "
        f"Write a response that appropriately completes the request.{' ' if row['input'] else '  '}"
    )
    parts = [("Instruction", row["instruction"]), ("Input", row["input"]), ("Response", row["output"])]
    sections = [f"{INDENT}### {title}:\n{INDENT}{text}" for title, text in parts if text]
    return f"{opening}\n\n" + f"\n{INDENT}\n".join(sections)


def main(source: Path, folder: Path) -> None:
    texts = [text_of(row) for row in json.loads(source.read_text(encoding="utf-8"))]
    random.Random(SEED).shuffle(texts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", texts[:HELD_OUT]), ("train", texts[HELD_OUT:])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in part]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
