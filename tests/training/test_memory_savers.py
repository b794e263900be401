"""Offloaded AdamW is AdamW, and what cannot run here says so with what can."""

from __future__ import annotations

import copy

import pytest
import torch

from rankwise.errors import ConfigError
from rankwise.training import spine
from rankwise.training.memory_savers import OffloadedAdamW, check_memory_savers


def _steps(optimizer_class, model, count: int) -> torch.optim.Optimizer:
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.1)
    _continue(optimizer, model, count)
    return optimizer


def _continue(optimizer, model, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        loss = model(torch.randn(5, 4, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_offloaded_adamw_is_adamw_to_the_bit():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    theirs = copy.deepcopy(ours)
    _steps(OffloadedAdamW, ours, 7)
    _steps(lambda *args, **kwargs: torch.optim.AdamW(*args, **kwargs, foreach=False), theirs, 7)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_its_state_goes_on_after_saving():
    torch.manual_seed(0)
    straight = torch.nn.Linear(4, 3)
    stopped = copy.deepcopy(straight)
    first = _steps(OffloadedAdamW, straight, 3)
    half = _steps(OffloadedAdamW, stopped, 3)
    resumed = OffloadedAdamW(stopped.parameters(), lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(half.state_dict())
    _continue(first, straight, 4)
    _continue(resumed, stopped, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), stopped.parameters()))


@pytest.mark.parametrize(
    ("optimizer", "device", "part"),
    [
        ("paged_adamw_8bit", "cpu", "use adamw_torch, or adamw_offload"),
        ("paged_adamw_32bit", "mps", "runs on CUDA cards only"),
        ("adamw_bnb_8bit", "cpu", "runs on CUDA cards only"),
        ("adamw_torch_4bit", "cpu", 'pip install "rankwise[cuda]"'),
    ],
)
def test_optimizers_that_cannot_run_here(optimizer, device, part, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_memory_savers(optimizer, device, activation_offloading=False)
    assert caught.value.code == "RW116"
    assert part in caught.value.message


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rankwise\[cuda\].*adamw_offload"):
        check_memory_savers("paged_adamw_8bit", "cuda", activation_offloading=False)


def test_offloading_activations_needs_an_accelerator():
    with pytest.raises(ConfigError, match="gradient-checkpointing"):
        check_memory_savers("adamw_torch", "cpu", activation_offloading=True)
    check_memory_savers("adamw_torch", "cuda", activation_offloading=True)
    check_memory_savers("adamw_offload", "cpu", activation_offloading=False)


@pytest.mark.usefixtures("cpu_as_accelerator")
def test_offloaded_activations_are_moved_once(make_trainer, monkeypatch):
    moved = []
    monkeypatch.setattr(spine, "move_once", moved.append)
    trainer = make_trainer(activation_offloading=True)
    assert moved == [trainer.maybe_activation_offload_context]
    make_trainer()
    assert len(moved) == 1
