"""Offloaded activations leave a card once; a CPU stands for the card."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rankwise as rw
from rankwise.acceleration import offloaded
from rankwise.acceleration.memory import MovedOnce, Offloaded
from tiny_models import tiny_gpt2, tiny_llama


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


class Stream:
    """A stream of the CPU, where everything runs in order."""

    def __init__(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> None: ...


def step(model: Any, x: torch.Tensor, context: Any) -> list[torch.Tensor]:
    """The loss and the gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    with context:
        loss = loss_of(model, x)
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(Stream=Stream, current_stream=Stream, stream=lambda _: nullcontext())
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("streams")
def test_activations_leave_once_and_gradients_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, given = MODELS[name]
    model, x = make(), given()
    plain = step(model, x, nullcontext())
    made: list[Offloaded] = []
    packs: list[tuple[int, int]] = []
    pack = Offloaded.pack

    def noted(self: Offloaded, tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
        made.append(self)
        number, packed = pack(self, tensor)
        packs.append((number, tensor.nbytes))
        return number, packed

    monkeypatch.setattr(Offloaded, "pack", noted)
    for _ in range(2):
        assert all(map(torch.equal, step(model, x, offloaded(model)), plain))
    assert sum(number > 0 for number, _ in packs) > 2
    assert not made[-1].waiting


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
