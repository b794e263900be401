"""Every setting of an adapter that names nothing in the model is said: targets as errors, others as warnings."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from adapted_models import logits, step

import rankwise as rw
from rankwise.errors import AdapterError, ConfigError, RankwiseWarning
from tiny_models import tiny_llama, tiny_moe

STACK = "mlp.experts.gate_up_proj"
REFUSED = [
    ("llama", {"target_modules": ["q_proj", "nope"]}, "RW401", ["'nope'", "its linear layers end in q_proj"]),
    ("llama", {"target_modules": ["q_proj", "v_prj", "up_porj"]}, "RW401", ["'v_prj', 'up_porj'", "v_proj", "up_proj"]),
    ("llama", {"target_modules": ["q_proj", "self_atn.k_proj"]}, "RW401", ["'self_atn.k_proj'", "k_proj"]),
    ("llama", {"target_modules": ["all-linear", "lm_head"]}, "RW401", ["names 'all-linear'"]),
    ("llama", {"target_modules": "nothing.*"}, "RW401", ["target_modules names 'nothing.*'"]),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 7, 9]}, "RW401", ["7, 9"]),
    ("llama", {"target_parameters": ["mlp.experts.w1"]}, "RW401", ["'mlp.experts.w1'", "it has no stacked experts"]),
    ("qwen3_moe", {"target_parameters": [STACK, "w1"]}, "RW401", ["'w1'", f"its stacked experts in {STACK}"]),
    ("llama", {"modules_to_save": ["lm_head", "lm_haed"]}, "RW401", ["'lm_haed'"]),
    (
        "qwen3_moe",
        {
            "target_modules": ["q_proj", "nope"],
            "target_parameters": ["w1"],
            "modules_to_save": ["score", "lm_head"],
            "layers_to_transform": [5],
        },
        "RW401",
        ["'nope'", "'w1'", "modules_to_save names 'score'", "names 5"],
    ),
]
WARNED = [
    ({"exclude_modules": ["lm_haed", "q_proj"]}, ["exclude_modules names 'lm_haed'"]),
    ({"exclude_modules": r".*\.99\..*"}, [r"exclude_modules names '.*\\.99\\..*'"]),
    ({"rank_pattern": {"q_proj": 2, "w_proj": 3}}, ["rank_pattern names 'w_proj'"]),
    ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, ["alpha_pattern names 'v_proj'"]),
    (
        {"exclude_modules": ["nope"], "rank_pattern": {"nope2": 2}, "alpha_pattern": {"nope3": 2}},
        ["'nope'", "'nope2'", "'nope3'"],
    ),
]


def model_of(family: str) -> torch.nn.Module:
    return tiny_llama() if family == "llama" else tiny_moe(family)


def said(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(item.message) for item in caught if isinstance(item.message, RankwiseWarning)]


@pytest.mark.parametrize(("family", "settings", "code", "parts"), REFUSED)
def test_targets_in_vain_are_refused(family, settings, code, parts):
    model, config = model_of(family), rw.LoraConfig(r=2, **settings)
    with pytest.raises(AdapterError) as caught:
        rw.add_adapter(model, config)
    assert caught.value.code == code
    for part in parts:
        assert part in caught.value.message, caught.value.message
    assert not hasattr(model, "rankwise_adapters")


@pytest.mark.parametrize(("settings", "parts"), WARNED)
def test_other_settings_in_vain_are_said_in_one_warning(settings, parts):
    model, config = tiny_llama(), rw.LoraConfig(r=2, **settings)
    (message,) = said(lambda: rw.add_adapter(model, config))
    assert message.startswith("RW420")
    for part in parts:
        assert part in message


def test_settings_that_all_name_something_are_not_warned_of():
    config = rw.LoraConfig(
        r=2,
        target_modules=["q_proj", "self_attn.v_proj", "model.layers.0.mlp.up_proj"],
        exclude_modules=["layers.1.self_attn.q_proj", "lm_head"],
        rank_pattern={"q_proj": 4, r"layers\.0\..*up_proj": 3},
        modules_to_save=["lm_head", "norm"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
    )
    assert said(lambda: rw.add_adapter(tiny_llama(), config)) == []
    experts = rw.LoraConfig(target_parameters=[STACK], rank_pattern={"gate_up_proj": 2})
    assert said(lambda: rw.add_adapter(tiny_moe("qwen3_moe"), experts)) == []


def test_a_pattern_matches_whole_names_behind_a_dot_as_in_peft():
    """`proj` is not the end of `q_proj`."""
    model = tiny_llama()
    patterns = {"rank_pattern": {"proj": 2, "self_attn.v_proj": 3}, "alpha_pattern": {"proj": 4}}
    config = rw.LoraConfig(r=5, target_modules=["q_proj", "v_proj"], **patterns)
    messages = said(lambda: rw.add_adapter(model, config))
    assert "rank_pattern names 'proj'" in " ".join(messages)
    assert "alpha_pattern names 'proj'" in " ".join(messages)
    parameters = rw.adapter_parameters(model)
    ranks = {key: value.shape[0] for key, value in parameters.items() if "lora_A" in key}
    assert sorted(ranks.values()) == [3, 3, 5, 5]
    assert all((rank == 3) == ("v_proj" in key) for key, rank in ranks.items())
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=5, target_modules=["q_proj", "v_proj"], **patterns, task_type="CAUSAL_LM")
    )
    assert ranks == {
        key.replace(".default", ""): value.shape[0] for key, value in theirs.named_parameters() if "lora_A" in key
    }


def test_a_layers_pattern_alone_is_refused():
    with pytest.raises(ConfigError, match="RW101.*layers_pattern"):
        rw.LoraConfig(target_modules=["q_proj"], layers_pattern="layers")


def test_what_peft_loads_is_loaded_and_said(tmp_path):
    """PEFT takes a configuration as long as one of its targets is there."""
    peft = pytest.importorskip("peft")
    given = {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, **given, task_type="CAUSAL_LM"))
    step(theirs, rate=0.05)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"modules_to_save": ["lm_head", "score"]}))
    model = tiny_llama()
    (message,) = said(lambda: rw.load_adapter(model, tmp_path))
    assert message.startswith("RW420")
    assert "target_modules names 'c_attn'" in message
    assert "modules_to_save names 'score'" in message
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=2e-5)
    rw.save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=2e-5)


def test_an_adapter_of_which_nothing_is_there_is_refused_without_a_warning(tmp_path):
    rw.add_adapter(model := tiny_llama(), rw.LoraConfig(r=2, target_modules=["q_proj"]))
    rw.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_attn", "c_fc"]}))

    def load():
        with pytest.raises(AdapterError, match="RW401"):
            rw.load_adapter(tiny_llama(), tmp_path)

    assert said(load) == []
