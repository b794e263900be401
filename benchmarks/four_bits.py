"""4-bit kernels beside bitsandbytes and the bf16 layer, alternating in one run.

    python benchmarks/four_bits.py --processes 8

Each round times every contender of a row once, so that a busy moment of the machine hits all of them; medians are
reported, of the rounds and then of the processes. Where a virtual machine's cores lie decides how fast memory is and
may change between two processes: hence several, and a row that only stores as many bytes as dequantizing does. The
float32 layer is there because PyTorch's bfloat16 products are far slower on CPUs without instructions for them.
Writes a JSON file into benchmarks/results, and four_bits.md beside it anew.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise import ops
from rankwise.ops.cpu import native

# bitsandbytes logs a missing optional package on import.
logging.disable(logging.WARNING)
import bitsandbytes  # noqa: E402
import bitsandbytes.functional  # noqa: E402

Contenders = dict[str, Callable[[], Any]]

SLOW_SECONDS = 20
# Of each row: whom we are compared with, and how many times faster we must be.
MANY_ROWS = "T={} forward + input gradient"
PROMISES = (
    ("quantize", "bitsandbytes", 50),
    ("dequantize", "bitsandbytes", 8),
    ("T=1", "bitsandbytes eval", 1),
    ("T=1", "bf16", 3),
    ("T=16", "bitsandbytes eval", 1),
    ("T=16", "bf16", 1),
    (MANY_ROWS.format(512), "bf16", 1 / 1.05),
    (MANY_ROWS.format(2048), "bf16", 1 / 1.05),
)


def milliseconds(contenders: Contenders, rounds: int) -> dict[str, float]:
    """The median time of each contender over alternating rounds: fewer, but at least three, once they took a minute.

    What takes longer than SLOW_SECONDS at once, as products in bfloat16 do without instructions for it, is called once.
    """
    times = {name: [milliseconds_of(call)] for name, call in contenders.items()}
    quick = {name: call for name, call in contenders.items() if times[name][0] < 1e3 * SLOW_SECONDS}
    for name in quick:
        times[name].clear()
    began = time.perf_counter()
    for done in range(1, rounds + 1):
        for name, call in quick.items():
            times[name].append(milliseconds_of(call))
        if done >= 3 and time.perf_counter() - began > 60:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def milliseconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class Layers:
    """The same weight as a bf16 layer, as bitsandbytes layers in both modes, and as ours."""

    def __init__(self, N: int, K: int) -> None:
        self.dense = nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.dense.weight.normal_(generator=torch.Generator().manual_seed(0))
        self.wide = nn.Linear(K, N, bias=False).requires_grad_(False)
        self.wide.weight.copy_(self.dense.weight)
        self.training, self.evaluating = self._bitsandbytes(N, K).train(), self._bitsandbytes(N, K).eval()
        self.packed = ops.quantize_weight(self.dense.weight)

    def _bitsandbytes(self, N: int, K: int) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(
            K, N, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            self.dense.weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
        )
        return layer.to("cpu")

    def ours(self, x: Tensor) -> Tensor:
        return ops.linear_4bit(x, self.packed)


def conversions(layers: Layers, rounds: int) -> dict[str, dict[str, float]]:
    w = layers.dense.weight
    packed, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4")
    kept = torch.empty_like(w)
    quantize = {
        "bitsandbytes": lambda: bitsandbytes.functional.quantize_4bit(w, quant_type="nf4"),
        "ours": lambda: ops.quantize_4bit(w),
    }
    dequantize = {
        "bitsandbytes": lambda: bitsandbytes.functional.dequantize_4bit(packed, state),
        "ours": lambda: ops.dequantize_weight(layers.packed),
        "copy to fresh memory": w.clone,
        "copy to kept memory": lambda: kept.copy_(w),
        "store to kept memory": lambda: kept.fill_(1),
    }
    return {
        "quantize": milliseconds(quantize, max(3, rounds // 10)),
        "dequantize": milliseconds(dequantize, rounds),
    }


def few_rows(layers: Layers, T: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Times without gradients, and the largest error of each product against float64, over the largest result."""
    x = torch.randn(T, layers.dense.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    contenders = {
        "bitsandbytes eval": lambda: layers.evaluating(x),
        "bitsandbytes train": lambda: layers.training(x),
        "bf16": lambda: layers.dense(x),
        "float32": lambda: layers.wide(wide),
        "ours": lambda: layers.ours(x),
    }
    with torch.no_grad():
        times = milliseconds(contenders, rounds)
        W = ops.dequantize_weight(layers.packed)
        true = functional.linear(x.double(), W.double())
        errors = {
            name: ((contenders[name]().double() - true).abs().max() / true.abs().max()).item()
            for name in ("bitsandbytes eval", "bitsandbytes train", "ours")
        }
    return times, errors


def many_rows(layers: Layers, T: int, rounds: int) -> dict[str, float]:
    """Forward and input gradient."""
    N, K = layers.dense.weight.shape
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    grad = torch.randn(T, N, generator=torch.Generator().manual_seed(2)).bfloat16()

    wide, wide_grad = x.detach().float().requires_grad_(), grad.float()

    def both(forward: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(x), x, grad)

    contenders = {
        "bitsandbytes train": both(layers.training),
        "bf16": both(layers.dense),
        "float32": lambda: torch.autograd.grad(layers.wide(wide), wide, wide_grad),
        "ours": both(layers.ours),
    }
    return milliseconds(contenders, max(5, rounds // 4))


def bandwidth_share(times: dict[str, float], N: int, K: int) -> float:
    """Bytes per second of our dequantization over those of a copy to memory that is kept."""
    dense = 2 * N * K
    ours = (dense + N * K / 2 + N * K / 16) / times["ours"]
    return ours / (2 * dense / times["copy to kept memory"])


def measure(N: int, K: int, rounds: int) -> dict[str, Any]:
    """All rows, in this process."""
    found, layers = environment(), Layers(N, K)
    rows: dict[str, dict[str, float]] = conversions(layers, rounds)
    errors = {}
    for T in (1, 16):
        rows[f"T={T}"], errors[f"T={T}"] = few_rows(layers, T, rounds)
    for T in (512, 2048):
        rows[MANY_ROWS.format(T)] = many_rows(layers, T, rounds)
    return {
        "shape": [N, K],
        "milliseconds": rows,
        "largest_relative_error": errors,
        "dequantize_share_of_copy_bandwidth": bandwidth_share(rows["dequantize"], N, K),
        "environment": found,
    }


def measure_in(processes: int, N: int, K: int, rounds: int) -> list[dict[str, Any]]:
    """`measure` in one new process after the other."""
    found = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(measure, N, K, rounds).result())
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several processes, and each promise with what the processes found."""
    milliseconds = {
        row: {name: statistics.median(one["milliseconds"][row][name] for one in found) for name in times}
        for row, times in found[0]["milliseconds"].items()
    }
    checks = []
    for row, peer, bound in PROMISES:
        ratios = [times[peer] / times["ours"] for times in (one["milliseconds"][row] for one in found)]
        middle = statistics.median(ratios)
        kept_in = sum(ratio >= bound for ratio in ratios)
        checks.append(
            {"row": row, "peer": peer, "ratio": middle, "at_least": bound, "kept": middle >= bound}
            | {"least": min(ratios), "most": max(ratios), "kept_in": kept_in}
        )
    return {
        "shape": found[0]["shape"],
        "milliseconds": milliseconds,
        "largest_relative_error": found[0]["largest_relative_error"],
        "checks": checks,
        "processes": found,
    }


def environment() -> dict[str, Any]:
    return {
        "cpu_level": native.level(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def page(runs: list[results.Run]) -> list[str]:
    N, K = runs[0]["shape"]
    names = [results.processor(run) for run in runs]
    return [
        f"# Four bits, {N} x {K} bf16, NF4 in blocks of 64",
        "",
        *results.where_from(runs),
        "Times faster than what is named, with how many of the processes kept the goal:",
        "",
        *results.table(("operation", "than", "wanted", *names), promises(runs)),
        "",
        "Milliseconds, medians of rounds and of processes:",
        "",
        *results.table(("operation", *names), ours(runs)),
        "",
        "The runs' files have all contenders, each process, and errors against float64.",
    ]


def promises(runs: list[results.Run]) -> Iterator[list[str]]:
    for row, peer, bound in PROMISES:
        cells = []
        for run in runs:
            check = next(item for item in run["checks"] if (item["row"], item["peer"]) == (row, peer))
            several = len(run["processes"])
            spread = f", {check['least']:.2f} to {check['most']:.2f}" if several > 1 else ""
            kept = f"{check['kept_in']} of {several}" if several > 1 else ("kept" if check["kept"] else "missed")
            cells.append(f"{check['ratio']:.2f}{spread} ({kept})")
        yield [row, peer, f"{bound:.2f}", *cells]


def ours(runs: list[results.Run]) -> Iterator[list[str]]:
    for row in runs[0]["milliseconds"]:
        yield [row, *(f"{run['milliseconds'][row]['ours']:,.3f}" for run in runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    about = {"command": results.command(), "machine": results.machine(), "versions": results.versions()}
    found = summary(measure_in(given.processes, *given.size, given.rounds))
    results.publish(given.output, "four_bits", {**about, **found}, page, given.name)


if __name__ == "__main__":
    main()
