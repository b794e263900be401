"""Training on a CUDA card: every kernel checked, then layers and whole Llama shapes timed against the frozen products.

    python benchmarks/gpu.py

One call, under ten minutes, from a source tree: it needs torch, transformers and triton, and times PEFT, bitsandbytes
and Unsloth where they are installed. First every kernel is judged against float64; then come a Llama of 8B and of 1B
with random weights and layers of 4096 and 8192 (bfloat16, r = 16 on all linear layers, 8,192 tokens per micro-batch, no
recomputation), as multiples of all frozen matrix products, timed in the same rounds; last the 4-bit kernels alone.
Prints one table, and writes benchmarks/results/gpu.json and docs/results/gpu.md. What does not fit in the time or on
the card is left out with a note.
Exit code 1 when a check fails. ``--device cpu --tiny`` tries the script itself, on shapes without meaning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from stand_in import source_tree

source_tree()

import contenders  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_four_bits  # noqa: E402
import gpu_models  # noqa: E402
import results  # noqa: E402
import torch  # noqa: E402
from gpu_models import Row  # noqa: E402
from gpu_unsloth import unsloth_rows  # noqa: E402

SECTIONS = ("models", "layers", "four-bits")
# Multiples of the floor for the 8B shape on an H100, DoRA's step against LoRA's, and MB saved per token: issue 4.
GOAL_MULTIPLE = {"lora": 1.45, "dora": 1.55, "qlora": 1.50, "qdora": 1.60}
GOAL_DORA = 1.07
GOAL_SAVED_MB = {"lora": 3.1, "dora": 3.6}


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device here: benchmarks/gpu.py needs one (--device cpu --tiny tries the script).", file=sys.stderr
        )
        return 2
    contenders.silence()
    deadline = gpu_models.Deadline(given.seconds)
    passed, failed = gpu_checks.check_everything(given.device, quick=given.tiny)
    for line in failed:
        print(f"CHECK FAILED  {line}", file=sys.stderr)
    print(f"{passed} comparisons passed, {len(failed)} failed", file=sys.stderr, flush=True)
    rows = []
    for row in training_rows(given, deadline):
        print(said(row), file=sys.stderr, flush=True)
        rows.append(row)
    content: dict[str, Any] = {**about(given), "checks_passed": passed, "checks_failed": failed}
    content["rows"] = [asdict(row) for row in rows]
    lines = markdown(content, rows)
    if "four-bits" in given.sections:
        lines += four_bits(given, deadline, content)
    results.publish(given.output, "gpu", content, lambda _: lines, "gpu")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=list(gpu_models.LLAMA), default=["8B", "1B"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192], help="square layers")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--seconds", type=float, default=560, help="when to stop beginning new timings")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few elements, to try the script")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args(arguments)
    if given.tiny:
        given.shapes, given.sizes, given.batch, given.length = ["tiny"], [64], 2, 16
    return given


def training_rows(given: argparse.Namespace, deadline: gpu_models.Deadline) -> Iterator[Row]:
    """The dearest shape first, ours before the peers, so that the goals' numbers exist when time runs out."""
    names = gpu_models.sides()
    if "models" in given.sections:
        for shape in given.shapes:
            measure = partial(gpu_models.model_row, shape, given.batch, given.length, given.device)
            yield from gpu_models.contended(f"Llama {shape}", given.device, deadline, measure, names)
    if "layers" in given.sections:
        for size in given.sizes:
            measure = partial(gpu_models.layer_row, size, given.batch * given.length, given.device)
            yield from gpu_models.contended(f"layer {size}", given.device, deadline, measure, names)
    if "models" in given.sections:
        yield from unsloth_rows(given.shapes, given.batch, given.length, deadline)


def four_bits(given: argparse.Namespace, deadline: gpu_models.Deadline, content: dict[str, Any]) -> list[str]:
    if given.device != "cuda":
        return ["", "The 4-bit kernels alone: not on this device."]
    if deadline.left() < 30:
        return ["", "The 4-bit kernels alone: no time left."]
    timed, bandwidth = gpu_four_bits.measure(given.sizes)
    content["four_bits"] = [asdict(row) for row in timed]
    content["copy_bytes_per_second"] = bandwidth
    return ["", f"The 4-bit kernels alone; a copy reaches {bandwidth / 1e9:.0f} GB/s.", "", gpu_four_bits.table(timed)]


def about(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that a timing depends on; a version is None for what is not installed."""
    card = torch.cuda.get_device_name() if given.device == "cuda" else "no card (a trial of the script)"
    return {
        "command": results.command(),
        "card": card,
        "cuda": torch.version.cuda,
        "machine": results.machine(),
        "versions": results.versions(),
        "tokens": given.batch * given.length,
        "batch": given.batch,
        "length": given.length,
    }


def said(row: Row) -> str:
    number = "" if row.multiple is None else f"{row.step_ms:.1f} ms, {row.multiple:.2f} of the floor"
    return f"{row.what}  {row.method}  {row.side}  {number or row.note}"


# --- the table ---


def markdown(content: dict[str, Any], rows: list[Row]) -> list[str]:
    others = [side for side in ("peft", "unsloth") if any(row.side == side for row in rows)]
    named = {"peft": "PEFT", "unsloth": "Unsloth"}
    headings = ["shape", "method", "floor ms", "ours ms", "with AdamW", "ours / floor", "saved MB/token", "peak GB"]
    headings += ["tokens/s"]
    for side in others:
        headings += [f"{named[side]} / floor", "saved MB/token", "peak GB"]
    found = {(row.what, row.method, row.side): row for row in rows}
    cells = [_cells(row, found, others) for row in rows if row.side == "ours"]
    checks = f"{content['checks_passed']} comparisons with float64 passed, {len(content['checks_failed'])} failed"
    return [
        f"# Training steps on {content['card']}",
        "",
        *results.where_from([content]),
        f"CUDA {content['cuda']}. {checks}{''.join(f'; FAILED: {line}' for line in content['checks_failed'])}.",
        "",
        f"bfloat16, r = {contenders.R} on all linear layers, {content['batch']} x {content['length']} tokens, no "
        "recomputation, random weights; goals (one H100, 8B) in brackets.",
        "",
        *results.table(headings, cells),
        "",
        *_dora_against_lora(found),
        *_notes(content, rows),
    ]


def _cells(row: Row, found: dict[tuple[str, str, str], Row], others: list[str]) -> list[str]:
    goals_apply = row.what == "Llama 8B"
    saved = None if row.saved_bytes_per_token is None else row.saved_bytes_per_token / 1e6
    cells = [
        *(row.what, row.method, results.number(row.floor_ms, 2), results.number(row.step_ms, 2)),
        results.number(row.with_optimizer_ms, 2),
        results.judged(row.multiple, GOAL_MULTIPLE[row.method] if goals_apply else None, at_most=True),
        results.judged(saved, GOAL_SAVED_MB.get(row.method) if goals_apply else None, at_most=True),
        *(_gigabytes(row), results.number(row.tokens_per_second, 0)),
    ]
    for side in others:
        peer = found.get((row.what, row.method, side), Row(row.what, row.method, side))
        saved = None if peer.saved_bytes_per_token is None else peer.saved_bytes_per_token / 1e6
        cells += [results.number(peer.multiple), results.number(saved), _gigabytes(peer)]
    return cells


def _gigabytes(row: Row) -> str:
    return results.number(None if row.peak_bytes is None else row.peak_bytes / 1e9, 1)


def _dora_against_lora(found: dict[tuple[str, str, str], Row]) -> list[str]:
    lines = []
    for what in dict.fromkeys(what for what, _, _ in found):
        lora, dora = (found.get((what, method, "ours")) for method in ("lora", "dora"))
        if lora is not None and dora is not None and lora.multiple and dora.multiple:
            goal = GOAL_DORA if what == "Llama 8B" else None
            ratio = results.judged(dora.multiple / lora.multiple, goal, at_most=True, digits=3)
            lines += [f"- {what}: our DoRA takes {ratio} of our LoRA."]
    return [*lines, ""] if lines else []


def _notes(content: dict[str, Any], rows: list[Row]) -> list[str]:
    missing = [name for name in ("peft", "bitsandbytes", "unsloth") if content["versions"].get(name) is None]
    notes = [f"- {row.what}, {row.method}, {row.side}: {row.note}." for row in rows if row.note]
    return [*notes, *([f"- Not installed: {', '.join(missing)}."] if missing else [])]


if __name__ == "__main__":
    sys.exit(main())
