"""DPO on real preferences: texts of the systems of the E2E challenge, ranked by their likeness to what people wrote.

    python benchmarks/ranked_texts.py ../shared/data/e2e [--method lora --steps 30 --held-out 80]

A pair is of one meaning: of all systems' texts the one with the highest chrF against the references, and the one with
the lowest. Meanings with less than 20 points between them are left out. Of ``--held-out`` meanings, drawn by chance, no
pair is trained on: the share of their pairs whose better text has the higher reward is printed with its interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from sacrebleu import sentence_chrf
from scipy.stats import binomtest

from rankwise.records import load_record, read_metrics

LEAST_GAP = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of E2E: testset_w_refs.csv, and systems/*.tsv")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pairs = pairs_of(given.data)
    random.Random(given.seed).shuffle(pairs)
    with tempfile.TemporaryDirectory() as place:
        train, held_out, output = (Path(place) / name for name in ("train.jsonl", "held-out.jsonl", "run"))
        write(held_out, pairs[: given.held_out])
        write(train, pairs[given.held_out :])
        options = {"--objective": "dpo", "--model": "demo", "--data": train, "--eval-data": held_out, "--eval-limit": 0}
        options |= {"--method": given.method, "--max-steps": given.steps, "--learning-rate": 1e-4, "--batch-size": 4}
        options |= {"--max-length": 256, "--seed": given.seed, "--eval-steps": given.steps, "--output": output}
        words = [str(part) for option in options.items() for part in option]
        subprocess.run([sys.executable, "-m", "rankwise", "train", *words], check=True)
        print(f"{len(pairs)} pairs, {len(pairs) - given.held_out} to train on; {found(output, given.held_out)}")


def pairs_of(folder: Path) -> list[dict[str, Any]]:
    """Messages, so that both sides are written by the model's chat template."""
    references, texts = defaultdict(list), defaultdict(list)
    with (folder / "testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references[row["mr"]].append(row["ref"])
    for path in sorted((folder / "systems").glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                texts[row["MR"]].append(row["output"].strip())
    pairs = []
    for meaning, known in references.items():
        ranked = sorted((sentence_chrf(text, known).score, text) for text in set(texts[meaning]))
        if ranked and ranked[-1][0] - ranked[0][0] >= LEAST_GAP:
            sides = {"chosen": ranked[-1][1], "rejected": ranked[0][1]}
            answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            pairs.append({"prompt": [{"role": "user", "content": meaning}], **answers})
    return pairs


def write(path: Path, pairs: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def found(output: Path, count: int) -> str:
    accuracies = [line["eval_reward_accuracy"] for line in read_metrics(output) if "eval_reward_accuracy" in line]
    low, high = binomtest(round(accuracies[-1] * count), count).proportion_ci(method="wilson")
    margin = load_record(output).eval_rewards["reward_margin"]
    return f"held-out accuracy {accuracies[-1]:.3f} (95 %: {low:.3f} to {high:.3f}), margin {margin:.3f}"


if __name__ == "__main__":
    main()
