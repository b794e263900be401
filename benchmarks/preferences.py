"""`rankwise train --objective dpo` against TRL's DPOTrainer with PEFT (and bitsandbytes): pairs per second, and memory.

    python benchmarks/preferences.py ../shared/data/e2e/trainset.csv --methods lora qdora --steps 12
    ... --held-out 128    # and whether the better answer of pairs that were not trained on comes out ahead

A pair is a text of E2E for its meaning and the text of another meaning that shares its name. Both sides train the same
base on the same pairs, as often, each in a process of its own. Pairs per second count the training steps alone. The
peer runs with TRL's defaults, but for what both are given and gradient checkpointing, which is off on both sides.
Writes a JSON file into benchmarks/results, and preferences.md beside it anew.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import end_to_end
import results
import timing
import torch

from rankwise.records import load_record, read_metrics, write_json
from rankwise.training.watch import MemoryMeter, Progress, StepClock

GOAL_FASTER = {"lora": 2.0, "dora": 2.0, "qlora": 3.0, "qdora": 3.0}
GOAL_MEMORY = 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.child is not None:
        write_json(Path(given.answer), train_peer(given))
        return
    with contenders.model_folder(given.model) as folder, tempfile.TemporaryDirectory() as place:
        train, held_out = Path(place) / "train.jsonl", Path(place) / "eval.jsonl"
        pairs = pairs_of(given.data, given.steps * given.batch + given.held_out, given.seed)
        write_pairs(train, pairs[given.held_out :])
        write_pairs(held_out, pairs[: given.held_out])
        rows = [measure(folder, method, train, held_out, Path(place), given) for method in given.methods]
    names = ("steps", "batch", "max_length", "learning_rate", "beta", "seed", "dtype", "held_out")
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "model": Path(given.model).name,
        **{name: getattr(given, name) for name in names},
        "rows": rows,
    }
    results.publish(given.output, "preferences", result, page, given.name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CSV of E2E, with the columns mr and ref; of the peer its pairs")
    parser.add_argument("--model", default="demo", help="folder of a model, or demo")
    parser.add_argument("--methods", nargs="+", choices=contenders.METHODS, default=["lora", "qdora"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=0, help="pairs to evaluate ours on")
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="bfloat16", help="of the frozen weights")
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor and dtype")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    for name in ("--child", "--method", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def pairs_of(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Messages, so that both sides write them by the model's chat template."""
    by_name: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in end_to_end.read_e2e(path):
        by_name[row["mr"].partition(",")[0]].append(row)
    draw, pairs = random.Random(seed), []
    while len(pairs) < count:
        better, worse = draw.sample(draw.choice(list(by_name.values())), 2)
        if better["mr"] != worse["mr"]:
            prompt = [{"role": "user", "content": better["mr"]}]
            sides = {"chosen": better["ref"], "rejected": worse["ref"]}
            answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            pairs.append({"prompt": prompt, **answers})
    return pairs


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def measure(
    folder: str, method: str, train: Path, held_out: Path, place: Path, given: argparse.Namespace
) -> dict[str, Any]:
    print(f"{method} ...", file=sys.stderr, flush=True)
    options = {"--model": folder, "--method": method, "--max-length": given.max_length, "--seed": given.seed}
    options |= {"--learning-rate": given.learning_rate, "--beta": given.beta, "--dtype": given.dtype}
    ours = {**options, "--data": train, "--max-steps": given.steps, "--batch-size": given.batch, "--objective": "dpo"}
    ours |= {"--output": place / method, "--logging-steps": 1}
    if given.held_out:
        ours |= {"--eval-data": held_out, "--eval-limit": 0}
    peer = [str(train), "--child", "peer", "--steps", given.steps, "--batch", given.batch, *flat(options)]
    return {
        "method": method,
        "peer": timing.in_fresh_process(__file__, list(map(str, peer))),
        "ours": train_ours(place / method, list(map(str, flat(ours)))),
    }


def flat(options: dict[str, Any]) -> list[Any]:
    return [part for pair in options.items() for part in pair]


def train_ours(output: Path, options: list[str]) -> dict[str, Any]:
    """By the command line; speed and memory are what the run's own record says."""
    peak = timing.watched([sys.executable, "-m", "rankwise", "train", *options])
    record, lines = load_record(output), list(read_metrics(output))
    evaluated = [line["eval_reward_accuracy"] for line in lines if "eval_reward_accuracy" in line]
    return {
        "pairs_per_second": record.examples_per_second,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "peak_memory_bytes": record.peak_memory_bytes,
        "predicted_peak_memory_bytes": record.predicted_peak_memory_bytes,
        "process_peak_bytes": peak,
        "held_out_accuracies": evaluated,
        "acceleration": record.device.get("acceleration"),
    }


# --- in a fresh process ---


def train_peer(given: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    set_seed(given.seed)
    method, dtype = given.method, getattr(torch, given.dtype)
    four_bits = contenders.bitsandbytes_config(dtype) if contenders.is_four_bit(method) else None
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, quantization_config=four_bits)
    progress = Progress()
    clock = StepClock(progress)

    class Watch(TrainerCallback):
        """The seconds between the beginning and the end of each step, as our own trainer counts them."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    lines = given.data.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=scratch,
                max_steps=given.steps,
                per_device_train_batch_size=given.batch,
                learning_rate=given.learning_rate,
                beta=given.beta,
                max_length=given.max_length,
                seed=given.seed,
                use_cpu=not torch.cuda.is_available(),
                bf16=dtype is torch.bfloat16,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(given.model),
            peft_config=contenders.peft_config(method, 0.0),
        )
        trainer.add_callback(Watch())
        with MemoryMeter(trainer.args.device.type) as memory:
            trainer.train()
    return {
        "pairs_per_second": given.steps * given.batch / progress.train_seconds,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "peak_memory_bytes": memory.peak(),
    }


# --- the table ---


def page(runs: list[results.Run]) -> list[str]:
    headings = (
        *("processor", "dtype", "steps", "method", "pairs/s: TRL + PEFT", "ours", "times as fast"),
        *(
            "last loss: TRL + PEFT",
            "ours",
            "peak MB: TRL + PEFT",
            "ours",
            "ours / theirs",
            "held-out accuracy: first, last",
        ),
    )
    first = runs[0]
    return [
        f"# DPO: {first['model']}, steps of {first['batch']} pairs",
        "",
        *results.where_from(runs),
        f"r = {contenders.R} on all linear layers, beta {first['beta']:g}, learning rate {first['learning_rate']:g}, "
        f"at most {first['max_length']} tokens an answer and its prompt. Goals in brackets.",
        "",
        *results.table(headings, [line for run in runs for line in lines_of(run)]),
        "",
        "Pairs per second of the training steps, the reference's passes among them. Peak: anonymous memory while "
        "training. Accuracy: the share of pairs that were not trained on whose better answer has the higher reward; "
        "before training all rewards are 0 up to rounding, and the accuracy says nothing.",
    ]


def lines_of(run: results.Run) -> list[list[str]]:
    return [[*results.row_name(run), str(run["steps"]), *cells(row)] for row in run["rows"]]


def cells(row: dict[str, Any]) -> list[str]:
    ours, peer = row["ours"], row["peer"]
    accuracies = ours["held_out_accuracies"]
    return [
        *(row["method"], *(results.number(side["pairs_per_second"]) for side in (peer, ours))),
        results.judged(ours["pairs_per_second"] / peer["pairs_per_second"], GOAL_FASTER[row["method"]], at_most=False),
        *(results.number(side["losses"][-1], 4) for side in (peer, ours)),
        *(results.number(side["peak_memory_bytes"] / 1e6, 0) for side in (peer, ours)),
        results.judged(ours["peak_memory_bytes"] / peer["peak_memory_bytes"], GOAL_MEMORY, at_most=True),
        f"{accuracies[0]:.2f}, {accuracies[-1]:.2f}" if accuracies else "",
    ]


if __name__ == "__main__":
    main()
