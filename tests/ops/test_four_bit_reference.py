"""The specification against its oracle, bitsandbytes on a CPU, and against the paper's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rankwise.ops import packed_weight, reference
from rankwise.ops.packed_weight import PackedWeight
from tables import thinned

CPU = torch.device("cpu")
SHAPES = [(64, 256), (7, 33), (3,), (1, 1), (100, 300), (9, 4097), (2, 3, 64), (0, 64)]


@pytest.fixture(scope="module")
def oracle():
    return pytest.importorskip("bitsandbytes.functional")


def weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers with a block of zeros, exact ties and a very small block among them."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    if w.numel() >= 512:
        flat = w.view(-1)
        flat[:64] = 0.0
        flat[64:80] = torch.tensor(packed_weight.code_table("nf4").value)
        flat[80:95] = torch.tensor(packed_weight.code_table("nf4").bound)
        flat[128:192] *= 1e-30
    return w.to(dtype)


def test_tables_equal_the_oracles(oracle) -> None:
    assert torch.equal(packed_weight.dynamic_map(CPU), oracle.create_dynamic_map())
    for quant_type in packed_weight.QUANT_TYPES:
        assert torch.equal(packed_weight.code_values(quant_type, CPU), oracle.get_4bit_type(quant_type, device="cpu"))


def test_tables_equal_the_shared_ones(shared: Path) -> None:
    tables = json.loads((shared / "numeric" / "bnb_code_tables.json").read_text())
    assert packed_weight.dynamic_map(CPU).tolist() == tables["dynamic_map_signed_256"]
    assert list(packed_weight.code_table("nf4").value) == tables["nf4"]
    assert list(packed_weight.code_table("fp4").value) == tables["fp4"]


@thinned(
    {
        "block_size": [32, 64, 4096],
        "quant_type": ["nf4", "fp4"],
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
    }
)
def test_equals_bitsandbytes(oracle, dtype: torch.dtype, quant_type: str, block_size: int) -> None:
    for shape in SHAPES[:-1]:
        w = weight(shape, dtype)
        packed, absmax = reference.quantize_4bit(w, quant_type, block_size)
        expected, state = oracle.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
        assert torch.equal(packed.view(-1, 1), expected), shape
        assert torch.equal(absmax, state.absmax), shape
        dense = reference.dequantize_4bit(
            PackedWeight(codes=packed, absmax=absmax, shape=shape, quant_type=quant_type, block_size=block_size), dtype
        )
        if shape[-1] % block_size == 0:
            assert torch.equal(dense, oracle.dequantize_4bit(expected, state)), shape


@pytest.mark.parametrize("blocks", [1, 5, 255, 256, 257, 3000])
def test_double_quantization_equals_bitsandbytes(oracle, blocks: int) -> None:
    for seed, scale in enumerate((1.0, 1e-4, 30.0)):
        w = torch.randn(blocks, 64, generator=torch.Generator().manual_seed(seed)) * scale
        packed, absmax = reference.quantize_4bit(w)
        found = reference.quantize_absmax(absmax)
        expected, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        for one, other in zip(found, (state.absmax, state.state2.absmax, state.offset)):
            assert torch.equal(one, other)
        weight = PackedWeight(
            codes=packed, absmax=found[0], shape=(blocks, 64), nested_absmax=found[1], offset=found[2]
        )
        dense = reference.dequantize_4bit(weight, torch.float32)
        assert torch.equal(dense, oracle.dequantize_4bit(expected, state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 33), (3, 100), (7, 7), (2, 96)])
def test_ragged_rows_are_right(quant_type: str, shape: tuple[int, int]) -> None:
    """Where bitsandbytes 0.50.2 reads the scales of the wrong block: an element loop decides."""
    w = weight(shape, torch.float32)
    packed, absmax = reference.quantize_4bit(w, quant_type)
    value = packed_weight.code_table(quant_type).value
    nibbles = [n for b in packed.view(-1).tolist() for n in (b >> 4, b & 15)]
    expected = [torch.tensor(value[nibbles[i]]) * absmax[i // 64] for i in range(w.numel())]
    found = reference.dequantize_4bit(
        PackedWeight(codes=packed, absmax=absmax, shape=shape, quant_type=quant_type), torch.float32
    )
    assert torch.equal(found.view(-1), torch.stack(expected))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_code_is_the_nearest(quant_type: str) -> None:
    w = torch.linspace(-1, 1, 6401)[:6400].view(100, 64).clone()
    w[:, 0] = 1.0
    packed, absmax = reference.quantize_4bit(w, quant_type)
    found = reference.dequantize_4bit(
        PackedWeight(codes=packed, absmax=absmax, shape=w.shape, quant_type=quant_type), torch.float32
    )
    best = (w.unsqueeze(-1) - packed_weight.code_values(quant_type, CPU)).abs().amin(-1)
    torch.testing.assert_close((w - found).abs(), best, rtol=0, atol=1e-7)


def test_ties_go_to_the_lower_value() -> None:
    for quant_type in packed_weight.QUANT_TYPES:
        table = packed_weight.code_table(quant_type)
        w = torch.ones(1, 32)
        w[0, :15] = torch.tensor(table.bound)
        packed, _ = reference.quantize_4bit(w, quant_type, 32)
        found = [n for b in packed.view(-1).tolist() for n in (b >> 4, b & 15)][:15]
        assert found == list(table.order[:15])


def test_mean_error_on_normal_numbers() -> None:
    w = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    packed, absmax = reference.quantize_4bit(w)
    error = (
        (reference.dequantize_4bit(PackedWeight(codes=packed, absmax=absmax, shape=w.shape), torch.float32) - w)
        .abs()
        .mean()
        .item()
    )
    assert abs(error - 0.0728) < 0.0002


def test_empty_and_odd() -> None:
    packed, absmax = reference.quantize_4bit(torch.empty(0, 64))
    assert packed.shape == (0, 32)
    assert absmax.shape == (0,)
    codes_8bit, nested_absmax, offset = reference.quantize_absmax(absmax)
    assert codes_8bit.numel() == nested_absmax.numel() == offset.item() == 0
    packed, absmax = reference.quantize_4bit(torch.tensor([0.5, -2.0, 1.0]))
    assert packed.shape == (2, 1)
    assert packed_weight.code_table("nf4").value[packed[1, 0].item() & 15] == 0.0
    assert absmax.item() == 2.0


def test_tables_are_plain_whoever_asks_first() -> None:
    made = (packed_weight.code_values, packed_weight.code_bounds, packed_weight.dynamic_map, packed_weight.code_table)
    for kept in made:
        kept.cache_clear()  # type: ignore[attr-defined]

    def transformed(x: torch.Tensor) -> torch.Tensor:
        packed_weight.code_values("nf4", CPU)
        return x.sum()

    torch.func.grad(transformed)(torch.ones(3))
    with FakeTensorMode():
        assert packed_weight.code_table("nf4").value[0] == -1
        packed_weight.code_bounds("nf4", CPU)
    with torch.inference_mode():
        packed_weight.dynamic_map(CPU)
    for table in (
        packed_weight.code_values("nf4", CPU),
        packed_weight.code_bounds("nf4", CPU),
        packed_weight.dynamic_map(CPU),
    ):
        assert type(table) is torch.Tensor
        assert not table.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tables_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    """transformers sets it while it loads a model."""
    made = [(packed_weight.dynamic_map, (CPU,)), (packed_weight.dynamic_bins, (CPU,))]
    tables = (packed_weight.code_values, packed_weight.code_bounds, packed_weight.code_order)
    made += [(table, (name, CPU)) for table in tables for name in packed_weight.QUANT_TYPES]
    usual = [table(*given) for table, given in made]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Beside the cache.
        found = [table.__wrapped__(*given) for table, given in made]
        assert [packed_weight.code_table.__wrapped__(name) for name in packed_weight.QUANT_TYPES] == [
            packed_weight.code_table(name) for name in packed_weight.QUANT_TYPES
        ]
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, usual, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)
