"""Seconds that quantizing adds to loading a model folder, ours and bitsandbytes', alternating in one process.

    python benchmarks/quantized_load.py                 # the demo model, as bfloat16 safetensors; a minute
    python benchmarks/quantized_load.py --model FOLDER

Writes a JSON file into benchmarks/results, and quantized_load.md beside it anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contenders
import results
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rankwise as rw

GOAL_SECONDS = 0.3
OURS = ("NF4, ours", "NF4 double-quantized, ours")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    with contenders.model_folder(given.model) as folder:
        seconds = measured(folder, given.rounds)
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "model": Path(given.model).name,
        "rounds": given.rounds,
        "seconds": {way: statistics.median(times) for way, times in seconds.items()},
    }
    results.publish(given.output, "quantized_load", result, page)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a bfloat16 safetensors folder; default: the demo model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    return parser.parse_args(arguments)


def measured(folder: str, rounds: int) -> dict[str, list[float]]:
    """{way to load: seconds of each round}; a first round of each is left out."""
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: None,
        OURS[0]: rw.Nf4Config,
        OURS[1]: lambda: rw.Nf4Config(double_quant=True),
        "NF4, bitsandbytes": lambda: theirs,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, config in ways.items():
            start = time.perf_counter()
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config())
            seconds[way].append(time.perf_counter() - start)
    return {way: times[1:] for way, times in seconds.items()}


def page(runs: list[results.Run]) -> list[str]:
    cells = []
    for run in runs:
        plain = run["seconds"]["plain"]
        for way, median in run["seconds"].items():
            goal = GOAL_SECONDS if way in OURS else None
            beyond = "" if way == "plain" else results.judged(median - plain, goal, at_most=True, digits=3)
            cells.append([results.processor(run), way, f"{median:.3f}", beyond])
    return [
        f"# Loading {runs[0]['model']} and quantizing it on the way",
        "",
        *results.where_from(runs),
        *results.table(("processor", "load", "seconds", "beyond the plain load"), cells),
        "",
        f"Medians of {runs[0]['rounds']} alternating rounds of `from_pretrained`, from the system's file cache. "
        "Goals in brackets.",
    ]


if __name__ == "__main__":
    main()
