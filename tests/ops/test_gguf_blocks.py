"""The blocks of files: decoded as the gguf package does, and MXFP4 as transformers does, to the bit, by plain PyTorch
and at every CPU level."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from marks import at_every_level, at_some_level
from rankwise import ops
from rankwise.constants import MXFP4
from rankwise.errors import QuantizationError
from rankwise.ops import gguf_blocks, reference
from rankwise.ops.branch import Branch, Frozen
from rankwise.ops.eight_bit import EightBit
from rankwise.ops.gguf_blocks import BLOCK_TYPES, GGUF_TYPES
from rankwise.ops.low_rank_linear import low_rank_linear
from rankwise.ops.packed_weight import PackedWeight

N, K = 37, 768
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_in(kind: str, *, ordered: bool = False) -> tuple[PackedWeight, torch.Tensor]:
    """(a weight (N, K) of random bytes and tame scales, what the gguf package or transformers reads from it)."""
    rng, found = np.random.default_rng(0), BLOCK_TYPES[kind]
    raw = rng.integers(0, 256, (N, found.row_bytes(K)), dtype=np.uint8)
    blocks = raw.reshape(-1, found.bytes)
    for at in found.halves:
        blocks[:, at : at + 2] = (rng.normal(size=(len(blocks), 1)) * 0.02).astype(np.float16).view(np.uint8)
    exponents = torch.empty(0)
    if kind == MXFP4:
        ordered, exponents = False, torch.from_numpy(rng.integers(100, 128, N * K // 32, dtype=np.uint8))
        given = torch.from_numpy(raw).view(1, N, -1, 16), exponents.view(1, N, -1)
        # Of a zero they keep the sign.
        dense = convert_moe_packed_tensors(*given, dtype=torch.float32)[0].T.contiguous() + 0
    else:
        dense = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    order = torch.from_numpy(rng.permutation(N).astype(np.int32)) if ordered else None
    weight = PackedWeight(
        codes=torch.from_numpy(raw),
        absmax=exponents,
        shape=(N, K),
        quant_type=kind,
        block_size=found.elements,
        order=order,
    )
    return weight, dense if order is None else dense[order.long()]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_table_is_that_of_gguf(kind: str) -> None:
    number, found = gguf.GGMLQuantizationType[kind], BLOCK_TYPES[kind]
    assert (number.value, gguf.GGML_QUANT_SIZES[number]) == (found.number, (found.elements, found.bytes))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@at_every_level
def test_decoding_equals_the_gguf_package_to_the_bit(kind: str, ordered: bool, level: str) -> None:
    weight, dense = weight_in(kind, ordered=ordered)
    assert torch.equal(reference.dequantize_4bit(weight, torch.float32).view(torch.int32), dense.view(torch.int32))
    for dtype in DTYPES:
        assert torch.equal(ops.dequantize_weight(weight, dtype), dense.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@at_every_level
def test_products_and_norms_are_those_of_the_decoded_weight(kind: str, dtype: torch.dtype, level: str) -> None:
    weight, dense = weight_in(kind, ordered=True)
    W, close = dense.to(dtype).double(), {"rtol": 0.02, "atol": 0.02}
    A, B = torch.randn(4, K), torch.randn(N, 4)
    torch.testing.assert_close(ops.row_norms_4bit(weight, dtype), W.norm(dim=1).float())
    cross = ((W @ A.T.double()) * B).sum(1)
    torch.testing.assert_close(ops.row_cross_4bit(weight, A, B, dtype).double(), cross, **close)
    for T in (1, 5, 70):
        x, dy = torch.randn(T, K).to(dtype) / K**0.5, torch.randn(T, N).to(dtype) / N**0.5
        torch.testing.assert_close(ops.linear_4bit(x, weight).double(), x.double() @ W.T, **close)
        torch.testing.assert_close(ops.linear_4bit_input_grad(dy, weight).double(), dy.double() @ W, **close)


def test_rows_of_an_ordered_weight_are_its_rows() -> None:
    weight, dense = weight_in("Q4_K", ordered=True)
    assert torch.equal(ops.dequantize_weight(weight.rows(slice(5, 9))), dense[5:9])
    for kind in ("Q6_K", MXFP4):
        weight, dense = weight_in(kind)
        assert torch.equal(ops.dequantize_weight(weight.rows(slice(5, 9))), dense[5:9])


@at_some_level
def test_rows_may_lie_at_any_byte(level: str) -> None:
    weight, dense = weight_in("Q6_K")
    row_bytes = weight.codes.shape[1]
    order = torch.arange(N, dtype=torch.int32) * row_bytes + 5
    order[N // 2 :] += 3
    codes = torch.zeros(order[-1] + row_bytes, dtype=torch.uint8)
    for start, row in zip(order.tolist(), weight.codes):
        codes[start : start + row_bytes] = row
    apart = dataclasses.replace(weight, codes=codes, order=order)
    assert torch.equal(ops.dequantize_weight(apart), dense)
    assert torch.equal(reference.dequantize_4bit(apart, torch.float32), dense)


@at_every_level
def test_every_code_and_exponent_of_mxfp4_is_what_transformers_reads(level: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(253, 1)
    exponents = torch.arange(253, dtype=torch.uint8).repeat_interleave(16)
    weight = PackedWeight(codes=codes, absmax=exponents, shape=(len(codes), 32), quant_type=MXFP4, block_size=32)
    dense = convert_moe_packed_tensors(codes[None, :, None], exponents[None, :, None], dtype=torch.float32)[0].T
    assert dense.isfinite().all()
    assert torch.equal(ops.dequantize_weight(weight), dense)
    assert torch.equal(reference.dequantize_4bit(weight, torch.float32), dense)


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0", MXFP4])
def test_an_adapted_layer_is_that_over_the_decoded_weight(kind: str, in_bytes: bool) -> None:
    """In bfloat16 and in 8 bits, forward and backward."""
    weight, dense = weight_in(kind, ordered=True)
    weight = weight.rows(slice(0, 32))
    A, B, channel, found = torch.randn(8, K) / 30, torch.randn(32, 8), torch.rand(K) + 0.5, []
    for W in (dataclasses.replace(weight, dtype=torch.bfloat16), dense[:32].bfloat16()):
        torch.manual_seed(0)
        x = torch.randn(96, K, dtype=torch.bfloat16).requires_grad_()
        frozen = Frozen(W, EightBit(channel) if in_bytes else None)
        y = low_rank_linear(
            x, (Branch(frozen=frozen, scale=2.0, A=A.clone().requires_grad_(), B=B.clone().requires_grad_()),)
        )[0]
        y.square().sum().backward()
        found.append((y, x.grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(N, 7, dtype=torch.uint8)},
        {"codes": torch.zeros(N, 432)},
        {"order": torch.zeros(N - 1, dtype=torch.int32)},
        {"shape": (N, K + 1)},
    ],
)
def test_buffers_of_another_shape_are_refused(change: dict[str, object]) -> None:
    weight, _ = weight_in("Q4_K")
    with pytest.raises(QuantizationError, match="RW606"):
        ops.dequantize_weight(dataclasses.replace(weight, **change))


def test_nothing_is_quantized_to_blocks() -> None:
    with pytest.raises(QuantizationError, match="RW615"):
        ops.quantize_4bit(torch.ones(4, 256), "Q4_K", 256)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_an_infinite_scale_is_found(kind: str) -> None:
    weight, _ = weight_in(kind)
    assert gguf_blocks.is_finite(weight.codes, kind)
    at = BLOCK_TYPES[kind].halves[-1]
    weight.codes[3, at : at + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    assert not gguf_blocks.is_finite(weight.codes, kind)
