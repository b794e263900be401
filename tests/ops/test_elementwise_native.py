"""The element-wise kernels against float64: at every instruction set, at odd sizes and strides, in poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marks import LEVELS
from rankwise.constants import IGNORED
from rankwise.errors import QuantizationError
from rankwise.ops import reference as reference
from rankwise.ops.checks import ACTIVATIONS
from rankwise.ops.cpu import native
from tables import thinned

if native.obstacle() is not None:
    pytest.skip(f"no native library: {native.obstacle()}", allow_module_level=True)

from rankwise.ops.cpu import elementwise

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(0, 5), (1, 1), (1, 33), (3, 16), (70, 130), (131, 257)]
# Float32's rounding along a sum or a polynomial, relative to the largest number in sight.
FLOAT32 = 1e-6


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that an element not written shows."""
    plain = torch.empty

    def empty(*arguments, **options):
        made = plain(*arguments, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", empty)


def rows(T: int, N: int, dtype: torch.dtype, *, apart: bool = False, seed: int = 0) -> torch.Tensor:
    """(T, N), where ``apart`` as the second half of a (T, 2 N) buffer."""
    made = torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made[:, N:] if apart else made[:, :N].contiguous()


def assert_as_exact(
    run: str, arguments: tuple, *, in_place: bool = False, float32: float = FLOAT32, terms: float = 0.0
) -> None:
    """Each result's error against float64 is at most the reference's in the same dtype, plus one rounding.

    ``terms``: the size of what is summed, where the sum may cancel.
    """
    exact = call(reference, run, tuple(map(doubled, arguments)), in_place)
    rounded, found = call(reference, run, arguments, in_place), call(elementwise, run, arguments, in_place)
    assert len(found) == len(exact)
    for one, expected, true in zip(found, rounded, exact):
        assert (one.dtype, one.shape) == (expected.dtype, expected.shape)
        if not one.numel():
            continue
        scale = true.abs().max()
        tolerance = torch.finfo(one.dtype).eps / 2 * scale + float32 * max(float(scale), terms)
        error = (one.double() - true).abs().max()
        assert error <= (expected.double() - true).abs().max() + tolerance, (run, error, scale)


def doubled(argument):
    return argument.double() if torch.is_tensor(argument) and argument.is_floating_point() else argument


def call(module, run: str, arguments: tuple, in_place: bool) -> list[torch.Tensor]:
    """The tensors that come back, and what has become of the first argument."""
    first = clone_with_strides(arguments[0]) if in_place else arguments[0]
    results = getattr(module, run)(first, *arguments[1:])
    results = results if isinstance(results, tuple) else (results,)
    assert not in_place or run == "cross_entropy_" or results[0] is first
    kept = [result for result in results if result is not None and result.is_floating_point()]
    return [*kept, first] if run == "cross_entropy_" and in_place else kept


def clone_with_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory as the tensor does, gaps included."""
    storage = tensor.untyped_storage().clone()
    made = torch.zeros(0, dtype=tensor.dtype)
    return made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@thinned({"T,N": SIZES, "R": [1, 7, 65], "dtype": DTYPES})
def test_low_rank_add(level: str, dtype: torch.dtype, T: int, N: int, R: int) -> None:
    g, bias = torch.rand(N) + 0.5, torch.randn(N).to(dtype)
    for apart, gain, shift in ((False, None, None), (True, g, None), (True, None, bias), (False, g, bias)):
        y, u, B = rows(T, N, dtype, apart=apart), rows(T, R, dtype, apart=apart, seed=1), rows(N, R, dtype, seed=2)
        assert_as_exact("low_rank_add_", (y, u, B, 0.3, gain, shift), in_place=True, float32=R * FLOAT32 / 8 + FLOAT32)


def test_low_rank_add_leaves_the_gaps_between_rows_alone(level: str) -> None:
    buffer = torch.randn(9, 50)
    before = buffer.clone()
    elementwise.low_rank_add_(buffer[:, 10:31], torch.randn(9, 4), torch.randn(21, 4), 1.0, None, None)
    assert torch.equal(buffer[:, :10], before[:, :10])
    assert torch.equal(buffer[:, 31:], before[:, 31:])
    assert not torch.equal(buffer, before)


@thinned({"T,N": SIZES, "dtype": DTYPES})
def test_scaled_grad(level: str, dtype: torch.dtype, T: int, N: int) -> None:
    g = torch.rand(N) + 0.5
    for apart in (False, True):
        dy, y = rows(T, N, dtype, apart=apart), rows(T, N, dtype, apart=apart, seed=1)
        assert_as_exact("scaled_grad", (dy, y, g), float32=1e-5)
        dz, dot = elementwise.scaled_grad(dy, None, g)
        assert dot is None
        assert torch.equal(dz, reference.scaled_grad(dy, None, g)[0])


@thinned({"T,D": SIZES, "offset,cast_first": [(0, True), (0, False), (1, False), (1, True)], "dtype": DTYPES})
def test_rms_norm(level: str, dtype: torch.dtype, T: int, D: int, offset: int, cast_first: bool) -> None:
    w = torch.randn(D).to(dtype)
    for apart in (False, True):
        x, dy = rows(T, D, dtype, apart=apart), rows(T, D, dtype, apart=apart, seed=1)
        assert_as_exact("rms_norm", (x, w, 1e-5, offset, cast_first))
        rstd = reference.rms_norm(x, w, 1e-5, offset, cast_first)[1]
        terms = float((dy.abs() * (offset + w).abs()).sum() * rstd.max()) if T else 0.0
        for residual in (None, rows(T, D, dtype, apart=not apart, seed=2)):
            assert_as_exact("rms_norm_backward", (dy, x, w, rstd, offset, residual), terms=terms / max(T, 1))


@thinned({"T,N": SIZES, "act": ACTIVATIONS, "dtype": DTYPES})
def test_glu(level: str, dtype: torch.dtype, T: int, N: int, act: str) -> None:
    for apart in (False, True):
        gate, up, dout = (rows(T, N, dtype, apart=apart, seed=seed) for seed in range(3))
        assert_as_exact("glu", (gate, up, act))
        for product in (False, True):
            assert_as_exact("glu_backward", (dout, gate, up, act, product))
        again = elementwise.glu_backward(dout, gate, up, act, True)[2]
        assert torch.equal(again, elementwise.glu(gate, up, act))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_of_large_and_small_numbers(level: str, act: str) -> None:
    x = torch.cat([torch.linspace(-120, 120, 48001), torch.tensor([1e-30, -1e-30, 1e10, -1e10, 1e30, -1e30])])
    one = torch.ones_like(x)
    product, (slope, dup, _) = elementwise.glu(x, one, act), elementwise.glu_backward(one, x, one, act, False)
    true, (true_slope, *_) = (
        reference.glu(x.double(), one.double(), act),
        reference.glu_backward(one.double(), x.double(), one.double(), act, False),
    )
    assert ((product.double() - true).abs() <= 4e-7 * x.double().abs() + 1e-30).all()
    # Beside float64 the argument of the exponential, up to 100, is itself rounded.
    assert (slope.double() - true_slope).abs().max() <= 4e-6
    assert torch.equal(dup, product)


@thinned(
    {
        "D,turned": [(2, 2), (64, 64), (80, 32), (14, 6), (7, 0)],
        "dtype": DTYPES,
        "table_dtype": DTYPES,
        "inverse": [False, True],
    }
)
def test_rope(level: str, dtype: torch.dtype, table_dtype: torch.dtype, D: int, turned: int, inverse: bool) -> None:
    B, H, L = 2, 3, 5
    for batches in (1, B):
        cos, sin = torch.randn(2, batches, L, turned).to(table_dtype)
        for q in (
            torch.randn(B, L, H, D).to(dtype).transpose(1, 2),
            torch.randn(B, H, L, D).to(dtype),
            torch.randn(B, L, H, 3 * D).to(dtype)[..., D : 2 * D].transpose(1, 2),
            torch.randn(B, H, D, L).to(dtype).transpose(2, 3),
        ):
            assert_as_exact("rope", (q, cos, sin, inverse))
            assert_as_exact("rope_", (q, cos, sin, inverse), in_place=True)
            assert elementwise.rope(q, cos, sin, inverse).transpose(1, 2).is_contiguous()


def test_rope_in_place_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "rope", None)
    cos, sin = torch.randn(2, 1, 5, 4)
    for q in (torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(2, 3, 5, 12)[..., 4:8]):
        expected = reference.rope(q, cos, sin, False)
        torch.testing.assert_close(elementwise.rope_(q, cos, sin, False), expected)


@thinned({"V": [1, 3, 129, 4099], "smoothing": [0.0, 0.1], "softcap": [None, 5.0], "dtype": DTYPES})
def test_cross_entropy(level: str, dtype: torch.dtype, V: int, smoothing: float, softcap: float | None) -> None:
    for C in (0, 1, 6):
        logits = (4 * rows(C, V, dtype, apart=C == 6)).mul_(1)
        logits = logits if C != 6 else (4 * torch.randn(C, 2 * V)).to(dtype)[:, V:]
        targets = torch.randint(0, V, (C,), generator=torch.Generator().manual_seed(V))
        targets[1:2] = IGNORED
        targets[3:4] = logits[3].argmax() if C > 3 else 0
        for multiplier, scale in ((1.0, 1.0), (0.7, 0.25)):
            arguments = (logits, targets, scale, smoothing, softcap, multiplier, True, True, True)
            assert_as_exact("cross_entropy_", arguments, in_place=True, float32=4 * FLOAT32)
            found, expected = (
                module.cross_entropy_(clone_with_strides(logits), *arguments[1:])[2]
                for module in (elementwise, reference)
            )
            assert found == expected


def test_cross_entropy_without_gradients_changes_nothing(level: str) -> None:
    logits, targets = torch.randn(5, 100), torch.tensor([0, 99, -100, 5, 6])
    before = logits.clone()
    loss, entropy, correct = elementwise.cross_entropy_(logits, targets, 1.0, 0.0, None, 1.0, False, False, False)
    assert torch.equal(logits, before)
    assert (entropy, correct) == (None, None)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))


def test_correct_means_the_first_largest(level: str) -> None:
    logits = torch.zeros(4, 40)
    logits[1, [3, 30]] = 2.0
    logits[2, [3, 30]] = 2.0
    logits[3, 39] = 1.0
    targets = torch.tensor([0, 30, 3, 39])
    assert elementwise.cross_entropy_(logits, targets, 1.0, 0.0, None, 1.0, False, False, True)[2] == 3


@pytest.mark.parametrize("column", [3, 77])
def test_nan_and_masked_logits(level: str, column: int) -> None:
    """A NaN reaches the loss; logits of minus infinity have no probability."""
    logits, targets = torch.randn(2, 80), torch.tensor([5, 6])
    logits[0, column] = float("nan")
    assert elementwise.cross_entropy_(logits.clone(), targets, 1.0, 0.0, None, 1.0, True, True, False)[0].isnan()
    logits[0, column] = -float("inf")
    found, expected = logits.clone(), logits.clone()
    results = elementwise.cross_entropy_(found, targets, 1.0, 0.0, None, 1.0, True, True, False)
    wanted = reference.cross_entropy_(expected, targets, 1.0, 0.0, None, 1.0, True, True, False)
    torch.testing.assert_close(results[:2], wanted[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected)
    assert found[0, column] == 0


@pytest.mark.parametrize("target", [-1, 10, -101, 1 << 40])
def test_targets_out_of_range(level: str, target: int) -> None:
    logits, targets = torch.randn(3, 10), torch.tensor([1, target, 2])
    before = logits.clone()
    for module in (elementwise, reference):
        with pytest.raises(QuantizationError, match=f"RW621.*row 1 is {target}"):
            module.cross_entropy_(logits, targets, 1.0, 0.0, None, 1.0, True, False, False)
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 40),
    N=st.integers(1, 300),
    p=st.one_of(st.floats(0, 0.99), st.sampled_from([0.0, 0.05, 0.1, 0.5])),
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(LEVELS),
)
def test_dropout_equals_the_reference_to_the_bit(T, N, p, seed, dtype, level) -> None:
    native.set_level(level)
    x, dx = rows(T, N, dtype), rows(T, N, dtype, seed=1)
    found = elementwise.dropout(x, p, seed)
    assert torch.equal(found, reference.dropout(x, p, seed))
    assert torch.equal(elementwise.dropout_add_(dx.clone(), x, p, seed), reference.dropout_add_(dx.clone(), x, p, seed))
    native.set_level(None)


def test_threads_change_no_bit(level: str) -> None:
    """Sums over rows are cut at fixed places, whoever adds them up."""
    T, N, threads = 300, 257, torch.get_num_threads()
    x, y, w, g = (
        rows(T, N, torch.bfloat16),
        rows(T, N, torch.bfloat16, seed=1),
        torch.randn(N).bfloat16(),
        torch.rand(N),
    )
    targets = torch.randint(0, N, (T,))

    def results() -> list[torch.Tensor]:
        normal, rstd = elementwise.rms_norm(x, w, 1e-5, 0, True)
        logits = x.clone()
        return [
            elementwise.low_rank_add_(x.clone(), y[:, :16], y[:257, :16].contiguous(), 0.5, g, None),
            *elementwise.scaled_grad(x, y, g),
            normal,
            elementwise.rms_norm_backward(y, x, w, rstd, 0, x),
            *elementwise.glu_backward(x, y, x, "silu", True),
            *elementwise.cross_entropy_(logits, targets, 1.0, 0.1, None, 1.0, True, True, True),
            logits,
            elementwise.dropout(x, 0.3, 1),
        ]

    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, results()))
    finally:
        torch.set_num_threads(threads)
