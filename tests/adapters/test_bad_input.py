"""Each mistake gets one sentence that says what, what it got and what to do, and leaves the model as it was."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from adapted_models import logits
from safetensors.torch import load_file, save_file

import rankwise as rw
from rankwise.adapters.folder import from_peft
from rankwise.cli.main import main
from rankwise.errors import AdapterError, ConfigError
from rankwise.foreign import read_header
from tiny_models import tiny_gpt2, tiny_llama


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    rw.save_adapter(model, tmp_path)
    return tmp_path


def edit_config(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def fails(model, folder, code: str, *parts: str) -> None:
    before, names = logits(model), list(dict(model.named_modules()))
    with pytest.raises(AdapterError) as caught:
        rw.load_adapter(model, folder)
    assert caught.value.code == code
    for part in parts:
        assert part in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message
    assert names == list(dict(model.named_modules()))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "code", "part"),
    [
        ({"target_modules": ["Q_PROJ"]}, "RW401", "end in q_proj"),
        ({"target_modules": ["mlp"]}, "RW402", "model.layers.0.mlp (LlamaMLP)"),
        ({"target_modules": ["q_proj"], "enable_lora": {"c_attn": [True]}}, "RW403", "c_attn"),
        ({"target_modules": ["q_proj"], "enable_lora": {"q_proj": [True] * 5}}, "RW403", "32 output rows"),
    ],
)
def test_targets(settings, code, part):
    model = tiny_llama()
    with pytest.raises(AdapterError) as caught:
        rw.add_adapter(model, rw.LoraConfig(**settings))
    assert caught.value.code == code
    assert part in caught.value.message
    assert all(type(module).__name__ != "AdaptedLayer" for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "'none', 'all' or 'lora_only'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"enable_lora": {"c_attn": [False, False]}}, "must be a list that enables at least one part"),
        ({"layers_to_transform": [0]}, "goes with a list of target_modules"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ('q_proj',)"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] is 'x'"),
        ({"layers_to_transform": "x", "target_modules": ["q_proj"]}, "layers_to_transform is 'x'"),
        ({"enable_lora": 5}, "enable_lora is 5"),
        ({"target_modules": "(q_proj"}, "target_modules is '(q_proj'"),
        ({"layers_pattern": "(x"}, "layers_pattern"),
    ],
)
def test_settings(settings, part):
    with pytest.raises(ConfigError) as caught:
        rw.LoraConfig(**settings)
    assert part in caught.value.message


def test_names():
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=2))
    for name in ("default", "a.b", ""):
        with pytest.raises(AdapterError, match="RW405"):
            rw.add_adapter(model, rw.LoraConfig(r=2), name=name)
    with pytest.raises(AdapterError, match="RW406"):
        rw.add_adapter(model, rw.LoraConfig(r=2, bias="all"), name="other")
    with pytest.raises(AdapterError, match="RW407"):
        rw.set_adapter(model, "missing")
    with pytest.raises(AdapterError, match="RW407"):
        rw.adapter_parameters(tiny_gpt2())
    with pytest.raises(AdapterError, match="RW408"):
        rw.unmerge_adapter(model)


def test_another_base_lists_every_tensor(folder):
    other = tiny_llama(hidden_size=48)
    fails(other, folder, "RW411", "8 of its tensors do not fit", "layers.0.self_attn.q_proj.lora_A", "(3, 48)")
    fails(tiny_llama(num_hidden_layers=1), folder, "RW411", "layers.1.self_attn.v_proj.lora_B.weight has no place")
    fails(tiny_llama(num_hidden_layers=3), folder, "RW411", "layers.2.self_attn.q_proj.lora_A.weight is missing")
    fails(tiny_gpt2(), folder, "RW401", "selects none")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    fails(other, folder, "RW411", "made for a base (org/base) other than this LlamaForCausalLM")


def test_unreadable_files(folder, tmp_path):
    fails(tiny_llama(), tmp_path / "nowhere", "RW409", "there is no folder")
    (folder / "adapter_config.json").write_text("{")
    fails(tiny_llama(), folder, "RW409", "adapter_config.json")
    (folder / "adapter_config.json").write_text("[]")
    fails(tiny_llama(), folder, "RW409", "list")
    (folder / "adapter_config.json").unlink()
    fails(tiny_llama(), folder, "RW409", "adapter_config.json")


def test_truncated_tensors(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    fails(tiny_llama(), folder, "RW409", "adapter_model.safetensors")


def test_pickles_are_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"anything": 1}))
    fails(tiny_llama(), folder, "RW409", "adapter_model.bin")


@pytest.mark.parametrize("change", ["use_qalora", "alora_invocation_tokens", "init_lora_weights", "peft_type"])
def test_fields_that_change_the_result(folder, change):
    values = {"use_qalora": True, "alora_invocation_tokens": [1], "init_lora_weights": "pissa", "peft_type": ["IA3"]}
    edit_config(folder, **{change: values[change]})
    fails(tiny_llama(), folder, "RW410", change)


def test_harmless_unknown_fields_are_ignored(folder):
    edit_config(folder, qalora_group_size=16, peft_version="0.99.0", some_future_note=None, eva_config=None)
    rw.load_adapter(tiny_llama(), folder)


def test_fields_left_out_have_pefts_defaults(folder):
    document = json.loads((folder / "adapter_config.json").read_text())
    del document["r"], document["lora_alpha"]
    config = from_peft(document, folder)
    assert (config.r, config.lora_alpha) == (8, 8)
    with pytest.raises(AdapterError, match="lora_alpha is None"):
        from_peft({**document, "lora_alpha": None}, folder)


@pytest.mark.parametrize("name", ["layers.0.x.lora_B", f"layers.{'9' * 5000}.x.lora_B"])
def test_inspect_reads_any_name_and_refuses_other_dtypes(folder, capsys, name):
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    assert main(["inspect", str(folder)]) == 0
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2, 2, dtype=torch.uint8)}))
    assert main(["inspect", str(folder)]) == 2
    assert "error RW411" in capsys.readouterr().err


def test_a_token_far_beyond_the_embedding(folder):
    edit_config(folder, trainable_token_indices=[10**9])
    fails(tiny_llama(), folder, "RW410", "the token 1,000,000,000")


def test_bad_values_in_the_config(folder):
    edit_config(folder, r=-1)
    fails(tiny_llama(), folder, "RW410", "r is -1")
    edit_config(folder, r="three")
    fails(tiny_llama(), folder, "RW410")


def test_nan_is_refused(folder):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[key].fill_(float("nan")))
    fails(tiny_llama(), folder, "RW412", key)


def test_metadata_that_cannot_be_read(folder):
    path = folder / "adapter_model.safetensors"
    for text in ("{", "[]", '{"enable_lora": {"q_proj": [false]}, "rank_pattern": {}, "alpha_pattern": {}}'):
        save_file(load_file(path), path, metadata={"format": "pt", "rankwise.enable_lora": text})
        fails(tiny_llama(), folder, "RW409", "rankwise.enable_lora")


def test_integers_are_no_weights(folder):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(torch.int32)}))
    fails(tiny_llama(), folder, "RW411", key, "I32")


def test_a_fused_file_that_is_not_block_structured(tmp_path):
    model = tiny_gpt2()
    config = rw.LoraConfig(r=2, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]})
    rw.add_adapter(model, config)
    rw.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].fill_(1.0)
    metadata = dict(read_header(path).metadata)
    save_file(tensors, path, metadata=metadata)
    fails(tiny_gpt2(), tmp_path, "RW411", "c_attn.lora_B.weight")


def tiny_router_models():
    from transformers import AutoModelForCausalLM, Llama4TextConfig, PhimoeConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama4 = Llama4TextConfig(**sizes, intermediate_size_mlp=16, head_dim=8, interleave_moe_layer_step=1)
    return [AutoModelForCausalLM.from_config(config) for config in (llama4, PhimoeConfig(**sizes))]


def test_routers_that_give_a_tuple_are_no_linear_layers():
    """Wrapped, their forward would add a product to a tuple at the first step."""
    for model in tiny_router_models():
        routers = [name for name, part in model.named_modules() if type(part).__name__.endswith("Router")]
        assert routers
        with pytest.raises(AdapterError, match="RW402"):
            rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=[routers[0].rpartition(".")[2]]))
        report = rw.add_adapter(model, rw.LoraConfig(r=2))
        adapted = {module.name for module in report.modules}
        assert adapted
        assert not adapted & set(routers)
        ids = torch.tensor([[1, 5, 9, 14]])
        model(input_ids=ids, labels=ids).loss.backward()
