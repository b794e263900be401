"""The 4-bit kernels on a CUDA card: right first, then timed against plain bfloat16 and, where installed, bitsandbytes.

    PYTHONPATH=src python benchmarks/gpu.py [--sizes 4096 8192] [--json gpu.json]

Takes a few minutes and needs torch and triton only. Prints one Markdown table and writes the same numbers as JSON.
Every timing goes round enough copies of the weight to overflow the second-level cache twice, as a model's layers do.
Decoding (1 to 16 rows) is timed as a CUDA graph: the card's own time; "with launch" is what an eager loop waits for.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rankwise import ops
from rankwise.ops import reference
from rankwise.records import write_json

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Calls = Sequence[Callable[[], object]]
Products = Sequence[Callable[[], Tensor]]

SHAPES = [((256, 1024), 64), ((33, 320), 64), ((130, 4096), 4096), ((5, 65), 32), ((9, 33), 64), ((7,), 64)]


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


def check_everything() -> int:
    """The number of comparisons made. AssertionError names the first that fails."""
    ops.set_implementation("triton")
    generator = torch.Generator("cuda").manual_seed(0)
    count = 0
    for (shape, block_size), quant_type, double, dtype in itertools.product(
        SHAPES, ("nf4", "fp4"), (False, True), DTYPES
    ):
        w = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        count += check_weight(w, quant_type, block_size, double)
    return count


def check_weight(w: Tensor, quant_type: str, block_size: int, double: bool) -> int:
    """Codes and values equal the CPU reference to the bit; products and norms are judged against float64."""
    what = f"{tuple(w.shape)} {w.dtype} {quant_type} block {block_size} double {double}"
    packed, absmax = ops.quantize_4bit(w, quant_type, block_size)
    expected = reference.quantize_4bit(w.cpu(), quant_type, block_size)
    assert torch.equal(packed.cpu(), expected[0]), f"codes differ: {what}"
    assert torch.equal(absmax.cpu(), expected[1]), f"scales differ: {what}"
    nested: dict[str, Any] = {}
    if double:
        absmax, nested["nested_absmax"], nested["offset"] = ops.quantize_absmax(absmax)
    how = {"quant_type": quant_type, "block_size": block_size, **nested}
    values = ops.dequantize_4bit(packed, absmax, w.shape, w.dtype, **how)
    on_cpu = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in how.items()}
    plain = reference.dequantize_4bit(packed.cpu(), absmax.cpu(), w.shape, w.dtype, **on_cpu)
    assert torch.equal(values.cpu(), plain), f"values differ: {what}"
    return 3 + (check_products(values, packed, absmax, how, what) if w.dim() == 2 else 0)


def check_products(w: Tensor, packed: Tensor, absmax: Tensor, how: dict[str, Any], what: str) -> int:
    norms = ops.row_norms_4bit(packed, absmax, w.shape, **how, dtype=w.dtype)
    torch.testing.assert_close(norms.double(), w.double().norm(dim=1), rtol=1e-6, atol=0, msg=f"norms: {what}")
    for T in (1, 2, 16, 17):
        x = torch.randn(T, w.shape[1], device="cuda").to(w.dtype).requires_grad_()
        bias = torch.randn(w.shape[0], device="cuda").to(w.dtype)
        y = ops.linear_4bit(x, packed, absmax, w.shape, bias, **how)
        grad = torch.randn_like(y)
        y.backward(grad)
        truth = x.double() @ w.double().T + bias.double()
        assert_as_good(y, functional.linear(x, w, bias), truth, f"product of {T} rows: {what}")
        assert_as_good(x.grad, grad @ w, grad.double() @ w.double(), f"input gradient of {T} rows: {what}")
    return 9


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """The error against float64 is not above that of torch's own product and a rounding of the float32 sum."""
    error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= allowed + 1e-5 * (1 + truth.abs().max()), f"{what}: error {error:.3g}, torch's own {allowed:.3g}"


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
        self.ours = [ops.quantize_4bit(w) for w in self.dense]
        self.theirs = _bitsandbytes_weights(self.dense)
        self.packed_bytes = size * size / 2 + 4 * size * size / 64

    def ours_linear(self, x: Tensor) -> Products:
        shape = (self.size, self.size)
        return [partial(ops.linear_4bit, x, packed, absmax, shape) for packed, absmax in self.ours]

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
    shape, dense_bytes = (layer.size, layer.size), 2 * layer.size**2
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
    calls = [partial(ops.dequantize_4bit, *weight, shape, torch.bfloat16) for weight in layer.ours]
    yield Row(layer.name, "dequantize", None, eager_us(theirs) if theirs else None, eager_us(calls), None, floor)
    norms = [partial(ops.row_norms_4bit, *weight, shape) for weight in layer.ours]
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


def versions() -> dict[str, str | None]:
    """Names and versions of everything that a timing depends on; None for what is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the 4-bit kernels on a CUDA card.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192], help="square layers to time")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the numbers go")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: benchmarks/gpu.py times the CUDA kernels and needs one.", file=sys.stderr)
        return 2
    about, checks = versions(), check_everything()
    rows, bandwidth = measure(options.sizes)
    print(f"{about['card']}, CUDA {about['cuda']}, torch {about['torch']}, triton {about['triton']}, ", end="")
    print(f"bitsandbytes {about['bitsandbytes'] or 'not installed'}; a copy reaches {bandwidth / 1e9:.0f} GB/s")
    print(f"{checks} comparisons with the reference and float64 passed; whole models are not part of this run.\n")
    print(table(rows))
    content = {**about, "copy_bytes_per_second": bandwidth, "checks": checks, "rows": [asdict(row) for row in rows]}
    write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
