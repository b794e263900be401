"""The Triton kernels against the reference. `test_triton_cases` runs this file in other processes.

The device is the CPU where Triton interprets its kernels (TRITON_INTERPRET=1 before Python starts), else a CUDA card.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_running import DEVICE, DTYPES, check_all_have_run, noting_launches, triton_on_poisoned_memory

from rankwise import ops
from rankwise.constants import BLOCK_SIZES
from rankwise.errors import QuantizationError
from rankwise.ops import reference
from rankwise.ops.packed_weight import PackedWeight, code_table
from tables import thinned

# Of `rankwise.ops.triton`, whose kernels all run here.
MODULES = ("four_bit",)
# The last has more elements than a program, and ends in a partial block.
RAGGED = [(7,), (1, 1), (3, 5, 7), (9, 33), (130,), (2, 96), (63, 66)]


@pytest.fixture(scope="module", autouse=True)
def launched() -> Iterator[set[str]]:
    with noting_launches() as names:
        yield names


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_on_poisoned_memory(monkeypatch, 0xAB):
        yield


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def quantized(w: Tensor, quant_type: str, block_size: int, double: bool) -> PackedWeight:
    codes, absmax = reference.quantize_4bit(w, quant_type, block_size)
    nested_absmax = offset = None
    if double:
        absmax, nested_absmax, offset = reference.quantize_absmax(absmax)
    return PackedWeight(
        codes=codes,
        absmax=absmax,
        shape=tuple(w.shape),
        quant_type=quant_type,
        block_size=block_size,
        nested_absmax=nested_absmax,
        offset=offset,
    )


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error of ``ours`` against float64 is not above that of the reference and a rounding of the float32 sum."""
    assert ours.dtype is plain.dtype
    assert ours.shape == plain.shape
    if truth.numel():
        error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= allowed + 1e-5 * (1 + truth.abs().max())


def test_triton_is_what_runs() -> None:
    assert ops.implementation(torch.ones(1, device=DEVICE)) == "triton"


@thinned(
    {
        "shape,block_size": [
            *(((3, block), block) for block in BLOCK_SIZES),
            *((shape, 32) for shape in RAGGED),
            ((0, 64), 64),
        ],
        "quant_type": ["nf4", "fp4"],
    }
)
def test_codes_scales_and_values_equal_the_reference(shape: tuple[int, ...], block_size: int, quant_type: str) -> None:
    for dtype in DTYPES:
        w = weight(shape, dtype)
        expected, ours = (
            reference.quantize_4bit(w, quant_type, block_size),
            ops.quantize_4bit(w, quant_type, block_size),
        )
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])
        for double in (False, True):
            packed = quantized(w, quant_type, block_size, double)
            found = ops.dequantize_weight(packed, dtype)
            assert found.dtype is dtype
            assert torch.equal(found, reference.dequantize_4bit(packed, dtype))


def test_values_on_the_bounds_between_codes_go_to_the_lower_side() -> None:
    for quant_type in ("nf4", "fp4"):
        bound = torch.tensor(code_table(quant_type).bound, device=DEVICE)
        w = torch.cat([bound, torch.ones(1, device=DEVICE), -bound, -torch.ones(1, device=DEVICE)])
        assert torch.equal(ops.quantize_4bit(w, quant_type, 32)[0], reference.quantize_4bit(w, quant_type, 32)[0])


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38, 1e30])
def test_extreme_scales_equal_the_reference(scale: float) -> None:
    w = weight((3, 64)) * scale
    packed, absmax = ops.quantize_4bit(w)
    assert torch.equal(packed, reference.quantize_4bit(w)[0])
    for dtype in DTYPES:
        found = ops.dequantize_4bit(packed, absmax, w.shape, dtype)
        assert torch.equal(
            found, reference.dequantize_4bit(PackedWeight(codes=packed, absmax=absmax, shape=w.shape), dtype)
        )


def test_halves_are_rounded_to_the_even_neighbour() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF], dtype=torch.int32, device=DEVICE)
    packed = torch.full((4, 16), 0xFF, dtype=torch.uint8, device=DEVICE)
    found = ops.dequantize_4bit(packed, bits.view(torch.float32), (4, 32), torch.bfloat16, block_size=32)
    assert [f"{value:x}" for value in found[:, 0].view(torch.int16).tolist()] == ["3f80", "3f82", "3f81", "3f81"]


def test_a_scale_that_is_not_finite_shows() -> None:
    absmax = torch.tensor([float("nan"), float("inf")], device=DEVICE)
    packed = torch.full((2, 32), 0xFF, dtype=torch.uint8, device=DEVICE)
    for dtype in DTYPES:
        found = ops.dequantize_4bit(packed, absmax, (2, 64), dtype)
        assert found[0].isnan().all()
        assert found[1].isinf().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [3, 70, 140])
def test_a_weight_that_is_not_finite_is_refused_and_the_place_named(value: float, index: int) -> None:
    w = weight((150,))
    w[index] = value
    with pytest.raises(QuantizationError, match=f"RW603.*flat index {index}:"):
        ops.quantize_4bit(w)


SIZES = [
    (9, 64, 64),
    (5, 192, 32),
    (17, 320, 64),
    (3, 1536, 128),
    (2, 4096, 2048),
    (1, 32, 32),
    (6, 80, 32),
    (5, 33, 64),
]


@thinned({"N,K,block_size": SIZES, "dtype": DTYPES, "double": [False, True]})
def test_products_and_gradients_are_as_good_as_the_reference(
    N: int, K: int, block_size: int, dtype: torch.dtype, double: bool
) -> None:
    packed = quantized(weight((N, K)), "fp4" if N % 2 else "nf4", block_size, double)
    w = reference.dequantize_4bit(packed, dtype)
    for T in (1, 2, 17):
        x, bias = weight((T, K), dtype).requires_grad_(), weight((N,), dtype).requires_grad_()
        y = ops.linear_4bit(x, packed, bias)
        assert_as_good(y, torch.nn.functional.linear(x, w, bias), x.double() @ w.double().T + bias.double())
        grad = torch.randn_like(y)
        y.backward(grad)
        assert_as_good(x.grad, grad @ w, grad.double() @ w.double())
        assert_as_good(bias.grad, grad.sum(0), grad.double().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_x_that_is_not_finite_leaves_the_others_alone(dtype: torch.dtype) -> None:
    packed = quantized(weight((5, 320)), "nf4", 64, False)
    x = weight((4, 320), dtype)
    x[1], x[3] = float("nan"), float("inf")
    y = ops.linear_4bit(x, packed)
    assert y[[0, 2]].isfinite().all()
    assert not y[[1, 3]].isfinite().any()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_row_of_every_block_size(block_size: int) -> None:
    N, K = 3, 2 * block_size
    packed = quantized(weight((N, K)), "nf4", block_size, True)
    w = reference.dequantize_4bit(packed, torch.bfloat16)
    for T in (1, 3):
        x = weight((T, K), torch.bfloat16)
        truth = x.double() @ w.double().T
        assert_as_good(ops.linear_4bit(x, packed), x @ w.T, truth)


@thinned(
    {
        "N,K,block_size": [(7, 64, 64), (5, 1152, 128), (2, 4096, 2048), (6, 80, 32), (3, 7, 64), (0, 64, 64)],
        "double": [False, True],
    }
)
def test_row_norms_are_those_of_the_dequantized_weight(N: int, K: int, block_size: int, double: bool) -> None:
    for quant_type in ("nf4", "fp4"):
        packed = quantized(weight((N, K)), quant_type, block_size, double)
        for dtype in DTYPES:
            norms = ops.row_norms_4bit(packed, dtype)
            w = reference.dequantize_4bit(packed, dtype)
            assert norms.dtype is torch.float32
            torch.testing.assert_close(norms.double(), w.double().norm(dim=1), rtol=1e-6, atol=0)


def test_one_row_in_and_out_keeps_its_leading_dimensions_and_takes_strides() -> None:
    packed = quantized(weight((6, 128)), "nf4", 64, False)
    w = reference.dequantize_4bit(packed, torch.float32)
    for x in (weight((128,)), weight((1, 1, 128)), weight((2, 3, 256))[..., ::2], weight((128, 4)).T):
        found = ops.linear_4bit(x, packed)
        torch.testing.assert_close(found, x @ w.T, rtol=1e-5, atol=1e-5)
    strided = torch.stack([packed.codes, packed.codes], dim=-1)[..., 0]
    assert torch.equal(ops.dequantize_4bit(strided, packed.absmax, (6, 128), torch.float32), w)


@pytest.mark.parametrize(("T", "N", "K"), [(0, 3, 64), (2, 0, 64), (2, 3, 0), (0, 0, 0)])
def test_empty_products(T: int, N: int, K: int) -> None:
    packed = quantized(weight((N, K)), "nf4", 64, False)
    bias = weight((N,))
    found = ops.linear_4bit(weight((T, K)), packed, bias)
    assert torch.equal(found, bias.expand(T, N))


def test_backward_keeps_the_packed_buffers_and_nothing_dense() -> None:
    kept: list[Tensor] = []
    packed = quantized(weight((64, 256)), "nf4", 64, False)
    x = weight((32, 256)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.linear_4bit(x, packed)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in packed.tensors.values()}


def test_random_shapes_blocks_and_types() -> None:
    draw = random.Random(0)
    for _ in range(12):
        shape = tuple(draw.choice([1, 2, 3, 31, 32, 64, 65, 96]) for _ in range(draw.choice([1, 2])))
        shape = (*draw.choice([(), (), (3,)]), *shape)
        quant_type, block_size = draw.choice(["nf4", "fp4"]), draw.choice(BLOCK_SIZES)
        dtype, double = draw.choice(DTYPES), draw.random() < 0.5
        w = weight(shape, draw.choice(DTYPES))
        expected, ours = (
            reference.quantize_4bit(w, quant_type, block_size),
            ops.quantize_4bit(w, quant_type, block_size),
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), (shape, quant_type, block_size)
        packed = quantized(w, quant_type, block_size, double)
        found = ops.dequantize_weight(packed, dtype)
        assert torch.equal(found, reference.dequantize_4bit(packed, dtype)), (shape, packed.parts[3:5], double, dtype)


def test_every_kernel_has_run(launched: set[str]) -> None:
    """After all others in this file."""
    check_all_have_run(MODULES, launched)
