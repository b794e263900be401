"""Every Triton kernel compiled for every architecture of cards, without a card: registers, spills, shared memory.

    python benchmarks/gpu_kernels.py

A kernel is compiled as it would be launched, from the arguments of a launch that does not take place; Triton brings
ptxas and cuobjdump along. A T4 (sm_75) has no bfloat16: there the same kernels take float16.It prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stand_in import source_tree

source_tree()

import results  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from rankwise.ops.checks import ACTIVATIONS  # noqa: E402
from rankwise.ops.packed_weight import PackedWeight  # noqa: E402
from rankwise.ops.triton import adapter, cross_entropy, elementwise, four_bit  # noqa: E402

MODULES = (adapter, cross_entropy, elementwise, four_bit)
# Architectures with the cards that our users have.
CARDS = {
    75: "T4, RTX 20",
    80: "A100",
    86: "RTX 30, A10",
    89: "RTX 40, L4",
    90: "H100",
    100: "B200",
    120: "RTX 50",
}
# Bytes of shared memory that a block may have.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and what it would have been launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


@dataclasses.dataclass(frozen=True)
class Usage:
    registers: int
    # Bytes of a thread that went to memory.
    spilled: int
    shared: int


def bf16(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def packed(N: int = 32, K: int = 4096, block_size: int = 64, *, double: bool = False) -> PackedWeight:
    codes, blocks = torch.zeros(N, K // 2, dtype=torch.uint8), N * K // block_size
    if not double:
        return PackedWeight(codes=codes, absmax=ones(blocks), shape=(N, K), quant_type="nf4", block_size=block_size)
    return PackedWeight(
        codes=codes,
        absmax=torch.zeros(blocks, dtype=torch.uint8),
        shape=(N, K),
        block_size=block_size,
        nested_absmax=ones(-(-blocks // 256)),
        offset=torch.ones(()),
    )


def cases() -> dict[str, Callable[[], Any]]:
    """Launches of the sizes of a large layer, as far as these decide how a kernel is compiled."""
    g, N, target = ones(32), 32, torch.zeros(16, dtype=torch.int64)
    logits, b16 = bf16(16, 8192), torch.bfloat16
    return {
        **_packed_cases(),
        "low rank": lambda: elementwise.low_rank_add_(bf16(32, N), bf16(32, 16), bf16(N, 16), 0.5, g, None),
        "low rank 256": lambda: elementwise.low_rank_add_(bf16(32, N), bf16(32, 256), bf16(N, 256), 0.5, g, bf16(N)),
        "low rank float32": lambda: elementwise.low_rank_add_(ones(32, N), ones(32, 256), ones(N, 256), 0.5, g, g),
        "low rank gradients": lambda: _grads(bf16, 16, None, folded=False),
        "low rank gradients 256": lambda: _grads(bf16, 256, None, folded=False),
        "low rank gradients DoRA": lambda: _grads(bf16, 16, g, folded=False),
        "low rank gradients DoRA 64": lambda: _grads(bf16, 64, g, folded=False),
        "low rank gradients QDoRA": lambda: _grads(bf16, 16, g, folded=True),
        "scaled grad": lambda: elementwise.scaled_grad(bf16(32, N), bf16(32, N), g),
        "scaled grad alone": lambda: elementwise.scaled_grad(bf16(32, N), None, g),
        "cross entropy": lambda: cross_entropy.cross_entropy_(logits, target, 1.0, 0.0, None, 1.0, True, False, False),
        "cross entropy with all": lambda: cross_entropy.cross_entropy_(
            logits, target, 1.0, 0.1, 30.0, 1.0, True, True, True
        ),
        **{f"glu {act}": lambda act=act: elementwise.glu(bf16(32, 64), bf16(32, 64), act) for act in ACTIVATIONS},
        **{
            f"glu {act} backward": lambda act=act: elementwise.glu_backward(
                bf16(32, 64), bf16(32, 64), bf16(32, 64), act, True
            )
            for act in ACTIVATIONS
        },
        "rms norm": lambda: elementwise.rms_norm(bf16(32, 4096), bf16(4096), 1e-5, 0, True),
        "rms norm of heads": lambda: elementwise.rms_norm(bf16(32, 128), bf16(128), 1e-5, 1, False),
        "rms norm backward": lambda: elementwise.rms_norm_backward(
            bf16(32, 4096), bf16(32, 4096), bf16(4096), ones(32), 0, bf16(32, 4096)
        ),
        "rope": lambda: elementwise.rope(bf16(2, 32, 16, 128), bf16(1, 16, 128), bf16(1, 16, 128), False),
        "rope backward": lambda: elementwise.rope(bf16(2, 8, 16, 128), *(ones(2, 16, 64) for _ in range(2)), True),
        "dropout": lambda: elementwise.dropout(bf16(32, N), 0.1, 7),
        "dropout add": lambda: elementwise.dropout_add_(bf16(32, N), bf16(32, N), 0.1, 7),
        "row cross": lambda: adapter.row_cross(bf16(N, 4096), bf16(16, 4096), bf16(N, 16)),
        "row cross in parts": lambda: adapter.row_cross(bf16(N, 4096), ones(256, 4096), ones(N, 256)),
        "row cross float32": lambda: adapter.row_cross(ones(N, 4096), ones(64, 4096), ones(N, 64)),
        "row cross float16": lambda: adapter.row_cross(ones(N, 4096).half(), ones(64, 4096), ones(N, 64)),
        "gain": lambda: adapter.adapted_gain(bf16(N, 4096), g, ones(16, 4096), ones(N, 16), g, 0.5),
        "gain 64": lambda: adapter.adapted_gain(bf16(N, 4096), g, ones(64, 4096), ones(N, 64), g, 0.5),
        "gain packed": lambda: adapter.adapted_gain_4bit(
            packed(double=True), g, ones(16, 4096), ones(N, 16), g, 0.5, b16
        ),
    }


def _packed_cases() -> dict[str, Callable[[], Any]]:
    b16 = torch.bfloat16
    return {
        "dequantize": lambda: four_bit.dequantize(packed(), b16),
        "dequantize double": lambda: four_bit.dequantize(packed(double=True), b16),
        "dequantize one element": lambda: four_bit.dequantize(
            PackedWeight(
                codes=torch.zeros(1, 1, dtype=torch.uint8),
                absmax=ones(1),
                shape=(1, 1),
                quant_type="nf4",
                block_size=4096,
            ),
            b16,
        ),
        "dequantize with a gain": lambda: four_bit.dequantize(packed(double=True), b16, ones(32)),
        "one row": lambda: four_bit.few_rows(bf16(1, 4096), packed(), bf16(32)),
        "one row double": lambda: four_bit.few_rows(bf16(1, 4096), packed(double=True), None),
        "one row of one block": lambda: four_bit.few_rows(bf16(1, 32), packed(1, 32, 32), None),
        "several rows": lambda: four_bit.few_rows(bf16(2, 4096), packed(), bf16(32)),
        "several rows double": lambda: four_bit.few_rows(bf16(2, 4096), packed(double=True), None),
        "several rows big block": lambda: four_bit.few_rows(ones(2, 4096), packed(32, 4096, 4096, double=True), None),
        "row norms": lambda: four_bit.row_norms(packed(double=True), b16),
        "quantize": lambda: four_bit.quantize_blocks(
            bf16(32 * 4096), torch.zeros(32 * 2048, dtype=torch.uint8), ones(32 * 64), "nf4", 64
        ),
        "packed": lambda: adapter.row_cross_4bit(packed(), bf16(16, 4096), ones(32, 16), b16),
        "packed double": lambda: adapter.row_cross_4bit(packed(double=True), ones(64, 4096), ones(32, 64), b16),
        "packed float32": lambda: adapter.row_cross_4bit(
            packed(double=True), ones(64, 4096), ones(32, 64), torch.float32
        ),
    }


def _grads(made: Callable[..., Tensor], R: int, g: Tensor | None, *, folded: bool) -> Any:
    T, N = 512, 32
    y, m = (None, None) if g is None else (made(T, N), g)
    return adapter.low_rank_grads_(made(T, R), made(T, N), made(T, R), made(N, R), 0.5, g, folded, y, m)


def launches(name: str, architecture: int = 90) -> list[Launch]:
    """The launches of a case on a card; nothing runs."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **keywords: found.append(Launch(self.kernel, arguments, keywords))

    with ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(patch.object(module, "launching_on", lambda device: nullcontext()))
            if hasattr(module, "is_old"):
                patches.enter_context(patch.object(module, "is_old", lambda device: architecture < 80))
            for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
                patches.enter_context(patch.object(module, kernel, Recorder(getattr(module, kernel))))
        cases()[name]()
    return found


def compiled(launch: Launch, architecture: int, *, aligned: bool = True) -> Any:
    """The kernel as the launch compiles it; not ``aligned``: for sizes that are not multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    given = {**dict(zip(names, launch.arguments)), **launch.keywords}
    if architecture < 80:
        given = {name: torch.float16 if value is torch.bfloat16 else value for name, value in given.items()}
    signature = {name: _kind(given[name], name in launch.keywords, architecture) for name in names}
    constants = {name: _for(given[name], architecture) for name in names if signature[name] == "constexpr"}
    numbers = [i for i, name in enumerate(names) if _is_aligned(given[name], signature[name], sizes=aligned)]
    attributes = {(index,): [["tt.divisibility", 16]] for index in numbers}
    options = {key: value for key, value in launch.keywords.items() if key not in names}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _kind(value: Any, is_constant: bool, architecture: int) -> str:
    if value is None or is_constant:
        return "constexpr"
    if isinstance(value, Tensor):
        pointer = POINTERS[value.dtype]
        return "*fp16" if architecture < 80 and pointer == "*bf16" else pointer
    # Triton makes a constant of 1.
    if isinstance(value, int) and value == 1:
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def _for(value: Any, architecture: int) -> Any:
    import triton.language as tl

    return tl.float16 if architecture < 80 and value is tl.bfloat16 else value


def _is_aligned(value: Any, signature: str, *, sizes: bool) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 1
    return sizes and signature == "i32" and value % 16 == 0


def usage(kernel: Any) -> Usage:
    """What ptxas gave the kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    return Usage(found["REG"], found["STACK"], kernel.metadata.shared)


def rows() -> Iterator[tuple[str, dict[int, str]]]:
    """Per case and kernel, what it takes on each architecture."""
    for name in cases():
        of_each = [launches(name, architecture) for architecture in CARDS]
        for same in zip(*of_each, strict=True):
            found = [(usage(compiled(launch, architecture)), architecture) for launch, architecture in zip(same, CARDS)]
            cells = {architecture: cell(used, architecture) for used, architecture in found}
            yield f"{name} ({same[0].name})", cells
            print(name, same[0].name, *cells.values(), sep="  ", file=sys.stderr, flush=True)


def cell(found: Usage, architecture: int) -> str:
    text = f"{found.registers} / {found.shared / 1024:.1f}"
    text += f", spills {found.spilled}" if found.spilled else ""
    return text + (", too much shared memory" if found.shared > SHARED[architecture] else "")


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    headings = ["kernel", *(f"sm_{architecture} ({cards})" for architecture, cards in CARDS.items())]
    found = [[name, *cells.values()] for name, cells in rows()]
    lines = [
        "# Every Triton kernel on every architecture",
        "",
        "Triton compiled every kernel for every architecture, which needs no card, and its `ptxas` reported what each",
        "kernel takes. A cell holds the registers of a thread / the shared memory of a block in KB, for sizes that are",
        "multiples of 16. If a kernel spills registers, its cell gives the bytes that a thread spills. A T4 (sm_75)",
        "has no bfloat16 and no asynchronous copies, so its column is for float16. Tests compile other sizes too.",
        "",
        f"    python benchmarks/gpu_kernels.py        (Triton {triton.__version__})",
        "",
        *results.table(headings, found),
    ]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
