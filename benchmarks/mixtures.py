"""Steps of a mixture of experts, ours and PEFT's, and what memory and processor allow.

    python benchmarks/mixtures.py             # two layers of Qwen3-30B-A3B's shape, about ten minutes
    python benchmarks/mixtures.py --whole     # all 48, planned from steps of two and of four
    python benchmarks/mixtures.py --quick     # a tiny one: does it run at all?

Weights are random: no real mixture of this size was at hand. Each side of a row is a process of its own, which takes
the median of its steps; sides alternate. Writes a JSON file into benchmarks/results, and mixtures.md beside it anew.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
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
# Sides whose whole model is planned, and the methods of `rw.plan`.
PLANNED = {"ours, 8 bits": "lora", "ours, NF4, 8 bits": "qlora"}
WHOLE = 48
SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.side is not None:
        asked = {"floor": floor, "plan": planned}.get(given.side, halves_of if given.whole else steps_of)
        write_json(Path(given.answer), asked(given))
        return
    options = [
        word
        for name in ("layers", "rows", "length", "vocabulary", "steps")
        for word in (f"--{name}", str(vars(given)[name]))
    ]
    options += [f"--{name}" for name in ("tiny", "whole") if vars(given)[name]]

    def run(adapted: str, side: str) -> dict[str, Any]:
        return timing.in_fresh_process(__file__, [*options, "--adapted", adapted, "--side", side])

    common = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "dtype": "bfloat16",
        **{name: vars(given)[name] for name in ("layers", "rows", "length", "vocabulary")},
    }
    if given.whole:
        halves = {side: run("attention and experts", side) for side in PLANNED}
        result = {**common, "halves": halves, "plan": run("attention and experts", "plan")}
        name = given.name or results.usual_name("mixtures_whole", result)
        results.publish(given.output, "mixtures", result, page, name)
        return
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
    result = {**common, "sides": rows, "floor": run("attention and experts", "floor")}
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
    parser.add_argument("--whole", action="store_true", help="plan the whole model from twice --layers and these")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    for name in ("--side", "--adapted", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.quick:
        given.tiny, given.length, given.vocabulary, given.steps = True, 16, 512, 2 if given.whole else 1
    return given


# --- in the fresh processes ---


def shape_of(given: argparse.Namespace, layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **(TINY if given.tiny else SHAPE), **HEADS, vocab_size=given.vocabulary, num_hidden_layers=layers,
        intermediate_size=6144, norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def planned(given: argparse.Namespace) -> dict[str, Any]:
    """{method: what `rankwise plan` says} of the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        shape_of(given, WHOLE).save_pretrained(folder)
        plan = rw.plan(
            model=folder, method=list(PLANNED.values()), target_modules=ATTENTION, target_parameters=EXPERTS,
            batch_size=given.rows, max_length=given.length, dtype="bfloat16", memory="1TB", device="cpu",
        )  # fmt: skip
    tokens = given.rows * given.length
    return {
        row["method"]: {
            "peak": row["peak_bytes"], "mapped": row["mapped_bytes"], "seconds": tokens / row["tokens_per_second"]
        }
        for row in plan.rows
    }  # fmt: skip


def mixture(given: argparse.Namespace) -> Any:
    """In bfloat16, of random weights that repeat: drawing two billion takes a minute."""
    config = shape_of(given, given.layers)
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


def halves_of(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps of ``layers`` and of twice as many, in turns on one model."""
    few, given.layers = given.layers, 2 * given.layers
    model = adapted(mixture(given), given).train()
    ids = torch.randint(0, given.vocabulary, (given.rows, given.length), generator=torch.Generator().manual_seed(1))
    step, found = contenders.Step(model, ids, optimizer=True), {few: [], 2 * few: []}
    for _ in range(1 + given.steps):
        for layers, seconds in found.items():
            model.config.num_hidden_layers = layers
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
            step.forget()
    return {"few": found[few][1:], "twice": found[2 * few][1:]}


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
        *results.table(HEADINGS, [row for run in runs if "sides" in run for row in cells(run)]),
        "",
        "*Of the bound*: a multiple of the time to read the packed experts twice (forward and backward) at the "
        "measured bandwidth, and to multiply each token with the weights that it visits, twice, at the measured rate "
        "of products in 8 bits; for NF4. *Peak*: the largest anonymous memory of the process, weights included.",
        *(whole_page(runs) if any("halves" in run for run in runs) else []),
    ]


def whole_page(runs: list[results.Run]) -> list[str]:
    return [
        "",
        f"## {WHOLE} layers, planned",
        "",
        f"No step of {WHOLE} layers was run. Steps of two numbers of layers, in turns on one model, give the time of "
        "one more, with the base in memory: by the quickest of each, since other programs lengthened some. *By plan*: "
        "`rankwise plan`, which goes by the speed of one product in bfloat16 and in 8 bits. Adapters on attention and "
        "experts.",
        "",
        *results.table(WHOLE_HEADINGS, [row for run in runs if "halves" in run for row in whole_cells(run)]),
    ]


WHOLE_HEADINGS = (
    *("processor", "layers measured, tokens", "side", "s of the fewer", "s of the more", f"s of {WHOLE}, planned"),
    *("by plan", "peak GB, by plan", "of them mapped"),
)


def whole_cells(run: results.Run) -> list[list[str]]:
    lines = []
    for side, method in PLANNED.items():
        plan, few, twice = run["plan"][method], *(min(run["halves"][side][name]) for name in ("few", "twice"))
        whole = few + (WHOLE - run["layers"]) * (twice - few) / run["layers"]
        lines.append(
            [
                results.processor(run),
                f"{run['layers']} and {2 * run['layers']}, {run['rows']} x {run['length']}",
                side,
                *(results.number(seconds, 2) for seconds in (few, twice)),
                *(f"{seconds:.0f}" for seconds in (whole, plan["seconds"])),
                results.number(plan["peak"] / 1e9, 1),
                results.number(plan["mapped"] / 1e9, 1),
            ]
        )
    return lines


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
