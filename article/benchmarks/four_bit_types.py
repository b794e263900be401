"""NF4 against FP4 and INT4: bits a weight, errors on normal weights, and what real models lose by them.

    python article/benchmarks/four_bit_types.py FOLDER demo FILE.gguf --text rows.jsonl \
        --train demo --data trainset.csv --eval-data devset.csv > four_bit_types.md

Every linear layer but the head is rounded to the type and back, in blocks of 64; all else stays. INT4 is 15 codes from
-7 to 7 (bitsandbytes' linear map with a zero); *16 uniform* are 16 codes from -1 to 1. Cross-entropy is that of the
rows of --text, `prompt` and `response`; a model without a tokenizer (a folder) reads texts that it drew itself, so that
its loss is a divergence from itself. Differences are paired by row.

With --train, LoRA is trained over the model once rounded to each type, in three seeds: QLoRA of that type.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t
from torch import Tensor
from torch.nn.functional import cross_entropy

import rankwise as rw
from rankwise import ops
from rankwise.quantization import Nf4Config
from rankwise.quantization.targets import target_names

BLOCK = 64
ROWS, TOKENS = 24, 160
SEEDS, TRAINED = 3, ("NF4", "FP4", "INT4")
TRAINING = (
    "--method lora --r 16 --products bfloat16 --max-steps 40 --batch-size 8 --max-length 160 --eval-steps 40 "
    "--eval-limit 256"
)
Rounding = Callable[[Tensor], Tensor]


def uniform(codes: Tensor) -> Rounding:
    """Rounding to the nearest of ``codes`` (sorted, evenly spaced) times the largest absolute value of each block."""

    def rounded(w: Tensor) -> Tensor:
        blocks = w.view(-1, BLOCK)
        absmax = blocks.abs().amax(1, keepdim=True)
        step = codes[1] - codes[0]
        places = ((blocks / absmax.clamp(min=1e-38) - codes[0]) / step).round().clamp(0, len(codes) - 1)
        return (codes[places.long()] * absmax).view(w.shape)

    return rounded


def four_bit(quant_type: str, *, double: bool = False) -> Rounding:
    return lambda w: ops.dequantize_weight(ops.quantize_weight(w, quant_type, BLOCK, double), torch.float32)


TYPES: dict[str, Rounding] = {
    "NF4": four_bit("nf4"),
    "NF4, double quantization": four_bit("nf4", double=True),
    "FP4": four_bit("fp4"),
    "INT4": uniform(torch.linspace(-1, 1, 15)),
    "16 uniform": uniform(torch.linspace(-1, 1, 16)),
}


def stored_bits(double: bool) -> float:
    """Bits that a packed (1024, 4096) weight takes, for each of its elements."""
    weight = ops.quantize_weight(torch.randn(1024, 4096), "nf4", BLOCK, double)
    tensors = (weight.codes, weight.absmax, weight.nested_absmax, weight.offset)
    return 8 * sum(value.nbytes for value in tensors if value is not None) / weight.elements


def relative_error(rounding: Rounding) -> float:
    w = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).view(1024, -1)
    return float((rounding(w) - w).norm() / w.norm())


def read(name: str, text: Path | None) -> tuple[Any, list[Tensor]]:
    """The model, and its rows of token ids."""
    model, tokenizer = rw.load_model(name, dtype=torch.bfloat16 if tokenizer_of(name) else torch.float32)
    model.eval()
    if tokenizer is None:
        torch.manual_seed(0)
        start = torch.full((ROWS, 1), model.config.bos_token_id or 1)
        return model, list(model.generate(start, do_sample=True, top_k=0, max_new_tokens=TOKENS, eos_token_id=None))
    if text is None:
        raise SystemExit(f"{name} has a tokenizer; give --text.")
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['prompt']}\n{row['response']}" for row in rows]
    ids = [tokenizer(each, return_tensors="pt").input_ids[0] for each in texts]
    return model, [row[:TOKENS] for row in ids if len(row) >= TOKENS][:ROWS]


def tokenizer_of(name: str) -> bool:
    return not Path(name).is_dir() or (Path(name) / "tokenizer.json").is_file()


@torch.inference_mode()
def losses(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of each row, in nats a token."""
    return torch.stack([cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]) for row in rows])


def of_model(name: str, text: Path | None) -> list[str]:
    model, rows = read(name, text)
    layers = [model.get_submodule(names[0]) for names in target_names(model, Nf4Config())]
    dense = [layer.weight.detach().clone() for layer in layers]
    before = losses(model, rows)
    title = f"## {Path(name).stem if name != 'demo' else 'SmolLM2-135M-Instruct'}"
    lines = [title, "", f"{len(rows)} rows of {len(rows[0])} tokens; dense: loss {before.mean():.4f}.", ""]
    lines += ["| type | error of the weights | loss added | more than NF4 | perplexity |", "|---|---|---|---|---|"]
    of_nf4 = torch.zeros(len(rows))
    for label, rounding in TYPES.items():
        squares = [0.0, 0.0]
        for layer, weight in zip(layers, dense):
            rounded = rounding(weight.float())
            squares[0] += float((rounded - weight.float()).square().sum())
            squares[1] += float(weight.float().square().sum())
            layer.weight.data.copy_(rounded)
        added = losses(model, rows) - before
        of_nf4 = added if label == "NF4" else of_nf4
        perplexity = math.exp(float((before + added).mean()))
        error = math.sqrt(squares[0] / squares[1])
        lines.append(f"| {label} | {error:.2%} | {_mean(added)} | {_mean(added - of_nf4)} | {perplexity:.2f} |")
    return [*lines, ""]


def _mean(values: Tensor) -> str:
    return f"{values.mean():.4f} ± {1.96 * float(values.std()) / math.sqrt(len(values)):.4f}"


def after_training(name: str, data: Path, eval_data: Path) -> list[str]:
    """A table of the losses after training over the model as each type rounds it."""
    model, tokenizer = rw.load_model(name, dtype=torch.bfloat16)
    layers = [model.get_submodule(names[0]) for names in target_names(model, Nf4Config())]
    dense = [layer.weight.detach().clone() for layer in layers]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        base, run = Path(place) / "base", Path(place) / "run"
        tokenizer.save_pretrained(base)
        for label, rounding in {"none": Tensor.clone, **{label: TYPES[label] for label in TRAINED}}.items():
            for layer, weight in zip(layers, dense):
                layer.weight.data.copy_(rounding(weight.float()))
            model.save_pretrained(base)
            for seed in range(SEEDS):
                command = [sys.executable, "-m", "rankwise", "train", "--model", base, "--data", data, "--output", run]
                command += ["--eval-data", eval_data, "--seed", str(seed), "--overwrite", *TRAINING.split()]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                losses = found.setdefault(label, [])
                losses.append(json.loads((run / "run.json").read_text(encoding="utf-8"))["eval_loss"])
    lines = [
        f"## {name}, trained",
        "",
        f"`rankwise train {TRAINING}` on {data.name} over weights that were rounded to the type, and the loss on "
        f"{eval_data.name}; differences are paired by seed.",
        "",
        "| type | loss, by seed | more than NF4 |",
        "|---|---|---|",
    ]
    for label, losses in found.items():
        more = [loss - other for loss, other in zip(losses, found["NF4"])]
        half = t.ppf(0.975, SEEDS - 1) * statistics.stdev(more) / math.sqrt(SEEDS)
        told = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {label} | {told} | {statistics.fmean(more):.4f} ± {half:.4f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--text", type=Path, help="JSON lines of `prompt` and `response`")
    parser.add_argument("--train", metavar="MODEL", help="model to train, with --data and --eval-data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--eval-data", type=Path)
    given = parser.parse_args()
    single, double = stored_bits(False), stored_bits(True)
    lines = [
        "# NF4, FP4 and INT4",
        "",
        "Made by `article/benchmarks/four_bit_types.py`, which says how. ± is a 95 % interval over rows. Weights from "
        "a GGUF file were rounded once before; those of stories260K are the trained ones, and its texts are its own. "
        "INT4 has 15 codes from -7 to 7; *16 uniform* has 16, and no zero.",
        "",
        "## Bits",
        "",
        f"A weight of NF4 in blocks of {BLOCK} takes {single:.4f} bits, with double quantization {double:.4f}: "
        f"{single - double:.4f} bits less. LLaMA-65B's 65.2 billion save {65.2 * (single - double) / 8:.2f} GB.",
        "",
        "## Normal weights",
        "",
        "| type | relative error of 4,194,304 normal draws |",
        "|---|---|",
        *(f"| {label} | {relative_error(rounding):.2%} |" for label, rounding in TYPES.items()),
        "",
    ]
    for name in given.models:
        lines += of_model(name, given.text)
    if given.train:
        lines += after_training(given.train, given.data, given.eval_data)
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
