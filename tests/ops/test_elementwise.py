"""The public element-wise functions: what they equal, gradients against autograd, PyTorch's checks, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rankwise import ops
from rankwise.errors import QuantizationError
from rankwise.ops import elementwise
from rankwise.ops import reference as reference
from rankwise.ops.checks import ACTIVATIONS, sum_dtype
from tables import thinned

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ACTIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.fixture(params=["auto", "reference"])
def chosen(request: pytest.FixtureRequest):
    ops.set_implementation(request.param)
    yield request.param
    ops.set_implementation("auto")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def examples() -> dict[str, tuple[Any, ...]]:
    """Arguments of every registered operator."""
    x, y, z, B = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6), torch.randn(6, 3)
    q, tables, targets = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 4), torch.tensor([0, -100, 5, 2])
    return {
        "low_rank_add_": (x.clone(), torch.randn(4, 3), B, 0.5, torch.rand(6), torch.randn(6)),
        "scaled_grad": (x, y, torch.rand(6)),
        "rms_norm": (x, torch.rand(6), 1e-5, 0, True),
        "rms_norm_backward": (x, y, torch.rand(6), torch.rand(4), 1, z),
        "glu": (x, y, "gelu"),
        "glu_backward": (x, y, z, "silu", True),
        "rope": (q, tables, tables, False),
        "rope_": (q.clone(), tables, tables, True),
        "cross_entropy_": (x.clone(), targets, 0.5, 0.1, 30.0, 2.0, True, True, True),
        "dropout": (x, 0.3, 7),
        "dropout_add_": (x.clone(), y, 0.3, 7),
    }


@pytest.mark.parametrize("name", examples())
def test_opcheck(chosen: str, name: str) -> None:
    arguments = examples()[name]
    torch.library.opcheck(getattr(torch.ops.rankwise, name).default, arguments, test_utils=OPCHECKS)


def test_opcheck_with_absent_arguments_and_results() -> None:
    made = examples()
    shorter = {
        "low_rank_add_": (*made["low_rank_add_"][:4], None, None),
        "scaled_grad": (made["scaled_grad"][0], None, made["scaled_grad"][2]),
        "rms_norm_backward": (*made["rms_norm_backward"][:4], 0, None),
        "glu_backward": (*made["glu_backward"][:4], False),
        "cross_entropy_": (*made["cross_entropy_"][:2], 1.0, 0.0, None, 1.0, True, False, False),
    }
    for name, arguments in shorter.items():
        torch.library.opcheck(getattr(torch.ops.rankwise, name).default, arguments, test_utils=OPCHECKS)


@thinned({"name": list(examples()), "dtype": [torch.float32, torch.bfloat16, torch.float16]})
def test_fake_tensors_give_the_same_shapes(name: str, dtype: torch.dtype) -> None:
    arguments = [
        a.to(dtype) if torch.is_tensor(a) and a.dim() > 1 and a.is_floating_point() else a for a in examples()[name]
    ]
    real = flat(call(name, clones(arguments)))
    with FakeTensorMode() as mode:
        fake = flat(call(name, [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]))
    for one, other in zip(real, fake, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", examples())
def test_compiled_functions_return_the_same(name: str) -> None:
    torch._dynamo.reset()
    arguments = examples()[name]
    compiled = torch.compile(lambda *a: call(name, a), backend="aot_eager", fullgraph=True)
    first, second = clones(arguments), clones(arguments)
    for one, other in zip(flat(compiled(*first)), flat(call(name, second)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)


def call(name: str, arguments: Any) -> Any:
    function = getattr(elementwise, name)
    if name == "cross_entropy_":
        return function(*arguments[:7], want_entropy=arguments[7], want_correct=arguments[8])
    if name == "glu_backward":
        return function(*arguments[:4], want_product=arguments[4])
    return function(*arguments)


def clones(arguments: Any) -> list[Any]:
    return [a.clone() if torch.is_tensor(a) else a for a in arguments]


def flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def test_low_rank_add(chosen: str) -> None:
    y, u, B, g, bias = torch.randn(2, 5, 6), torch.randn(2, 5, 3), torch.randn(6, 3), torch.rand(6), torch.randn(6)
    expected = g * (y + 0.5 * u @ B.T) + bias
    found = elementwise.low_rank_add_(y, u, B, 0.5, g, bias)
    assert found is y
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("Norm", "offset", "cast_first"), [(LlamaRMSNorm, 0, True), (GemmaRMSNorm, 1, False)])
def test_rms_norm_is_that_of_transformers(
    chosen: str, dtype: torch.dtype, Norm: type[torch.nn.Module], offset: int, cast_first: bool
) -> None:
    norm = Norm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 64).to(dtype)
    y, rstd = elementwise.rms_norm(x, norm.weight, 1e-5, offset, cast_first)
    # One unit in the last place: sums of squares are added in another order.
    torch.testing.assert_close(y, norm(x), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(rstd, (x.float().square().mean(-1) + 1e-5).rsqrt().view(-1))


@pytest.mark.parametrize("offset", [0, 1])
def test_rms_norm_gradient(offset: int) -> None:
    x, w, dy, more = double(5, 7), double(7), double(5, 7).detach(), double(5, 7).detach()
    y, rstd = reference.rms_norm(x, w, 1e-5, offset, False)
    (expected,) = torch.autograd.grad(y, x, dy)
    found = elementwise.rms_norm_backward(dy, x.detach(), w.detach(), rstd.detach(), offset, more)
    torch.testing.assert_close(found, expected + more)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_glu_and_gradients(act: str) -> None:
    gate, up, dout = double(5, 7), double(5, 7), double(5, 7).detach()
    product = ACTIVE[act](gate) * up
    wanted = torch.autograd.grad(product, (gate, up), dout)
    torch.testing.assert_close(elementwise.glu(gate.detach(), up.detach(), act), product.detach())
    *found, again = elementwise.glu_backward(dout, gate.detach(), up.detach(), act)
    torch.testing.assert_close(found, list(wanted))
    torch.testing.assert_close(again, product.detach())


def test_glu_reads_halves_of_one_buffer(chosen: str) -> None:
    both = torch.randn(2, 3, 20)
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(elementwise.glu(gate, up, "silu"), functional.silu(gate) * up)


def test_rope_is_that_of_transformers(chosen: str) -> None:
    q, angle = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 5, 4).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    found = elementwise.rope(q, cos, sin)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(elementwise.rope(found, cos, sin, inverse=True), q)
    partial = elementwise.rope(q, cos[..., :4], sin[..., :4])
    assert torch.equal(partial[..., 4:], q[..., 4:])
    assert elementwise.rope_(q, cos, sin) is q
    torch.testing.assert_close(q, expected)


def test_rope_gradient() -> None:
    """Also where the two halves of cos and sin differ."""
    q, cos, sin, grad = (
        double(2, 3, 5, 8),
        double(1, 5, 6).detach(),
        double(1, 5, 6).detach(),
        double(2, 3, 5, 8).detach(),
    )
    (expected,) = torch.autograd.grad(reference.rope_(q.clone(), cos, sin, False), q, grad)
    torch.testing.assert_close(elementwise.rope(grad, cos, sin, inverse=True), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_and_gradient(chosen: str, smoothing: float, softcap: float | None) -> None:
    logits, targets = torch.randn(6, 50), torch.tensor([0, 49, -100, 7, -100, 8])
    exact = logits.double().requires_grad_()
    z = exact * 1.5
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = functional.cross_entropy(z, targets, reduction="sum", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss, exact)
    found, entropy, correct = elementwise.cross_entropy_(
        logits, targets, 0.25, smoothing, softcap, 1.5, want_entropy=True, want_correct=True
    )
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, 0.25 * grad.float(), rtol=1e-5, atol=1e-7)
    assert not logits[2].any()
    kept = torch.distributions.Categorical(logits=z[targets >= 0].detach())
    torch.testing.assert_close(entropy, kept.entropy().sum(), rtol=1e-6, atol=0)
    assert correct == (z.argmax(1) == targets).sum()
    assert elementwise.cross_entropy_(logits, targets)[1:] == (None, None)


def test_sums_of_apples_gpus_are_not_in_float64() -> None:
    assert {kind: sum_dtype(SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda", "mps")} == {
        "cpu": torch.float64,
        "cuda": torch.float64,
        "mps": torch.float32,
    }


def test_dropout_keeps_its_share_and_forgets_nothing(chosen: str) -> None:
    x, p = torch.ones(400, 500), 0.2
    y = elementwise.dropout(x, p, 11)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    kept = (y != 0).double()
    # Five standard deviations of a fair draw, over everything, rows and columns.
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / x.numel() ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * deviation / 400**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * deviation / 500**0.5
    assert torch.equal(elementwise.dropout_add_(x.clone(), x, p, 11), x + y)
    assert torch.equal(elementwise.dropout(x.view(-1), p, 11), y.view(-1))


@pytest.mark.parametrize("other", [12, 11 + (1 << 32), 11 ^ (1 << 63), -11])
def test_masks_of_two_seeds_are_independent(other: int) -> None:
    x, p = torch.ones(1 << 18), 0.5
    one, two = (elementwise.dropout(x, p, seed) != 0 for seed in (11, other))
    deviation = 0.5 / x.numel() ** 0.5
    assert abs((one == two).double().mean() - 0.5) < 5 * deviation
    for shift in (1, 2, 64, 576, 4096):
        assert abs((one[shift:] == one[:-shift]).double().mean() - 0.5) < 6 * deviation
        assert abs((one[shift:] == two[:-shift]).double().mean() - 0.5) < 6 * deviation


@pytest.mark.parametrize("bit", [0, 5, 15])
def test_every_bit_of_the_index_moves_the_mask(bit: int) -> None:
    """Elements whose indices differ in one bit are kept independently of each other."""
    kept = reference.keep_mask(torch.empty(1 << 16), 0.5, 3)
    neighbour = kept.view(-1, 2, 1 << bit).flip(1).reshape(-1)
    # The pairs are counted twice: half as many draws.
    assert abs((kept == neighbour).double().mean() - 0.5) < 5 * 0.5 / (1 << 15) ** 0.5


def test_dropout_of_nothing_is_the_identity(chosen: str) -> None:
    x = torch.randn(30, 40)
    assert torch.equal(elementwise.dropout(x, 0.0, 5), x)


@pytest.mark.parametrize(
    "call_it",
    [
        lambda x: elementwise.low_rank_add_(x, torch.zeros(4, 3), torch.zeros(6, 2), 1.0),
        lambda x: elementwise.low_rank_add_(x, torch.zeros(4, 3), torch.zeros(6, 3), 1.0, torch.ones(5)),
        lambda x: elementwise.scaled_grad(x, x[:3], torch.ones(6)),
        lambda x: elementwise.rms_norm(x, torch.ones(4), 1e-5),
        lambda x: elementwise.rms_norm(x, torch.ones(6), 1e-5, 2),
        lambda x: elementwise.rms_norm_backward(x, x, torch.ones(6), torch.ones(4), 0, x[:, :5]),
        lambda x: elementwise.glu(x, x[:, :5], "silu"),
        lambda x: elementwise.glu(x, x, "relu"),
        lambda x: elementwise.glu_backward(x[:2], x, x, "silu"),
        lambda x: elementwise.rope(x, x, x),
        lambda x: elementwise.rope_(x.view(1, 1, 4, 6), torch.ones(2, 4, 6), torch.ones(2, 4, 6)),
        lambda x: elementwise.cross_entropy_(x, torch.zeros(4)),
        lambda x: elementwise.cross_entropy_(x, torch.zeros(4, dtype=torch.int64), label_smoothing=1.5),
        lambda x: elementwise.dropout(x, 1.0, 1),
        lambda x: elementwise.dropout_add_(x, x[:2], 0.5, 1),
        lambda x: elementwise.glu(x.int(), x.int(), "silu"),
    ],
)
def test_arguments_that_do_not_fit(call_it: Callable[[Tensor], Any]) -> None:
    with pytest.raises(QuantizationError, match="RW606"):
        call_it(torch.zeros(4, 6))
