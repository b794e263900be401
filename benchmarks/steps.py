"""One training step, ours and PEFT's + bitsandbytes', against the frozen matrix products alone.

    python benchmarks/steps.py                            # the demo model, every method, about a quarter of an hour
    python benchmarks/steps.py MODEL --methods lora dora  # a folder of any model; some methods
    python benchmarks/steps.py --dtype float32            # what `train` takes on a CPU without bfloat16 instructions
    python benchmarks/steps.py --peer-dtype float32       # ours in bfloat16 there, against what PEFT does best

For each method one fresh process calls our step, PEFT's and the floor in turn and takes medians; then the same with the
optimizer's step inside, where DoRA's norms are due. Peak memory is measured with each side in a process of its own,
optimizer included. Writes a JSON file into benchmarks/results, and steps.md beside it anew. What glibc's thresholds
give us (freed memory is kept) holds for the whole process, so in the timings PEFT has it too; "alone" is each side in
its own process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import results
import timing
import torch

from rankwise.ops.branch import is_slow_in_torch
from rankwise.records import write_json
from rankwise.training.watch import MemoryMeter

ROWS = (("lora", 0.0), ("dora", 0.0), ("qlora", 0.0), ("qdora", 0.0), ("lora", 0.05), ("dora", 0.05))
# Goals by method and dropout; "of our LoRA" compares steps of one process.
GOALS: dict[tuple[str, float], dict[str, float]] = {
    ("lora", 0.0): {"floor": 1.35, "faster": 1.55, "saved": 0.60, "memory": 0.85},
    ("dora", 0.0): {"floor": 1.40, "of our LoRA": 1.04, "faster": 1.75, "saved": 0.40, "memory": 0.75},
    ("qlora", 0.0): {"floor": 1.45, "of our LoRA": 1.10, "faster": 1.8, "saved": 0.45, "memory": 0.85},
    ("qdora", 0.0): {"floor": 1.50, "of our LoRA": 1.12, "faster": 2.5, "saved": 0.30, "memory": 0.75},
    ("lora", 0.05): {"faster": 2.1, "saved": 0.45},
    ("dora", 0.05): {"faster": 3.1},
}
MEMORY_STEPS = 4
MOST_SLOW_TOKENS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    if given.child is not None:
        write_json(given.answer, {"timing": timed, "memory": alone}[given.child](given))
        return
    with contenders.model_folder(given.model) as folder:
        rows = [measure(folder, method, dropout, given) for method, dropout in ROWS if method in given.methods]
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "model": Path(given.model).name,
        "batch": given.batch,
        "length": given.length,
        "dtype": given.dtype,
        "peer_dtype": given.peer_dtype,
        "rounds": given.rounds,
        "rows": rows,
    }
    results.publish(given.output, "steps", result, page, given.name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="folder of a model, or demo")
    parser.add_argument("--methods", nargs="+", choices=contenders.METHODS, default=list(contenders.METHODS))
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each, all labelled")
    parser.add_argument("--rounds", type=int, default=7, help="medians are of that many, after one to warm up")
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="bfloat16", help="of the frozen weights")
    parser.add_argument("--peer-dtype", choices=contenders.DTYPES, help="of PEFT's and of the floor (default: --dtype)")
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor and dtype")
    parser.add_argument("--quick", action="store_true", help="one round of 2 x 16 tokens: does it run at all?")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    for name in ("--child", "--method", "--side", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.peer_dtype = given.peer_dtype or given.dtype
    if given.quick:
        given.batch, given.length, given.rounds = 2, 16, 1
    given.answer = None if given.answer is None else Path(given.answer)
    return given


def measure(folder: str, method: str, dropout: float, given: argparse.Namespace) -> dict[str, Any]:
    """One row: a process with both sides for the times, one for each side's memory."""
    print(f"{method}, dropout {dropout:g} ...", file=sys.stderr, flush=True)
    options = {"--method": method, "--dropout": dropout, "--batch": given.batch, "--length": given.length}
    options |= {"--rounds": given.rounds, "--dtype": given.dtype, "--peer-dtype": given.peer_dtype}
    shared = [folder, *(str(part) for pair in options.items() for part in pair)]
    row = timing.in_fresh_process(__file__, [*shared, "--child", "timing"])
    row.pop("process_peak_bytes")
    for side in contenders.SIDES:
        found = timing.in_fresh_process(__file__, [*shared, "--child", "memory", "--side", side])
        for name, value in found.items():
            row.setdefault(name, {})[side] = value
    return {"method": method, "dropout": dropout, **row, "ratios": ratios(row, given.batch * given.length)}


# --- in the fresh processes ---


def timed(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every round, bytes saved for the backward pass, FLOPs."""
    what = given.model, given.method, given.dropout
    models = {side: contenders.build(side, *what, dtype) for side, dtype in dtypes(given).items()}
    shapes = dense_shapes(given.model)
    if given.method != "lora" and given.dropout == 0.0:
        models["our LoRA"] = contenders.build("ours", given.model, "lora", 0.0, given.dtype)
    ids = batch_of(models["ours"], given)
    floor = timing.Floor(shapes, ids.numel(), dtype=getattr(torch, given.peer_dtype))
    steps = {name: contenders.Step(model, ids) for name, model in models.items()}
    calls = {name: (step, step.forget) for name, step in steps.items()} | {"floor": (floor, timing.nothing)}
    load = timing.load_average()
    seconds = timing.alternate(calls, given.rounds)
    counted = {
        "saved_bytes": {side: timing.saved_bytes(models[side], steps[side].forward) for side in contenders.SIDES},
        "flops": {side: counted_flops(models[side], steps[side]) for side in contenders.SIDES},
        "floor_flops": timing.flops(floor),
    }
    full = {side: contenders.Step(models[side], ids, optimizer=True) for side in contenders.SIDES}
    with_optimizer = {side: (step, step.forget) for side, step in full.items()} | {"floor": (floor, timing.nothing)}
    return {
        "seconds": seconds,
        "seconds_with_optimizer": timing.alternate(with_optimizer, given.rounds),
        **counted,
        "adapter_dtypes": {side: contenders.dtypes_of_adapter(models[side]) for side in contenders.SIDES},
        "load_average_before": load,
    }


def alone(given: argparse.Namespace) -> dict[str, Any]:
    """Peak anonymous memory of steps with the optimizer, and their median time."""
    model = contenders.build(given.side, given.model, given.method, given.dropout, dtypes(given)[given.side])
    step = contenders.Step(model, batch_of(model, given), optimizer=True)
    gc.collect()
    seconds = []
    with MemoryMeter("cpu") as memory:
        for _ in range(MEMORY_STEPS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
            step.forget()
    return {"peak_memory_bytes": memory.peak(), "alone_seconds": statistics.median(seconds[1:])}


def dtypes(given: argparse.Namespace) -> dict[str, str]:
    return {"ours": given.dtype, "peft": given.peer_dtype}


def batch_of(model: Any, given: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (given.batch, given.length), generator=generator)


def dense_shapes(folder: str) -> list[tuple[int, int]]:
    """Of the linear layers as they are before anything is quantized or adapted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return timing.linear_shapes(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))


def counted_flops(model: Any, step: contenders.Step) -> int | None:
    """None where a step in plain PyTorch, whose products the counter sees, would take minutes."""
    if is_slow_in_torch(model.dtype) and step.ids.numel() > MOST_SLOW_TOKENS:
        return None
    with contenders.models_own_attention(model):
        found = timing.flops(step)
    step.forget()
    return found


# --- the table ---


def ratios(row: dict[str, Any], tokens: int) -> dict[str, float]:
    """What the goals speak of, from medians."""
    step, full = timing.medians(row["seconds"]), timing.medians(row["seconds_with_optimizer"])
    found = {
        "floor": step["ours"] / step["floor"],
        "floor, with optimizer": full["ours"] / full["floor"],
        "faster": step["peft"] / step["ours"],
        "faster, with optimizer": full["peft"] / full["ours"],
        "faster, alone": row["alone_seconds"]["peft"] / row["alone_seconds"]["ours"],
        "saved": row["saved_bytes"]["ours"] / row["saved_bytes"]["peft"],
        "memory": row["peak_memory_bytes"]["ours"] / row["peak_memory_bytes"]["peft"],
        "tokens_per_second": tokens / step["ours"],
        "tokens_per_second_peft": tokens / step["peft"],
    }
    if "our LoRA" in step:
        found["of our LoRA"] = step["ours"] / step["our LoRA"]
    return found


def page(runs: list[results.Run]) -> list[str]:
    return [
        f"# Training steps of {runs[0]['model']}: ours, PEFT's, and the frozen products alone",
        "",
        *results.where_from(runs),
        f"r = {contenders.R} on all linear layers, every token labelled; adapters in float32 on both sides. In "
        "brackets what is wanted, of bfloat16 on a processor with products for it.",
        "",
        *results.table(HEADINGS, [cells(run, row) for run in runs for row in run["rows"]]),
        "",
        "*Of the floor*: seconds of forward and backward, medians of alternating rounds, as a multiple of every frozen "
        "product of the model, forward and input gradient, once. *With AdamW*: the same with the optimizer's step. "
        "*Saved*: distinct storages that autograd keeps, parameters and buffers left out. *Peak*: anonymous memory "
        "during steps with AdamW, each side in a process of its own. Weights that stay in a mapped file are not in it: "
        "LoRA's dense ones here, and not QLoRA's packed ones.",
    ]


def about(run: results.Run) -> list[str]:
    """The first cells of a row: processor, dtype (of the peer and the floor, too, where it is another), tokens."""
    name, dtype = results.row_name(run)
    peer = run["peer_dtype"]
    return [name, dtype if peer == dtype else f"{dtype} (PEFT, floor: {peer})", f"{run['batch']} x {run['length']}"]


def named(row: dict[str, Any]) -> str:
    return str(row["method"]) + (f", dropout {row['dropout']:g}" if row["dropout"] else "")


HEADINGS = (
    *("processor", "dtype", "tokens", "method", "s a step", "of the floor", "times as fast as PEFT", "with AdamW"),
    *("saved MB", "of PEFT's", "peak MB", "of PEFT's"),
)


def cells(run: results.Run, row: dict[str, Any]) -> list[str]:
    goals, found = GOALS.get((row["method"], row["dropout"]), {}), row["ratios"]
    wanted = {key: f" ({goals[key]:g})" if key in goals else "" for key in ("floor", "faster", "saved", "memory")}
    ratio = {key: results.number(found.get(key)) + wanted[key] for key in wanted}
    megabytes = [results.number(row[key]["ours"] / 1e6, 0) for key in ("saved_bytes", "peak_memory_bytes")]
    seconds = results.number(timing.medians(row["seconds"])["ours"], 3)
    faster = results.number(found["faster, with optimizer"])
    return [
        *(*about(run), named(row), seconds, ratio["floor"], ratio["faster"], faster),
        *(megabytes[0], ratio["saved"], megabytes[1], ratio["memory"]),
    ]


if __name__ == "__main__":
    main()
