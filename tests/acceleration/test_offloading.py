"""Offloaded activations leave a card once: with trl's own class, which runs on a CPU here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from trl.models.activation_offloading import OffloadActivations

import rankwise as rw
from rankwise.acceleration import MovedOnce, move_once
from tiny_models import tiny_gpt2, tiny_llama

LEAST_BYTES = 1024


class Branching(nn.Module):
    """Saves tensors twice, at once and long after, views, transposed ones, parameters, small ones and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.small = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x).exp()
        first = (y * y.sin() + y.mT.contiguous().mT.cos()) * y[8:].mean()
        later = first.exp().sin().cos().exp().sin().cos() * y
        return self.small(later * first).sum() * later[:, 3:].sum()


def llama() -> Any:
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    rw.add_adapter(model, rw.LoraConfig(r=4, use_dora=True))
    rw.optimize_for_training(model.train())
    return model


MODELS: dict[str, Any] = {
    "branching": (Branching, lambda: torch.randn(32, 64, requires_grad=True)),
    "llama": (llama, lambda: torch.arange(64).view(2, 32)),
    "gpt2": (lambda: tiny_gpt2().train(), lambda: torch.arange(64).view(2, 32)),
}


def loss_of(model: Any, given: Any) -> Any:
    return model(given) if isinstance(model, Branching) else model(input_ids=given, labels=given, use_cache=False).loss


def trls(model: nn.Module) -> OffloadActivations:
    context = OffloadActivations(use_pin_memory=False)
    context.update_model_params(model)
    return context


def step(
    model: Any, x: torch.Tensor, context: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Gradients, what was moved and what stayed, parameters aside; under ``context``, trl's or what is around it."""
    model.zero_grad()
    torch.manual_seed(1)
    with context:
        loss = loss_of(model, x)
        entries = list(context.tracker.values())
        loss.backward()
    stayed = [tensor for tensor, moved, *_ in entries if not moved and tensor.nbytes >= LEAST_BYTES]
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    stayed = [tensor for tensor in stayed if tensor.untyped_storage().data_ptr() not in ours]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *grads], [tensor for tensor, moved, *_ in entries if moved], stayed


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("cpu_as_accelerator")
def test_nothing_stays_and_gradients_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, given = MODELS[name]
    model, x = make(), given()
    plain, moved, stayed = step(model, x, trls(model))
    # If trl moves what is saved twice, this module has no work left.
    assert stayed
    context = trls(model)
    move_once(context)
    found, moved_now, stay_now = step(model, x, context)
    assert not stay_now
    assert len(moved_now) <= len(moved) + len({tensor.untyped_storage().data_ptr() for tensor in stayed})
    assert all(map(torch.equal, found, plain))
    for _ in range(2):
        assert all(map(torch.equal, step(model, x, context)[0], plain))


def test_what_is_written_between_two_saves_is_moved_twice() -> None:
    x, y = torch.randn(512, requires_grad=True), torch.randn(512)
    moved: list[torch.Tensor] = []
    once = MovedOnce(lambda tensor: moved.append(tensor.clone()) or moved[-1], lambda tensor: tensor)
    with saved_tensors_hooks(once.pack, once.unpack):
        products = x * y + x * y
        before = y.clone()
        y.add_(1)
        (products + x * y).sum().backward()
    assert len(moved) == 2
    assert torch.allclose(x.grad, 3 * before + 1)
