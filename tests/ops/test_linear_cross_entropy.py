"""The loss of an output head in chunks, against PyTorch's of whole logits and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from marks import at_some_level
from rankwise.constants import CARD_TILE, chunk_rows
from rankwise.ops import linear_cross_entropy as chunked
from rankwise.ops.branch import Frozen
from rankwise.ops.eight_bit import EightBit
from rankwise.ops.eight_bit import product as eight_bit_product
from rankwise.ops.linear_cross_entropy import LogitShape, linear_cross_entropy, linear_log_probs

pytestmark = at_some_level

SHAPES = (LogitShape(), LogitShape(0.5), LogitShape(1.3, 2.0))
TARGETS = torch.tensor([1, -100, 3, 10, 0])


@pytest.fixture(autouse=True)
def rows_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(chunked, "chunk_rows", lambda *_, **__: 2)


def given(dtype: torch.dtype, *, biased: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (5, 4), weight (11, 4) and bias (11,)."""
    hidden = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(11, 4, dtype=dtype), torch.randn(11, dtype=dtype) if biased else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck_in_float64(shape: LogitShape, smoothing: float, biased: bool) -> None:
    hidden, weight, bias = given(torch.float64, biased=biased)

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, TARGETS, shape=shape, label_smoothing=smoothing, bias=bias).loss

    assert torch.autograd.gradcheck(loss, (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_loss_of_whole_logits(dtype: torch.dtype, shape: LogitShape, smoothing: float) -> None:
    hidden, weight, bias = given(dtype, biased=True)
    logits = shape(F.linear(hidden, weight, bias))
    expected = F.cross_entropy(logits, TARGETS, reduction="sum", label_smoothing=smoothing)
    options = {"shape": shape, "label_smoothing": smoothing, "bias": bias, "want_stats": True}
    found = linear_cross_entropy(hidden, weight, TARGETS, **options)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (found.loss, expected)))
    scored = logits[TARGETS != -100].double()
    entropy = torch.distributions.Categorical(logits=scored).entropy().sum()
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-6)
    assert found.correct == (scored.argmax(1) == TARGETS[TARGETS != -100]).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_equal_those_of_whole_logits(shape: LogitShape, temperature: float, dtype: torch.dtype) -> None:
    """Each target's, and the gradient of a sum that weighs each otherwise."""
    hidden, weight, bias = given(dtype, biased=True)
    targets, weights = torch.tensor([1, 7, 3, 10, 0]), torch.tensor([0.3, -2.0, 0.0, 1.0, 5.0], dtype=dtype)
    logits = shape(F.linear(hidden, weight, bias)) / temperature
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    found = linear_log_probs(hidden, weight, targets, shape=shape.at(temperature), bias=bias, want_stats=True)
    torch.testing.assert_close(found.log_probs, expected)
    grads = [torch.autograd.grad((weights * each).sum(), hidden)[0] for each in (found.log_probs, expected)]
    torch.testing.assert_close(*grads)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy().sum()
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-6)
    assert found.correct == (logits.argmax(1) == targets).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_have_a_loss_of_zero_with_gradients(dtype: torch.dtype) -> None:
    hidden, weight, _ = given(dtype, biased=False)
    found = linear_cross_entropy(hidden[:0], weight, TARGETS[:0], want_stats=True)
    found.loss.backward()
    assert found.loss == found.entropy == found.correct == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize(("vocabulary", "rows"), [(32_000, 2048), (128_256, 2048), (151_936, 1536), (262_144, 1024)])
def test_chunks_of_a_card_hold_whole_tiles(vocabulary: int, rows: int) -> None:
    assert chunk_rows(vocabulary, 2, on_card=True) == rows
    assert rows % CARD_TILE == 0


def test_logits_in_8_bits_are_those_of_the_specification() -> None:
    hidden, weight = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(96, 64).bfloat16()
    targets, eight_bit = torch.tensor([1, -100, 3, 95, 0, 7]), EightBit(torch.linspace(0.5, 2, 64))
    scales = Frozen(weight, eight_bit).scales
    assert scales is not None
    found = linear_cross_entropy(hidden, weight, targets, eight_bit=eight_bit)
    logits = eight_bit_product(hidden.detach(), weight, scales).bfloat16().float().requires_grad_()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    exact = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    torch.testing.assert_close(found.loss, expected, rtol=1e-3, atol=0)
    assert abs(found.loss - expected) < abs(exact - expected) / 4


def test_the_gradient_of_logits_in_8_bits_has_no_bias() -> None:
    """Beside an entry near 1, 8 bits round thousands to zero. The head's rows have a common part, in which their sum
    shows."""
    weight = (1 + torch.randn(4096, 64)).bfloat16()
    targets = torch.randint(0, 4096, (128,))
    hidden = (0.1 * (weight[targets].float() - 1) + 0.15 * torch.randn(128, 64)).bfloat16().requires_grad_()
    targets[5] = -100
    z = (hidden.detach().float() @ weight.float().T).requires_grad_()
    (z_grad,) = torch.autograd.grad(F.cross_entropy(z, targets, reduction="sum"), z)
    exact = z_grad @ weight.float()
    loss = linear_cross_entropy(hidden, weight, targets, eight_bit=EightBit(torch.ones(64))).loss
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not grad[5].any()
    for found, wanted in ((grad.float(), exact), (grad.float().mean(0), exact.mean(0))):
        assert (found - wanted).norm() < 0.03 * wanted.norm()
