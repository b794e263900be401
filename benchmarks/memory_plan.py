"""Predicted peak memory against measured, for every method, with and without gradient checkpointing.

    python benchmarks/memory_plan.py            # the demo model and a random Llama of 0.6B; some minutes
    python benchmarks/memory_plan.py --quick    # the demo model, one method
    python benchmarks/memory_plan.py --dtype bfloat16 --methods lora qlora    # not the machine's own

Each measurement takes three real steps of random weights in a process of its own: on a CPU the growth of its anonymous
memory, on CUDA the peak of torch's allocator. Writes a JSON file into benchmarks/results, and docs/results/memory.md
anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import results

from rankwise.planning import PLANNED, Workload, estimate, measure
from rankwise.planning.check import comparable
from rankwise.planning.hardware import this_machine

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
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor and dtype")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    return parser.parse_args(arguments)


def row_of(name: str, model: str, method: str, batch: int, length: int, again: bool, dtype: str) -> dict[str, Any]:
    print(f"{name}: {method}{', checkpointing' if again else ''} ...", file=sys.stderr, flush=True)
    kind = this_machine().device_type
    workload = Workload(
        batch_size=batch, max_length=length, gradient_checkpointing=again, device_type=kind, dtype=dtype
    )
    closed, dry = (estimate(model, method, workload, exact=exact) for exact in (False, True))
    measured = measure(model, method, workload)
    return {
        "model": name,
        "method": method,
        "checkpointing": again,
        "measured_bytes": measured.peak_bytes,
        "dry_run_bytes": comparable(dry, kind),
        "closed_form_bytes": comparable(closed, kind),
        "dry_run_seconds": dry.seconds,
        "closed_form_seconds": closed.seconds,
    }


def page(runs: list[results.Run]) -> list[str]:
    headings = ("processor", "dtype", "model", "method", "checkpointing", "measured")
    predicted = ("dry run", "off by", "closed form", "off by")
    slowest = {
        key: max(row[f"{key}_seconds"] for run in runs for row in run["rows"]) for key in ("dry_run", "closed_form")
    }
    return [
        "# Memory: predicted and measured",
        "",
        *results.where_from(runs),
        *results.table(
            (*headings, *predicted), [[*results.row_name(run), *cells(row)] for run in runs for row in run["rows"]]
        ),
        "",
        "MB (10^6 bytes): what three steps with AdamW take beyond the libraries, r = 16 on all linear layers. "
        f"The slowest dry run took {slowest['dry_run']:.1f} s, the slowest closed form "
        f"{slowest['closed_form']:.2f} s.",
    ]


def cells(row: dict[str, Any]) -> list[str]:
    measured, dry, closed = (row[f"{key}_bytes"] for key in ("measured", "dry_run", "closed_form"))
    off = [f"{100 * (found / measured - 1):+.1f} %" for found in (dry, closed)]
    missed = "" if abs(dry / measured - 1) <= GOAL else f" (within {GOAL:.0%}: missed)".replace("%", " %")
    sizes = [f"{size / 1e6:,.0f}" for size in (measured, dry, closed)]
    checkpointing = "yes" if row["checkpointing"] else "no"
    return [row["model"], row["method"], checkpointing, sizes[0], sizes[1], off[0] + missed, sizes[2], off[1]]


if __name__ == "__main__":
    main()
