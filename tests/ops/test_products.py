"""Sums of products, on tiles of bfloat16 pairs or in float32, against float64 and against PyTorch's own steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from marks import LEVELS, needs_products
from rankwise import ops
from rankwise.ops import low_rank_linear as operator
from rankwise.ops import low_rank_steps
from rankwise.ops.branch import Branch, Dropout, Frozen, input_grad_out, linear_out
from rankwise.ops.cpu import low_rank, products
from rankwise.ops.low_rank_linear import low_rank_linear
from tables import thinned

# (T, N, K): a single row, odd sizes, whole tiles, several parts of the sum, rows whose lines share sets of the cache.
SHAPES = [(1, 1, 1), (1, 40, 577), (7, 33, 50), (64, 96, 576), (300, 200, 1600), (100, 70, 2048), (33, 40, 8300)]


# AVX-512 without bfloat16 has those of AVX2.
WITH_PRODUCTS = [name for name in LEVELS if name not in ("portable", "avx512")]
# AVX-512 multiplies pairs of bfloat16 in two ways, of which a processor takes the quicker one.
WAYS = [(name, "measured") for name in WITH_PRODUCTS if name != "avx512_bf16"]
WAYS += [("avx512_bf16", pairs) for pairs in ("widened", "dots") if "avx512_bf16" in WITH_PRODUCTS]
pytestmark = pytest.mark.parametrize(("level", "pairs"), WAYS or [(None, None)], indirect=True)


@pytest.fixture
def pairs(level: str | None, request: pytest.FixtureRequest) -> Iterator[None]:
    if level is not None:
        products.allow(True, request.param)
    yield
    if level is not None:
        products.allow(True)


@pytest.fixture(autouse=True)
def _at_a_level(level: str | None, pairs: None) -> None:
    """First of all fixtures."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rounded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random(*shape, seed=seed).to(dtype)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of what is multiplied, where this level takes it."""
    dtype: torch.dtype = getattr(torch, request.param)
    if not products.take(dtype):
        pytest.skip(f"no sums of products in {dtype} here")
    return dtype


def assert_rounded_once(y: Tensor, exact: Tensor) -> None:
    """y is exact up to one rounding, and to float32 sums whose terms are as large as the largest result."""
    close = 2**-8 if y.dtype is torch.bfloat16 else 2**-19
    tolerance = exact.abs() * close + exact.abs().max() * close
    assert ((y.double() - exact).abs() <= tolerance).all()


@needs_products
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_a_weight_and_its_branch(shape: tuple[int, int, int], transposed: bool, rows: torch.dtype) -> None:
    T, N, K = shape
    x, u, B, g, bias = rounded(T, K, dtype=rows), rounded(T, 5, dtype=rows), random(N, 5), random(N).abs(), random(N)
    W = rounded(K, N, seed=1, dtype=rows).T if transposed else rounded(N, K, seed=1, dtype=rows)
    factor = products.Factor.of(W)
    assert factor is not None
    branch = products.Factor.of(B)
    assert branch is not None
    terms = [products.Term(a=x, W=factor), products.Term(a=u, W=branch, scale=0.5)]
    y = products.add_products(terms, x.new_empty(T, N), g, bias)
    low_rank_part = 0.5 * u.double() @ B.double().T
    assert_rounded_once(y, g.double() * (x.double() @ W.double().T + low_rank_part) + bias.double())


@needs_products
@pytest.mark.parametrize(("T", "N", "K", "r"), [(1, 1, 1, 1), (40, 48, 576, 16), (33, 70, 50, 5), (300, 600, 700, 300)])
def test_exact_terms_keep_what_rounding_leaves(T: int, N: int, K: int, r: int) -> None:
    """``x A^T`` comes as two bfloat16 matrices, and with B as another two: as exact as 16 bits of mantissa are."""
    x, A, B = rounded(T, K), random(r, K, seed=1), random(N, r, seed=2)
    U, rest = x.new_empty(T, r), x.new_empty(T, r)
    factor, branch = products.Factor.of(A), products.Factor.of(B)
    assert factor is not None
    assert branch is not None
    products.add_products([products.Term(a=x, W=factor, exact=True)], U, rest=rest)
    exact = x.double() @ A.double().T
    assert (U.double() + rest.double() - exact).abs().max() <= 2**-15 * exact.abs().max() + 1e-4 * K**0.5
    assert (rest.abs() <= U.abs() * 2**-8).all()
    y, y_rest = x.new_empty(T, N), x.new_empty(T, N)
    products.add_products([products.Term(a=U, W=branch, scale=0.5, exact=True, a_rest=rest)], y, rest=y_rest)
    exact = 0.5 * (U.double() + rest.double()) @ B.double().T
    assert (y.double() + y_rest.double() - exact).abs().max() <= 2**-14 * exact.abs().max()


@needs_products
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_the_way_back(shape: tuple[int, int, int], transposed: bool, rows: torch.dtype) -> None:
    T, N, K = shape
    dy, dU, A, gain = rounded(T, N, dtype=rows), rounded(T, 3, dtype=rows), random(3, K), random(N).abs()
    W = rounded(K, N, seed=1, dtype=rows).T if transposed else rounded(N, K, seed=1, dtype=rows)
    factor, branch = products.Factor.of(W), products.Factor.of(A)
    assert factor is not None
    assert branch is not None
    terms = [products.Term(a=dy, W=factor, across=True, gain=gain), products.Term(a=dU, W=branch, across=True)]
    dx = products.add_products(terms, dy.new_empty(T, K))
    assert_rounded_once(dx, (dy.double() * gain.double()) @ W.double() + dU.double() @ A.double())


@needs_products
@thinned(
    {
        "N,K,block_size": [(96, 256, 64), (40, 80, 64), (33, 50, 32), (64, 4096, 4096)],
        "T": [5, 70],
        "double_quant": [False, True],
    }
)
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_four_bits_are_what_dequantization_gives(
    N: int, K: int, block_size: int, double_quant: bool, T: int, rows: torch.dtype
) -> None:
    packed = ops.quantize_weight(random(N, K), "nf4", block_size, double_quant)
    weight, dense = products.Factor.of(packed), products.Factor.of(ops.dequantize_weight(packed, rows))
    assert weight is not None
    assert dense is not None
    x, dy = rounded(T, K, dtype=rows), rounded(T, N, dtype=rows)
    for across, a, columns, factor in (
        (False, x, N, None),
        (False, x, N, random(K).abs()),
        (True, dy, K, random(N).abs()),
    ):
        found, expected = (
            products.add_products([products.Term(a=a, W=of, across=across, gain=factor)], a.new_empty(T, columns))
            for of in (weight, dense)
        )
        assert torch.equal(found, expected)


@needs_products
@thinned(
    {
        "T,R,C": [(1, 1, 1), (70, 16, 100), (600, 33, 2100)],
        "by_column": [False, True],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_products_over_rows(T: int, R: int, C: int, by_column: bool, dtype: torch.dtype, rows: torch.dtype) -> None:
    q, m, y = rounded(T, R, dtype=rows), rounded(T, C, dtype=rows), rounded(T, C, seed=1, dtype=rows)
    gain, divisor = random(C), random(C)
    divisor[0] = 0.0
    out, dot = products.row_product(q, m, y=y, divisor=divisor, scale=0.75, gain=gain, by_column=by_column, dtype=dtype)
    exact = 0.75 * gain.double() * (q.double().T @ m.double())
    close = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(
        out.double(), exact.T if by_column else exact, rtol=close, atol=close * float(exact.abs().max())
    )
    assert dot is not None
    assert dot[0] == 0
    sums = (m.double() * y.double()).sum(0)
    torch.testing.assert_close((dot * divisor)[1:].double(), sums[1:], rtol=1e-4, atol=1e-4 * float(sums.abs().max()))


@needs_products
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(T=st.integers(1, 130), N=st.integers(1, 150), K=st.integers(1, 150), gap=st.integers(0, 3))
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_any_shape_and_any_distance_of_rows(T: int, N: int, K: int, gap: int, rows: torch.dtype) -> None:
    x, W, out = (rounded(*shape, dtype=rows) for shape in ((T, K + gap), (N, K + gap), (T, N + gap)))
    x, W = x[:, :K], W[:, :K]
    untouched = out[:, N:].clone()
    factor = products.Factor.of(W)
    assert factor is not None
    assert_rounded_once(products.add_products([products.Term(a=x, W=factor)], out[:, :N]), x.double() @ W.double().T)
    assert torch.equal(out[:, N:], untouched)


@needs_products
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_threads_change_no_bit(rows: torch.dtype) -> None:
    x, W, q = rounded(600, 2000, dtype=rows), rounded(300, 2000, dtype=rows), rounded(600, 16, dtype=rows)
    factor = products.Factor.of(W)
    assert factor is not None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = products.add_products([products.Term(a=x, W=factor)], x.new_empty(600, 300))
            found.append((y, products.row_product(q, x)[0]))
    finally:
        torch.set_num_threads(before)
    for y, S in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(S, found[0][1])


@needs_products
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_not_a_number_stays_in_its_row_and_column(rows: torch.dtype) -> None:
    x, W = rounded(40, 64, dtype=rows), rounded(48, 64, dtype=rows)
    x[3, 5] = float("nan")
    W[7, 9] = float("inf")
    factor = products.Factor.of(W)
    assert factor is not None
    y = products.add_products([products.Term(a=x, W=factor)], x.new_empty(40, 48))
    wrong = ~y.isfinite()
    expected = torch.zeros_like(wrong)
    expected[3], expected[:, 7] = True, True
    assert torch.equal(wrong, expected)


def two_branches(*, dora: bool, bias: bool, dtype: torch.dtype, rows: torch.dtype = torch.bfloat16) -> list[Branch]:
    made = []
    for width, r in ((96, 4), (70, 7)):
        m = gain = None
        if dora:
            m, gain = random(width).abs().add(0.5).requires_grad_(), random(width, seed=2).abs().add(0.5)
        A, B = random(r, 80).to(dtype).requires_grad_(), random(width, r).to(dtype).requires_grad_()
        b = rounded(width, dtype=rows).requires_grad_() if bias else None
        made.append(Branch(frozen=Frozen(rounded(width, 80, dtype=rows)), scale=0.75, A=A, B=B, bias=b, m=m, gain=gain))
    return made


def gradients(made: list[Branch], x: Tensor, dropout: Dropout | None, unused: bool = False) -> list[Tensor]:
    ys = low_rank_linear(x, made, dropout)
    total = sum((y.float() * rounded(*y.shape).float()).sum() for y in ys[: 1 if unused else 2])
    tensors = [tensor for branch in made for tensor in branch.tensors if tensor is not None]
    grads = torch.autograd.grad(total, [x, *tensors], allow_unused=True)  # type: ignore[arg-type]
    return [*ys, *(torch.zeros(()) if grad is None else grad for grad in grads)]


@pytest.fixture
def without_products() -> Iterator[None]:
    products.allow(False)
    yield
    products.allow(True)


@needs_products
@thinned({"dora": [False, True], "bias": [False, True], "p": [0.0, 0.3], "dtype": [torch.float32, torch.bfloat16]})
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_the_operator_is_no_worse_than_in_separate_steps(
    dora: bool, bias: bool, p: float, dtype: torch.dtype, rows: torch.dtype, request: pytest.FixtureRequest
) -> None:
    made, dropout = two_branches(dora=dora, bias=bias, dtype=dtype, rows=rows), Dropout(p, 3) if p else None
    x = rounded(2, 20, 80, dtype=rows).requires_grad_()
    wide = [
        dataclasses.replace(
            branch,
            frozen=Frozen(branch.frozen.weight.float()),  # type: ignore[union-attr]
            A=branch.A.detach().float().requires_grad_(),
            B=branch.B.detach().float().requires_grad_(),
            bias=None if branch.bias is None else branch.bias.detach().float().requires_grad_(),
        )
        for branch in made
    ]
    exact = gradients(wide, x.detach().float().requires_grad_(), dropout)
    assert isinstance(operator._steps(x.reshape(-1, 80), made), low_rank.Steps)
    ours = gradients(made, x, dropout)
    request.getfixturevalue("without_products")
    assert operator._steps(x.reshape(-1, 80), made) is low_rank_steps
    for found, plain, wanted in zip(ours, gradients(made, x, dropout), exact):
        errors = [float((each.float() - wanted).norm() / wanted.norm()) for each in (found, plain)]
        assert errors[0] <= 1.2 * errors[1] + (2**-10 if torch.bfloat16 in (dtype, rows) else 2**-20)
        assert found.dtype is plain.dtype


@needs_products
def test_a_branch_whose_output_nobody_used() -> None:
    made, x = two_branches(dora=False, bias=False, dtype=torch.float32), rounded(40, 80).requires_grad_()
    dx, dA, dB, *rest = gradients(made, x, None, unused=True)[2:]
    assert all(float(grad.float().abs().sum()) > 0 for grad in (dx, dA, dB))
    assert all(float(grad.float().abs().sum()) == 0 for grad in rest)


@needs_products
def test_few_rows_and_weights_with_gaps_take_separate_steps() -> None:
    """Few rows repay no packing."""
    made = two_branches(dora=False, bias=False, dtype=torch.float32)
    assert operator._steps(rounded(3, 80), made) is low_rank_steps
    assert operator._steps(random(3, 80), made) is low_rank_steps
    four_bits = [dataclasses.replace(made[0], frozen=Frozen(ops.quantize_weight(rounded(96, 128))))]
    assert operator._steps(rounded(3, 128), four_bits) is low_rank_steps
    assert isinstance(operator._steps(rounded(40, 128), four_bits), low_rank.Steps)
    gaps = [dataclasses.replace(made[0], frozen=Frozen(rounded(192, 160)[::2, ::2]))]
    assert operator._steps(rounded(40, 80), gaps) is low_rank_steps


@pytest.mark.parametrize("T", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dense_weight_and_its_input_gradient(T: int, dtype: torch.dtype) -> None:
    x, W, b, dy = (rounded(*shape, dtype=dtype) for shape in ((T, 64), (300, 64), (300,), (T, 300)))
    exact = x.double() @ W.double().T
    assert_rounded_once(linear_out(x, W, torch.empty_like(dy)), exact)
    assert_rounded_once(linear_out(x, W, torch.empty_like(dy), b), exact + b.double())
    assert_rounded_once(input_grad_out(dy, W, torch.empty_like(x)), dy.double() @ W.double())


@needs_products
@thinned(
    {
        "T": [5, 16, 17, 64],
        "N,K,block_size": [(40, 256, 64), (7, 4096, 4096), (100, 128, 128)],
        "double_quant": [False, True],
    }
)
@pytest.mark.parametrize("rows", ["bfloat16", "float32"], indirect=True)
def test_few_rows_of_four_bits(T: int, N: int, K: int, block_size: int, double_quant: bool, rows: torch.dtype) -> None:
    packed = ops.quantize_weight(random(N, K), "fp4", block_size, double_quant)
    x, bias = rounded(2, T, K, dtype=rows)[1], rounded(N, dtype=rows)
    W = ops.dequantize_weight(packed, rows)
    y = ops.linear_4bit(x, packed, bias)
    assert_rounded_once(y, x.double() @ W.double().T + bias.double())
