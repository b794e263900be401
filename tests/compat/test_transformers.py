"""Canaries of ``compat.transformers``: each is named after what it watches and checks what the source relies on."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama import modeling_llama

from rankwise.compat import transformers as compat
from tiny_models import tiny_llama, tiny_moe

IDS = torch.arange(1, 7)[None]


def test_attn_implementation_is_what_set_attn_implementation_set(llama: LlamaForCausalLM):
    for name in ("eager", "sdpa"):
        llama.set_attn_implementation(name)
        assert compat.attention_of(llama.config) == name
    assert compat.attention_of(object()) is None


def experts_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "gate_up_proj"))


def test_experts_implementation_of_a_model_is_chosen_by_its_config():
    model = tiny_moe("qwen3_moe")
    expected = model(IDS).logits
    compat.choose_experts(model.config, "grouped_mm")
    assert experts_of(model).config._experts_implementation == "grouped_mm"
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


def test_experts_implementation_internal_of_one_module_calls_what_is_registered(monkeypatch: pytest.MonkeyPatch):
    model, calls = tiny_moe("qwen3_moe"), []
    experts = experts_of(model)

    def ours(self, hidden_states, top_k_index, top_k_weights):
        calls.append((self, hidden_states.shape, top_k_index.shape, top_k_weights.shape))
        return torch.zeros_like(hidden_states)

    compat.register_experts("rankwise_canary", ours)
    experts.config = copy.copy(experts.config)
    compat.choose_experts_of_module(experts.config, "rankwise_canary")
    model(IDS)
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("rankwise_canary")
    assert [(call[0] is experts, len(call[1]), len(call[2]), len(call[3])) for call in calls] == [(True, 2, 2, 2)]
    assert not compat.spreads_experts(experts)


def test_apply_gate_of_experts_is_the_gated_activation():
    experts = experts_of(tiny_moe("qwen3_moe"))
    both = torch.randn(5, experts.gate_up_proj.shape[1])
    gate, up = both.chunk(2, dim=-1)
    assert torch.allclose(compat.gate_of(experts)(both), experts.act_fn(gate) * up)


def test_keep_in_fp32_modules_and_get_dtype_plan(llama: LlamaForCausalLM):
    assert compat.kept_in_float32(llama) == ()
    assert compat.dtype_plan(llama, torch.float16) == {}
    llama._keep_in_fp32_modules = ["norm"]
    assert compat.kept_in_float32(llama) == ("norm",)
    assert compat.dtype_plan(llama, torch.float16) == {"norm": torch.float32}
    assert "norm" in compat.dense_by_default(llama)


def test_get_keys_to_not_convert_and_should_convert_module(llama: LlamaForCausalLM):
    assert compat.dense_by_default(llama) == ["lm_head"]
    assert not compat.is_converted("lm_head", ["lm_head"])
    assert not compat.is_converted("model.layers.0.mlp.up_proj", ["model.layers.0.mlp"])
    assert not compat.is_converted("model.layers.0.mlp.up_proj", ["up_proj"])
    assert compat.is_converted("model.layers.1.mlp.up_proj", ["model.layers.0.mlp", "lm_head"])


def test_assign_is_quantized_marks_the_parts_that_are_models(llama: LlamaForCausalLM):
    compat.mark_quantized(llama)
    assert llama.config._is_quantized
    assert llama.model.config._is_quantized


def test_is_hf_initialized_keeps_weights_from_being_drawn_again():
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    compat.mark_initialized(layer)
    model._initialize_weights(layer)
    assert torch.equal(layer.weight, before)
    assert not compat.is_initialized(layer.weight)
    layer.weight._is_hf_initialized = True
    assert compat.is_initialized(layer.weight)


def test_all_tied_weights_keys_are_what_saving_leaves_out(tmp_path: Path):
    model = tiny_llama(tie_word_embeddings=True)
    before = compat.tie_weights_as(model, False, {})
    assert before == (True, {"lm_head.weight": "model.embed_tokens.weight"})
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not again.lm_head.weight.any()
    assert again.model.embed_tokens.weight.any()
    compat.tie_weights_as(model, *before)
    assert model.config.tie_word_embeddings


def test_weight_conversions_are_what_loading_leaves_and_saving_inverts(tmp_path: Path):
    model = tiny_moe("qwen3_moe")
    assert compat.conversions_of(model) is None
    assert compat.known_conversions(model)
    model.save_pretrained(tmp_path / "split")
    loaded = type(model).from_pretrained(tmp_path / "split")
    assert compat.conversions_of(loaded)
    compat.set_conversions(loaded, [])
    loaded.save_pretrained(tmp_path / "whole")
    assert stored_experts(tmp_path / "split") > stored_experts(tmp_path / "whole")
    compat.forget_conversions(loaded)
    assert compat.conversions_of(loaded) is None
    loaded.save_pretrained(tmp_path / "again")
    assert stored_experts(tmp_path / "again") == stored_experts(tmp_path / "split")


def stored_experts(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum("experts" in name for name in file.keys())  # noqa: SIM118  (no dictionary)


def test_MODEL_TO_CONVERSION_PATTERN_names_families():
    assert compat.is_experts_family("qwen3_moe", "qwen2_moe")
    assert not compat.is_experts_family("llama", "qwen2_moe")


def test_is_tracing_of_masking_utils_decides_whether_a_fake_mask_is_looked_at():
    from rankwise.compat.torch import FakeTensorMode

    before = masking_utils.is_tracing
    with FakeTensorMode():
        mask = torch.ones(1, 4)
        assert masking_utils.is_tracing(mask)
        with compat.fake_masks_looked_at():
            assert not masking_utils.is_tracing(mask)
    assert masking_utils.is_tracing is before


def test_apply_rotary_pos_emb_is_the_name_that_modeling_code_calls(llama: LlamaForCausalLM):
    module_name, calls = modeling_llama.__name__, []
    original = compat.rotary_of(module_name)

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    compat.set_rotary(module_name, counted)
    try:
        llama(IDS)
    finally:
        compat.set_rotary(module_name, original)
    assert calls == [(1, 4, 6, 8)] * 2
    assert compat.rotary_of("transformers.models.gpt2.modeling_gpt2" if "gpt2" in sys.modules else "no.such") is None


def test_gradient_checkpointing_func_is_what_a_block_calls(llama: LlamaForCausalLM):
    llama.gradient_checkpointing_enable()
    llama.train()
    block, calls = llama.model.layers[0], []
    before = compat.checkpointing_of(block)
    assert getattr(before, "func", before) is torch.utils.checkpoint.checkpoint

    def ours(function, hidden, *args):
        calls.append(hidden.shape)
        return function(hidden, *args)

    with compat.checkpointing_by(block, ours):
        llama(IDS, use_cache=False)
    assert calls == [(1, 6, 32)]
    assert compat.checkpointing_of(block) is before


def test_active_collector_and_its_hooks_tell_who_asked_for_outputs(llama: LlamaForCausalLM):
    found = []
    llama.model.layers[1].register_forward_pre_hook(lambda *_: found.append(compat.collects_outputs()))
    llama(IDS)
    llama(IDS, output_hidden_states=True)
    assert found == [False, True]
    hooks = [hook for module in llama.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert all(map(compat.is_collecting_hook, hooks))
    assert not compat.is_collecting_hook(lambda *_: None)


def test_gguf_reader_names_and_bars_are_patched_and_put_back():
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    def patched() -> tuple[object, ...]:
        return gguf.GGUFReader, gguf.get_tensor_name_map, gguf.dequantize, loader.tqdm, loader.np, loader.torch

    before = patched()
    with compat.gguf_read_once():
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    assert patched() == before


def test_supports_flash_attn_is_said_by_the_class(llama: LlamaForCausalLM):
    assert compat.names_windows(llama)
    assert not compat.names_windows(nn.Module())


def test__no_split_modules_names_the_decoder_layers():
    assert len(compat.decoder_layers(tiny_llama())) == 2


def test_is_accelerate_available_keeps_from_pretrained_from_a_device_and_from_gguf(tmp_path: Path, monkeypatch):
    from transformers import modeling_utils
    from transformers.integrations import accelerate as asker

    tiny_llama().save_pretrained(tmp_path)
    for module in (modeling_utils, asker):
        monkeypatch.setattr(module, "is_accelerate_available", lambda: False)
    for given in ({"device_map": {"": "cpu"}}, {"gguf_file": "none"}):
        with pytest.raises(ValueError, match="accelerate"):
            LlamaForCausalLM.from_pretrained(tmp_path, **given)
    with compat.without_accelerate():
        assert LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).device.type == "cpu"
    assert not asker.is_accelerate_available()


def test__load_pretrained_model_comes_after_the_layers_and_before_the_weights(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)
    seen = []
    with compat.before_weights(lambda model: seen.extend(parameter.is_meta for parameter in model.parameters())):
        model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert seen
    assert all(seen)
    assert not any(parameter.is_meta for parameter in model.parameters())
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(seen) == len(list(model.parameters()))


def test_of_a_parameter_that_is_a_dtensor_the_process_reads_its_rows(tmp_path: Path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = tiny_llama()
    expected.save_pretrained(tmp_path)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with compat.before_weights(lambda model: fully_shard(model, mesh=mesh)):
            model = LlamaForCausalLM.from_pretrained(tmp_path)
        found = model.model.layers[0].mlp.up_proj.weight.to_local()
        assert torch.equal(found, expected.model.layers[0].mlp.up_proj.weight)
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    finally:
        distributed.destroy_process_group()


def test_weight_converters_tell_parameters_made_of_several_tensors():
    assert not compat.is_converted_by_parts(tiny_llama())
    assert compat.is_converted_by_parts(tiny_moe("mixtral"))


def test_should_save_on_this_rank_keeps_other_ranks_from_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.distributed import mixin

    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    tiny_llama().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    compat.saved_by_any_rank(tiny_llama()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
