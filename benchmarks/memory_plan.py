"""Predicted peak memory against measured, of 59 runs of `rankwise train`: shapes, methods, objectives, options.

    python benchmarks/memory_plan.py          # half an hour; a run that the file already has is not repeated
    python benchmarks/memory_plan.py dpo      # only the runs with this word, anew

All figures are those of run.json: on a CPU the process's own memory and mapped weights, on CUDA torch's allocator.
Errors are of the training part, without the idle process.
Writes a JSON file into benchmarks/results, and memory.md beside it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import results

import rankwise
import rankwise.planning.trace
import rankwise.training.run
from rankwise.cli.main import main as main_of_rankwise
from rankwise.planning.extend import error_bytes
from rankwise.records import write_json

# Random models with demo's tokenizer: (family, settings of its config).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama256": ("llama", {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}),
    "llama512": ("llama", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}),
    "gpt2": ("gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 6}),
    "gemma": ("gemma3_text", {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}),
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
METHODS = ("full", "lora", "qlora", "dora", "qdora")
CHECKPOINTED, MERGED, EVALUATED = "--gradient-checkpointing", "mixed --for-merge q4_0", "mixed --eval-data mixed"
BF16, INT8 = "--products bfloat16", "--products int8"
REWARDED = "asks --reward length=16 --max-completion-length 48"
# The objective of data that are no demonstrations.
OBJECTIVES = {"dpo": "dpo", "kto": "kto", "asks": "grpo", "labels": "classify"}
# Longer runs take more than short ones: rows differ in length, and heap is left between them.
STEPS = 40


def orders() -> Iterator[tuple[str, str, int, str]]:
    """(model, method, rows of a batch, data and other options) of every run."""
    for model in ("llama256", "gemma", "gpt2", "llama512"):
        yield from ((model, method, 4, "mixed") for method in METHODS)
    for model in ("llama256", "gemma"):
        for method in ("lora", "qdora"):
            yield from (
                (model, method, 8, f"mixed {CHECKPOINTED}"),
                (model, method, 1, "rows"),
                (model, method, 8, EVALUATED),
            )
    yield from (("llama256", "lora", 4, "dpo"), ("gpt2", "lora", 4, "dpo"), ("gemma", "dora", 4, "kto"))
    yield from (("llama256", "qdora", 4, "kto"), ("llama256", "lora", 4, MERGED), ("gemma", "lora", 4, MERGED))
    yield from (("demo", method, 4, "stdlib") for method in METHODS[1:])
    yield ("demo", "lora", 4, f"stdlib {CHECKPOINTED}")
    for model in ("llama512", "demo"):
        yield from ((model, method, 8, f"mixed {exact}") for method in ("lora", "qdora") for exact in (BF16, INT8))
        yield from ((model, "lora", 4, word) for word in ("dpo", "dpo --adapter first"))
    yield from (("gemma", "dora", 4, "mixed --neftune-noise-alpha 5"), ("llama512", "qlora", 8, "labels"))
    yield from (("llama512", "lora", 8, REWARDED), ("gpt2", "lora", 8, f"{REWARDED} --beta 0.1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", help="repeat the runs whose description contains this word")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    run = {"command": results.command(), "machine": results.machine(), "versions": results.versions(), "rows": []}
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"{results.usual_name('memory', run)}.json"
    if file.exists():
        run["rows"] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as place:
        # A process that has made models holds free memory, in which a run would take place.
        in_a_process(write_models_and_rows, Path(place))
        for order in orders():
            is_known = any(tuple(row["run"]) == order for row in run["rows"])
            if (not is_known and given.word is None) or (given.word and given.word in f"{order}"):
                print(*order, file=sys.stderr, flush=True)
                kept = [row for row in run["rows"] if tuple(row["run"]) != order]
                run["rows"] = [*kept, {"run": order, **figures(order, Path(place))}]
                write_json(file, run)
    results.publish(given.output, "memory", run, page, file.stem)


def write_models_and_rows(place: Path) -> None:
    """Random models, rows of about 250 tokens and of mixed lengths, pairs, marked answers, prompts and labels."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = rankwise.load_model("demo")[1]
    for name, (family, settings) in SHAPES.items():
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **HEADS, **settings, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    chance, words = random.Random(0), ("the", "cat", "sees", "a", "river", "near", "old", "houses")

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(least, most)))

    data: dict[str, list[dict[str, Any]]] = {
        "rows": [{"prompt": text(5, 20), "completion": text(195, 195)} for _ in range(64)],
        "mixed": [{"prompt": text(5, 20), "completion": text(5, 80)} for _ in range(64)],
        "dpo": [{"prompt": text(20, 60), "chosen": text(10, 60), "rejected": text(10, 60)} for _ in range(64)],
        "kto": [{"prompt": text(20, 60), "completion": text(10, 60), "label": bool(n % 2)} for n in range(64)],
        "asks": [{"prompt": text(20, 60)} for _ in range(64)],
        "labels": [{"text": text(20, 120), "label": n % 3} for n in range(64)],
    }
    for name, rows in data.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def figures(order: tuple[str, str, int, str], place: Path) -> dict[str, int]:
    """Predicted and measured bytes of a run, in a forked process."""
    model, method, rows, more = order
    data, *options = more.split()
    files = {path.stem: str(path) for path in place.glob("*.jsonl")} | {"first": str(place / f"first-{model}")}
    source = model if model == "demo" else str(place / model)
    if "first" in options and not Path(files["first"]).exists():
        # The adapter to continue.
        words = f"train --model {source} --data {files['mixed']} --max-steps 1 --output {files['first']}"
        in_a_process(train, words.split())
    options = ["--data", *(files.get(word, word) for word in (data, *options))]
    if data in OBJECTIVES:
        options += ["--objective", OBJECTIVES[data]]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        words = f"train --model {source} --method {method} --batch-size {rows} --max-length 256"
        arguments = [*words.split(), *options, "--max-steps", str(STEPS), "--output", f"{folder}/run"]
        in_a_process(train, arguments)
        record = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))
    names = {"predicted": "predicted_peak_memory_bytes", "measured": "peak_memory_bytes", "idle": "idle_bytes"}
    return {name: record[field] for name, field in names.items()}


def in_a_process(function: Callable[[Any], None], argument: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=(argument,))
    process.start()
    process.join()


def train(arguments: list[str]) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        main_of_rankwise(arguments)


def errors(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [(row["predicted"] - row["idle"]) / (row["measured"] - row["idle"]) - 1 for row in rows]


def is_within(row: dict[str, Any]) -> bool:
    """Whether the measurement lies in the interval that the run printed."""
    return abs(row["predicted"] - row["measured"]) <= error_bytes(row["predicted"] - row["idle"], "cpu")


def page(runs: list[results.Run]) -> list[str]:
    lines = ["# Memory: predicted and measured", "", *results.where_from(runs)]
    for run in runs:
        off = errors(run["rows"])
        within, above = sum(map(is_within, run["rows"])), sum(error > 0 for error in off)
        median, of_size = 100 * statistics.median(off), 100 * statistics.median(map(abs, off))
        lines += [
            f"{results.processor(run)}: {len(off)} runs of {STEPS} steps, each in a process of its own. The median "
            f"error is {median:+.1f} %, the median of its size {of_size:.1f} %; {within} are within the "
            f"printed interval, and {above} predictions lie above the measurement. MB are 10^6 bytes; idle is a "
            "process with its libraries, and errors are of the rest.",
            "",
            *results.table(
                ("model", "method", "rows", "data and options", "idle", "predicted", "measured", "off by"),
                [cells(row, error) for row, error in zip(run["rows"], off, strict=True)],
            ),
        ]
    return lines


def cells(row: dict[str, Any], error: float) -> list[str]:
    model, method, rows, more = row["run"]
    sizes = [f"{row[name] / 1e6:,.0f}" for name in ("idle", "predicted", "measured")]
    return [model, method, str(rows), more.replace("--", ""), *sizes, f"{100 * error:+.1f} %"]


if __name__ == "__main__":
    main()
