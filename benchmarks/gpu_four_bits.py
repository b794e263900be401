"""The 4-bit kernels on a CUDA card beside plain bfloat16 and, where installed, bitsandbytes.

Every timing goes round enough copies of the weight to overflow the second-level cache twice, as a model's layers do.
Decoding (1 to 16 rows) is timed as a CUDA graph: the card's own time; "with launch" is what an eager loop waits for.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rankwise import ops

Calls = Sequence[Callable[[], object]]
Products = Sequence[Callable[[], Tensor]]


@dataclass
class Row:
    """One operation of one layer; times in microseconds, None where the peer is missing or cannot be captured."""

    layer: str
    operation: str
    bf16_us: float | None
    bitsandbytes_us: float | None
    ours_us: float
    ours_with_launch_us: float | None
    floor_us: float | None
    """The bytes that must move, at the copy bandwidth measured in this run."""


def eager_us(calls: Calls, rounds: int = 7, target_ms: float = 40.0) -> float:
    """Median over ``rounds`` of the mean time of one call, going round ``calls``."""
    for call in calls:
        call()
    once = _elapsed_ms(calls, 1)
    repeats = max(1, int(target_ms / max(once, 1e-3)))
    return 1e3 * statistics.median(_elapsed_ms(calls, repeats) for _ in range(rounds)) / (repeats * len(calls))


def graph_us(calls: Calls) -> float | None:
    """As `eager_us`, with all calls in one CUDA graph, so without Python and the launches. None: not capturable."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        print(f"not captured as a CUDA graph: {error}", file=sys.stderr)
        return None
    return eager_us([graph.replay]) / len(calls)


def _elapsed_ms(calls: Calls, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        for call in calls:
            call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def copy_bytes_per_second() -> float:
    """What a plain copy reaches: read plus written bytes."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (eager_us([lambda: target.copy_(source)]) * 1e-6)


class Layer:
    """Copies of one N x N weight: in bfloat16, in ours, and in bitsandbytes' format where it is installed."""

    def __init__(self, size: int) -> None:
        self.size, self.name = size, f"{size} x {size}"
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(24, 2 + 2 * cache_bytes // (size * size // 2))
        self.dense = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        self.ours = [ops.quantize_weight(w) for w in self.dense]
        self.theirs = _bitsandbytes_weights(self.dense)
        self.packed_bytes = size * size / 2 + 4 * size * size / 64

    def ours_linear(self, x: Tensor) -> Products:
        return [partial(ops.linear_4bit, x, packed) for packed in self.ours]

    def dense_linear(self, x: Tensor) -> Products:
        return [partial(functional.linear, x, w) for w in self.dense]

    def their_linear(self, x: Tensor) -> Products:
        import bitsandbytes

        return [partial(bitsandbytes.matmul_4bit, x, p.t(), quant_state=state) for p, state in self.theirs]


def _bitsandbytes_weights(dense: list[Tensor]) -> list[tuple[Tensor, Any]]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    import bitsandbytes

    return [bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", blocksize=64) for w in dense]


def weight_rows(layer: Layer, bandwidth: float) -> Iterator[Row]:
    """Quantize, dequantize, row norms."""
    dense_bytes = 2 * layer.size**2
    theirs: Calls = []
    quantize: Calls = []
    if layer.theirs:
        import bitsandbytes

        theirs = [partial(bitsandbytes.functional.dequantize_4bit, *weight) for weight in layer.theirs]
        their_quantize = partial(bitsandbytes.functional.quantize_4bit, quant_type="nf4", blocksize=64)
        quantize = [partial(their_quantize, w) for w in layer.dense]
    floor = (layer.packed_bytes + dense_bytes) / bandwidth * 1e6
    ours = eager_us([partial(ops.quantize_4bit, w) for w in layer.dense])
    yield Row(layer.name, "quantize", None, eager_us(quantize) if layer.theirs else None, ours, None, floor)
    calls = [partial(ops.dequantize_weight, weight) for weight in layer.ours]
    yield Row(layer.name, "dequantize", None, eager_us(theirs) if theirs else None, eager_us(calls), None, floor)
    norms = [partial(ops.row_norms_4bit, weight, torch.float32) for weight in layer.ours]
    yield Row(layer.name, "row norms", None, None, eager_us(norms), None, layer.packed_bytes / bandwidth * 1e6)


@torch.no_grad()
def decoding_row(layer: Layer, T: int, bandwidth: float) -> Row:
    x = torch.randn(T, layer.size, device="cuda", dtype=torch.bfloat16)
    ours = layer.ours_linear(x)
    fast = graph_us(ours)
    assert fast is not None, "our product cannot be captured as a CUDA graph"
    theirs = graph_us(layer.their_linear(x)) if layer.theirs else None
    dense, floor = graph_us(layer.dense_linear(x)), layer.packed_bytes / bandwidth * 1e6
    return Row(layer.name, f"T = {T}, no_grad", dense, theirs, fast, eager_us(ours), floor)


def training_row(layer: Layer, T: int) -> Row:
    x = torch.randn(T, layer.size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(T, layer.size, device="cuda", dtype=torch.bfloat16)

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), x, grad)

    def timed(calls: Products) -> float:
        return eager_us([step(call) for call in calls])

    theirs = timed(layer.their_linear(x)) if layer.theirs else None
    dense, ours = timed(layer.dense_linear(x)), timed(layer.ours_linear(x))
    return Row(layer.name, f"T = {T}, forward + input gradient", dense, theirs, ours, None, None)


def measure(sizes: list[int]) -> tuple[list[Row], float]:
    bandwidth = copy_bytes_per_second()
    rows: list[Row] = []
    for size in sizes:
        layer = Layer(size)
        rows += weight_rows(layer, bandwidth)
        rows += [decoding_row(layer, T, bandwidth) for T in (1, 2, 4, 8, 16)]
        rows += [training_row(layer, T) for T in (512, 2048)]
        del layer
        torch.cuda.empty_cache()
    return rows, bandwidth


def table(rows: list[Row]) -> str:
    lines = [
        "| layer | operation | bf16 us | bitsandbytes us | ours us | with launch us | ours / bf16 | floor us |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = row.ours_us / row.bf16_us if row.bf16_us else None
        numbers = [row.bf16_us, row.bitsandbytes_us, row.ours_us, row.ours_with_launch_us, ratio, row.floor_us]
        cells = " | ".join("" if number is None else f"{number:.{2 if number is ratio else 1}f}" for number in numbers)
        lines.append(f"| {row.layer} | {row.operation} | {cells} |")
    return "\n".join(lines)
