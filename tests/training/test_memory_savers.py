"""Optimizers and schedules are those of transformers, and what cannot run here says so."""

from __future__ import annotations

import copy

import pytest
import torch

from rankwise.errors import ConfigError
from rankwise.planning.workload import RULES
from rankwise.training.optimizers import NAMES, SCHEDULES, check_memory_savers, make_optimizer, make_schedule
from tiny_models import tiny_llama


@pytest.mark.parametrize(
    ("optimizer", "device", "part"),
    [
        ("paged_adamw_8bit", "cpu", "use adamw_torch"),
        ("paged_adamw_32bit", "mps", "runs on CUDA GPUs only"),
        ("adamw_bnb_8bit", "cpu", "runs on CUDA GPUs only"),
        ("adamw_torch_4bit", "cpu", "pip install torchao"),
    ],
)
def test_optimizers_that_cannot_run_here(optimizer, device, part, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_memory_savers(optimizer, device, activation_offloading=False)
    assert caught.value.code == "RW116"
    assert part in caught.value.message


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        check_memory_savers("paged_adamw_8bit", "cuda", activation_offloading=False)


def test_offloading_activations_needs_an_accelerator():
    with pytest.raises(ConfigError, match="gradient-checkpointing"):
        check_memory_savers("adamw_torch", "cpu", activation_offloading=True)
    check_memory_savers("adamw_torch", "cuda", activation_offloading=True)


def test_every_planned_optimizer_can_be_had():
    assert set(NAMES) == set(RULES)


TORCHS = ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"]


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_optimizers_are_those_of_the_trainer(name, decay, tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer is the oracle here; install the extra `bench`")
    from transformers import Trainer, TrainingArguments

    ours = tiny_llama()
    theirs = copy.deepcopy(ours)
    same = {"learning_rate": 1e-2, "weight_decay": decay, "optim": name}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **same)
    optimizers = (
        make_optimizer(name, ours, rate=1e-2, weight_decay=decay),
        Trainer(theirs, arguments).create_optimizer(),
    )
    for model, optimizer in zip((ours, theirs), optimizers):
        for _ in range(3):
            model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    ours, theirs = make_schedule(name, 0.1, warmup, 9), get_scheduler(name, optimizer, warmup, 9)
    for step in range(9):
        assert [0.1 * ours(step)] == theirs.get_last_lr()
        optimizer.step()
        theirs.step()
