"""`rankwise train` against TRL's SFTTrainer with PEFT (and bitsandbytes) on the E2E data: examples per second.

    python benchmarks/end_to_end.py ../shared/data/e2e/trainset.csv --eval-data ../shared/data/e2e/devset.csv
    ... --dtype float32   # what `train` takes on a CPU without bfloat16 instructions

Both train the same base on the same rows, as often, with the same rank, dropout, learning rate and seed, each in a
process of its own, and both adapters are then scored by one evaluator. Examples per second count the training steps
alone: loading, tokenizing and evaluating are left out. Writes a JSON file into benchmarks/results, and
benchmarks/results/end_to_end.md anew.

The peer runs with TRL's defaults, but for what is named above and gradient checkpointing, which is off on both sides.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import results
import timing
import torch
from torch.nn import functional

import rankwise as rw
from rankwise.data import encode_rows, read_rows
from rankwise.records import load_record, write_json
from rankwise.training.watch import MemoryMeter, Progress, StepClock

GOAL_FASTER = 3.0
GOAL_LOSS = 1.03
# Of the peer's LoRA.
GOAL_MEMORY = {"lora": 0.85, "qlora": 0.85, "dora": 0.75, "qdora": 0.75}
IGNORED = -100
COLUMNS = ("mr", "ref")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.child is not None:
        write_json(given.answer, {"peer": train_peer, "evaluate": evaluate}[given.child](given))
        return
    with contenders.model_folder(given.model) as folder, tempfile.TemporaryDirectory() as place:
        files = write_rows(given, Path(place))
        rows = [measure(folder, method, files, Path(place), given) for method in given.methods]
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "model": Path(given.model).name,
        **{name: getattr(given, name) for name in ("steps", "batch", "max_length", "dropout", "learning_rate", "seed")},
        "dtype": given.dtype,
        "eval_rows": given.eval_rows,
        "rows": rows,
    }
    results.publish(given.output, "end_to_end", result, page, given.name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CSV of E2E, with the columns mr and ref")
    parser.add_argument("--eval-data", type=Path, required=True, help="the same for evaluating")
    parser.add_argument("--model", default="demo", help="folder of a model, or demo")
    parser.add_argument("--methods", nargs="+", choices=contenders.METHODS, default=list(contenders.METHODS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-rows", type=int, default=128, help="spread evenly over the evaluation data")
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="bfloat16", help="of the frozen weights")
    parser.add_argument("--by-length", action="store_true", help="the peer's batches have rows of about one length")
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor and dtype")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    for name in ("--child", "--method", "--ours", "--peer", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.answer = None if given.answer is None else Path(given.answer)
    return given


def write_rows(given: argparse.Namespace, place: Path) -> dict[str, str]:
    """train.csv with exactly the rows that the steps need, drawn by the seed, and eval.csv."""
    everything, held_out = read_e2e(given.data), read_e2e(given.eval_data)
    chosen = random.Random(given.seed).sample(everything, given.steps * given.batch)
    step = max(1, len(held_out) // given.eval_rows)
    kept = {"train": chosen, "eval": held_out[::step][: given.eval_rows]}
    for name, rows in kept.items():
        with (place / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return {name: str(place / f"{name}.csv") for name in kept}


def read_e2e(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: row[name] for name in COLUMNS} for row in csv.DictReader(file)]


def for_trl(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The texts that we make of E2E's rows; trl adds the stop token to the completion, as we do."""
    return [{"prompt": row["mr"] + "\n", "completion": row["ref"]} for row in rows]


def measure(folder: str, method: str, files: dict[str, str], place: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One method, one side after the other, then the evaluation of both adapters."""
    print(f"{method} ...", file=sys.stderr, flush=True)
    adapters = {"ours": str(place / f"ours-{method}"), "peer": str(place / f"peer-{method}")}
    options = {"--model": folder, "--method": method, "--steps": given.steps, "--batch": given.batch}
    options |= {"--max-length": given.max_length, "--dropout": given.dropout, "--seed": given.seed}
    options |= {"--learning-rate": given.learning_rate, "--eval-data": files["eval"], "--dtype": given.dtype}
    options |= {f"--{side}": adapter for side, adapter in adapters.items()}
    shared = [files["train"], *(str(part) for pair in options.items() for part in pair)]
    shared += ["--by-length"] if given.by_length else []
    found = {
        "ours": train_ours(folder, method, files["train"], adapters["ours"], given),
        "peer": timing.in_fresh_process(__file__, [*shared, "--child", "peer"]),
    }
    losses = timing.in_fresh_process(__file__, [*shared, "--child", "evaluate"])
    losses.pop("process_peak_bytes")
    return {"method": method, **found, "eval_loss": losses}


def train_ours(folder: str, method: str, data: str, output: str, given: argparse.Namespace) -> dict[str, Any]:
    """By the command line; speed and memory are what the run's own record says."""
    options = {"--model": folder, "--data": data, "--method": method, "--output": output, "--max-steps": given.steps}
    options |= {"--batch-size": given.batch, "--max-length": given.max_length, "--lora-dropout": given.dropout}
    options |= {"--learning-rate": given.learning_rate, "--seed": given.seed, "--dtype": given.dtype}
    command = [sys.executable, "-m", "rankwise", "train"]
    peak = timing.watched([*command, *(str(part) for pair in options.items() for part in pair)])
    record = load_record(Path(output))
    assert record.examples_per_second is not None, "a finished run has a speed"
    return {
        "examples": given.steps * given.batch,
        "train_seconds": given.steps * given.batch / record.examples_per_second,
        "trained_tokens": record.data["train"]["trained_tokens"],
        "tokens": record.data["train"]["tokens"],
        "train_loss": record.train_loss,
        "peak_memory_bytes": record.peak_memory_bytes,
        "predicted_peak_memory_bytes": record.predicted_peak_memory_bytes,
        "process_peak_bytes": peak,
        "acceleration": record.device.get("acceleration"),
    }


# --- in fresh processes ---


def train_peer(given: argparse.Namespace) -> dict[str, Any]:
    """TRL's SFTTrainer, which tokenizes, masks the prompts and optimizes as it does for everyone."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(given.seed)
    dtype = getattr(torch, given.dtype)
    four_bits = contenders.bitsandbytes_config(dtype) if contenders.is_four_bit(given.method) else None
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, quantization_config=four_bits)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=given.steps,
                per_device_train_batch_size=given.batch,
                learning_rate=given.learning_rate,
                max_length=given.max_length,
                seed=given.seed,
                use_cpu=not torch.cuda.is_available(),
                bf16=dtype is torch.bfloat16,
                gradient_checkpointing=False,
                train_sampling_strategy="group_by_length" if given.by_length else "random",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(for_trl(read_e2e(given.data))),
            processing_class=AutoTokenizer.from_pretrained(given.model),
            peft_config=contenders.peft_config(given.method, given.dropout),
        )
        return run_peer(trainer, given)


def run_peer(trainer: Any, given: argparse.Namespace) -> dict[str, Any]:
    from transformers import TrainerCallback

    progress = Progress()
    clock = StepClock(progress)

    class Watch(TrainerCallback):
        """The seconds between the beginning and the end of each step, as our own trainer counts them."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    trainer.add_callback(Watch())
    with MemoryMeter(trainer.args.device.type) as memory:
        outcome = trainer.train()
    trainer.model.save_pretrained(given.peer)
    return {
        "examples": given.steps * given.batch,
        "train_seconds": progress.train_seconds,
        "trained_tokens": sum(label != IGNORED for labels in trainer.train_dataset["labels"] for label in labels),
        "tokens": sum(map(len, trainer.train_dataset["input_ids"])),
        "train_loss": outcome.training_loss,
        "peak_memory_bytes": memory.peak(),
        "precision": "bf16 autocast" if trainer.args.bf16 else "none",
        "adapter_dtypes": contenders.dtypes_of_adapter(trainer.model),
    }


def evaluate(given: argparse.Namespace) -> dict[str, float]:
    """Mean loss per labelled token of the base and of both adapters, by the plain model over the same 4-bit weights."""
    four_bits = rw.Nf4Config(double_quant=True) if contenders.is_four_bit(given.method) else None
    model, tokenizer = rw.load_model(given.model, dtype=getattr(torch, given.dtype), quantization=four_bits)
    rows = encode_rows(read_rows(str(given.eval_data)), tokenizer, max_length=given.max_length).dataset
    pairs = sorted(((list(row["input_ids"]), list(row["labels"])) for row in rows), key=lambda pair: len(pair[0]))
    batches = [pairs[start : start + given.batch] for start in range(0, len(pairs), given.batch)]
    losses = {"base": mean_loss(model, batches)}
    for side in ("ours", "peer"):
        rw.load_adapter(model, getattr(given, side))
        losses[side] = mean_loss(model, batches)
        rw.remove_adapter(model)
    return losses


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Sequence[tuple[list[int], list[int]]]]) -> float:
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        ids, labels, mask = padded(batch)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        scored = labels[:, 1:] != IGNORED
        total += float(functional.cross_entropy(logits[scored].float(), labels[:, 1:][scored], reduction="sum"))
        count += int(scored.sum())
    return total / count


def padded(batch: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, labels and mask (rows, longest), padded on the right."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
    return ids, labels, mask


# --- the table ---


def page(runs: list[results.Run]) -> list[str]:
    headings = (
        *("processor", "dtype", "steps", "method", "examples/s: TRL + PEFT", "ours", "times as fast"),
        *("loss: base", "TRL + PEFT", "ours", "ours / their LoRA"),
        *("peak MB: TRL + PEFT", "ours", "ours / theirs"),
    )
    first = runs[0]
    return [
        f"# End to end on E2E: {first['model']}, steps of {first['batch']} rows",
        "",
        *results.where_from(runs),
        f"r = {contenders.R} on all linear layers, dropout {first['dropout']:g}, learning rate "
        f"{first['learning_rate']:g}, at most {first['max_length']} tokens a row. Goals, of bfloat16 on a processor "
        "with products for it, in brackets.",
        "",
        *results.table(headings, [line for run in runs for line in lines_of(run)]),
        "",
        *(line for run in runs for line in other_tokens(run)),
        "Examples per second of the training steps. Loss per labelled token over rows of the evaluation data, "
        f"{', '.join(dict.fromkeys(str(run['eval_rows']) for run in runs))} of them, by one evaluator. Peak: anonymous "
        "memory while training, and what the model maps of its file. TRL's "
        "gradient checkpointing is off, its precision the one above, its other options are TRL's defaults.",
    ]


def lines_of(run: results.Run) -> list[list[str]]:
    lora = next((row["eval_loss"]["peer"] for row in run["rows"] if row["method"] == "lora"), None)
    name, dtype = results.row_name(run)
    return [[name, f"{dtype}{products(row)}", str(run["steps"]), *cells(row, lora)] for row in run["rows"]]


def products(row: dict[str, Any]) -> str:
    """Said where our side multiplied frozen weights in 8 bits, as its record says."""
    return "; ours: frozen products in 8 bits" if "in 8 bits" in (row["ours"]["acceleration"] or "") else ""


def other_tokens(run: results.Run) -> list[str]:
    """Said where the two sides did not train on the same number of tokens."""
    lines = [
        f"- {results.processor(run)}, {row['method']}: {row['peer'][key]:,} {key.replace('_', ' ')} by TRL, "
        f"{row['ours'][key]:,} by ours."
        for row in run["rows"]
        for key in ("tokens", "trained_tokens")
        if row["peer"][key] != row["ours"][key]
    ]
    return [*lines, ""] if lines else []


def cells(row: dict[str, Any], lora: float | None) -> list[str]:
    speed = {side: row[side]["examples"] / row[side]["train_seconds"] for side in ("ours", "peer")}
    loss, method = row["eval_loss"], row["method"]
    peak = {side: row[side]["peak_memory_bytes"] for side in speed}
    return [
        *(method, *(results.number(speed[side]) for side in ("peer", "ours"))),
        results.judged(speed["ours"] / speed["peer"], GOAL_FASTER, at_most=False),
        *(results.number(loss[key], 4) for key in ("base", "peer", "ours")),
        results.judged(None if lora is None else loss["ours"] / lora, GOAL_LOSS, at_most=True, digits=3),
        *(results.number(peak[side] / 1e6, 0) for side in ("peer", "ours")),
        results.judged(peak["ours"] / peak["peer"], GOAL_MEMORY[method], at_most=True),
    ]


if __name__ == "__main__":
    main()
