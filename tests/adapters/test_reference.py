"""Against the numbers that PEFT gave for a real, trained model: logits, gradients, merged weights, ten AdamW losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

import rankwise as rw

TOLERANCE = 1e-4


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def mean_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])


@pytest.fixture(params=["lora_r4_qv", "dora_r4_qv"])
def case(request: pytest.FixtureRequest, shared: Path) -> tuple[PreTrainedModel, Path, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K", dtype=torch.float32)
    folder = shared / "adapters" / request.param
    return model, folder, load_file(folder / "reference.safetensors")


def test_init_is_the_base(case):
    model, folder, reference = case
    config = rw.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora="dora" in folder.name)
    base = model(input_ids=reference["input_ids"]).logits
    rw.add_adapter(model, config)
    logits = model(input_ids=reference["input_ids"]).logits
    torch.testing.assert_close(logits, base, rtol=0, atol=1e-5)
    assert relative_error(logits, reference["logits_at_init"]) < TOLERANCE


def test_logits_gradients_and_merge(case):
    model, folder, reference = case
    rw.load_adapter(model, folder)
    logits = model(input_ids=reference["input_ids"]).logits
    assert relative_error(logits, reference["logits"]) < TOLERANCE

    mean_loss(model, reference["input_ids"]).backward()
    gradients = {key.removeprefix("grad."): value for key, value in reference.items() if key.startswith("grad.")}
    parameters = rw.adapter_parameters(model)
    assert {key.removesuffix(".weight") for key in gradients} == {key.removesuffix(".weight") for key in parameters}
    for key, gradient in gradients.items():
        ours = parameters.get(key, parameters.get(key.removesuffix(".weight")))
        assert relative_error(ours.grad, gradient) < TOLERANCE, key

    rw.merge_adapter(model)
    for key, weight in reference.items():
        if key.startswith("merged."):
            assert relative_error(model.get_parameter(key.removeprefix("merged.")), weight) < TOLERANCE, key
    merged = model(input_ids=reference["input_ids"]).logits
    assert relative_error(merged, reference["logits_merged"]) < TOLERANCE


def test_ten_steps_of_adamw(case):
    model, folder, reference = case
    rw.load_adapter(model, folder)
    optimizer = torch.optim.AdamW(rw.adapter_parameters(model).values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(10):
        loss = mean_loss(model, reference["train_ids"])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = reference["continued_losses_adamw_lr1e-3"]
    torch.testing.assert_close(torch.tensor(losses), expected, rtol=TOLERANCE, atol=0)
    assert losses[-1] < losses[0]
