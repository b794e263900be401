"""What a step costs as sequences get longer, and what memory it takes as the vocabulary grows.

    python benchmarks/scaling.py                    # the demo model; some minutes
    python benchmarks/scaling.py MODEL --lengths 256 512 --method dora

Lengths: one sequence a step, all tokens labelled, and attention of the same shape timed in the same rounds, so that its
share, which grows with the length, can be taken off. Vocabularies: a Llama of random weights and small width, each size
in a process of its own. Writes a JSON file into benchmarks/results, and scaling.md beside it
anew.

Legend: B = sequences, L = tokens of each, H = heads, D = width of a head.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contenders
import results
import timing
import torch

import rankwise as rw
from rankwise.acceleration.attention import obstacle
from rankwise.ops.attention import attention
from rankwise.records import write_json
from rankwise.training.watch import MemoryMeter

LENGTHS = (256, 512, 1024, 2048, 4096)
VOCABULARIES = (32_000, 262_144)
WIDTH, LAYERS, HEADS = 256, 4, 4
GOAL_GROWTH = 1.2
STEPS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.child is not None:
        write_json(given.answer, {"lengths": lengths, "vocabulary": vocabulary}[given.child](given))
        return
    print("lengths ...", file=sys.stderr, flush=True)
    shared = ["--method", given.method, "--rounds", str(given.rounds), "--batch", str(given.batch)]
    shared += ["--tokens", str(given.tokens), "--lengths", *map(str, given.lengths)]
    with contenders.model_folder(given.model) as folder:
        by_length = timing.in_fresh_process(__file__, [folder, *shared, "--child", "lengths"])
    by_vocabulary = []
    for size in given.vocabularies:
        print(f"vocabulary of {size:,} ...", file=sys.stderr, flush=True)
        found = {
            side: timing.in_fresh_process(
                __file__, [*shared, "--child", "vocabulary", "--side", side, "--vocabularies", str(size)]
            )
            for side in contenders.SIDES
        }
        by_vocabulary.append({"vocabulary": size, **found})
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "model": Path(given.model).name,
        "method": given.method,
        "rounds": given.rounds,
        "batch": given.batch,
        "tokens": given.tokens,
        "lengths": by_length["rows"],
        "attention": by_length["attention"],
        "vocabularies": by_vocabulary,
    }
    results.publish(given.output, "scaling", result, page)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="folder of a model, or demo: for the lengths")
    parser.add_argument("--method", choices=contenders.METHODS, default="lora")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens per sequence")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--batch", type=int, default=4, help="sequences of the vocabulary runs")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    for name in ("--child", "--side", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.answer = None if given.answer is None else Path(given.answer)
    return given


# --- in fresh processes ---


def lengths(given: argparse.Namespace) -> dict[str, Any]:
    """Every length in every round, its attention beside it."""
    model = contenders.build("ours", given.model, given.method, 0.0)
    steps, calls = {}, {}
    for L in given.lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, L), generator=torch.Generator().manual_seed(L))
        steps[L] = contenders.Step(model, ids)
        calls[f"step {L}"] = (steps[L], steps[L].forget)
        calls[f"attention {L}"] = (attention_of(model.config, L), timing.nothing)
    load = timing.load_average()
    seconds = timing.alternate(calls, given.rounds)
    median = timing.medians(seconds)
    rows = [
        {
            "length": L,
            "step_seconds": median[f"step {L}"],
            "attention_seconds": model.config.num_hidden_layers * median[f"attention {L}"],
            "saved_bytes": timing.saved_bytes(model, steps[L].forward),
        }
        for L in given.lengths
    ]
    return {"rows": rows, "seconds": seconds, "attention": attention_name(), "load_average_before": load}


def attention_of(config: Any, L: int) -> Callable[[], object]:
    """Causal attention of one layer, forward and backward: our kernel or, where that cannot run, torch's."""
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, L, H, D, dtype=torch.bfloat16, requires_grad=True) for H in heads)
    dy = torch.randn(1, L, heads[0], D, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), dy)


def attention_name() -> str:
    why_not = obstacle(torch.bfloat16, torch.empty(0))
    return "our kernel" if why_not is None else f"torch's ({why_not})"


def vocabulary(given: argparse.Namespace) -> dict[str, Any]:
    """Peak anonymous memory of steps with the optimizer; embedding and head are one weight of that many rows."""
    model = random_llama(given.vocabularies[0])
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if given.side == "ours":
        is_dora = contenders.is_dora(given.method)
        rw.add_adapter(model, rw.LoraConfig(r=contenders.R, lora_alpha=contenders.ALPHA, use_dora=is_dora))
        rw.optimize_for_training(model.train())
    else:
        from peft import get_peft_model

        model = get_peft_model(model, contenders.peft_config(given.method, 0.0)).train()
    ids = torch.randint(0, given.vocabularies[0], (given.batch, given.tokens))
    step = contenders.Step(model, ids, optimizer=True)
    gc.collect()
    with MemoryMeter("cpu") as memory:
        before = memory.now()
        for _ in range(STEPS):
            step()
            step.forget()
    return {"peak_memory_bytes": memory.peak(), "before_steps_bytes": before, "weight_bytes": weights}


def random_llama(size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


# --- the tables ---


def markdown(result: dict[str, Any]) -> list[str]:
    return [
        f"# Scaling: {result['method']}, bfloat16",
        "",
        *results.where_from([result]),
        f"## Length: {result['model']}, one sequence",
        "",
        *length_table(result["lengths"]),
        "",
        f"Seconds of forward and backward, medians of {result['rounds']} alternating rounds. Attention: "
        f"{result['attention']}, timed by itself, times the number of layers. Without: attention taken off. Growth: "
        "per token, against the shortest sequence.",
        "",
        f"## Vocabulary: a Llama of width {WIDTH} with {LAYERS} layers, {result['batch']} x {result['tokens']} tokens",
        "",
        *vocabulary_table(result["vocabularies"]),
        "",
        "MB (10^6 bytes) of anonymous memory during steps with AdamW. Growth: the peak less the larger weights, "
        f"against that of the first vocabulary; the goal is {GOAL_GROWTH:g}.",
    ]


page = results.sections(markdown)


def length_table(rows: list[dict[str, Any]]) -> list[str]:
    def per_token(row: dict[str, Any], attention: float) -> float:
        return 1e6 * (row["step_seconds"] - attention) / row["length"]

    def aside(row: dict[str, Any]) -> float:
        return per_token(row, row["attention_seconds"])

    headings = ("tokens", "step s", "attention s", "us/token", "without", "growth", "without", "saved KB/token")
    cells = []
    for row in rows:
        growth = per_token(row, 0) / per_token(rows[0], 0)
        cells.append(
            [
                str(row["length"]),
                *(results.number(row[f"{part}_seconds"], 3) for part in ("step", "attention")),
                *(results.number(per_token(row, 0), 0), results.number(aside(row), 0), results.number(growth)),
                results.number(aside(row) / aside(rows[0])),
                results.number(row["saved_bytes"] / row["length"] / 1e3, 0),
            ]
        )
    return results.table(headings, cells)


def vocabulary_table(rows: list[dict[str, Any]]) -> list[str]:
    headings = ("vocabulary", "weights", "ours: before", "peak", "growth", "PEFT: before", "peak", "growth")
    cells = []
    for row in rows:
        found = [str(row["vocabulary"]), results.number(row["ours"]["weight_bytes"] / 1e6, 0)]
        for side in contenders.SIDES:
            memory, first = row[side], rows[0][side]
            peak = memory["peak_memory_bytes"]
            growth = (peak - memory["weight_bytes"] + first["weight_bytes"]) / first["peak_memory_bytes"]
            found += [results.number(value / 1e6, 0) for value in (memory["before_steps_bytes"], peak)]
            found.append(results.judged(growth, GOAL_GROWTH if side == "ours" else None, at_most=True))
        cells.append(found)
    return results.table(headings, cells)


if __name__ == "__main__":
    main()
