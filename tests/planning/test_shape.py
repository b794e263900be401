"""Modules and parameter counts from a config alone are those of the model that transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from planning_models import FAMILIES, config_of, skeleton
from transformers import AutoConfig

from rankwise.adapters import add_adapter
from rankwise.errors import AdapterError, ModelError
from rankwise.models.folder import auto_class
from rankwise.planning import Workload
from rankwise.planning.adapted import adaptation
from rankwise.planning.architectures import FAMILIES as KNOWN
from rankwise.planning.architectures import shape_of
from tables import thinned

ADAPTERS = [
    {},
    {"target_modules": ("q_proj", "v_proj", "c_attn", "qkv_proj"), "r": 32},
    {"target_modules": r".*\.(o_proj|down_proj|c_fc)"},
    {"target_modules": ("embed_tokens", "wte", "v_proj")},
    {"exclude_modules": ("o_proj", "c_fc")},
    {"modules_to_save": ("lm_head",)},
    {"modules_to_save": ("mlp",)},
    {"bias": "all"},
    {"bias": "lora_only", "target_modules": ("q_proj", "c_attn", "o_proj")},
    {"layers_to_transform": (0, 2), "target_modules": ("v_proj", "c_proj", "o_proj")},
    {"rank_pattern": {"q_proj": 4, "c_attn": 2}},
    {"enable_lora": {"c_attn": (True, False, True)}},
    {"target_modules": ("self_attn",)},
    {"target_modules": ("no_such_module",)},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_those_of_the_model(family):
    shape, model = shape_of(config_of(family)), skeleton(family)
    own = {name: sum(p.numel() for p in module.parameters(recurse=False)) for name, module in model.named_modules()}
    assert {module.name: module.parameters for module in shape.modules} == {k: n for k, n in own.items() if n}
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_every_known_family_is_tested():
    assert set(KNOWN) == set(FAMILIES)


@thinned({"family": ["llama", "gpt2", "phi3", "qwen2_moe", "gemma3", "smolvlm"], "use_dora": [False, True]})
def test_trainable_parameters_are_those_of_add_adapter(family, use_dora):
    for settings in ADAPTERS:
        if use_dora and "enable_lora" in settings:
            continue  # its rows are found by value, which the meta device does not have
        config = Workload(**settings).lora_config(use_dora=use_dora)
        assert _outcome(lambda: adaptation(shape_of(config_of(family)), config).parameters) == _outcome(  # noqa: B023
            lambda: add_adapter(skeleton(family), config).trainable_parameters  # noqa: B023
        ), settings


def test_a_whole_name_chooses_its_layer_itself():
    """As in PEFT, whatever layers_to_transform says: the plan counts what the model trains."""
    named = {"target_modules": ("model.layers.1.self_attn.v_proj",), "layers_to_transform": (0,)}
    config = Workload(**named).lora_config(use_dora=False)
    planned = adaptation(shape_of(config_of("llama")), config)
    assert [item.module.name for item in planned.adapted] == ["model.layers.1.self_attn.v_proj"]
    assert planned.parameters == add_adapter(skeleton("llama"), config).trainable_parameters


@pytest.mark.parametrize("enabled", [{"no_such": (True,)}, {"q_proj": (True, False, True)}])
def test_what_is_said_of_wrong_parts_is_what_add_adapter_says(enabled):
    config = Workload(enable_lora=enabled).lora_config(use_dora=False)
    with pytest.raises(AdapterError) as planned:
        adaptation(shape_of(config_of("llama")), config)
    with pytest.raises(AdapterError) as added:
        add_adapter(skeleton("llama"), config)
    assert planned.value.message == added.value.message


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {
            "target_parameters": ["down_proj"],
            "target_modules": (),
            "rank_pattern": {"layers.1.mlp.experts.down_proj": 3},
        },
        {"target_parameters": ["gate_up_proj"], "exclude_modules": ("experts",), "layers_to_transform": (0,)},
        {"target_parameters": ["layers.2.mlp.experts.down_proj"], "target_modules": ("q_proj",)},
        {"target_parameters": ["gate.weight"]},
        {"target_parameters": ["experts.gate_up_proj", "w1"]},
        {"target_parameters": ["experts.gate_up_proj"], "modules_to_save": ("mlp",)},
        {"target_parameters": ["experts.gate_up_proj"], "target_modules": ("w1",)},
    ],
)
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_stacks_are_those_of_add_adapter(family, settings):
    if "layers_to_transform" in settings:
        settings = {**settings, "target_modules": ("q_proj",)}
    config = Workload(**settings).lora_config(use_dora=False)
    found = _outcome(lambda: adaptation(shape_of(config_of(family)), config).parameters)
    assert found == _outcome(lambda: add_adapter(skeleton(family), config).trainable_parameters)


def _outcome(count):
    try:
        return count()
    except AdapterError as error:
        return error.code


LEFT_OUT = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings")


def with_defaults(config):
    return {
        name: with_defaults(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in LEFT_OUT
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    config = with_defaults(config_of(family, hidden_size=2048, num_attention_heads=32, num_hidden_layers=1))
    given = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = auto_class(family).from_config(AutoConfig.for_model(family, **given))
    shape = shape_of(config)
    assert shape.parameters == model.num_parameters()
    assert shape.kv_heads == getattr(model.config.get_text_config(), "num_key_value_heads", 32)


def test_an_unknown_architecture_is_named_and_sent_to_the_dry_run():
    with pytest.raises(ModelError, match="'mamba'.*--exact") as caught:
        shape_of({"model_type": "mamba"})
    assert caught.value.code == "RW325"


def test_gemma_3_4b_as_its_config_stands_on_the_hub():
    """google/gemma-3-4b-it: a config within the config that leaves out what transformers fills in."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    shape = shape_of({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    # The hub counts 4.30B parameters.
    assert shape.parameters == 4_300_079_472
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.tied) == (34, 2560, 262_208, True)


def test_a_config_within_the_config_must_be_there():
    with pytest.raises(ModelError, match="no text_config") as caught:
        shape_of({"model_type": "gemma3"})
    assert caught.value.code == "RW326"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", None),
        ("num_hidden_layers", 10**7),
        ("mlp_only_layers", 3),
        ("tie_word_embeddings", "false"),
        ("attention_dropout", "0.1"),
        ("attention_dropout", -2),
        ("max_position_embeddings", "2048"),
    ],
)
def test_fields_that_are_not_of_their_kind_are_refused(field, value):
    config = config_of("qwen3_moe") | {field: value}
    with pytest.raises(ModelError, match=field) as caught:
        shape_of(config)
    assert caught.value.code == "RW326"


def test_missing_and_wrong_fields_are_all_named():
    config = config_of("llama")
    del config["hidden_size"]
    config["num_attention_heads"] = "many"
    with pytest.raises(ModelError, match="hidden_size is missing, num_attention_heads is 'many'") as caught:
        shape_of(config)
    assert caught.value.code == "RW326"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_heads_that_transformers_refuses_are_refused(family):
    """And only those: some families round the heads' width down."""
    heads = {"hidden_size": 1000, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 1}
    is_refused = {}
    for build in (lambda: shape_of(config_of(family, **heads)), lambda: skeleton(family, **heads)):
        try:
            build()
        except ModelError as error:
            is_refused["here"] = error.code == "RW326"
        except (ValueError, StrictDataclassError):
            is_refused["there"] = True
    assert is_refused in ({}, {"here": True, "there": True})


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"])
def test_key_value_heads_of_null_are_as_many_as_heads(family):
    """Not the family's default, which counts where the field is left out: Qwen's of 32 would shrink 64 heads' keys."""
    sizes = {"num_attention_heads": 64, "num_hidden_layers": 1, "num_key_value_heads": None}
    assert shape_of(config_of(family, **sizes)).kv_heads == 64
    assert shape_of(config_of(family, **sizes)).parameters == skeleton(family, **sizes).num_parameters()


def test_key_value_heads_must_divide_the_heads():
    config = config_of("llama", num_key_value_heads=7)
    with pytest.raises(ModelError, match="16 attention heads.*7 key-value heads.*num_key_value_heads") as caught:
        shape_of(config)
    assert caught.value.code == "RW326"


def test_the_closed_form_needs_no_torch(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    program = (
        "import sys; from rankwise.planning import estimate\n"
        f"estimate({str(tmp_path)!r}, 'qdora'); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
