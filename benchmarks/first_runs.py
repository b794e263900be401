"""Write docs/results/first-runs.md and .svg from finished run folders: losses side by side, curves, generations.

    python benchmarks/first_runs.py --test ../shared/data/e2e/testset_w_refs.csv \
        LoRA=runs/e2e-lora DoRA=runs/e2e-dora QLoRA=runs/e2e-qlora QDoRA=runs/e2e-qdora
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rankwise.records import RunRecord, load_record, read_metrics
from rankwise.reports.loss_plot import loss_svg

RESULTS = Path(__file__).parents[1] / "docs" / "results"
GENERATIONS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--test", type=Path, required=True, help="E2E test set with the columns mr and ref")
    arguments = parser.parse_args()
    runs = {name: Path(folder) for name, _, folder in (item.partition("=") for item in arguments.runs)}
    records = {name: load_record(folder) for name, folder in runs.items()}
    prompts = test_prompts(arguments.test)
    RESULTS.mkdir(parents=True, exist_ok=True)
    metrics = {name: list(read_metrics(folder)) for name, folder in runs.items()}
    (RESULTS / "first-runs.svg").write_text(loss_svg(metrics, title="E2E, SmolLM2-135M"), encoding="utf-8")
    page = [*opening(), *results(records), *answers(runs, prompts)]
    (RESULTS / "first-runs.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def test_prompts(path: Path) -> list[str]:
    """Meaning representations spread evenly over the test set."""
    with path.open(encoding="utf-8", newline="") as file:
        distinct = list(dict.fromkeys(row["mr"] for row in csv.DictReader(file)))
    return distinct[:: len(distinct) // GENERATIONS][:GENERATIONS]


def opening() -> list[str]:
    return [
        "# First runs: E2E",
        "",
        "SmolLM2-135M-Instruct (`demo`, bfloat16) on the E2E restaurant data: 42,061 training rows, 200 steps of 8 "
        "rows, r = 16 on all linear layers, learning rate 2e-4 falling linearly, seed 0, on two CPU cores. One seed "
        "and 1,600 rows: a check that everything works, not a comparison of methods. Other jobs shared the machine, so "
        "no speed is quoted.",
        "",
        "![training and evaluation loss](first-runs.svg)",
        "",
    ]


def results(records: dict[str, RunRecord]) -> list[str]:
    lines = ["## Commands", "", "```"]
    for record in records.values():
        settings = record.settings
        extra = " --adapter-dtype base" if settings["adapter_dtype"] == "base" else ""
        lines.append(
            f"rankwise train --model demo --data {settings['data']} --eval-data {settings['eval_data']} "
            f"--method {record.method} --output {settings['output']} --max-steps {settings['max_steps']}{extra}"
        )
    lines += ["```", "", "## Losses", "", f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for name, record in records.items():
        lines.append(f"| {' | '.join(row(name, record))} |")
    first = next(iter(records.values()))
    versions = ", ".join(f"{key} {first.versions[key]}" for key in ("rankwise", "torch", "transformers", "trl"))
    evaluated = first.data["eval"]["rows"]
    return [*lines, "", f"Mean loss per token over {evaluated} development rows, spread evenly. {versions}.", ""]


HEADINGS = ("method", "before", "after", "kept step", "trainable", "peak memory")


def row(name: str, record: RunRecord) -> list[str]:
    return [
        name,
        f"{record.initial_eval_loss:.4f}",
        f"{record.eval_loss:.4f}",
        str(record.kept_step),
        f"{record.trainable_parameters:,}",
        f"{(record.peak_memory_bytes or 0) / 1e9:.2f} GB",
    ]


def answers(runs: dict[str, Path], prompts: list[str]) -> list[str]:
    lines = [
        "## Ten test-set generations",
        "",
        "Greedy, at most 60 tokens, inputs spread evenly over the test set.",
        "",
    ]
    given = {name: generate(folder, prompts) for name, folder in runs.items()}
    for index, prompt in enumerate(prompts):
        lines += [f"**{prompt}**", ""]
        base = next(iter(given.values()))[index]["base"]
        lines.append(f"- base: {shown(base)}")
        lines += [f"- {name}: {shown(answered[index]['tuned'])}" for name, answered in given.items()]
        lines.append("")
    return lines


def generate(folder: Path, prompts: list[str]) -> list[dict[str, Any]]:
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    command = [sys.executable, "-m", "rankwise.cli.main", "generate", "--adapter", str(folder), "--compare", "--json"]
    done = subprocess.run([*command, "--max-new-tokens", "60", *given], check=True, capture_output=True, text=True)
    answered: list[dict[str, Any]] = json.loads(done.stdout)["answers"]
    return answered


def shown(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


if __name__ == "__main__":
    main()
