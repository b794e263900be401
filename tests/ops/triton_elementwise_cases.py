"""Triton's element-wise operators against the reference. `test_triton_cases` runs this file in other processes.

The device is the CPU where Triton interprets its kernels (TRITON_INTERPRET=1 before Python starts), else a CUDA card.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton_running import (
    DEVICE,
    DTYPES,
    assert_as_good,
    check_all_have_run,
    noting_launches,
    rand,
    randn,
    triton_on_poisoned_memory,
)

from rankwise.errors import QuantizationError
from rankwise.ops import elementwise, table
from rankwise.ops import reference as reference
from rankwise.ops.checks import ACTIVATIONS
from rankwise.ops.linear_cross_entropy import LogitShape, linear_cross_entropy
from tables import thinned

# Of `rankwise.ops.triton`, whose kernels all run here.
MODULES = ("cross_entropy", "elementwise")


@pytest.fixture(scope="module", autouse=True)
def launched() -> Iterator[set[str]]:
    with noting_launches() as names:
        yield names


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_on_poisoned_memory(monkeypatch, 0x2B):
        yield


def test_triton_is_what_runs() -> None:
    for dtype in DTYPES:
        assert table.module_for(randn(1, dtype=dtype)).__name__ == "rankwise.ops.triton.elementwise"
    assert table.module_for(randn(1).double()) is reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "N", "R"), [(1, 1, 1), (5, 33, 3), (70, 131, 16), (65, 129, 17), (3, 200, 64), (2, 5, 256), (2, 9, 100)]
)
def test_low_rank_add(T: int, N: int, R: int, dtype: torch.dtype) -> None:
    for has_g, bias_dtype in ((True, dtype), (False, None), (True, torch.float32)):
        y, u, B = randn(T, N, dtype=dtype), randn(T, R, dtype=dtype), randn(N, R, dtype=dtype)
        g, bias = rand(N) + 0.5 if has_g else None, None if bias_dtype is None else randn(N, dtype=bias_dtype)
        truth = y.double() + 0.7 * u.double() @ B.double().T
        truth = truth * (1 if g is None else g.double()) + (0 if bias is None else bias.double())
        plain = reference.low_rank_add_(y.clone(), u, B, 0.7, g, bias)
        assert elementwise.low_rank_add_(y, u, B, 0.7, g, bias) is y
        assert_as_good(y, plain, truth)


def test_low_rank_add_takes_rows_that_are_apart_and_leaves_what_lies_between() -> None:
    wide_y, wide_u, B = randn(3, 4, 40), randn(3, 4, 12), randn(24, 5)
    before, y, u = wide_y.clone(), wide_y[..., 8:32], wide_u[..., 3:8]
    expected = y + 2 * u @ B.T
    elementwise.low_rank_add_(y, u, B, 2)
    torch.testing.assert_close(y, expected)
    assert torch.equal(wide_y[..., :8], before[..., :8])
    assert torch.equal(wide_y[..., 32:], before[..., 32:])
    turned = randn(24, 7).T
    expected = turned + u[0, :1] @ B.T
    elementwise.low_rank_add_(turned, u[0, :1].expand(7, 5), B.T.contiguous().T, 1.0)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("shapes", [((0, 4), (0, 2), (4, 2)), ((3, 0), (3, 2), (0, 2))])
def test_low_rank_add_of_nothing(shapes: tuple[tuple[int, int], ...]) -> None:
    y, u, B = (randn(*shape) for shape in shapes)
    assert elementwise.low_rank_add_(y, u, B, 1.0).shape == shapes[0]


def test_low_rank_add_of_rank_zero() -> None:
    y, g = randn(3, 5), rand(5)
    expected = y * g
    assert torch.equal(elementwise.low_rank_add_(y, randn(3, 0), randn(5, 0), 1.0, g), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 1), (7, 130), (257, 3)])
def test_scaled_grad(T: int, N: int, dtype: torch.dtype) -> None:
    dy, y, g = randn(T, N, dtype=dtype), randn(T, N, dtype=dtype), rand(N)
    dz, dot = elementwise.scaled_grad(dy, y, g)
    plain, plain_dot = reference.scaled_grad(dy, y, g)
    assert torch.equal(dz, plain)
    assert_as_good(dot, plain_dot, (dy.double() * y.double()).sum(0))
    again = elementwise.scaled_grad(dy, y, g)
    assert torch.equal(dz, again[0])
    assert torch.equal(dot, again[1])
    alone, nothing = elementwise.scaled_grad(dy, None, g)
    assert torch.equal(alone, dz)
    assert nothing is None


def test_scaled_grad_of_strided_rows_and_of_none() -> None:
    wide, y, g = randn(2, 3, 20), randn(20, 6).T.reshape(2, 3, 20)[..., :8], rand(8)
    dz, dot = elementwise.scaled_grad(wide[..., 4:12], y, g)
    assert dz.is_contiguous()
    assert torch.equal(dz, wide[..., 4:12] * g)
    torch.testing.assert_close(dot, (wide[..., 4:12] * y).sum((0, 1)))
    dz, dot = elementwise.scaled_grad(randn(0, 8), randn(0, 8), g)
    assert dz.shape == (0, 8)
    assert not dot.any()


@thinned({"T,N": [(1, 1), (3, 37), (2, 1025), (0, 4)], "dtype": DTYPES, "act": ACTIVATIONS})
def test_gated_activations(T: int, N: int, dtype: torch.dtype, act: str) -> None:
    dout, up, gate = randn(T, N, dtype=dtype), randn(T, N, dtype=dtype), 6 * randn(T, N, dtype=dtype)
    wide = gate.double().requires_grad_(), up.double().requires_grad_()
    truth = reference.glu(*wide, act)
    d_gate, d_up = torch.autograd.grad(truth, wide, dout.double())
    assert_as_good(elementwise.glu(gate, up, act), reference.glu(gate, up, act), truth.detach())
    kept = gate.clone(), up.clone(), dout.clone()
    found, plain = elementwise.glu_backward(dout, gate, up, act), reference.glu_backward(dout, gate, up, act, True)
    for ours, ref, exact in zip(found, plain, (d_gate, d_up, truth.detach())):
        assert_as_good(ours, ref, exact)
    assert all(torch.equal(now, before) for now, before in zip((gate, up, dout), kept))
    fewer = elementwise.glu_backward(dout, gate, up, act, want_product=False)
    assert torch.equal(fewer[0], found[0])
    assert torch.equal(fewer[1], found[1])
    assert fewer[2] is None


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_activations_of_extreme_and_strided_gates(act: str) -> None:
    gate = torch.tensor([[-1e30, -100.0, -20.0, -0.0, 1e-30, 20.0, 1e15]], device=DEVICE)
    one = torch.ones_like(gate)
    torch.testing.assert_close(elementwise.glu(gate, one, act), reference.glu(gate, one, act), rtol=1e-5, atol=1e-7)
    found = elementwise.glu_backward(one, gate, one, act)
    torch.testing.assert_close(found, reference.glu_backward(one, gate, one, act, True), rtol=1e-5, atol=1e-6)
    both, dout = randn(2, 3, 40), randn(20, 6).T.reshape(2, 3, 20)
    gate, up = both[..., :20], both[..., 20:]
    assert elementwise.glu(gate, up, act).is_contiguous()
    torch.testing.assert_close(elementwise.glu(gate, up, act), reference.glu(gate, up, act))
    torch.testing.assert_close(
        elementwise.glu_backward(dout, gate, up, act), reference.glu_backward(dout, gate, up, act, True)
    )


@thinned(
    {
        "T,D": [(1, 1), (5, 33), (70, 128), (3, 2048), (2, 5000), (0, 4)],
        "offset,cast_first": [(0, True), (1, False), (0, False)],
        "dtype": DTYPES,
    }
)
def test_rms_norm(T: int, D: int, offset: int, cast_first: bool, dtype: torch.dtype) -> None:
    x, dy, past = (3 * randn(T, D, dtype=dtype) for _ in range(3))
    for w in (randn(D, dtype=dtype), randn(D)):
        how = (1e-5, offset, cast_first)
        found, plain = elementwise.rms_norm(x, w, *how), reference.rms_norm(x, w, *how)
        truth = reference.rms_norm(x.double(), w.double(), *how)
        for ours, ref, exact in zip(found, plain, truth):
            assert_as_good(ours, ref, exact)
        for residual in (None, past):
            wide = None if residual is None else residual.double()
            assert_as_good(
                elementwise.rms_norm_backward(dy, x, w, found[1], offset, residual),
                reference.rms_norm_backward(dy, x, w, plain[1], offset, residual),
                reference.rms_norm_backward(dy.double(), x.double(), w.double(), truth[1], offset, wide),
            )


def test_rms_norm_of_rows_that_are_apart() -> None:
    wide, dy, w = randn(2, 3, 40), randn(20, 6).T.reshape(2, 3, 20), randn(20)
    x = wide[..., 10:30]
    y, rstd = elementwise.rms_norm(x, w, 1e-5)
    expected, expected_rstd = reference.rms_norm(x, w, 1e-5, 0, True)
    assert y.is_contiguous()
    torch.testing.assert_close((y, rstd), (expected, expected_rstd))
    found = elementwise.rms_norm_backward(dy, x, w, rstd, 1, x)
    torch.testing.assert_close(found, reference.rms_norm_backward(dy, x, w, rstd, 1, x))


# A program turns 16 heads of 128 columns: of 20 the last tile is a part.
@thinned(
    {
        "heads,D,turned": [(1, 2, 2), (9, 64, 64), (3, 80, 20), (20, 128, 128), (2, 6, 0)],
        "dtype": DTYPES,
        "inverse": [False, True],
    }
)
def test_rope(heads: int, D: int, turned: int, dtype: torch.dtype, inverse: bool) -> None:
    for q, batches, table_dtype in (
        (randn(2, 3, heads, D, dtype=dtype).transpose(1, 2), 1, dtype),
        (randn(2, heads, D, 3, dtype=dtype).transpose(2, 3), 2, torch.float32),
    ):
        cos, sin = (randn(batches, 3, turned, dtype=table_dtype) for _ in range(2))
        kept, truth = q.clone(), reference.rope(q.double(), cos.double(), sin.double(), inverse)
        found, plain = elementwise.rope(q, cos, sin, inverse), reference.rope(q, cos, sin, inverse)
        assert torch.equal(q, kept)
        assert found.transpose(1, 2).is_contiguous()
        assert_as_good(found, plain, truth)
        in_place = q.clone()
        assert elementwise.rope_(in_place, cos, sin, inverse) is in_place
        assert torch.equal(in_place, found)


def test_rope_of_nothing_and_of_shared_memory() -> None:
    angles = randn(1, 5, 4)
    assert elementwise.rope(randn(0, 2, 5, 4), angles, angles).shape == (0, 2, 5, 4)
    shared = randn(1, 1, 5, 4).expand(1, 3, 5, 4)
    torch.testing.assert_close(elementwise.rope(shared, angles, angles), reference.rope(shared, angles, angles, False))
    with pytest.raises(RuntimeError, match="single memory location"):
        elementwise.rope_(shared, angles, angles)


# Llama has no part that Qwen 3 has not.
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.long), "gemma2", "qwen3"])
def test_a_model_with_all_parts_computes_what_it_did(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary positions and gated MLPs as on a card; DoRA over what the norms keep."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import rankwise as rw
    from rankwise.acceleration import parts
    from rankwise.acceleration.optimize import fuse_parts
    from rankwise.acceleration.parts import Undo

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 8, "num_hidden_layers": 1, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **more, eos_token_id=2, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    rw.add_adapter(model, rw.LoraConfig(r=4, use_dora=True, init_lora_weights=False))
    ids = torch.randint(3, 50, (2, 3), device=DEVICE)

    def loss_and_grads() -> tuple[Tensor, list[Tensor]]:
        loss = model(input_ids=ids, labels=ids).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(rw.adapter_parameters(model).values())))

    expected, undo = loss_and_grads(), Undo()
    monkeypatch.setattr(parts, "takes_triton", lambda x: True)
    norms, mlps, ropes = fuse_parts(model, undo)
    assert (norms, mlps, ropes) == ({"llama": 3, "gemma2": 5, "qwen3": 5}[family], 1, 1)
    torch.testing.assert_close(loss_and_grads(), expected, rtol=1e-4, atol=1e-5)
    undo()


@thinned(
    {
        "V": [1, 2, 37, 4096, 4097, 9001],
        "smoothing,softcap": [(0.0, None), (0.1, None), (0.0, 3.0), (0.3, 30.0)],
        "dtype": DTYPES,
    }
)
def test_cross_entropy(V: int, smoothing: float, softcap: float | None, dtype: torch.dtype) -> None:
    logits = 4 * randn(5, V, dtype=dtype)
    targets = torch.tensor([0, V - 1, -100, V // 2, V // 3], device=DEVICE)
    options = (0.7, smoothing, softcap, 1.5)
    plain, truth, ours = logits.clone(), logits.double(), logits.clone()
    expected = reference.cross_entropy_(truth, targets, *options, True, True, True)
    rounded = reference.cross_entropy_(plain, targets, *options, True, True, True)
    found = elementwise.cross_entropy_(ours, targets, *options, True, want_entropy=True, want_correct=True)
    assert [part.dtype for part in found] == [torch.float64, torch.float64, torch.int64]
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-6, atol=1e-5)
    assert found[2] == rounded[2]
    assert_as_good(ours, plain, truth)
    assert not ours[2].any()
    unchanged = logits.clone()
    loss, entropy, correct = elementwise.cross_entropy_(unchanged, targets, *options, False)
    assert torch.equal(unchanged, logits)
    assert (loss, entropy, correct) == (found[0], None, None)


def test_the_gradient_of_cross_entropy_is_autograds() -> None:
    logits, targets = randn(6, 50).requires_grad_(), torch.tensor([3, -100, 0, 49, 7, 7], device=DEVICE)
    loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2)
    (grad,) = torch.autograd.grad(loss, logits)
    ours = logits.detach().clone()
    found = elementwise.cross_entropy_(ours, targets, 1.0, 0.2)[0]
    torch.testing.assert_close(found, loss.detach().double())
    torch.testing.assert_close(ours, grad)


def test_the_first_of_equal_logits_is_the_guess() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0]], device=DEVICE)
    for targets, hits in (([1, 0, 0], 3), ([2, 1, 1], 0), ([1, -100, 2], 1)):
        targets = torch.tensor(targets, device=DEVICE)
        assert elementwise.cross_entropy_(logits.clone(), targets, want_correct=True)[2] == hits


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_extreme_logits(softcap: float | None) -> None:
    logits = randn(4, 5000)
    logits[0], logits[1, :4500], logits[2, 7], logits[3] = 1e4, -float("inf"), 3e4, -1e4
    targets = torch.tensor([4999, 4600, 7, 0], device=DEVICE)
    truth = logits.double()
    expected = reference.cross_entropy_(truth, targets, 1.0, 0.0, softcap, 1.0, True, True, False)
    found = elementwise.cross_entropy_(logits, targets, softcap=softcap, want_entropy=True)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-7)


def test_cross_entropy_of_strided_rows_of_none_and_of_bad_targets() -> None:
    wide, targets = randn(3, 30), torch.tensor([0, 3, 9], device=DEVICE)
    before, logits = wide.clone(), wide[:, 10:20]
    expected, found = logits.clone(), logits
    loss = reference.cross_entropy_(expected, targets, 1.0, 0.0, None, 1.0, True, False, False)[0]
    torch.testing.assert_close(elementwise.cross_entropy_(found, targets)[0], loss)
    torch.testing.assert_close(found, expected)
    assert torch.equal(wide[:, :10], before[:, :10])
    assert torch.equal(wide[:, 20:], before[:, 20:])
    nothing = elementwise.cross_entropy_(randn(0, 9), targets[:0], want_entropy=True, want_correct=True)
    assert [float(part) for part in nothing] == [0.0, 0.0, 0.0]
    for bad in (10, -1):
        with pytest.raises(QuantizationError, match=f"RW621.*row 1 is {bad}"):
            elementwise.cross_entropy_(randn(2, 10), torch.tensor([0, bad], device=DEVICE))


@pytest.mark.parametrize(("seed", "dtype"), zip([0, 1, 16, 2**31, 2**63 + 12345, -1], [*DTYPES, *DTYPES]))
def test_dropout_equals_the_reference_to_the_bit(seed: int, dtype: torch.dtype) -> None:
    for shape in ((1,), (7, 301), (0, 4)):
        x, dx = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        for p in (0.0, 0.05, 0.5, 0.999):
            assert torch.equal(elementwise.dropout(x, p, seed), reference.dropout(x, p, seed))
            expected = reference.dropout_add_(dx.clone(), x, p, seed)
            assert torch.equal(elementwise.dropout_add_(dx.clone(), x, p, seed), expected)


def test_dropout_of_strided_tensors_counts_their_elements() -> None:
    x, dx = randn(12, 9).T, randn(12, 9).T
    expected = reference.dropout_add_(dx.clone(), x, 0.3, 5)
    assert elementwise.dropout(x, 0.3, 5).is_contiguous()
    assert torch.equal(elementwise.dropout(x, 0.3, 5), reference.dropout(x.contiguous(), 0.3, 5))
    assert elementwise.dropout_add_(dx, x, 0.3, 5) is dx
    assert torch.equal(dx, expected)


def test_the_chunked_loss_has_the_gradient_of_autograd() -> None:
    hidden, W, targets = randn(40, 8).requires_grad_(), randn(60, 8), torch.randint(0, 60, (40,), device=DEVICE)
    targets[::5] = -100
    ours = linear_cross_entropy(hidden, W, targets, shape=LogitShape(1.5, 9.0), label_smoothing=0.1).loss
    logits = 9 * torch.tanh(1.5 * (hidden @ W.T) / 9)
    plain = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(ours, plain)
    found, expected = torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(plain, hidden)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_kernel_has_run(launched: set[str]) -> None:
    """After all others in this file."""
    check_all_have_run(MODULES, launched)
