"""Steps of a mixture of experts, ours and PEFT's, and what memory and processor allow.

    python benchmarks/mixtures.py             # two layers of Qwen3-30B-A3B's shape, about ten minutes
    python benchmarks/mixtures.py --quick     # a tiny one: does it run at all?

Weights are random: no real mixture of this size was at hand. Each side of a row is a process of its own, which takes
the median of its steps; sides alternate. Writes a JSON file into benchmarks/results, and mixtures.md beside it anew.
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
import timing
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import rankwise as rw
from rankwise.ops.cpu import products
from rankwise.ops.eight_bit import Scales
from rankwise.records import write_json

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What is adapted, and the sides.
ROWS = {"attention": ("ours", "ours, 8 bits", "peft"), "attention and experts": ("ours", "ours, 8 bits", "peft")}
# Over NF4 there is no peer: bitsandbytes leaves stacked experts dense.
FOUR_BITS = ("ours, NF4", "ours, NF4, 8 bits")
SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.side is not None:
        write_json(Path(given.answer), floor(given) if given.side == "floor" else steps_of(given))
        return
    options = [
        word
        for name in ("layers", "rows", "length", "vocabulary", "steps")
        for word in (f"--{name}", str(vars(given)[name]))
    ]
    options += ["--tiny"] if given.tiny else []

    def run(adapted: str, side: str) -> dict[str, Any]:
        return timing.in_fresh_process(__file__, [*options, "--adapted", adapted, "--side", side])

    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(given.rounds):
        for adapted, sides in ROWS.items():
            for side in (*sides, *(FOUR_BITS if adapted != "attention" else ())):
                found.setdefault((adapted, side), []).append(run(adapted, side))
    rows = [
        {
            "adapted": adapted,
            "side": side,
            "seconds": [run["seconds"] for run in runs],
            "peak": runs[0]["process_peak_bytes"],
        }
        for (adapted, side), runs in found.items()
    ]
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "dtype": "bfloat16",
        **{name: vars(given)[name] for name in ("layers", "rows", "length", "vocabulary")},
        "sides": rows,
        "floor": run("attention and experts", "floor"),
    }
    results.publish(given.output, "mixtures", result, page, given.name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--steps", type=int, default=5, help="of each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side")
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    for name in ("--side", "--adapted", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.quick:
        given.tiny, given.length, given.vocabulary, given.steps = True, 16, 512, 1
    return given


# --- in the fresh processes ---


def mixture(given: argparse.Namespace) -> Any:
    """In bfloat16, of random weights that repeat: drawing two billion takes a minute."""
    config = Qwen3MoeConfig(
        **(TINY if given.tiny else SHAPE), **HEADS, vocab_size=given.vocabulary, num_hidden_layers=given.layers,
        intermediate_size=6144, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    drawn = torch.randn((1 << 20) + 61).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        flat.fill_(1.0) if parameter.dim() == 1 else repeat(drawn, flat)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def repeat(drawn: Tensor, out: Tensor) -> None:
    for start in range(0, out.numel(), drawn.numel()):
        part = out[start : start + drawn.numel()]
        part.copy_(drawn[: part.numel()])


def adapted(model: Any, given: argparse.Namespace) -> Any:
    more = {"target_parameters": EXPERTS} if given.adapted != "attention" else {}
    if given.side == "peft":
        import peft

        config = peft.LoraConfig(r=contenders.R, lora_alpha=contenders.ALPHA, target_modules=ATTENTION, **more)
        return peft.get_peft_model(model, config)
    if "NF4" in given.side:
        rw.quantize(model, rw.Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(r=contenders.R, lora_alpha=contenders.ALPHA, target_modules=ATTENTION, **more))
    rw.optimize_for_training(model, products="int8" if "8 bits" in given.side else "bfloat16")
    return model


def steps_of(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, forward, backward and AdamW."""
    model = adapted(mixture(given), given).train()
    ids = torch.randint(0, given.vocabulary, (given.rows, given.length), generator=torch.Generator().manual_seed(1))
    step = contenders.Step(model, ids, optimizer=True)
    seconds = []
    for _ in range(1 + given.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        step.forget()
    return {"seconds": statistics.median(seconds[1:])}


def floor(given: argparse.Namespace) -> dict[str, float]:
    """Seconds to read the packed experts twice, and to multiply every token with its weights twice in 8 bits."""
    model = mixture(given)
    experts = [module for module in model.modules() if hasattr(module, "has_gate")]
    stacked = sum(parameter.numel() for module in experts for parameter in module.parameters())
    linear = sum(module.weight.numel() for module in model.modules() if type(module) is nn.Linear)
    shape = model.config
    del model, experts
    tokens = given.rows * given.length
    visited = stacked * shape.num_experts_per_tok / shape.num_experts
    large = torch.ones(1 << 27, dtype=torch.int64)
    bandwidth = large.numel() * 8 / median_of(lambda: large.sum())
    rate = integer_rate()
    read, multiplied = 2 * stacked * (0.5 + 4 / 64) / bandwidth, 2 * tokens * (visited + linear) / rate
    return {"bytes_a_second": bandwidth, "multiply_adds_a_second": rate, "read": read, "multiplied": multiplied}


def integer_rate() -> float:
    """Multiply-adds a second of a product in 8 bits, weights rounded and rows quantized in it."""
    W, x = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    out, factor = torch.empty_like(x), products.Factor.of(W)
    assert factor is not None, "a dense weight"
    scales = Scales.of(W, torch.ones(2048), products.largest())

    def multiply() -> None:
        q, of_rows = products.quantize_rows(x, scales.per_channel)
        in_bytes = products.InBytes(of_rows, scales, factor, across=False)
        products.add_products([products.Term(a=q, W=factor, in_bytes=in_bytes)], out)

    return 2048**3 / median_of(multiply)


def median_of(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


# --- the page ---


def page(runs: list[results.Run]) -> list[str]:
    return [
        "# Steps of a mixture of experts",
        "",
        *results.where_from(runs),
        "The shape of Qwen3-30B-A3B (128 experts, 8 a token) with random weights. A step: forward, backward and AdamW. "
        f"LoRA, r = {contenders.R}, on attention, or on attention and every expert. Each side in a process of its own.",
        "",
        *results.table(HEADINGS, [row for run in runs for row in cells(run)]),
        "",
        "*Of the bound*: a multiple of the time to read the packed experts twice (forward and backward) at the "
        "measured bandwidth, and to multiply each token with the weights that it visits, twice, at the measured rate "
        "of products in 8 bits; for NF4. *Peak*: the largest anonymous memory of the process, weights included.",
    ]


HEADINGS = (
    "processor",
    "layers, tokens",
    "adapters on",
    "side",
    "s a step",
    "times as fast as PEFT",
    "of the bound",
    "peak GB",
)


def cells(run: results.Run) -> list[list[str]]:
    bound = run["floor"]["read"] + run["floor"]["multiplied"]
    medians = {(row["adapted"], row["side"]): statistics.median(row["seconds"]) for row in run["sides"]}
    lines = []
    for row in run["sides"]:
        seconds, peer = medians[row["adapted"], row["side"]], medians[row["adapted"], "peft"]
        lines.append(
            [
                results.processor(run),
                f"{run['layers']}, {run['rows']} x {run['length']}",
                row["adapted"],
                row["side"].replace("peft", "PEFT"),
                results.number(seconds, 2),
                results.number(peer / seconds, 2) if row["side"] != "peft" else "",
                results.number(seconds / bound, 2) if "NF4" in row["side"] else "",
                results.number(row["peak"] / 1e9, 1),
            ]
        )
    return lines


if __name__ == "__main__":
    main()
