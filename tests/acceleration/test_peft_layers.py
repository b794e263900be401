"""``accelerate_peft``: PEFT's model with our operators inside."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from families import family
from torch import Tensor

import rankwise as rw
from marks import LEVELS, needs_products
from rankwise.acceleration import restore
from rankwise.errors import AdapterError

peft = pytest.importorskip("peft")


def peft_model(name: str = "llama", **config: Any) -> Any:
    model = family(name)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**options)).train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def loss_and_grads(model: Any, inputs: dict[str, Tensor] | None = None) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**(inputs or batch())).loss
    loss.backward()
    return loss.item(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, grad in expected[1].items():
        torch.testing.assert_close(found[1][key], grad, rtol=2e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_same_results_parameters_and_state_dict(name: str, use_dora: bool) -> None:
    model = peft_model(name, use_dora=use_dora)
    expected, keys = loss_and_grads(model), list(model.state_dict())
    parameters = dict(model.named_parameters())
    done = rw.accelerate_peft(model)
    assert done.shared_inputs == 4
    assert_same(loss_and_grads(model), expected)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    restore(model)
    assert_same(loss_and_grads(model), expected)
    assert not any("rankwise" in key for module in model.modules() for key in module.__dict__)


@needs_products
@pytest.mark.parametrize("level", [name for name in LEVELS if name != "portable"], indirect=True)
@pytest.mark.parametrize("use_dora", [False, True])
def test_bfloat16_is_no_further_from_float32_than_pefts(use_dora: bool, level: str) -> None:
    """Root mean squares over models and batches: of one alone the order is a matter of luck. PEFT computes the low-rank
    branch in float32 and rounds twice; with A, B and U rounded ours was 10 to 20 % further away."""
    errors: dict[str, list[float]] = {"peft": [], "ours": []}
    for seed in range(4):
        torch.manual_seed(seed)
        base = family("llama", torch.bfloat16)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", use_dora=use_dora, init_lora_weights=False
        )
        model = peft.get_peft_model(base, config).train()
        scatter_(model, seed)
        exact = copy.deepcopy(model).float()
        errors["peft"] += relative_errors(model, exact)
        rw.accelerate_peft(model)
        errors["ours"] += relative_errors(model, exact)
    assert sum(errors["ours"]) <= 1.05 * sum(errors["peft"])


@torch.no_grad()
def scatter_(model: torch.nn.Module, seed: int) -> None:
    """Weights of a size at which signals neither die nor explode, and adapters that bfloat16 cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_" in key:
            parameter.mul_(1 + 0.02 * noise)
        else:
            parameter.copy_(0.45 * noise / parameter.shape[1] ** 0.5)


def relative_errors(model: Any, exact: Any) -> list[float]:
    """Of all gradients together, per batch, squared."""
    found = []
    for seed in range(4):
        ids = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(seed))
        ours, wanted = (loss_and_grads(each, {"input_ids": ids, "labels": ids})[1] for each in (model, exact))
        wrong = sum(float((ours[key].float() - grad).norm()) ** 2 for key, grad in wanted.items())
        found.append(wrong / sum(float(grad.norm()) ** 2 for grad in wanted.values()))
    return found


def test_dropout_follows_pefts() -> None:
    model = peft_model(lora_dropout=0.5)
    rw.accelerate_peft(model)
    assert loss_and_grads(model)[0] != loss_and_grads(model)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert loss_and_grads(model)[0] == loss_and_grads(model)[0]


def test_training_goes_on_as_in_peft() -> None:
    runs = []
    for fast in (False, True):
        model = peft_model(use_dora=True)
        if fast:
            rw.accelerate_peft(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_what_peft_does_beyond_stays_peft_s() -> None:
    model = peft_model()
    rw.accelerate_peft(model)
    with model.disable_adapter():
        bare = model(**batch()).loss.item()
    assert bare == pytest.approx(family("llama")(**batch()).loss.item(), rel=1e-5)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    second = model(**batch()).loss.item()
    model.merge_adapter()
    assert model(**batch()).loss.item() == pytest.approx(second, rel=1e-4)
    model.unmerge_adapter()
    restore(model)
    assert model(**batch()).loss.item() == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_base(double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = family("llama")
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            plain = getattr(layer.mlp, name)
            packed = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=False, quant_type="nf4", compress_statistics=double_quant
            )
            packed.weight = bnb.nn.Params4bit(
                plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double_quant, blocksize=32
            )
            setattr(layer.mlp, name, packed.to("cpu"))
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    expected = loss_and_grads(model)
    rw.accelerate_peft(model)
    assert_same(loss_and_grads(model), expected)


def test_a_model_without_peft_is_refused(monkeypatch) -> None:
    with pytest.raises(AdapterError, match=r"RW416.*give what get_peft_model returned\."):
        rw.accelerate_peft(family("llama"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match=r"RW416.*PEFT is not installed.*pip install peft"):
        rw.accelerate_peft(family("llama"))


def test_each_row_with_an_adapter_of_its_own() -> None:
    model = peft_model()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    given = {"input_ids": batch()["input_ids"], "adapter_names": ["default", "second"]}
    expected = model(**given).logits
    rw.accelerate_peft(model)
    torch.testing.assert_close(model(**given).logits, expected)


def test_another_base_and_hooks_inside_are_seen() -> None:
    model, calls = peft_model(target_modules=["q_proj", "down_proj"]), []
    rw.accelerate_peft(model)
    layer = model.base_model.model.model.layers[0]
    q, down = layer.self_attn.q_proj, layer.mlp.down_proj
    old = q.base_layer
    q.base_layer = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    q.lora_A["default"].register_forward_hook(lambda *_: calls.append("A"))
    down.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    found = loss_and_grads(model)
    assert calls == ["A", "base"]
    restore(model)
    assert_same(found, loss_and_grads(model))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_another_parameter_in_its_place_is_seen(part: str) -> None:
    model = peft_model(use_dora=True)
    rw.accelerate_peft(model)
    loss_and_grads(model)
    holder = getattr(model.base_model.model.model.layers[0].self_attn.q_proj, part)["default"]
    holder.weight = torch.nn.Parameter(1.5 * holder.weight.detach())
    found = loss_and_grads(model)
    restore(model)
    assert_same(found, loss_and_grads(model))


def test_a_parameter_of_a_transposed_layer_stays_pefts() -> None:
    """PEFT adds B A to it as it is stored."""
    model = peft_model("gpt2", target_modules=["lm_head"], target_parameters=["attn.c_proj.weight", "c_fc.weight"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = loss_and_grads(model)
    rw.accelerate_peft(model)
    assert_same(loss_and_grads(model), expected)


def test_hooks_on_a_magnitude_are_called() -> None:
    model, calls = peft_model(use_dora=True), []
    rw.accelerate_peft(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: calls.append("m"))
    model(**batch())
    assert calls == ["m"]
