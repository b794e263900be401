"""Write 100,000 rows of Orca-Math to train on and 500 others to answer, in the layout of the QDoRA runs.

python article/recipes/prepare_orca_math.py data/orca-math
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from rankwise.records import write_text

DATA = "microsoft/orca-math-word-problems-200k"
TRAIN, HELD_OUT, SEED = 100_000, 500, 42


def main(rows: Sequence[Mapping[str, str]], folder: Path, train: int = TRAIN, held_out: int = HELD_OUT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", range(train)), ("validation", range(train, train + held_out))):
        pairs = [
            {"prompt": f"###Question:\n{rows[n]['question']}\n###Answer:\n", "completion": rows[n]["answer"]}
            for n in numbers
        ]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))


if __name__ == "__main__":
    main(datasets.load_dataset(DATA, split="train").shuffle(seed=SEED), Path(sys.argv[1]))
