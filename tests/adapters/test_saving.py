"""``save_pretrained`` and trainers keep the adapter: a PEFT folder, never a model that loads as the untrained base."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import IDS, logits, step
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rankwise as rw
from rankwise.errors import AdapterError
from rankwise.foreign import read_header
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_moe

FILES = {"adapter_config.json", "adapter_model.safetensors"}
BASES = {
    "llama": lambda: tiny_llama(attention_bias=True),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "mixtral": lambda: tiny_moe("mixtral"),
}
CASES = {
    "lora": ("llama", {}),
    "dora": ("llama", {"use_dora": True}),
    "bias_all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "whole_head": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"]}),
    "fused": ("gpt2", {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}, "use_dora": True}),
    "fused_alpha": (
        "gpt2",
        {
            "target_modules": ["c_attn"],
            "enable_lora": {"c_attn": [True, False, True]},
            "alpha_pattern": {"transformer.h.0.attn.c_attn": 16},
            "rank_pattern": {"transformer.h.1.attn.c_attn": 2},
        },
    ),
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}


def adapted(family: str, settings: dict[str, Any], name: str = "default") -> Any:
    model = BASES[family]()
    rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "lora_alpha": 8, **settings}), name=name)
    step(model)
    return model


def test_equal_adapters_have_equal_bytes(tmp_path):
    model = adapted("gpt2", {**CASES["fused_alpha"][1], "for_merge": "q4_0"})
    found = set()
    for _ in range(8):
        rw.save_adapter(model, tmp_path)
        found.add((tmp_path / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1
    assert len(read_header(tmp_path / "adapter_model.safetensors").metadata) == 3


@pytest.mark.parametrize("case", CASES)
def test_what_it_writes_reads_in_peft_and_in_ours(case, tmp_path):
    peft = pytest.importorskip("peft")
    family, settings = CASES[case]
    model = adapted(family, settings)
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == FILES
    ours = BASES[family]()
    rw.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=0)
    theirs = peft.PeftModel.from_pretrained(BASES[family](), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_that_is_given_is_what_is_written(case, tmp_path):
    family, settings = CASES[case]
    model = adapted(family, settings)
    trained = copy.deepcopy(model)
    gathered = {key: value.clone() for key, value in trained.state_dict().items()}
    expected = logits(trained)
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=gathered)
    ours = BASES[family]()
    rw.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=0)


def test_transformers_loads_the_adapter_with_its_base(tmp_path):
    pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rw.add_adapter(model, rw.LoraConfig(r=3))
    step(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_model_without_an_adapter_at_work_is_saved_whole(tmp_path):
    model = adapted("tied", {"target_modules": "all-linear"})
    before = logits(model)
    rw.merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), before, rtol=1e-4, atol=1e-5)
    rw.unmerge_adapter(model)
    model.save_pretrained(tmp_path / "unmerged")
    assert set(os.listdir(tmp_path / "unmerged")) == FILES
    rw.remove_adapter(model)
    model.save_pretrained(tmp_path / "removed")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "removed")
    torch.testing.assert_close(logits(plain), logits(BASES["tied"]()), rtol=0, atol=0)


def test_several_adapters_stand_in_folders_of_their_names(tmp_path):
    model = adapted("llama", {"target_modules": ["q_proj"]}, name="first")
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["v_proj"]), name="second")
    step(model)
    with rw.adapter_disabled(model):
        model.save_pretrained(tmp_path)
    for name, place in (("second", tmp_path), ("first", tmp_path / "first")):
        rw.set_adapter(model, name)
        alone = BASES["llama"]()
        rw.load_adapter(alone, place)
        torch.testing.assert_close(logits(alone), logits(model), rtol=0, atol=0)


def test_what_it_cannot_write_is_refused(tmp_path):
    model = adapted("llama", {})
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"save_peft_format": False}):
        with pytest.raises(AdapterError, match=f"RW421.*{next(iter(options))}="):
            model.save_pretrained(tmp_path / "out", **options)
    with pytest.raises(AdapterError, match=r"RW421.*state_dict lacks 28 of the adapter's tensors"):
        model.save_pretrained(tmp_path / "out", state_dict=tiny_llama().state_dict())
    model.save_pretrained(tmp_path / "other_rank", is_main_process=False)
    assert not (tmp_path / "other_rank").exists()


def test_copies_save_their_own_adapter(tmp_path):
    model = adapted("llama", {})
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        key, parameter = next(iter(rw.adapter_parameters(other).items()))
        parameter.data.fill_(5.0)
        other.save_pretrained(tmp_path / str(number))
        assert (load_file(tmp_path / str(number) / "adapter_model.safetensors")[key] == 5).all()
    model.save_pretrained(tmp_path / "own")
    assert not (load_file(tmp_path / "own" / "adapter_model.safetensors")[key] == 5).all()


def trainer_of(model: Any, folder: Path, steps: int, rate: float) -> Trainer:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(8, 1)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        learning_rate=rate,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_plain_trainer_saves_resumes_and_loads_its_best_step(four_bit, tmp_path):
    def model() -> Any:
        found = tiny_llama()
        if four_bit:
            rw.quantize(found, rw.Nf4Config(block_size=32))
        torch.manual_seed(0)
        rw.add_adapter(found, rw.LoraConfig(r=3, use_dora=True, modules_to_save=["lm_head"]))
        return found

    # A rate so high that the loss soon rises: the best step is not the last.
    wild = trainer_of(model(), tmp_path / "wild", 6, 3.0)
    wild.train()
    best = int(wild.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 6
    assert wild.evaluate()["eval_loss"] == pytest.approx(wild.state.best_metric, rel=1e-5)
    stored = load_file(tmp_path / "wild" / f"checkpoint-{best}" / "adapter_model.safetensors")
    kept = {key: value.detach() for key, value in rw.adapter_parameters(wild.model).items()}
    assert all(torch.equal(stored[key], value) for key, value in kept.items())

    through = trainer_of(model(), tmp_path / "through", 4, 1e-2)
    through.train()
    resumed = trainer_of(model(), tmp_path / "through", 4, 1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model), logits(through.model), rtol=1e-5, atol=1e-6)
    resumed.save_model(str(tmp_path / "final"))
    assert set(os.listdir(tmp_path / "final")) == FILES | {"training_args.bin"}
    again = model()
    rw.load_adapter(again, tmp_path / "final", name="again")
    torch.testing.assert_close(logits(again), logits(resumed.model), rtol=0, atol=0)


def test_peft_loads_the_adapter_of_a_model_that_does_not_generate(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_bert()
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["query"]))
    rw.save_adapter(model, tmp_path)
    peft.PeftModel.from_pretrained(tiny_bert(), tmp_path)


def test_peft_s_biases_beside_a_block_that_trains_whole_load(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["mlp"])
    theirs = peft.get_peft_model(tiny_llama(attention_bias=True, mlp_bias=True), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.01 * parameter.requires_grad
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama(attention_bias=True, mlp_bias=True)
    rw.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
