"""The evidence of README, on two chat models that people know: speed, memory and loss beside TRL with PEFT.

    python benchmarks/evidence.py FOLDER --data trainset.csv --eval-data devset.csv            # what has not run yet
    python benchmarks/evidence.py FOLDER --data trainset.csv --eval-data devset.csv --cells 2  # no more than two of it

FOLDER holds the files of MODELS. The list of runs below was written before the first of them ran, and is ordered so
that any beginning of it is a table already; a cell that has not run is marked on the page. One cell trains both sides
on the same rows of E2E, one after the other, and one evaluator scores both adapters. The peer runs with TRL's defaults,
but for gradient checkpointing, which is off, and rows grouped by length. Dropout is 0 on both sides. A class of
processors that this one is not is had by limits on its instructions, which both sides have, in float32.

Each cell is written when it is done, with the commit, into benchmarks/results/evidence_PROCESSOR.json; evidence.md
beside it is made anew. The list is one, whichever processors its cells run on: the two sides of a cell share one. Run
it where nothing else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import contenders
import end_to_end
import results

import rankwise as rw
from rankwise.ops.cpu import native

MODELS = {"0.5B": "qwen2.5-coder-0.5b.gguf", "1.5B": "qwen2.5-coder-1.5b.gguf"}
# Optimizer steps of eight rows.
STEPS = {"0.5B": 30, "1.5B": 10}
ROWS, EVAL_ROWS, RATE = 8, 64, 2e-4
# LoRA over the bits of the file, which no peer trains.
OVER_FILE = "lora@file"
# {class of processors: what limits this one to its instructions}.
LIMITS = {
    level: {
        "RANKWISE_CPU_LEVEL": level,
        "ONEDNN_MAX_CPU_ISA": one_dnn,
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    for level, one_dnn in (("avx2", "AVX2"), ("avx_vnni", "AVX2_VNNI"))
}


@dataclasses.dataclass(frozen=True)
class Cell:
    model: str
    method: str
    seed: int
    # Of LIMITS; empty: without limits.
    level: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.method, str(self.seed), self.level)))


def cells() -> Iterator[Cell]:
    """Both models with one seed, then the other seeds of the smaller one, then the other classes of processors."""
    methods = ("qlora", "lora", OVER_FILE, "dora", "qdora")
    yield from (Cell("0.5B", method, 0) for method in methods[:2])
    yield from (Cell("1.5B", method, 0) for method in methods[:2])
    yield from (Cell(model, method, 0) for method in methods[2:] for model in MODELS)
    yield from (Cell("0.5B", method, seed) for seed in (1, 2) for method in methods)
    yield from (Cell("0.5B", method, 0, level) for level in LIMITS for method in methods[:2])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, metavar="FOLDER", help=f"with {' and '.join(MODELS.values())}")
    parser.add_argument("--data", type=Path, required=True, help="CSV of E2E, with the columns mr and ref")
    parser.add_argument("--eval-data", type=Path, required=True, help="the same for evaluating")
    parser.add_argument("--cells", type=int, default=sys.maxsize, help="run no more than so many")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args(arguments)
    contenders.silence()
    about = {"command": results.command(), "machine": results.machine(), "versions": results.versions()}
    maker = results.processor(about).split()[0].lower()
    file = given.output / f"{results.usual_name('evidence', about)}_{maker}.json"
    run = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**about, "cells": {}}
    done = {name for other in results.runs_of("evidence", given.output) for name in other["cells"]}
    able = ("", *native.usable_levels())
    for cell in [cell for cell in cells() if cell.level in able and str(cell) not in done][: given.cells]:
        print(cell, file=sys.stderr, flush=True)
        run["cells"][str(cell)] = {**measured(cell, given), "commit": about["versions"]["rankwise"]}
        results.publish(given.output, "evidence", run, page, file.stem)


def measured(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """What ``end_to_end`` measures of both sides; of LoRA over the file our side alone."""
    words = [str(given.data), "--eval-data", str(given.eval_data), "--dropout", "0", "--by-length"]
    words += ["--batch", str(ROWS), "--steps", str(STEPS[cell.model]), "--seed", str(cell.seed)]
    words += ["--dtype", "float32"] if cell.level else []
    options = end_to_end.parse([*words, "--learning-rate", str(RATE), "--eval-rows", str(EVAL_ROWS)])
    gguf = given.files / MODELS[cell.model]
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, LIMITS.get(cell.level, {})):
        place = Path(name)
        files = end_to_end.write_rows(options, place)
        if cell.method == OVER_FILE:
            return {"ours": end_to_end.train_ours(str(gguf), "lora", files["train"], str(place / "ours"), options)}
        model, tokenizer = rw.load_model(str(gguf))
        assert tokenizer is not None, "the file has one"
        for part in (model, tokenizer):
            part.save_pretrained(place / "model")
        del model
        return end_to_end.measure(str(place / "model"), cell.method, files, place, options)


# --- the page ---

HEADINGS = (
    *("model", "method", "seeds", "processor", "tokens/s: TRL + PEFT", "rankwise", "times as fast"),
    *("peak MB: TRL + PEFT", "rankwise", "planned", "loss: before", "TRL + PEFT", "rankwise"),
)


def page(runs: list[results.Run]) -> list[str]:
    lines = ["# Evidence: Qwen2.5-Coder-Instruct 0.5B and 1.5B on E2E", "", *results.where_from(runs)]
    steps = " and ".join(f"{count} on the {model}" for model, count in STEPS.items())
    lines += [
        f"Steps of {ROWS} rows: {steps}; r = {contenders.R} on all linear layers, learning rate {RATE:g}, dropout 0. "
        "Both sides train on the same rows, the peer's grouped by length, without gradient checkpointing, else with "
        "TRL's defaults. Tokens a second of the training steps and peaks are those of the first seed, losses medians "
        f"over seeds: a label token on {EVAL_ROWS} held-out rows, by one evaluator. Peak: anonymous memory and what "
        "the model maps of its file. The two sides of a cell ran on one processor. "
        f"`{OVER_FILE}` trains over the GGUF's own bits, which the peer does not.",
        "",
    ]
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells():
        groups.setdefault((cell.model, cell.method, cell.level), []).append(cell)
    done = {name: (run, found) for run in runs for name, found in run["cells"].items()}
    lines += results.table(HEADINGS, (_row(done, group) for group in groups.values()))
    commits = sorted({found["commit"] for _, found in done.values()})
    return [*lines, "", f"{len(done)} of {len(list(cells()))} cells have run, at {', '.join(commits)}."]


def _row(done: dict[str, tuple[results.Run, results.Run]], group: Sequence[Cell]) -> list[str]:
    model, method = group[0].model, group[0].method
    level = group[0].level.upper().replace("_", "-")
    limit = f"limited to {level}, float32" if level else ""
    found = [done[str(cell)] for cell in group if str(cell) in done]
    if not found:
        return [
            model,
            method,
            f"0 of {len(group)}",
            "; ".join(filter(None, ("not run yet", limit))),
            *[""] * (len(HEADINGS) - 4),
        ]
    # Speed and memory are of one processor.
    run, first = found[0]

    def value(side: str, name: str) -> float | None:
        return first.get(side, {}).get(name)

    def speed(side: str) -> float | None:
        return first[side]["tokens"] / first[side]["train_seconds"] if side in first else None

    def loss(side: str) -> float | None:
        losses = [cell["eval_loss"][side] for _, cell in found if "eval_loss" in cell]
        return statistics.median(losses) if losses else None

    ours, peer = speed("ours"), speed("peer")
    peaks = (value("peer", "peak_memory_bytes"), value("ours", "peak_memory_bytes"))
    planned = value("ours", "predicted_peak_memory_bytes")
    return [
        *(model, f"{method}{end_to_end.products(first)}", f"{len(found)} of {len(group)}"),
        "; ".join(filter(None, (results.processor(run), limit))),
        *(results.number(peer, 0), results.number(ours, 0)),
        "" if peer is None or ours is None else f"{ours / peer:.2f}",
        *(results.number(each and each / 1e6, 0) for each in (*peaks, planned)),
        *(results.number(loss(side), 4) for side in ("base", "peer", "ours")),
    ]


if __name__ == "__main__":
    main()
