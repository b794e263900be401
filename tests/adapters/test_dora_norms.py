"""DoRA's norms and gains: computed once a step, and never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import IDS, logits, step
from adapter_table import build
from torch import nn

import rankwise as rw


def _in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(0.05)


def _through_data(parameter: nn.Parameter) -> None:
    parameter.data.add_(0.05)


def _new_storage(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data + 0.05


def _permuted(parameter: nn.Parameter) -> None:
    # Same values in another order, and after the constant fill none that a sum or an XOR would notice.
    parameter.data.copy_(parameter.data.flip(0))


def _filled(parameter: nn.Parameter) -> None:
    parameter.data.fill_(0.3)


@pytest.mark.parametrize("change", [_in_place, _through_data, _new_storage, _permuted, _filled])
@pytest.mark.parametrize("training", [True, False])
def test_dora_notices_changes_by_hand(training, change):
    model, config = build("dora", "llama", torch.float32)
    rw.add_adapter(model, config)
    step(model)
    model.train(training)
    logits(model)
    for parameter in rw.adapter_parameters(model).values():
        change(parameter)
    changed = logits(model)
    rw.merge_adapter(model)
    torch.testing.assert_close(changed, logits(model), rtol=1e-4, atol=1e-4)


def _other_weights_in_freed_memory(layer: nn.Module) -> None:
    # As one loads them who has no room for both: the new storage lies where the old one was.
    weight = layer.base_layer.weight
    weight.data = torch.empty(0)
    weight.data = torch.randn(layer.out_features, layer.in_features)


def _other_scale(layer: nn.Module) -> None:
    layer.adapters["default"].scaling *= 3


@pytest.mark.parametrize("change", [_other_weights_in_freed_memory, _other_scale])
def test_dora_notices_changes_around_its_parameters(change):
    model, x = nn.Sequential(nn.Linear(32, 24)), torch.randn(20, 32)
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False))
    model(x)
    change(model[0])
    changed = model(x)
    rw.merge_adapter(model)
    torch.testing.assert_close(changed, model(x), rtol=1e-4, atol=1e-4)


def test_dora_computes_its_norms_once_per_optimizer_step(monkeypatch):
    from rankwise.adapters import lora

    calls = []
    count = lora.adapted_row_norms
    monkeypatch.setattr(lora, "adapted_row_norms", lambda *args: calls.append(1) or count(*args))
    model, config = build("dora", "llama", torch.float32)
    layers = len(rw.add_adapter(model, config).modules)
    optimizer = torch.optim.SGD(rw.adapter_parameters(model).values(), lr=0.1)
    model.train()
    calls.clear()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    logits(model)
    # None at all: the norms at initialisation still hold.
    assert len(calls) == 0
    optimizer.step()
    logits(model)
    logits(model)
    assert len(calls) == layers


class PastTheVersions(torch.optim.Optimizer):
    """As optimizers with kernels of their own write: no version counter sees it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.1)


def test_dora_norms_are_renewed_by_an_optimizer_step_that_no_version_shows(monkeypatch):
    """Where no copies are compared, as on a card, the optimizers' hook alone tells of the step."""
    monkeypatch.setattr("rankwise.ops.kept.is_comparable", lambda tensor: False)
    model, config = build("dora", "llama", torch.float32)
    rw.add_adapter(model, config)
    before = logits(model)
    PastTheVersions(rw.adapter_parameters(model).values()).step()
    found = logits(model)
    # A copy keeps nothing.
    torch.testing.assert_close(found, logits(copy.deepcopy(model)))
    assert not torch.allclose(found, before, atol=1e-3)


def test_the_gain_that_a_card_computes_at_once_is_renewed_by_every_write(monkeypatch):
    """There it is kept without norms, and without copies to compare."""
    monkeypatch.setattr("rankwise.adapters.lora.takes_triton", lambda tensor: True)
    monkeypatch.setattr("rankwise.ops.kept.is_comparable", lambda tensor: False)
    model, config = build("dora", "llama", torch.float32)
    rw.add_adapter(model, config)
    before = logits(model)
    # While B is zero A has no effect.
    for part in ("lora_B", "lora_A", "magnitude"):
        for name, parameter in rw.adapter_parameters(model).items():
            if part in name:
                _in_place(parameter)
        found = logits(model)
        torch.testing.assert_close(found, logits(copy.deepcopy(model)))
        assert not torch.allclose(found, before, atol=1e-3), part
        before = found


def test_a_row_of_zeros_stays_zero_under_dora():
    model, config = build("dora", "llama", torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    before = logits(model)
    rw.add_adapter(model, config)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for p in rw.adapter_parameters(model).values() if p.grad is not None)
    step(model, rate=0.01)
    assert logits(model).isfinite().all()
    rw.merge_adapter(model)
    assert logits(model).isfinite().all()


def test_dora_under_inference_mode_and_compiled():
    model, config = build("dora", "llama", torch.float32)
    rw.add_adapter(model, config)
    step(model)
    expected = logits(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)
        made_here, config = build("dora", "llama", torch.float32)
        rw.add_adapter(made_here, config)
        assert made_here(input_ids=IDS).logits.isfinite().all()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
