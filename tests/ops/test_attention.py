"""Attention over ranges of keys: the native kernel against float64, its contract, and the ways around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from marks import LEVELS, needs_avx2
from precision import assert_as_exact
from rankwise import ops
from rankwise.errors import QuantizationError, RankwiseWarning
from rankwise.ops import reference
from rankwise.ops.attention import attention, obstacle, plain_attention
from rankwise.ops.cpu import attention as native_attention
from rankwise.ops.cpu import native
from tables import thinned

Range = tuple[Tensor | None, Tensor | None]

_EXAMPLE = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
WHY = obstacle(_EXAMPLE, _EXAMPLE, _EXAMPLE)
needs_native = pytest.mark.skipif(WHY is not None, reason=f"no native attention: {WHY}")

# (B, Lq, Lk, H, Hkv, D): odd lengths, one query, tiles of 64 and beyond, heads that share keys, all kinds of head size.
SHAPES = [
    (2, 256, 256, 9, 3, 64),
    (1, 1, 1, 1, 1, 16),
    (3, 1, 70, 4, 1, 64),
    (1, 64, 64, 2, 2, 32),
    (2, 65, 65, 4, 1, 32),
    (1, 150, 333, 3, 3, 80),
    (2, 63, 128, 4, 4, 96),
    (1, 130, 130, 4, 2, 128),
    (1, 70, 71, 3, 1, 256),
    (1, 5, 300, 2, 2, 112),
    (1, 40, 20, 2, 2, 48),
    (1, 7, 7, 3, 3, 240),
]


def causal(B: int, Lq: int, Lk: int) -> Range:
    return None, None


def everything(B: int, Lq: int, Lk: int) -> Range:
    return None, torch.full((B, Lq), Lk, dtype=torch.int32)


def left_padded(B: int, Lq: int, Lk: int) -> Range:
    return torch.arange(B, dtype=torch.int32).mul(5).add(3).clamp(max=Lk)[:, None].repeat(1, Lq), None


def right_padded(B: int, Lq: int, Lk: int) -> Range:
    length = (Lk - 1 - 4 * torch.arange(B, dtype=torch.int32)).clamp(min=1)[:, None]
    return None, torch.minimum(positions(B, Lq, Lk) + 1, length)


def packed(B: int, Lq: int, Lk: int) -> Range:
    i = positions(B, Lq, Lk)
    return i // 37 * 37, i + 1


def sliding(B: int, Lq: int, Lk: int) -> Range:
    return positions(B, Lq, Lk) - 20, None


def scattered(B: int, Lq: int, Lk: int) -> Range:
    """Any range for any query: many are empty, some reach beyond the keys."""
    generator = torch.Generator().manual_seed(1)
    start, end = torch.randint(-5, Lk + 5, (2, B, Lq), generator=generator, dtype=torch.int32)
    return start, end


def nothing(B: int, Lq: int, Lk: int) -> Range:
    return torch.full((B, Lq), 3, dtype=torch.int32), torch.full((B, Lq), 3, dtype=torch.int32)


def beginning(B: int, Lq: int, Lk: int) -> Range:
    """Rows of 37 behind a common beginning of 21."""
    i = positions(B, Lq, Lk)
    starts = torch.stack([torch.zeros_like(i), (i // 37 * 37).clamp(min=21)], dim=1)
    return starts, torch.stack([(i + 1).clamp(max=21), i + 1], dim=1)


def scattered_thrice(B: int, Lq: int, Lk: int) -> Range:
    """Three disjoint ranges for any query, in any order: some are empty, some reach beyond the keys."""
    generator = torch.Generator().manual_seed(2)
    ends = torch.randint(-5, Lk + 5, (B, 6, Lq), generator=generator, dtype=torch.int32).sort(dim=1).values
    order = torch.randperm(3, generator=generator)
    return ends[:, 0::2][:, order], ends[:, 1::2][:, order]


RANGES = [
    *(causal, everything, left_padded, right_padded, packed, sliding, scattered, nothing),
    *(beginning, scattered_thrice),
]


def positions(B: int, Lq: int, Lk: int) -> Tensor:
    """The key beside each query, where both sequences end together."""
    return (torch.arange(Lq, dtype=torch.int32) + Lk - Lq).clamp(min=0).repeat(B, 1)


def make(B: int, Lq: int, Lk: int, H: int, Hkv: int, D: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, Lq, H, D), (B, Lk, Hkv, D), (B, Lk, Hkv, D), (B, Lq, H, D))
    return [torch.randn(size, generator=generator).bfloat16() for size in sizes]


def results(run: Callable[..., Tensor], tensors: list[Tensor], ranges: Range, **options: float) -> list[Tensor]:
    """out, dq, dk, dv."""
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs, *ranges, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
    """PyTorch's own, with the same visible keys; a query without any sees all, and its result is dropped."""
    seen = reference.visible(start, end, (q.shape[0], q.shape[1], k.shape[1]), q.device)[:, None]
    empty = ~seen.any(-1, keepdim=True)
    out = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen | empty, enable_gqa=True
    )
    return out.masked_fill(empty, 0).transpose(1, 2)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that an element not written shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: plain(*sizes, **options).fill_(float("nan")))


# AVX-VNNI and AVX-512 without bfloat16 have the attention of AVX2.
WITH_ATTENTION = [name for name in LEVELS if name not in ("portable", "avx_vnni", "avx512")]
with_attention = pytest.mark.parametrize("level", WITH_ATTENTION or [None], indirect=True)


@needs_native
@with_attention
@thinned({"shape": SHAPES, "ranges": RANGES})
def test_as_exact_as_pytorch(poisoned: None, level: str, shape: tuple[int, ...], ranges: Callable[..., Range]) -> None:
    tensors, seen = make(*shape), ranges(*shape[:3])
    found = results(attention, tensors, seen)
    assert all(x.isfinite().all() for x in found)
    exact = results(plain_attention, [x.double() for x in tensors], seen)
    assert_as_exact(found, results(masked_sdpa, tensors, seen), exact)


@needs_avx2
@pytest.mark.usefixtures("avx2")
@thinned({"shape": SHAPES, "ranges": RANGES})
def test_float32_is_as_exact_as_pytorch(poisoned: None, shape: tuple[int, ...], ranges: Callable[..., Range]) -> None:
    tensors, seen = [x.float() for x in make(*shape)], ranges(*shape[:3])
    found = results(attention, tensors, seen)
    assert all(x.isfinite().all() and x.dtype is torch.float32 for x in found)
    exact = results(plain_attention, [x.double() for x in tensors], seen)
    assert_as_exact(found, results(masked_sdpa, tensors, seen), exact)


@needs_native
@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 3),
    Lq=st.integers(1, 200),
    Lk=st.integers(1, 200),
    Hkv=st.integers(1, 3),
    G=st.integers(1, 4),
    D=st.integers(1, 16).map(lambda n: 16 * n),
    scale=st.sampled_from([0.01, 0.125, 1.0]),
    ranges=st.sampled_from(RANGES),
    seed=st.integers(0, 1 << 16),
)
def test_fuzz(B, Lq, Lk, Hkv, G, D, scale, ranges, seed) -> None:
    tensors, seen = make(B, Lq, Lk, Hkv * G, Hkv, D, seed), ranges(B, Lq, Lk)
    found = results(attention, tensors, seen, scale=scale)
    exact = results(plain_attention, [x.double() for x in tensors], seen, scale=scale)
    for ours, true in zip(found, exact):
        assert (ours.double() - true).norm() <= 2.0**-6 * true.norm() + 2.0**-7 * D**0.5 * true.numel() ** 0.5


@needs_native
def test_log_sum_exp() -> None:
    q, k, v, _ = make(2, 150, 150, 4, 2, 64)
    for ranges in RANGES:
        seen = ranges(2, 150, 150)
        _, lse = native_attention.attention_forward(q, k, v, *seen, 0.3)
        _, expected = reference.attention_forward(q.double(), k.double(), v.double(), *seen, 0.3)
        torch.testing.assert_close(lse, expected, rtol=1e-6, atol=2e-6)


@needs_native
@pytest.mark.parametrize("factor", [1e-4, 1.0, 60.0, 3e3])
def test_scores_of_any_size(factor: float) -> None:
    """Softmax from flat to one-hot, where exponentials without the maximum would overflow."""
    q, k, v, grad = make(1, 130, 130, 2, 2, 64)
    tensors = [(q * factor).bfloat16(), k, v, grad]
    found = results(attention, tensors, (None, None))
    assert all(x.isfinite().all() for x in found)
    assert_as_exact(
        found,
        results(masked_sdpa, tensors, (None, None)),
        results(plain_attention, [x.double() for x in tensors], (None, None)),
    )


@needs_native
def test_equal_scores_average() -> None:
    """A known value: with q = 0 the output is the mean of the visible values."""
    _, k, v, _ = make(1, 100, 100, 2, 2, 32)
    v = torch.arange(100.0).view(1, 100, 1, 1).expand(v.shape).bfloat16()
    out = attention(torch.zeros_like(k), k, v, None, None)
    torch.testing.assert_close(out[0, :, 0, 0].float(), torch.arange(100.0) / 2, rtol=2.0**-7, atol=0)


@needs_native
def test_empty_ranges_give_zeros() -> None:
    start, end = torch.zeros(1, 80, dtype=torch.int32), torch.full((1, 80), 80, dtype=torch.int32)
    end[0, 10:20] = 0
    tensors = make(1, 80, 80, 2, 1, 64)
    out, dq, dk, dv = results(attention, tensors, (start, end))
    assert not out[:, 10:20].any()
    assert not dq[:, 10:20].any()
    tensors[3][:, 10:20] = 100.0
    other = results(attention, tensors, (start, end))
    assert torch.equal(other[2], dk)
    assert torch.equal(other[3], dv)


@needs_native
def test_packed_sequences_equal_sequences_apart() -> None:
    """Block-diagonal attention is the attention of each block."""
    q, k, v, grad = make(1, 180, 180, 6, 2, 64)
    blocks = [(0, 50), (50, 51), (51, 115), (115, 180)]
    start = torch.cat([torch.full((b - a,), a) for a, b in blocks]).int()[None]
    whole = results(attention, [q, k, v, grad], (start, None))
    parts = [results(attention, [x[:, a:b] for x in (q, k, v, grad)], (None, None)) for a, b in blocks]
    for one, pieces in zip(whole, zip(*parts)):
        torch.testing.assert_close(one, torch.cat(pieces, 1), rtol=2.0**-7, atol=2.0**-7)


@needs_native
def test_views_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one projection's output, heads-first tensors and an expanded gradient give the same bits as copies."""
    B, L, H, Hkv, D = 2, 77, 4, 2, 64
    tensors = make(B, L, L, H, Hkv, D)
    expected = results(attention, tensors, (None, None))
    joint = torch.cat([x.flatten(2) for x in tensors[:3]], -1)
    q, k, v = (x.unflatten(2, (-1, D)) for x in joint.split([H * D, Hkv * D, Hkv * D], -1))
    heads_first = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("copied"))
    found = results(attention, [q, k, v, heads_first], (None, None))
    assert all(map(torch.equal, found, expected))
    monkeypatch.undo()
    ones = results(attention, [*tensors[:3], torch.ones(B, L, H, D).bfloat16()], (None, None))
    expanded = results(attention, [*tensors[:3], torch.ones(1).bfloat16().expand(B, L, H, D)], (None, None))
    assert all(map(torch.equal, ones, expanded))
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    assert all(map(torch.equal, results(attention, turned, (None, None)), expected))


@needs_native
@pytest.mark.parametrize("shape", [(4, 256, 256, 9, 3, 64), (1, 300, 300, 2, 1, 64), (1, 500, 40, 1, 1, 32)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    tensors, threads, found = make(*shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(results(attention, tensors, sliding(*shape[:3])))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@needs_native
def test_saved_for_backward_is_linear_in_the_length() -> None:
    q, k, v, _ = (x.requires_grad_() for x in make(1, 128, 128, 4, 2, 64))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attention(q, k, v)
    assert {x.data_ptr() for x in kept} > {x.data_ptr() for x in (q, k, v, out)}
    assert sum(x.nbytes for x in kept) == q.nbytes + k.nbytes + v.nbytes + out.nbytes + 4 * 128 * 4


@needs_native
def test_frozen_inputs_get_no_gradient() -> None:
    q, k, v, grad = make(1, 20, 20, 2, 2, 32)
    attention(q.requires_grad_(), k, v).backward(grad)
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is None
    assert not attention(q.detach(), k, v).requires_grad


def test_reference_gradients() -> None:
    """gradcheck of the specification, and its written-out gradients against PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 5, heads, 4, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    )
    for ranges in RANGES:
        seen = ranges(2, 5, 5)
        assert torch.autograd.gradcheck(lambda q, k, v: plain_attention(q, k, v, *seen), (q, k, v))  # noqa: B023
        out, lse = reference.attention_forward(q, k, v, *seen, 0.5)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        written = reference.attention_backward(grad, q, k, v, out, lse, *seen, 0.5)
        for one, other in zip(written, torch.autograd.grad(out, (q, k, v), grad)):
            torch.testing.assert_close(one, other)


@thinned({"shape": [(2, 30, 30, 4, 2, 20), (1, 9, 64, 3, 3, 64), (1, 12, 5, 2, 1, 32)], "ranges": RANGES})
def test_other_dtypes_and_head_sizes_run_in_pytorch(shape: tuple[int, ...], ranges: Callable[..., Range]) -> None:
    tensors, seen = [x.double() for x in make(*shape)], ranges(*shape[:3])
    assert obstacle(*tensors[:3]) is not None
    found, exact = results(attention, tensors, seen), results(plain_attention, [x.double() for x in tensors], seen)
    for one, other in zip(found, exact):
        torch.testing.assert_close(one, other)


def test_slow_path_is_said_once() -> None:
    ops.set_implementation(None)
    q = torch.randn(1, 8, 2, 24).bfloat16()
    with pytest.warns(RankwiseWarning, match="RW608.*heads of 16.* have 24"):
        attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, q, q)
        attention(q.float(), q.float(), q.float())


@needs_native
def test_lower_levels_run_in_pytorch() -> None:
    ops.set_implementation(None)
    tensors = make(1, 50, 50, 2, 1, 64)
    native.set_level("portable")
    try:
        assert "AVX2" in str(obstacle(*tensors[:3]))
        with pytest.warns(RankwiseWarning, match="RW608"):
            found = results(attention, tensors, (None, None))
    finally:
        native.set_level(None)
    exact = results(plain_attention, [x.double() for x in tensors], (None, None))
    assert_as_exact(found, results(masked_sdpa, tensors, (None, None)), exact)


def test_forced_implementation() -> None:
    q = torch.randn(1, 8, 2, 24).bfloat16()
    try:
        ops.set_implementation("reference")
        assert torch.equal(attention(q, q, q), plain_attention(q, q, q))
        ops.set_implementation("native")
        with pytest.raises(QuantizationError, match="RW607"):
            attention(q, q, q)
    finally:
        ops.set_implementation("auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in make(2, 9, 11, 4, 2, 64)]
    q, k, v, grad = tensors
    for seen in ((None, None), scattered(2, 9, 11)):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(torch.ops.rankwise.attention_forward.default, (*inputs, *seen, 0.125))
        out, lse = torch.ops.rankwise.attention_forward(q, k, v, *seen, 0.125)
        torch.library.opcheck(torch.ops.rankwise.attention_backward.default, (grad, q, k, v, out, lse, *seen, 0.125))


@needs_native
def test_compiled_gives_the_same_bits() -> None:
    tensors, seen = make(2, 70, 70, 4, 2, 64), packed(2, 70, 70)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, tensors, seen), results(attention, tensors, seen)))


@needs_native
def test_fake_tensors_know_shapes_and_what_is_kept() -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 33, 4, 64, dtype=torch.bfloat16), torch.empty(2, 33, 2, 64, dtype=torch.bfloat16)
        inputs = [x.requires_grad_() for x in (q, k, k.clone())]
        out = attention(*inputs)
        out.sum().backward()
    assert out.shape == q.shape
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


@needs_native
def test_autocast() -> None:
    tensors = make(1, 20, 20, 2, 2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*(x.float() for x in tensors[:3]))
    assert torch.equal(out, attention(*tensors[:3]))


def test_misfits_are_one_error() -> None:
    q, k, v, _ = make(2, 8, 8, 4, 2, 32)
    bound = torch.zeros(2, 8, dtype=torch.int32)
    for arguments in (
        (q[0], k[0], v[0]),
        (q, k, v[:, :7]),
        (q, k.float(), v),
        (q[:, :, :3], k, v),
        (q[..., :16], k, v),
        (q, k[:1], v[:1]),
        (q, k, v, bound.long()),
        (q, k, v, None, bound[:, :7]),
    ):
        with pytest.raises(QuantizationError, match="RW606.*it got q"):
            attention(*arguments)


@needs_native
def test_wrong_sizes_never_reach_the_library() -> None:
    q, k, v, grad = make(2, 8, 8, 4, 2, 32)
    out, lse = native_attention.attention_forward(q, k, v, None, None, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        native_attention.attention_backward(grad, q, k, v, out[:1], lse, None, None, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        native_attention.attention_backward(grad, q, k, v, out, lse[:, :, :7], None, None, 1.0)
