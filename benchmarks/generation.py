"""Milliseconds a token while generating with an adapter that is not merged: ours against PEFT, and the bare model.

    python benchmarks/generation.py [--dtype float32] [--batch 1] [--rounds 5]

The demo model, greedy, r = 16 on all linear layers; every contender in every round, medians. Writes a JSON file into
benchmarks/results, and generation.md beside it anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contenders
import results
import timing
import torch
from transformers import AutoModelForCausalLM

PROMPT, NEW = 16, 32


def models(folder: str, dtype: torch.dtype) -> dict[str, Any]:
    made = {"bare model": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)}
    for method in contenders.METHODS:
        made[f"{method}: PEFT"] = contenders.peft(folder, method, 0.0, dtype)
        made[f"{method}: ours"] = contenders.adapted(folder, method, 0.0, dtype)
    return {name: model.eval() for name, model in made.items()}


def generating(model: Any, ids: torch.Tensor) -> timing.Prepared:
    def call() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )

    return call, timing.nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="rows that are generated together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    contenders.silence()
    torch.manual_seed(0)
    ids = torch.randint(10, 40000, (given.batch, PROMPT))
    with contenders.model_folder("demo") as folder:
        found = models(folder, getattr(torch, given.dtype))
        calls = {name: generating(model, ids) for name, model in found.items()}
        seconds = timing.alternate(calls, given.rounds)
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "dtype": given.dtype,
        "batch": given.batch,
        "ms_per_token": {name: median / NEW * 1e3 for name, median in timing.medians(seconds).items()},
    }
    results.publish(given.output, "generation", result, page)


def page(runs: list[results.Run]) -> list[str]:
    headings = ("processor", "dtype", "rows", "bare model", "method", "PEFT", "ours", "ours / bare", "times as fast")
    return [
        "# Generating with an adapter: demo",
        "",
        *results.where_from(runs),
        f"Milliseconds a token, greedy, {NEW} tokens after {PROMPT}. The other 4-bit layers are bitsandbytes'.",
        "",
        *results.table(headings, [line for run in runs for line in lines_of(run)]),
    ]


def lines_of(run: results.Run) -> Iterator[list[str]]:
    ms = run["ms_per_token"]
    bare = ms["bare model"]
    for method in contenders.METHODS:
        peer, own = ms[f"{method}: PEFT"], ms[f"{method}: ours"]
        yield [
            *(*results.row_name(run), str(run["batch"]), results.number(bare, 1), method),
            *(results.number(value, 1) for value in (peer, own)),
            *map(results.number, (own / bare, peer / own)),
        ]


if __name__ == "__main__":
    main()
