"""The kernels compile for cards that need not be here, spill no registers, and round as the reference does."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
nvidia = pytest.importorskip("triton.backends.nvidia")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rankwise.ops.packed_weight import PackedWeight  # noqa: E402
from rankwise.ops.triton import dequantize, four_bit, product, quantize, row_norms  # noqa: E402

CARDS = {"RTX 3090": 86, "RTX 4090": 89, "H100": 90}
TABLES = {"packed": "*u8", "values": "*fp32"}
PLAIN = {**TABLES, "absmax": "*fp32"}
DOUBLE = {**TABLES, "absmax": "*u8", "nested_absmax": "*fp32", "offset": "*fp32", "dynamic_map": "*fp32"}
ROWS = {"N": "i32", "row_spans": "i32", "row_bytes": "i32"}
FLAT = {"n": "i64", "n_bytes": "i64"}
ONE = {"BLOCK": 64, "SPAN": 64, "SPANS": 16, "ROWS": 4}
SEVERAL = {"BLOCK": 64, "SPAN": 64, "SPANS": 4, "ROWS": 16, "TOKENS": 16}
BIG = {"BLOCK": 4096, "SPAN": 256, "SPANS": 1, "ROWS": 16, "TOKENS": 16}


def half(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*bf16")


KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "dequantize": (dequantize.dequantize_kernel, {**PLAIN, **FLAT, **half("out")}, {"BLOCK": 64, "BLOCKS": 64}, 4),
    "dequantize double": (
        dequantize.dequantize_kernel,
        {**DOUBLE, **FLAT, **half("out")},
        {"BLOCK": 64, "BLOCKS": 64},
        4,
    ),
    "dequantize one element": (
        dequantize.dequantize_kernel,
        {**PLAIN, **half("out")},
        {"BLOCK": 4096, "BLOCKS": 1, "n": 1, "n_bytes": 1},
        4,
    ),
    "one row": (product.one_row_kernel, {**PLAIN, **ROWS, **half("x", "y", "bias")}, ONE, 4),
    "one row double": (product.one_row_kernel, {**DOUBLE, **ROWS, **half("x", "y")}, ONE, 4),
    "one row of one block": (
        product.one_row_kernel,
        {**PLAIN, "row_bytes": "i32", **half("x", "y")},
        {"BLOCK": 32, "SPAN": 32, "SPANS": 1, "ROWS": 4, "N": 1, "row_spans": 1},
        4,
    ),
    "several rows": (
        product.several_rows_kernel,
        {**PLAIN, **ROWS, "T": "i32", "K": "i32", **half("x", "y", "bias")},
        SEVERAL,
        4,
    ),
    "several rows double": (
        product.several_rows_kernel,
        {**DOUBLE, **ROWS, "T": "i32", "K": "i32", **half("x", "y")},
        SEVERAL,
        4,
    ),
    "several rows big block": (
        product.several_rows_kernel,
        {**DOUBLE, **ROWS, "T": "i32", "K": "i32", "x": "*fp32", "y": "*fp32"},
        BIG,
        4,
    ),
    "row norms": (row_norms.row_norms_kernel, {**DOUBLE, **ROWS, "norms": "*fp32"}, {**ONE, "ROUNDED": tl.bfloat16}, 4),
    "quantize": (
        quantize.quantize_kernel,
        {"packed": "*u8", "absmax": "*fp32", "bounds": "*fp32", "order": "*u8", "n": "i64", **half("w")},
        {"BLOCK": 64, "BLOCKS": 64},
        quantize._WARPS,
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name: str, card: str) -> Any:
    kernel, types, constants, warps = KERNELS[name]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    fixed = {key: constants.get(key) for key, kind in signature.items() if kind == "constexpr"}
    # As for a layer of 4096 x 4096: all pointers and counts are multiples of 16 but the scalar offset.
    numbers = [
        i for i, (argument, kind) in enumerate(signature.items()) if kind != "constexpr" and argument != "offset"
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in numbers}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32), options=options)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_without_spilling(name: str, tmp_path: Path) -> None:
    for card in CARDS:
        cubin = tmp_path / f"{CARDS[card]}.cubin"
        cubin.write_bytes(compiled(name, card).asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"STACK:(\d+)", usage) == ["0"], (card, usage)


@pytest.mark.parametrize("name", ["dequantize", "dequantize double"])
def test_weights_are_multiplied_and_added_in_two_roundings_and_keep_subnormals(name: str) -> None:
    ptx = compiled(name, "H100").asm["ptx"]
    assert "mul" in ptx
    assert not re.search(r"\bfma\.", ptx)
    assert ".ftz" not in ptx


def test_sums_are_fused_where_the_kernel_says_so() -> None:
    assert "fma.rn.f32" in compiled("one row", "H100").asm["ptx"]


class Spy:
    """Stands for a kernel and keeps the keywords of its launches."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *buffers, **keywords: self.launches.append(keywords)


def test_every_launch_asks_for_what_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    spies = {}
    for module in (dequantize, product, quantize, row_norms):
        monkeypatch.setattr(module, "launching_on", lambda device: nullcontext())
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            spies[name] = Spy()
            monkeypatch.setattr(module, name, spies[name])
    N, K, w = 16, 4096, torch.ones(16, 4096)
    packed = PackedWeight(torch.zeros(N, K // 2, dtype=torch.uint8), torch.ones(N * K // 64), (N, K))
    four_bit.dequantize_4bit(packed, torch.bfloat16)
    four_bit.linear_4bit(w[:1], packed)
    four_bit.linear_4bit(w[:2], packed)
    four_bit.row_norms_4bit(packed, torch.bfloat16)
    quantize.quantize_blocks(w.view(-1), packed.codes, packed.absmax, "nf4", 64)
    for kernel, _, constants, warps in KERNELS.values():
        launch = spies[kernel.__name__].launches[0]
        assert (launch["enable_fp_fusion"], launch["num_warps"]) == (False, warps)
        if constants.get("BLOCK") == 64:
            assert constants.items() <= launch.items()
