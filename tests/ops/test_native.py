"""The native library against the specification: equal to the bit where it dequantizes, as exact where it multiplies."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from marks import LEVELS
from rankwise.errors import QuantizationError
from rankwise.ops import reference
from rankwise.ops.cpu import native
from rankwise.ops.packed_weight import PackedWeight
from tables import thinned

if native.obstacle() is not None:
    pytest.skip(f"no native library: {native.obstacle()}", allow_module_level=True)

from rankwise.ops.cpu import four_bit

MAPS = Path("/proc/self/maps")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN (0xff in integers), so that an element not written shows."""
    plain = torch.empty

    def empty(*arguments, **options):
        made = plain(*arguments, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", empty)


def quantized(
    N: int, K: int, dtype: torch.dtype, quant_type: str, block_size: int, nested: bool, seed: int = 0
) -> tuple[torch.Tensor, PackedWeight]:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, absmax = reference.quantize_4bit(w, quant_type, block_size)
    nested_absmax = offset = None
    if nested:
        absmax, nested_absmax, offset = reference.quantize_absmax(absmax)
    return w, PackedWeight(
        codes=codes,
        absmax=absmax,
        shape=(N, K),
        quant_type=quant_type,
        block_size=block_size,
        nested_absmax=nested_absmax,
        offset=offset,
    )


def assert_as_exact(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, W: torch.Tensor, bias) -> None:
    """The error against float64 is at most the reference's, plus one rounding of the result and float32's of the
    sum."""
    true = functional.linear(x.double(), W.double(), None if bias is None else bias.double())
    terms = (x.double().abs() @ W.double().abs().T).max() if x.numel() else 0.0
    tolerance = torch.finfo(x.dtype).eps * true.abs().max() + 1e-6 * terms
    assert (found.double() - true).abs().max() <= (expected.double() - true).abs().max() + tolerance


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 40),
    K=st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 576, 4096])),
    T=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    nested=st.booleans(),
    biased=st.booleans(),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 1 << 16),
)
def test_fuzz(N, K, T, dtype, quant_type, block_size, nested, biased, level, seed) -> None:
    native.set_level(level)
    w, packed = quantized(N, K, dtype, quant_type, block_size, nested, seed)
    found_codes, found_absmax = four_bit.quantize_4bit(w, quant_type, block_size)
    assert torch.equal(found_codes, packed.codes)
    assert torch.equal(found_absmax, reference.quantize_4bit(w, quant_type, block_size)[1])
    W = reference.dequantize_4bit(packed, dtype)
    assert torch.equal(four_bit.dequantize_4bit(packed, dtype), W)
    norms = four_bit.row_norms_4bit(packed, dtype)
    torch.testing.assert_close(norms, reference.row_norms_4bit(packed, dtype), rtol=1e-5, atol=0)
    x, bias = torch.randn(T, K).to(dtype), torch.randn(N).to(dtype) if biased else None
    assert_as_exact(four_bit.linear_4bit(x, packed, bias), reference.linear_4bit(x, packed, bias), x, W, bias)
    native.set_level(None)


@thinned({"T": [1, 2, 3, 5, 16, 65], "K": [192, 1000, 4096], "dtype": DTYPES})
def test_rows_of_x(level: str, poisoned: None, dtype: torch.dtype, T: int, K: int) -> None:
    _, packed = quantized(39, K, dtype, "nf4", 64, True)
    x, bias = torch.randn(T, K).to(dtype), torch.randn(39).to(dtype)
    W = reference.dequantize_4bit(packed, dtype)
    y = four_bit.linear_4bit(x, packed, bias)
    assert y.isfinite().all()
    assert_as_exact(y, reference.linear_4bit(x, packed, bias), x, W, bias)


def test_every_element_is_written(level: str, poisoned: None) -> None:
    for N, K in ((1, 1), (3, 31), (5, 64), (2, 4097)):
        w, packed = quantized(N, K, torch.bfloat16, "nf4", 64, False)
        assert torch.equal(four_bit.quantize_4bit(w)[0], packed.codes)
        for dtype in DTYPES:
            found = four_bit.dequantize_4bit(packed, dtype)
            assert torch.equal(found, reference.dequantize_4bit(packed, dtype))


def test_extreme_scales(level: str) -> None:
    """Subnormal, zero, huge and non-finite scales round as PyTorch rounds them."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(16).view(-1, 1)
    absmax = torch.tensor(
        [0.0, 1e-45, 1e-41, 1e-38, 2e-30, 1e-20, 6e-8, 65504.0, 65520.0, 1e30, 3.4e38, float("inf"), float("nan"), -0.7]
    )
    packed = PackedWeight(codes=codes, absmax=absmax.repeat(16)[:128], shape=(64, 128))
    for dtype in DTYPES:
        found = four_bit.dequantize_4bit(packed, dtype)
        expected = reference.dequantize_4bit(packed, dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_scales_that_are_no_numbers(level: str, dtype: torch.dtype) -> None:
    """A row of the weight with an Inf or NaN among its scales, of whatever bits, spoils its own output and no other."""
    N, K = 7, 128
    _, packed = quantized(N, K, torch.float32, "nf4", 32, False)
    absmax = packed.absmax
    absmax[4 * 2 + 1], absmax[4 * 5 + 3] = float("inf"), torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    W = reference.dequantize_4bit(packed, dtype)
    for T in (1, 2):
        x = torch.rand(T, K).to(dtype) + 1
        y = four_bit.linear_4bit(x, packed)
        assert (~y.isfinite()).all(dim=0).nonzero().flatten().tolist() == [2, 5]
        fine = W[[0, 1, 3, 4, 6]]
        assert_as_exact(y[:, [0, 1, 3, 4, 6]], functional.linear(x, fine), x, fine, None)


def test_written_past_the_caches(level: str) -> None:
    """A weight large enough for streaming stores, with a partial last block."""
    w, packed = quantized(2100, 4099, torch.bfloat16, "fp4", 64, False)
    assert torch.equal(four_bit.quantize_4bit(w, "fp4")[0], packed.codes)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(four_bit.dequantize_4bit(packed, dtype), reference.dequantize_4bit(packed, dtype))


def test_all_float16_numbers(level: str) -> None:
    """Each finite float16 as a weight: reading 16-bit numbers is exact."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    w = every[every.isfinite()][:63488].view(-1, 64)
    found, expected = four_bit.quantize_4bit(w), reference.quantize_4bit(w)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("value", "index"), [(float("nan"), 0), (float("inf"), 8000), (-float("inf"), 8199)])
def test_bad_numbers_are_found(level: str, value: float, index: int) -> None:
    w = torch.randn(8200)
    w[index] = value
    for run in (four_bit.quantize_4bit, reference.quantize_4bit):
        with pytest.raises(QuantizationError, match=f"RW603.*{str(value).removeprefix('-')}.*index {index}:"):
            run(w)


def test_memory_is_used_again_only_when_dropped() -> None:
    weights = [quantized(1024, 1024, torch.float32, "nf4", 64, False, seed)[1] for seed in (0, 1)]
    first = four_bit.dequantize_4bit(weights[0], torch.bfloat16)
    view, copy = first[10:], first[10:].clone()
    second = four_bit.dequantize_4bit(weights[1], torch.bfloat16)
    four_bit.linear_4bit(torch.randn(100, 1024).bfloat16(), weights[1])
    assert torch.equal(view, copy)
    del first
    four_bit.dequantize_4bit(weights[1], torch.bfloat16)
    assert torch.equal(view, copy)
    assert torch.equal(second, reference.dequantize_4bit(weights[1], torch.bfloat16))
    del second, view
    address = four_bit.dequantize_4bit(weights[0], torch.bfloat16).data_ptr()
    again = four_bit.dequantize_4bit(weights[0], torch.bfloat16)
    assert again.data_ptr() == address
    assert again.untyped_storage().nbytes() == again.nbytes


def test_used_memory_comes_as_a_tensor_of_its_own() -> None:
    """Of any shape and dtype, changed in place without trace, and fit for a backward pass though made without one."""
    shape, other = (1024, 1024), (512, 2048)
    _, weight = quantized(*shape, torch.float32, "nf4", 64, False)
    reshaped = dataclasses.replace(weight, shape=other)
    with torch.inference_mode():
        first = four_bit.dequantize_4bit(weight, torch.float32)
        address = first.data_ptr()
        first.t_().add_(1)
        del first
        assert four_bit.dequantize_4bit(reshaped, torch.float32).data_ptr() == address
    for packed in (reshaped, weight):
        made = four_bit.dequantize_4bit(packed, torch.float32)
        assert made.data_ptr() == address
        assert made.is_contiguous()
        assert not made._is_view()
        assert made._version == 0
        assert torch.equal(made, reference.dequantize_4bit(packed, torch.float32))
        factor = torch.ones(packed.shape, requires_grad=True)
        (made * factor).sum().backward()
        assert torch.equal(factor.grad, made)
        del made, factor
    assert four_bit.dequantize_4bit(weight, torch.bfloat16).dtype is torch.bfloat16


def test_unknown_level_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="RW607"):
        native.set_level("sse9")


def test_one_thread_gives_the_same_bits() -> None:
    _, packed = quantized(200, 512, torch.bfloat16, "nf4", 64, False)
    x, threads = torch.randn(3, 512).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = four_bit.linear_4bit(x, packed)
        torch.set_num_threads(4)
        assert torch.equal(four_bit.linear_4bit(x, packed), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not MAPS.exists(), reason="reads the loaded libraries from /proc")
def test_threads_are_torchs_own() -> None:
    """One OpenMP runtime in the process: the library links none and borrows torch's.

    A process of its own, because bitsandbytes, an oracle of other tests, brings a second one.
    """
    code = (
        "import torch; from rankwise import ops\n"
        "packed, absmax = ops.quantize_4bit(torch.randn(256, 256))\n"
        "ops.dequantize_4bit(packed, absmax, (256, 256), torch.float32)\n"
        "assert ops.implementation(packed) == 'native'\n"
        "print(open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    mapped = {Path(line.split()[-1]).name for line in done.stdout.splitlines() if "/" in line}
    runtimes = {name for name in mapped if name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes
