"""Liger's kernels take a part's place where they agree with it. No card is here: a stub stands for Liger, on the CPU,
that writes over its arguments as Liger does."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from families import family
from torch import Tensor
from torch.nn import functional
from transformers.models.llama import modeling_llama

import rankwise as rw
from rankwise.acceleration import liger, restore
from rankwise.acceleration.replace import Undo


class Stub:
    """`liger.Kernels` in plain PyTorch. It counts its calls."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def rms_norm(self, x: Tensor, w: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        self.count("rms_norm")
        normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        if casting == "llama":
            return (offset + w) * normal.to(x.dtype)
        return ((offset + w.float()) * normal).to(x.dtype)

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.count("rope")
        return self.turned_(q, cos, sin), self.turned_(k, cos, sin)

    def rope_backward_(self, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.count("rope_backward")
        return self.turned_(dq, cos, -sin), self.turned_(dk, cos, -sin)

    def turned_(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = q.chunk(2, dim=-1)
        return q.copy_(q * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None])

    def glu(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        self.count("glu")
        return self.activate(gate, act) * up

    def glu_backward_(self, gate: Tensor, up: Tensor, dout: Tensor, act: str) -> tuple[Tensor, Tensor]:
        self.count("glu_backward")
        with torch.enable_grad():
            g = gate.detach().requires_grad_()
            activated = self.activate(g, act)
        (d_gate,) = torch.autograd.grad(activated, g, dout * up)
        d_up = dout * activated.detach()
        return gate.copy_(d_gate), up.copy_(d_up)

    def activate(self, gate: Tensor, act: str) -> Tensor:
        return functional.silu(gate) if act == "silu" else functional.gelu(gate, approximate="tanh")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """In place of Liger, on any device."""
    kernels = Stub()
    monkeypatch.setattr(liger, "kernels", lambda: kernels)
    monkeypatch.setattr(liger, "obstacle", lambda: None)
    monkeypatch.setattr(liger, "runs_on", lambda x: x.dtype in liger.TOLERANCE)
    return kernels


def adapted(name: str, **config: Any) -> Any:
    model = family(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rw.add_adapter(model, rw.LoraConfig(**{"r": 4, "init_lora_weights": False, **config}))
    return model


def loss_and_grads(model: Any) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(rw.adapter_parameters(model).values())))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("name", "norms", "mlps", "ropes"),
    [("llama", 5, 2, 1), ("qwen3", 9, 2, 1), ("gemma2", 9, 2, 1), ("granite", 5, 2, 1), ("gpt2", 0, 0, 0)],
)
def test_losses_and_gradients_stay(name: str, norms: int, mlps: int, ropes: int, use_dora: bool, stub: Stub) -> None:
    model, undo, left = adapted(name, use_dora=use_dora), Undo(), []
    expected = loss_and_grads(model)
    assert liger.replace_parts(model, undo, left) == (norms, mlps, ropes)
    assert left == []
    stub.calls.clear()
    found = loss_and_grads(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if norms:
        layers = len(model.model.layers)
        assert stub.calls == {
            "rms_norm": norms,
            "rope": layers,
            "rope_backward": layers,
            "glu": layers,
            "glu_backward": layers,
        }
    undo()
    stub.calls.clear()
    torch.testing.assert_close(loss_and_grads(model), expected)
    assert not stub.calls


def test_optimize_for_training_asks_liger_on_cuda_only(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    # A model of another test, optimized and not yet collected, may still have a twin in its place.
    namesake = modeling_llama.apply_rotary_pos_emb
    model, original = adapted("llama", use_dora=True), getattr(namesake, "original", namesake)
    expected = loss_and_grads(model)
    done = rw.optimize_for_training(model)
    assert done.norms == 5
    assert not stub.calls
    restore(model)
    # The same on a card, as far as the wiring goes.
    from rankwise.acceleration import optimize

    monkeypatch.setattr(optimize, "_fuse_parts", lambda model, undo, left: liger.replace_parts(model, undo, left))
    done = rw.optimize_for_training(model)
    assert (done.norms, done.mlps, done.ropes) == (5, 2, 1)
    torch.testing.assert_close(loss_and_grads(model), expected, rtol=1e-4, atol=1e-5)
    assert stub.calls["glu_backward"] > 0
    restore(model)
    left: Any = modeling_llama.apply_rotary_pos_emb
    assert left is original or (left.original is original and model not in left.users)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_cuda_and_nothing_else_gets_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.acceleration import optimize

    class OnDevice:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

        def parameters(self) -> Any:
            return iter([self])

    monkeypatch.setattr(liger, "replace_parts", lambda model, undo, left: (1, 2, 3))
    monkeypatch.setattr(optimize, "replace_mlps", lambda model, undo: 4)
    model: Any = OnDevice("cuda")
    assert optimize._fuse_parts(model, Undo(), []) == (1, 4 + 2, 3)
    model = OnDevice("mps")
    assert optimize._fuse_parts(model, Undo(), []) == (0, 0, 0)


@pytest.mark.parametrize("part", ["rms_norm", "rope_", "rope_backward_", "glu", "glu_backward_"])
def test_a_kernel_that_disagrees_or_fails_is_not_used(part: str, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(stub, part)

    def off(*arguments: Any) -> Any:
        result = right(*arguments)
        return tuple(x * 1.01 for x in result) if isinstance(result, tuple) else result * 1.01

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("too wide")

    for kernel, reason in ((off, "gives another result"), (failing, "RuntimeError: too wide")):
        monkeypatch.setattr(stub, part, kernel)
        model, undo, left = adapted("llama"), Undo(), []
        norms, mlps, ropes = liger.replace_parts(model, undo, left)
        undo()
        expected = {"rms_norm": (0, 2, 1), "rope_": (5, 2, 0), "rope_backward_": (5, 2, 0)}.get(part, (5, 0, 1))
        assert (norms, mlps, ropes) == expected
        assert len(left) == 1
        assert reason in left[0]


def test_a_kernel_that_writes_over_what_it_was_given_is_not_used(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    right = stub.rms_norm

    def writing(x: Tensor, *rest: Any) -> Tensor:
        y = right(x, *rest)
        x.data.zero_()
        return y

    monkeypatch.setattr(stub, "rms_norm", writing)
    left: list[str] = []
    assert liger.replace_norms(adapted("llama"), Undo(), left) == 0
    assert left == ["LlamaRMSNorm stays torch's: Liger's kernel gives another result"]


def test_without_liger_the_reason_and_the_remedy_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    left: list[str] = []
    assert liger.replace_parts(adapted("llama"), Undo(), left) == (0, 0, 0)
    assert left == [
        "norms, gated MLPs, rotary positions stay torch's: liger-kernel is not installed; "
        "install it with: pip install 'rankwise[cuda]'"
    ]


def test_a_tensor_on_the_cpu_stays_with_the_model() -> None:
    model = adapted("llama")
    assert not liger.runs_on(next(model.parameters()))
    if liger.obstacle() is None:
        left: list[str] = []
        assert liger.replace_parts(model, Undo(), left) == (0, 0, 0)


def test_undoing_one_model_keeps_the_change_of_another(stub: Stub) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    first, second, other = Undo(), Undo(), object()
    assert liger.replace_ropes(adapted("llama"), first, []) == 1
    assert liger.replace_ropes(adapted("llama"), second, []) == 0
    modeling_llama.apply_rotary_pos_emb, twin = other, modeling_llama.apply_rotary_pos_emb
    first()
    assert modeling_llama.apply_rotary_pos_emb is other
    modeling_llama.apply_rotary_pos_emb = original
    assert twin.original is original


INTERPRETED = """
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from rankwise.acceleration import liger
liger.runs_on = lambda x: True
q, k = torch.randn(2, 5, 4, 16).transpose(1, 2), torch.randn(2, 5, 2, 16).transpose(1, 2)
angles = torch.randn(1, 5, 8).repeat(1, 1, 2)
why_not = liger._disagreement(
    lambda q, k: liger.Rope.apply(q, k, angles.cos(), angles.sin()),
    lambda q, k: apply_rotary_pos_emb(q, k, angles.cos(), angles.sin()),
    [q, k],
)
assert why_not is None, why_not
before = q.clone()
liger.kernels().rope_(q, k, angles.cos(), angles.sin())
assert not torch.equal(q, before), "Liger's RoPE leaves its arguments alone: the copies can go"
"""


@pytest.mark.skipif(liger.obstacle() is not None, reason="liger-kernel is not installed")
def test_ligers_own_rope_agrees_under_the_interpreter() -> None:
    """Its other kernels use functions that Triton cannot interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: Liger's kernels cannot run here")
@pytest.mark.skipif(liger.obstacle() is not None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_liger_on_a_card(name: str) -> None:
    model = adapted(name, use_dora=True).cuda()
    left: list[str] = []
    norms, mlps, ropes = liger.replace_parts(model, Undo(), left)
    assert norms >= 5, left
    assert (mlps, ropes) == (2, 1), left
