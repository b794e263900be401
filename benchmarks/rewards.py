"""Does a reward rise? Sums of two numbers, learned by GRPO from the exact-answer reward alone, with several seeds.

    python benchmarks/rewards.py [--model demo --steps 60 --seeds 2 --method lora]

Writes docs/results/rewards.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import results

from rankwise.records import RunRecord, load_record, read_metrics, write_text

# Sums asked in training and, other ones, in evaluations; and the largest number in them.
TRAINED, HELD_OUT, LARGEST = 400, 100, 30
# Steps over which a reward is averaged.
SPAN = 10
OPTIONS = {
    "--num-generations": "8",
    "--batch-size": "16",
    "--max-completion-length": "16",
    "--max-length": "96",
    "--learning-rate": "2e-4",
    "--lr-scheduler-type": "constant",
    "--logging-steps": "1",
    "--eval-limit": "0",
}


def write_sums(folder: Path) -> tuple[Path, Path]:
    """Rows of a question and its answer; no sum is in both files."""
    pairs = [(a, b) for a in range(2, LARGEST + 1) for b in range(2, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    files = folder / "train.jsonl", folder / "held-out.jsonl"
    for path, part in zip(files, (pairs[:TRAINED], pairs[TRAINED : TRAINED + HELD_OUT])):
        rows = [{"prompt": f"What is {a} + {b}? Give only the number.", "answer": str(a + b)} for a, b in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def run(arguments: argparse.Namespace, files: tuple[Path, Path], seed: int, output: Path) -> RunRecord:
    command = [sys.executable, "-m", "rankwise", "train", "--objective", "grpo", "--reward", "answer"]
    command += ["--model", arguments.model, "--method", arguments.method, "--seed", str(seed)]
    command += ["--data", str(files[0]), "--eval-data", str(files[1]), "--output", str(output)]
    command += ["--max-steps", str(arguments.steps), "--eval-steps", str(arguments.steps)]
    command += [part for option in OPTIONS.items() for part in option]
    subprocess.run(command, check=True)
    return load_record(output)


def row(record: RunRecord, folder: Path) -> str:
    lines = [line for line in read_metrics(folder) if line.get("reward") is not None]
    rewards = [line["reward"] for line in lines]
    first, last = statistics.fmean(rewards[:SPAN]), statistics.fmean(rewards[-SPAN:])
    before, after = (-(loss or 0.0) for loss in (record.initial_eval_loss, record.eval_loss))
    seconds = lines[-1]["train_seconds"] / len(lines)
    return f"| {record.seed} | {first:.3f} | {last:.3f} | {before:.2f} | {after:.2f} | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        files = write_sums(Path(place))
        for seed in range(arguments.seeds):
            folder = Path(place) / f"seed-{seed}"
            rows.append(row(run(arguments, files, seed, folder), folder))
    versions = ", ".join(f"{name} {number}" for name, number in results.versions(("rankwise", "torch", "trl")).items())
    page = [
        "# Learning sums from a reward",
        "",
        f"`python benchmarks/rewards.py --model {arguments.model} --method {arguments.method} --steps "
        f"{arguments.steps}`: sums of two numbers from 2 to {LARGEST}, {TRAINED} for training and {HELD_OUT} others "
        "held out; the reward is 1 for the right number, else 0. Each step asks two sums, eight times each. Means over "
        f"the first and the last {SPAN} steps; held out: greedy answers. {versions}; {results.machine()['processor']}.",
        "",
        f"| seed | reward, first {SPAN} steps | last {SPAN} | held out, before | after | s / step |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    write_text(results.PAGES / "rewards.md", "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
