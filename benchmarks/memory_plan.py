"""Predicted peak memory against measured, for every method, with and without gradient checkpointing.

    python benchmarks/memory_plan.py            # the demo model and a random Llama of 0.6B; some minutes
    python benchmarks/memory_plan.py --quick    # the demo model, one method
    python benchmarks/memory_plan.py --dtype bfloat16 --methods lora qlora    # not the machine's own
    python benchmarks/memory_plan.py --runs ''     # whole runs of `rankwise train` and `compare`; half an hour
    python benchmarks/memory_plan.py --runs fsdp   # those with this word; the others keep their figures

Each measurement takes three real steps of random weights in a process of its own: on a CPU the growth of its anonymous
memory, on CUDA the peak of torch's allocator. ``--runs`` compares both figures of run.json instead. Writes a JSON file
into benchmarks/results, and memory.md beside it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import contenders
import results

from rankwise.planning import PLANNED, Workload, estimate, measure
from rankwise.planning.extend import error_bytes
from rankwise.planning.hardware import parse_size, this_machine
from rankwise.planning.real_steps import comparable
from rankwise.records import write_json

GOAL = 0.08
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.runs is not None:
        publish_runs(given)
        return
    with contenders.model_folder("demo") as demo, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        models = [("demo, 4 x 256 tokens", demo, 4, 256)]
        if not given.quick:
            models.append(("Llama of 0.6B, 2 x 256 tokens", folder, 2, 256))
        methods = PLANNED[:1] if given.quick else given.methods
        rows = [
            row_of(name, model, method, batch, length, again, given.dtype)
            for name, model, batch, length in models
            for method in methods
            for again in (False, True)
        ]
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "dtype": given.dtype,
        "rows": rows,
    }
    results.publish(given.output, "memory", result, page, given.name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one method on the demo model: does it run at all?")
    parser.add_argument("--methods", nargs="+", choices=PLANNED, default=PLANNED)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=this_machine().dtype)
    parser.add_argument("--runs", metavar="WORD", help="whole runs whose description contains WORD")
    parser.add_argument("--gguf", help="with --runs: a third model, Gemma 3 270M")
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor and dtype")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    return parser.parse_args(arguments)


def row_of(name: str, model: str, method: str, batch: int, length: int, again: bool, dtype: str) -> dict[str, Any]:
    print(f"{name}: {method}{', checkpointing' if again else ''} ...", file=sys.stderr, flush=True)
    kind = this_machine().device_type
    workload = Workload(
        batch_size=batch, max_length=length, gradient_checkpointing=again, device_type=kind, dtype=dtype
    )
    predicted = estimate(model, method, workload)
    measured = measure(model, method, workload)
    return {
        "model": name,
        "method": method,
        "checkpointing": again,
        "measured_bytes": measured.peak_bytes,
        "predicted_bytes": comparable(predicted, kind),
    }


# {columns: layers} of the small models, Llamas with demo's vocabulary.
SMALL = {256: 4, 384: 6, 512: 8}
USUAL = "--batch-size 4 --max-length 256"
MIXED = "--data mixed.jsonl --eval-data mixed.jsonl --batch-size 8 --max-length 256"
PAIRS = f"--data pairs.jsonl --objective dpo {USUAL}"
COMPARED = "--data mixed.jsonl --eval-data mixed.jsonl --eval-limit 64 --max-length 128 --learning-rates 1e-3 --seeds 1"
SAID = re.compile(r"predicted peak .*? that the process has, ([\d.,]+) (.B) for the training")


def orders() -> Iterator[tuple[str, str]]:
    """(model, arguments) of every run; ``compare`` is one for each of its methods."""
    for columns, methods in ((256, PLANNED), (384, ("full", "lora", "dora")), (512, ("full", "lora", "qdora"))):
        yield from ((f"llama{columns}", f"train --method {method} {USUAL}") for method in methods)
    yield from (("demo", f"train --method {method} {USUAL}") for method in PLANNED)
    yield from (("demo in bfloat16", f"train --method {method} {USUAL}") for method in ("lora", "qlora", "dora"))
    yield from (("gemma", f"train --method {method} {USUAL}") for method in ("lora", "qlora", "dora"))
    for arguments in (
        f"dora {MIXED}",
        f"qlora {MIXED}",
        f"qlora {PAIRS}",
        f"dora {PAIRS}",
        f"lora {USUAL} --devices 2",
        f"lora {USUAL} --devices 2 --strategy fsdp",
        f"qdora {USUAL} --devices 2 --strategy fsdp",
        f"full {USUAL} --devices 2 --strategy fsdp",
    ):
        yield "demo", f"train --method {arguments}"
    for arguments in (
        f"lora {MIXED}",
        f"lora {PAIRS}",
        f"full {USUAL} --threads 2",
        f"qdora {USUAL} --dtype float32",
        f"qdora {USUAL} --devices 2 --strategy fsdp",
    ):
        yield "llama512", f"train --method {arguments}"
    yield "demo", f"compare --methods lora,qlora,dora,qdora --max-steps 20 {COMPARED}"
    yield "llama384", f"compare --methods full,lora,qlora,dora --max-steps 8 {COMPARED}"


def publish_runs(given: argparse.Namespace) -> None:
    """Carry out the chosen runs, and keep the figures of the others from the file."""
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "dtype": given.dtype,
        "runs": [],
    }
    given.output.mkdir(parents=True, exist_ok=True)
    name = given.name or results.usual_name("memory_runs", result)
    file = given.output / f"{name}.json"
    if file.exists():
        result["runs"] = json.loads(file.read_text(encoding="utf-8"))["runs"]
    with contenders.model_folder("demo") as demo, tempfile.TemporaryDirectory() as place:
        models = {"demo": "demo", "demo in bfloat16": demo, "gemma": given.gguf, **small_models(demo, Path(place))}
        write_rows(Path(place))
        for model, arguments in orders():
            if models[model] is not None and given.runs in f"{model} {arguments}":
                print(f"{model}: {arguments} ...", file=sys.stderr, flush=True)
                found = list(run_rows(model, models[model], arguments, Path(place)))
                kept = [row for row in result["runs"] if (row["model"], row["arguments"]) != (model, arguments)]
                result["runs"] = kept + found
                write_json(file, result)
    results.publish(given.output, "memory", result, page, name)


def small_models(demo: str, place: Path) -> dict[str, str]:
    """{name: folder} of random Llamas with demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo)
    for columns, layers in SMALL.items():
        heads, folder = columns // 64, place / f"llama{columns}"
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=columns,
            intermediate_size=3 * columns,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {f"llama{columns}": str(place / f"llama{columns}") for columns in SMALL}


def write_rows(place: Path) -> None:
    """Rows just below 256 tokens, of mixed lengths, and pairs."""
    chance, words = random.Random(0), ("the", "cat", "sees", "a", "river", "near", "old", "houses")

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(least, most)))

    lengths = {"rows": (195, 195), "mixed": (5, 80)}
    for name, (least, most) in lengths.items():
        rows = [{"prompt": text(5, 20), "completion": text(least, most)} for _ in range(128)]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": text(20, 60), "chosen": text(10, 60), "rejected": text(10, 60)} for _ in range(64)]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))


def run_rows(model: str, source: str, arguments: str, place: Path) -> Iterator[dict[str, Any]]:
    """The figures of one command's runs."""
    verb, *rest = arguments.replace(" --threads 2", "").split()
    given = [str(place / word) if word.endswith(".jsonl") else word for word in rest]
    data = [] if "--data" in given else ["--data", str(place / "rows.jsonl")]
    steps = [] if "--max-steps" in given else ["--max-steps", "3"]
    threads = "2" if "--threads 2" in arguments else "1"
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command = [sys.executable, "-m", "rankwise", verb, "--model", source, *data, *given, *steps]
        done = subprocess.run(
            [*command, "--output", f"{folder}/run"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        files = sorted(Path(folder).glob("run/run.json" if verb == "train" else "run/runs/*/run.json"))
        if done.returncode or not files:
            print(f"ended with code {done.returncode}: {done.stderr[-2000:]}", file=sys.stderr)
            return
        for file in files:
            record = json.loads(file.read_text(encoding="utf-8"))
            logs = Path(folder).glob(f"run/cells/{file.parent.name}.train.*")
            said = done.stdout if verb == "train" else "".join(log.read_text(errors="replace") for log in logs)
            size, unit = SAID.search(said).groups()
            yield {
                "model": model,
                "arguments": arguments,
                "method": record["method"],
                "predicted_bytes": record["predicted_peak_memory_bytes"],
                "training_bytes": parse_size(f"{size}{unit}"),
                "measured_bytes": record["peak_memory_bytes"],
            }


def page(runs: list[results.Run]) -> list[str]:
    steps = [run for run in runs if "rows" in run]
    whole = [line for run in runs if "runs" in run for line in runs_section(run)]
    return [
        "# Memory: predicted and measured",
        "",
        *results.where_from(runs),
        *(steps_table(steps) if steps else []),
        *whole,
    ]


def steps_table(runs: list[results.Run]) -> list[str]:
    headings = ("processor", "dtype", "model", "method", "checkpointing", "measured")
    rows = [[*results.row_name(run), *cells(row)] for run in runs for row in run["rows"]]
    return [
        *results.table((*headings, "predicted", "off by"), rows),
        "",
        "MB (10^6 bytes): what three steps with AdamW take beyond the libraries, r = 16 on all linear layers.",
        "",
    ]


def runs_section(run: results.Run) -> list[str]:
    rows = run["runs"]
    inside = sum(map(is_inside, rows))
    below = sum(row["measured_bytes"] < row["predicted_bytes"] for row in rows)
    headings = ("model", "method", "arguments", "predicted", "printed", "measured", "off by")
    return [
        "## Whole runs",
        "",
        f"Both figures of run.json, each run in a new process ({results.processor(run)}, {run['dtype']} unless given). "
        f"{inside} of {len(rows)} measurements lie inside the printed interval; {below} are below the prediction.",
        "",
        *results.table(headings, map(run_cells, rows)),
    ]


def interval_bytes(row: dict[str, Any]) -> int:
    """Half of the interval that such a run prints."""
    return error_bytes(row["training_bytes"], "cpu")


def is_inside(row: dict[str, Any]) -> bool:
    return abs(row["measured_bytes"] - row["predicted_bytes"]) <= interval_bytes(row)


def run_cells(row: dict[str, Any]) -> list[str]:
    predicted, measured = row["predicted_bytes"], row["measured_bytes"]
    sizes = [f"{predicted / 1e6:,.0f}", f"±{interval_bytes(row) / 1e6:,.0f}", f"{measured / 1e6:,.0f}"]
    off = f"{(predicted - measured) / 1e6:+,.0f}"
    return [row["model"], row["method"], f"`{row['arguments']}`", *sizes, off]


def cells(row: dict[str, Any]) -> list[str]:
    measured, predicted = row["measured_bytes"], row["predicted_bytes"]
    off = predicted / measured - 1
    missed = "" if abs(off) <= GOAL else f" (within {GOAL:.0%}: missed)".replace("%", " %")
    sizes = [f"{size / 1e6:,.0f}" for size in (measured, predicted)]
    return [row["model"], row["method"], "yes" if row["checkpointing"] else "no", *sizes, f"{100 * off:+.1f} %{missed}"]


if __name__ == "__main__":
    main()
