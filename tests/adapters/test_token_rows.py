"""New tokens: only their rows train, in PEFT's format, over embeddings and heads, tied or not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from adapted_models import logits, step
from torch import nn

import rankwise as rw
from rankwise.errors import AdapterError, ConfigError
from rankwise.export.merged import merge_to_folder
from tiny_models import tiny_gpt2, tiny_llama

BASES = {
    "llama": lambda: tiny_llama(),
    "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(),
}
IDS = [5, 9, 96]
ROWS: dict[str, Any] = {
    "llama": {"embed_tokens": IDS, "lm_head": IDS},
    "llama-tied": IDS,
    "gpt2": {"wte": IDS},
}


def with_rows(base: str, **given: Any) -> nn.Module:
    model = BASES[base]()
    targets = ["c_attn"] if base == "gpt2" else ["q_proj"]
    config = {"r": 4, "target_modules": targets, "trainable_token_indices": ROWS[base], **given}
    rw.add_adapter(model, rw.LoraConfig(**config))
    return model


def ends(model: nn.Module) -> list[torch.Tensor]:
    return [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.parametrize("base", BASES)
def test_only_the_rows_train(base):
    plain, model = BASES[base](), with_rows(base)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
    step(model, 0.05)
    changed = [key for key, value in rw.adapter_parameters(model).items() if "trainable_tokens_delta" in key]
    assert len(changed) == (2 if base == "llama" else 1)
    with rw.adapter_disabled(model):
        assert torch.equal(logits(model), logits(plain))
    trained = logits(model)
    rw.merge_adapter(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    for merged, first in zip(ends(model), ends(plain), strict=True):
        moved = (merged != first).any(dim=1).nonzero().flatten().tolist()
        assert moved == IDS
    if base != "llama":
        assert ends(model)[0] is ends(model)[1]
    rw.unmerge_adapter(model)
    assert torch.equal(logits(model), trained)
    rw.remove_adapter(model)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_loading_makes_room_and_merging_to_a_folder_keeps_it(base, tmp_path):
    BASES[base]().save_pretrained(tmp_path / "base")
    model = BASES[base]()
    torch.manual_seed(3)
    model.resize_token_embeddings(99, mean_resizing=False)
    new = {"embed_tokens": [97, 98], "lm_head": [97, 98]} if base == "llama" else [97, 98]
    rw.add_adapter(model, rw.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=new))
    step(model, 0.05)
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    again = BASES[base]()
    rw.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = rw.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 99
    with pytest.raises(AdapterError, match="RW730"):
        rw.export_adapter(model, tmp_path / "served", target="vllm")


def test_rows_stay_in_float32_under_a_cast_and_train_under_the_fused_loss():
    model = with_rows("llama-tied").to(torch.bfloat16)
    rows = model.get_submodule("model.embed_tokens").at_work.rows
    assert rows.dtype is torch.float32
    assert model.get_submodule("lm_head").at_work.rows is rows
    rw.optimize_for_training(model)
    ids = torch.tensor([[1, 5, 9, 14]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert rows.grad is not None
    assert rows.grad[:2].abs().sum(dim=1).all()


@pytest.mark.parametrize(
    ("rows", "more", "error", "said"),
    [
        ([97], {}, AdapterError, "RW434.*97 rows"),
        ({"q_proj": [1]}, {}, AdapterError, "RW434.*q_proj"),
        ({"nothing": [1]}, {}, AdapterError, "RW434.*no module"),
        ([1], {"modules_to_save": ["embed_tokens"]}, AdapterError, "RW434"),
        ([1], {"modules_to_save": ["lm_head"], "tie_word_embeddings": True}, AdapterError, "RW434"),
        ([1], {"target_modules": ["lm_head"], "tie_word_embeddings": True}, AdapterError, "RW434"),
        ([1, 1], {}, ConfigError, "RW101.*twice"),
        ([-1], {}, ConfigError, "RW101"),
        ("5", {}, ConfigError, "RW101"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows, more, error, said):
    model = tiny_llama(tie_word_embeddings=more.get("tie_word_embeddings", False))
    given = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": rows, **more}
    given.pop("tie_word_embeddings", None)
    with pytest.raises(error, match=said):
        rw.add_adapter(model, rw.LoraConfig(**given))
    assert not rw.adapters.has_adapter(model)
