"""What PEFT makes of stacked experts beside what one asks for; the rest is in ``tests/differential``."""

from __future__ import annotations

import json

import pytest
import torch
from adapted_models import logits
from test_expert_adapters import BOTH, base
from torch import nn

import rankwise as rw
from rankwise.errors import AdapterError

peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")


def in_peft(family: str, **settings) -> nn.Module:
    settings = {"r": 3, "lora_alpha": 8, "init_lora_weights": False, **settings}
    return peft.get_peft_model(base(family), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


def test_targets_of_transformers_4_that_peft_turned_into_parameters(tmp_path):
    """PEFT reads w1, w2 and w3 of Mixtral as stacks, with twice the rank for gate and up."""
    theirs = in_peft("mixtral", target_modules=["w1", "w2", "w3", "q_proj"])
    theirs.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(document["target_parameters"]) == ["down_proj", "gate_up_proj"]
    model = base("mixtral")
    report = rw.load_adapter(model, tmp_path)
    assert {item.leaf: item.r for item in report.modules} == {"q_proj": 3, "gate_up_proj": 6, "down_proj": 3}
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=2e-5)


def test_without_target_modules_peft_chose_some_itself(tmp_path):
    theirs = in_peft("mixtral", target_parameters=list(BOTH))
    theirs.save_pretrained(tmp_path)
    model = base("mixtral")
    rw.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=2e-5)


def test_two_adapters(tmp_path):
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        in_peft("mixtral", target_modules=[], target_parameters=list(BOTH)).save_pretrained(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(base("mixtral"), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    model = base("mixtral")
    rw.load_adapter(model, tmp_path / "one", name="one")
    rw.load_adapter(model, tmp_path / "two", name="two")
    for name in ("one", "two"):
        theirs.set_adapter(name)
        rw.set_adapter(model, name)
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=2e-5)


def test_a_router_that_peft_adapted_is_refused(tmp_path):
    in_peft("mixtral", target_modules=[], target_parameters=["mlp.gate.weight"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"RW419.*mlp\.gate\.weight.*\(4, 32\)"):
        rw.load_adapter(base("mixtral"), tmp_path)
