"""Does a reward rise? Sums of two digits, learned by GRPO from the exact-answer reward alone, with several seeds.

    python benchmarks/rewards.py [--steps 60 --seeds 2 --method lora]

The model is a Llama of two layers that has learned the sums for so few steps that it is right only at times. Writes
benchmarks/results/rewards.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import results
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.config import TrainSettings
from rankwise.records import RunRecord, read_metrics, write_text
from rankwise.training.run import train

# Steps over which a reward is averaged, and of learning before rewards.
SPAN, BEFORE = 10, 150
WORDS = ["<pad>", "<s>", "</s>", "+", "=", *map(str, range(19))]
COMMON: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_length": 16, "lr_scheduler_type": "constant"}


def small_model(folder: Path) -> None:
    """Two layers of 64, and a word for each number."""
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **ids)).save_pretrained(folder)


def write_sums(path: Path) -> Path:
    rows = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(10) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def base(place: Path, data: Path) -> Path:
    """The small model after a few steps of demonstrations."""
    small_model(place / "new")
    given = {"model": str(place / "new"), "data": str(data), "output": place / "base", "method": "full"}
    train(TrainSettings(**given, **COMMON, batch_size=16, max_steps=BEFORE, learning_rate=3e-3))
    return place / "base"


def rewarded(place: Path, model: Path, data: Path, seed: int, arguments: argparse.Namespace) -> tuple[Path, RunRecord]:
    output = place / f"seed-{seed}"
    given: dict[str, Any] = {"model": str(model), "data": str(data), "eval_data": str(data), "output": output}
    given |= {"objective": "grpo", "reward": ["answer"], "method": arguments.method, "seed": seed}
    given |= {"batch_size": 128, "num_generations": 16, "max_completion_length": 4, "learning_rate": 3e-3}
    given |= {"max_steps": arguments.steps, "eval_steps": arguments.steps, "logging_steps": 1}
    return output, train(TrainSettings(**given, **COMMON))


def row(folder: Path, record: RunRecord) -> str:
    rewards = [line["reward"] for line in read_metrics(folder) if line.get("reward") is not None]
    first, last = statistics.fmean(rewards[:SPAN]), statistics.fmean(rewards[-SPAN:])
    before, after = (-(loss or 0.0) for loss in (record.initial_eval_loss, record.eval_loss))
    return f"| {record.seed} | {first:.3f} | {last:.3f} | {before:.2f} | {after:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = write_sums(place / "sums.jsonl")
        model = base(place, data)
        rows = [row(*rewarded(place, model, data, seed, arguments)) for seed in range(arguments.seeds)]
    versions = ", ".join(f"{name} {number}" for name, number in results.versions(("rankwise", "torch")).items())
    page = [
        "# Learning sums from a reward",
        "",
        f"A small Llama first learns the 100 sums of two digits from demonstrations, for {BEFORE} steps. Then it "
        "trains with GRPO. The reward of an answer is 1 if its number is right, and 0 otherwise. Each step asks 8 sums "
        "and draws 16 answers to each. *Greedy* is the share of all 100 sums that the model answers rightly without "
        "sampling.",
        "",
        f"    python benchmarks/rewards.py --method {arguments.method} --steps {arguments.steps} "
        f"--seeds {arguments.seeds}",
        "",
        f"{versions}.",
        "",
        f"| seed | mean reward, first {SPAN} steps | last {SPAN} steps | greedy, before GRPO | after |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_text(results.FOLDER / "rewards.md", "\n".join(page) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
