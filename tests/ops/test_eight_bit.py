"""Frozen products in 8 bits: exact sums, gradients beside bfloat16's own error, and what stays in full precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rankwise as rw
from marks import LEVELS, needs_avx2
from rankwise.acceleration import calibrate_products, restore
from rankwise.acceleration.parts import adapted_layers
from rankwise.compat.torch import FakeTensorMode, is_fake
from rankwise.ops import dequantize_weight, eight_bit, quantize_weight
from rankwise.ops.branch import Branch, Frozen, eight_bit_pays
from rankwise.ops.cpu import native, products
from rankwise.ops.low_rank_linear import low_rank_linear
from tiny_models import tiny_llama

WITH_INTEGERS = [name for name in LEVELS if name not in ("portable", "avx512")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(params=[*WITH_INTEGERS, "plain"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """A level with native 8-bit products, or plain PyTorch."""
    before = None if native.obstacle() else native.level()
    rw.ops.set_implementation("reference" if request.param == "plain" else "native")
    if request.param != "plain":
        native.set_level(request.param)
    yield str(request.param)
    rw.ops.set_implementation("auto")
    if before is not None:
        native.set_level(before)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 32), (33, 96, 160), (40, 64, 9024), (257, 608, 224)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_of_the_largest_integers_are_exact(
    way: str, shape: tuple[int, int, int], across: bool, dtype: torch.dtype
) -> None:
    (T, N, K), largest = shape, 127 if way == "plain" else products.largest()
    x, W = (largest * (2.0 * (random(*sizes) > 0) - 1) for sizes in ((T, K), (K, N) if across else (N, K)))
    exact = x.double() @ (W.double() if across else W.double().T)
    if way == "plain":
        assert torch.equal(
            eight_bit.integer_product(x.to(torch.int8), (W if across else W.T).to(torch.int8)).double(), exact
        )
        return
    if not products.take(dtype):
        pytest.skip(f"no products of rows in {dtype} here")
    factor = products.Factor.of(W if largest > 127 else W.to(dtype))
    q, _ = products.quantize_rows(x.to(dtype), torch.ones(K))
    assert (q.int() - (128 if largest == 127 else 0)).abs().unique().tolist() == [largest]
    ones = torch.ones(max(N, K, -(-T // 32) * 32))
    assert factor is not None
    scales = products.InBytes(
        ones, eight_bit.Scales(channel=ones, row=ones, per_channel=ones, per_row=ones), factor, across=across
    )
    y = torch.full((T, N), torch.nan, dtype=dtype)
    products.add_products([products.Term(a=q, W=factor, across=across, in_bytes=scales)], y)
    # Sums of long rows are cut, and their parts added in float32.
    rounding = torch.finfo(dtype).eps if K > 1024 else 0.0
    close = 2**-23 * float(exact.abs().max()) if K > 1024 else 0.0
    torch.testing.assert_close(y.double(), exact.to(dtype).double(), rtol=rounding, atol=close)


@pytest.mark.parametrize("level", WITH_INTEGERS or [None], indirect=True)
@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_products_equal_the_specification(level: str | None, dtype: torch.dtype, four_bits: bool) -> None:
    if level is None or not products.take(dtype):
        pytest.skip(f"no products of rows in {dtype} here")
    x, dy, W = random(70, 224).to(dtype), random(70, 96).to(dtype), random(96, 224).to(dtype)
    weight = quantize_weight(W) if four_bits else W
    dense = dequantize_weight(weight, dtype) if four_bits else W
    scales = eight_bit.Scales.of(dense, random(224, seed=1).abs() + 0.5, products.largest())
    factor = products.Factor.of(weight)
    assert factor is not None
    for rows, of_rows, across, dither, wanted in (
        (x, scales.per_channel, False, False, eight_bit.product(x, dense, scales)),
        (dy, scales.row, True, True, eight_bit.input_grad(dy, dense, scales)),
    ):
        q, a = products.quantize_rows(rows, of_rows, dither=dither)
        term = products.Term(a=q, W=factor, across=across, in_bytes=products.InBytes(a, scales, factor, across=across))
        assert torch.equal(products.add_products([term], rows.new_empty(wanted.shape)), wanted.to(dtype))


def test_small_numbers_in_a_dithered_row_keep_their_sum() -> None:
    x = torch.full((64, 4096), 1e-3)
    x[:, 7] = 1.0
    for dither, wanted in ((False, 1.0), (True, 5.095)):
        q, a = eight_bit.quantize_rows(x, torch.ones(4096), dither=dither)
        sums = (q.float() * a[:, None]).sum(1)
        torch.testing.assert_close(sums, torch.full((64,), wanted), rtol=0.02, atol=0)


@pytest.mark.parametrize("gain", [None, 0.5])
def test_small_gradients_beside_a_large_one_reach_the_input(way: str, gain: float | None) -> None:
    """Rounded to the nearest, the small ones, 0.3 of the sum, would be 0 in every row."""
    W, dy = (1 + random(1056, 64) / 10).bfloat16(), torch.full((64, 1056), 4e-4).bfloat16()
    dy[:, 7] = 1.0
    branch = Branch(
        frozen=Frozen(W, eight_bit.EightBit()),
        scale=1.0,
        A=torch.zeros(4, 64),
        B=torch.zeros(1056, 4),
        gain=None if gain is None else torch.full((1056,), gain),
    )
    x = random(64, 64).bfloat16().requires_grad_()
    low_rank_linear(x, [branch])[0].backward(dy)
    found, exact = x.grad.double().mean(dim=0), (gain or 1) * (dy.double() @ W.double()).mean(dim=0)
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(70, 96, 224), (33, 32, 9024), (5, 1056, 32)])
def test_weights_rounded_once_change_no_bit(way: str, shape: tuple[int, int, int], transposed: bool) -> None:
    T, N, K = shape
    dtype = torch.bfloat16 if way == "plain" or products.take(torch.bfloat16) else torch.float32
    x, A, B = random(T, K).to(dtype), random(4, K), random(N, 4)
    W = random(K, N).to(dtype).T if transposed else random(N, K).to(dtype)
    found = []
    for keeps in (False, True):
        eight = eight_bit.EightBit(random(K, seed=1).abs() + 0.5)
        eight.keeps_rounded = keeps
        frozen = Frozen(W, eight)
        found.append(
            results([Branch(frozen=frozen, scale=0.5, A=A.clone().requires_grad_(), B=B.clone().requires_grad_())], x)
        )
        kept = frozen.scales.rounded
        assert (kept is not None) == (keeps and (way == "plain" or products.largest() == 127))
        if kept is not None:
            assert kept.stride() == W.stride()
            assert torch.equal(kept, eight_bit.quantize_weight(W, dataclasses.replace(frozen.scales, rounded=None)))
            W[0].neg_()
            assert torch.equal(frozen.scales.rounded[0], -kept[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def branches(dora: bool, four_bits: bool, dtype: torch.dtype) -> list[Branch]:
    made = []
    for N in (96, 160):
        W = random(N, 224).to(dtype) / 15
        weight = quantize_weight(W) if four_bits else W
        B, A, m = (random(*shape).mul(0.1).requires_grad_() for shape in ((N, 4), (4, 224), (N,)))
        gain = random(N, seed=1).abs() + 0.5 if dora else None
        made.append(
            Branch(
                frozen=Frozen(weight, eight_bit.EightBit()),
                scale=0.5,
                A=A,
                B=B,
                bias=None,
                m=m if dora else None,
                gain=gain,
            )
        )
    return made


def results(made: list[Branch], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    ys = low_rank_linear(x, made)
    sum((y * random(*y.shape).to(y.dtype)).sum() for y in ys).backward()
    grads = [tensor.grad for branch in made for tensor in branch.tensors if tensor is not None]
    return [tensor.detach() for tensor in (*ys, x.grad, *grads) if tensor is not None]


def in_float64(branch: Branch) -> Branch:
    W = branch.frozen.weight
    dense = W if isinstance(W, Tensor) else dequantize_weight(W, torch.bfloat16)
    A, B, m = (None if t is None else t.detach().double().requires_grad_() for t in (branch.A, branch.B, branch.m))
    assert A is not None
    assert B is not None
    return dataclasses.replace(branch, frozen=Frozen(dense.double()), A=A, B=B, m=m)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_errors_beside_bfloat16(way: str, dora: bool, four_bits: bool) -> None:
    """Outputs and dx err by the rounding to 127 steps or 1,023; gradients of A and B read x and dy as they are."""
    slack = 0.03 * 127 / (127 if way == "plain" else products.largest())
    x = (random(70, 224) * (1 + 20 * (random(224, seed=1) > 1.5))).bfloat16()
    made = branches(dora, four_bits, torch.bfloat16)
    exact = results([in_float64(branch) for branch in made], x.double())
    found = results(made, x)
    as_they_are = [
        dataclasses.replace(one, frozen=Frozen(one.frozen.weight)) for one in branches(dora, four_bits, x.dtype)
    ]
    for index, (mine, plain, true) in enumerate(zip(found, results(as_they_are, x), exact)):
        error, bfloat16 = (float((tensor.double() - true).norm() / true.norm()) for tensor in (mine, plain))
        is_product = index < 3 or (dora and index in (5, 8))
        assert error <= bfloat16 + (slack if is_product else 1e-3), (index, error, bfloat16)


def test_a_layer_in_eight_bits_may_follow_one_that_is_not(way: str) -> None:
    x, (first, second) = random(70, 224).bfloat16(), branches(False, False, torch.bfloat16)
    mixed = [dataclasses.replace(first, frozen=Frozen(first.frozen.weight)), second]
    for mine, true in zip(results(mixed, x), results([in_float64(branch) for branch in mixed], x.double())):
        assert (mine.double() - true).norm() <= 0.03 * true.norm()


def test_channel_scales_take_outliers() -> None:
    x, W = random(64, 256), random(96, 256)
    x[:, 7] *= 100

    def error(channel: Tensor) -> float:
        y = eight_bit.product(x, W, eight_bit.Scales.of(W, channel))
        return float((y - x @ W.T).norm() / (x @ W.T).norm())

    scaled = error(eight_bit.channel_scales(x.abs().amax(0), W.abs().amax(0)))
    assert scaled < error(torch.ones(256)) / 2


def test_bytes_of_a_weight_do_not_wrap() -> None:
    """Scales from W in bfloat16, which rounds the largest element down."""
    W = torch.tensor([[1.0 + 2**-8 - 2**-12, -0.5]])
    scales = eight_bit.Scales.of(W.bfloat16(), torch.ones(2))
    assert eight_bit.quantize_weight(W * 1.001, scales).tolist() == [[127, -64]]


def test_only_training_is_in_eight_bits_and_can_be_undone() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96).bfloat16()
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False))
    ids = torch.arange(3, 40)[None]
    rw.optimize_for_training(model.train())
    training, evaluating = model(input_ids=ids, labels=ids).loss, model.eval()(input_ids=ids).logits
    done = rw.optimize_for_training(model.train(), products="int8")
    assert done.eight_bit == 7 * model.config.num_hidden_layers
    in_bytes = model(input_ids=ids, labels=ids).loss
    assert in_bytes != training
    assert in_bytes.item() == pytest.approx(training.item(), rel=0.01)
    assert torch.equal(model.eval()(input_ids=ids).logits, evaluating)
    restore(model)
    assert all(layer.at_work.eight_bit is None for _, layer in adapted_layers(model))


def test_scales_follow_a_changed_weight_and_keep_the_first_rows() -> None:
    frozen = Frozen(random(96, 64), eight_bit.EightBit())
    most = frozen.weight.abs().amax(dim=0)
    for rows in (random(8, 64), 5 * random(8, 64, seed=1)):
        eight_bit.calibrate(rows, [(frozen.eight_bit, frozen)])
    assert torch.equal(frozen.eight_bit.channel, eight_bit.channel_scales(random(8, 64).abs().amax(0), most))
    before = frozen.scales.row.clone()
    frozen.weight.mul_(2)
    torch.testing.assert_close(frozen.scales.row, 2 * before)


def test_calibration_depends_only_on_the_base() -> None:
    found = []
    for seed in (0, 1):
        model = tiny_llama(hidden_size=64, intermediate_size=96).bfloat16()
        torch.manual_seed(seed)
        rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False))
        rw.optimize_for_training(model.train(), products="int8")
        calibrate_products(model, torch.arange(3, 40)[None])
        found.append([layer.at_work.eight_bit.channel for _, layer in adapted_layers(model)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    q, k, v = found[0][:3]
    assert q is k is v


class Mixture(torch.nn.Module):
    """Token 0 goes to the first expert, the others to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 32)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x, is_first = self.embedding(input_ids), input_ids == 0
        return torch.cat([self.experts[0](x[is_first]), self.experts[1](x[~is_first])])


def test_experts_without_a_token_to_calibrate_them_stay_as_they_are() -> None:
    model = Mixture().bfloat16()
    rw.add_adapter(model, rw.LoraConfig(r=4, target_modules=["0", "1"]))
    rw.optimize_for_training(model.train(), products="int8")
    assert calibrate_products(model, torch.zeros(1, 8, dtype=torch.long)) == 1
    model(torch.arange(9)[None])
    first, second = (layer.at_work.eight_bit for _, layer in adapted_layers(model))
    assert first.channel is not None
    assert second is None


@pytest.mark.parametrize("level", LEVELS or [None], indirect=True)
@pytest.mark.parametrize("part", [0.6, 0.8])
def test_eight_bits_are_taken_where_they_pay(level: str | None, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows of float32 and bfloat16. AVX2's integers pay on some processors, so they are measured."""
    if level is None:
        pytest.skip("no native library")
    monkeypatch.setattr(products, "seconds_of_integers", lambda dtype, level: part)
    known = {"portable": (0, 0), "avx_vnni": (1, 1), "avx512_bf16": (0, 1), "amx": (0, 0)}
    found = eight_bit_pays(torch.ones(1)), eight_bit_pays(torch.ones(1).bfloat16())
    assert found == known.get(level, (part < 0.7, part < 0.7))


@needs_avx2
def test_the_time_of_integers_is_measured_in_a_plan_too(avx2: None, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, add, fakes = torch.get_num_threads(), products.add_products, []
    monkeypatch.setattr(products, "add_products", lambda terms, out: fakes.append(is_fake(add(terms, out))))
    with FakeTensorMode():
        assert 0.1 < products.seconds_of_integers.__wrapped__(torch.float32, "avx2") < 5
    assert set(fakes) == {False}
    assert torch.get_num_threads() == threads
