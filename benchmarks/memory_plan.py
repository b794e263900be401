"""Predicted peak memory against measured, of runs of `rankwise train`: shapes, methods, objectives, options.

    python benchmarks/memory_plan.py          # hours; a run that the file already has is not repeated
    python benchmarks/memory_plan.py dpo      # only the runs with this word, anew
    python benchmarks/memory_plan.py --files FOLDER    # also Qwen's, from FOLDER

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
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import results

import rankwise
import rankwise.planning.trace  # noqa: F401
import rankwise.training.run  # noqa: F401
from rankwise.cli.main import main as main_of_rankwise
from rankwise.methods import method_of
from rankwise.planning.memory import error_bytes
from rankwise.records import write_json


def _shape(width: int, inner: int, layers: int, heads: int, keys: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }


# Random models with demo's tokenizer: (family, settings of its config).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama256": ("llama", {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}),
    "llama512": ("llama", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}),
    "gpt2": ("gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 6}),
    "gemma": ("gemma3_text", {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}),
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Shapes on which nothing was fitted: of real models, and of a mixture.
UNSEEN: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-360M": ("llama", _shape(960, 2560, 32, 15, 5)),
    "Qwen3-0.6B": ("qwen3", _shape(1024, 3072, 28, 16, 8) | {"vocab_size": 151936, "head_dim": 128}),
    "Llama-3.2-1B": ("llama", _shape(2048, 8192, 16, 32, 8) | {"vocab_size": 128256, "head_dim": 64}),
    "Granite-350M": ("granite", _shape(1024, 2048, 28, 16, 4) | {"vocab_size": 100352}),
    "GPT-2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257}),
    "Gemma-3-270M": ("gemma3_text", _shape(640, 2048, 18, 4, 1) | {"vocab_size": 262144, "head_dim": 256}),
    "Pythia-31M": ("gpt_neox", _shape(256, 1024, 6, 8, 8) | {"vocab_size": 50304}),
    "stories15M": ("llama", _shape(288, 768, 6, 6, 6)),
    "mixture": (
        "qwen3_moe",
        _shape(512, 1024, 8, 8, 4)
        | {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 384},
    ),
}
# Those that take all steps.
SMALL = ("Pythia-31M", "stories15M", "mixture")
# Those to whose runs the constants of a plan were fitted.
FITTED = (*SHAPES, "demo")
# Real models, of which the benchmark needs the files.
FILES = {"Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b.gguf", "Qwen2.5-Coder-1.5B": "qwen2.5-coder-1.5b.gguf"}
METHODS = ("full", "lora", "qlora", "dora", "qdora")
CHECKPOINTED, MERGED, EVALUATED = "--gradient-checkpointing", "mixed --for-merge q4_0", "mixed --eval-data mixed"
BF16, INT8 = "--products bfloat16", "--products int8"
REWARDED = "asks --reward length=16 --max-completion-length 48"
# The objective of data that are no demonstrations.
OBJECTIVES = {"dpo": "dpo", "kto": "kto", "asks": "grpo", "labels": "classify"}
# Longer runs take more than short ones: rows differ in length, and heap is left between them.
STEPS = 40
# Of runs on large models; holes in the heap, which later steps leave, are not in them.
FEW_STEPS = 3
# A run that prepares its base in its own process.
FIRST = "first"


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


def unseen() -> Iterator[tuple[str, str, int, str]]:
    """As `orders`, on models on which nothing was fitted."""
    for model, *runs in (
        (
            "SmolLM2-360M",
            "lora 4 mixed",
            f"qlora 4 mixed {FIRST}",
            "qlora 4 mixed",
            "dora 4 mixed",
            f"qdora 8 mixed {INT8}",
            f"lora 8 mixed {CHECKPOINTED}",
            "full 1 mixed",
            "lora 4 kto",
            "lora 1 rows",
            "lora 4 mixed --eval-data mixed",
        ),
        (
            "Pythia-31M",
            "full 4 mixed",
            "lora 4 mixed",
            f"qlora 4 mixed {FIRST}",
            "dora 8 mixed",
            f"lora 8 mixed {CHECKPOINTED}",
            "lora 4 dpo",
            f"lora 8 {REWARDED}",
            "qlora 8 labels",
        ),
        (
            "Qwen2.5-Coder-0.5B",
            f"qlora 8 mixed {FIRST}",
            "qlora 8 mixed",
            "qdora 4 mixed",
            f"lora 4 mixed {FIRST}",
            "lora 2 dpo",
            f"qlora 8 mixed {CHECKPOINTED}",
            f"lora 4 mixed {INT8}",
            "dora 1 rows",
        ),
        (
            "Gemma-3-270M",
            "lora 4 mixed",
            f"qlora 4 mixed {FIRST}",
            "dora 4 mixed",
            f"lora 8 mixed {CHECKPOINTED}",
            "qdora 4 kto",
            "full 1 mixed",
        ),
        ("stories15M", "full 8 mixed", "lora 8 mixed", f"qdora 8 mixed {FIRST}", "lora 1 rows"),
        ("GPT-2-medium", "lora 4 mixed", f"qlora 4 mixed {FIRST}", f"dora 4 mixed {CHECKPOINTED}", "lora 2 dpo"),
        (
            "mixture",
            "lora 4 mixed",
            f"qlora 4 mixed {FIRST}",
            "full 2 mixed",
            f"lora 8 mixed {CHECKPOINTED}",
            "dora 4 kto",
        ),
        (
            "Qwen3-0.6B",
            "lora 4 mixed",
            f"qlora 4 mixed {FIRST}",
            f"dora 4 mixed {CHECKPOINTED}",
            f"lora 8 mixed {INT8}",
            "qlora 2 dpo",
            "lora 4 labels",
        ),
        ("Granite-350M", "lora 4 mixed", "dora 4 mixed", f"qdora 4 mixed {FIRST}", "qlora 8 mixed"),
        (
            "Llama-3.2-1B",
            "lora 2 mixed",
            f"qlora 2 mixed {FIRST}",
            f"qdora 4 mixed {CHECKPOINTED}",
            f"lora 4 mixed {INT8}",
        ),
        ("Qwen2.5-Coder-1.5B", f"qlora 4 mixed {FIRST}", "qlora 4 mixed", f"lora 2 mixed {CHECKPOINTED}"),
    ):
        for run in runs:
            method, rows, more = run.split(maxsplit=2)
            yield model, method, int(rows), more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", help="repeat the runs whose description contains this word")
    parser.add_argument("--files", type=Path, help=f"the folder of {' and '.join(FILES.values())}, else left out")
    parser.add_argument("--place", type=Path, help="keep the random models and the prepared bases in this folder")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    run = {"command": results.command(), "machine": results.machine(), "versions": results.versions(), "rows": []}
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"{results.usual_name('memory', run)}.json"
    if file.exists():
        run["rows"] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as temporary:
        place = given.place or Path(temporary)
        # A process that has made models holds free memory, in which a run would take place.
        in_a_process(write_rows, place)
        for order in (*orders(), *unseen()):
            if order[0] in FILES and given.files is None:
                continue
            is_known = any(tuple(row["run"]) == order for row in run["rows"])
            if (not is_known and given.word is None) or (given.word and given.word in f"{order}"):
                print(*order, file=sys.stderr, flush=True)
                found = figures(order, place, given.files)
                run["rows"] = [*(row for row in run["rows"] if tuple(row["run"]) != order), {"run": order, **found}]
                write_json(file, run)
    results.publish(given.output, "memory", run, page, file.stem)


def write_model(target: Path) -> None:
    """A random model of the shape that the folder is named after, with demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = rankwise.load_model("demo")[1]
    family, settings = (SHAPES | UNSEEN)[target.name]
    known = {"vocab_size": len(tokenizer), **HEADS, "tie_word_embeddings": True} | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **known), dtype=torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_rows(place: Path) -> None:
    """Rows of about 250 tokens and of mixed lengths, pairs, marked answers, prompts and labels."""
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


def figures(order: tuple[str, str, int, str], place: Path, files: Path | None) -> dict[str, int]:
    """Predicted and measured bytes of a run, in a forked process."""
    model, method, rows, more = order
    data, *options = more.split()
    steps = STEPS if model in FITTED or model in SMALL else FEW_STEPS
    source = model if model == "demo" else str(place / model)
    if model in FILES:
        assert files is not None
        source = str(files / FILES[model])
    elif model != "demo" and not Path(source, "config.json").exists():
        in_a_process(write_model, Path(source))
    adapter = place / f"first-{model}"
    if "--adapter" in options and not adapter.exists():
        # The adapter to continue.
        words = f"train --model {source} --data {place}/mixed.jsonl --max-steps 1 --output {adapter}"
        in_a_process(train, words.split())
    # Which methods take the same prepared base.
    bases = place / f"bases-{model}-{method_of(method).four_bits}"
    is_first = options[-1:] == [FIRST] and "--adapter" not in options
    if is_first:
        options.pop()
        shutil.rmtree(bases, ignore_errors=True)
    elif (method_of(method).four_bits or model in FILES) and not bases.exists():
        words = f"train --model {source} --method {method} --data {place}/mixed.jsonl --batch-size 1 --max-steps 1"
        with tempfile.TemporaryDirectory(dir=place) as folder:
            in_a_process(train, f"{words} --max-length 256 --cache {bases} --output {folder}/run".split())
    paths = {path.stem: str(path) for path in place.glob("*.jsonl")} | {"first": str(adapter)}
    options = ["--data", *(paths.get(word, word) for word in (data, *options)), "--cache", str(bases)]
    if data in OBJECTIVES:
        options += ["--objective", OBJECTIVES[data]]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        words = f"train --model {source} --method {method} --batch-size {rows} --max-length 256"
        arguments = [*words.split(), *options, "--max-steps", str(steps), "--output", f"{folder}/run"]
        in_a_process(train, arguments)
        record = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))
    names = {"predicted": "predicted_peak_memory_bytes", "measured": "peak_memory_bytes", "idle": "idle_bytes"}
    return {name: record[field] for name, field in names.items()} | {"steps": steps}


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
        lines += [
            f"{results.processor(run)}: each run in a process of its own. MB are 10^6 bytes; idle is a process with "
            "its libraries, and errors are of the rest.",
            "",
        ]
        for is_fitted, title in ((False, "Models on which nothing was fitted"), (True, "Models of the fit")):
            if rows := [row for row in run["rows"] if (row["run"][0] in FITTED) is is_fitted]:
                lines += [f"## {title}", "", said(rows), "", *results.table(HEADINGS, map(cells, rows)), ""]
    return lines[:-1]


HEADINGS = ("model", "method", "rows", "data and options", "steps", "idle", "predicted", "measured", "off by")


def said(rows: Sequence[dict[str, Any]]) -> str:
    off = errors(rows)
    median, of_size = 100 * statistics.median(off), 100 * statistics.median(map(abs, off))
    return (
        f"{len(off)} runs. The median error is {median:+.1f} %, the median of its size {of_size:.1f} %; "
        f"{sum(map(is_within, rows))} are within the printed interval, {sum(error > 0 for error in off)} predictions "
        f"lie above the measurement, and the one that lies furthest below it by {-100 * min(off):.1f} %."
    )


def cells(row: dict[str, Any]) -> list[str]:
    model, method, rows, more = row["run"]
    sizes = [f"{row[name] / 1e6:,.0f}" for name in ("idle", "predicted", "measured")]
    steps = str(row.get("steps", STEPS))
    return [model, method, str(rows), more.replace("--", ""), steps, *sizes, f"{100 * errors([row])[0]:+.1f} %"]


if __name__ == "__main__":
    main()
