"""Figures that others published."""

from __future__ import annotations

from pathlib import Path

import pytest
from planning_models import of_config

from rankwise.planning import Workload
from rankwise.planning.memory import ERROR

LLAMA_65B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "tie_word_embeddings": False,
}
LLAMA_32_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def test_qlora_trains_65b_on_one_48_gb_card():
    """QLoRA, abstract and section 4: r = 64 on all linear layers, batch 1, 512 tokens, paged optimizer."""
    workload = Workload(batch_size=1, max_length=512, r=64, gradient_checkpointing=True, optimizer="paged_adamw_32bit")
    found = of_config(LLAMA_65B, "qlora", workload)
    assert found.total_parameters == 65_285_660_672
    # The weights and the adapter alone are 37 GB.
    assert 38e9 < found.peak_bytes < 48e9


@pytest.mark.parametrize(("method", "trainable"), [("lora", 9_175_040), ("dora", 9_289_728)])
def test_trainable_parameters_of_llama_3_2_3b(method, trainable):
    """PEFT's method comparison: r = 32 on q and v."""
    workload = Workload(r=32, target_modules=("q_proj", "v_proj"))
    assert of_config(LLAMA_32_3B, method, workload).trainable_parameters == trainable


def test_full_fine_tuning_of_65b_takes_more_than_780_gb():
    """QLoRA, abstract, of 16-bit fine-tuning."""
    assert of_config(LLAMA_65B, "full", Workload(batch_size=1, max_length=512)).peak_bytes > 780e9


def test_errors_are_those_that_the_docs_state():
    text = (Path(__file__).parents[2] / "docs" / "gpus.md").read_text(encoding="utf-8")
    assert f"the plan is within {100 * ERROR:.0f} %" in text


def test_gpt2_medium_with_lora_on_q_and_v_counts_what_loralib_does():
    """loralib's MergedLinear(1024, 3072, r=4, enable_lora=[True, False, True]): A (8, 1024) and B (2048, 4) a layer."""
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16}
    workload = Workload(r=4, target_modules=("c_attn",), enable_lora={"c_attn": (True, False, True)})
    found = of_config(config | {"n_positions": 1024}, "lora", workload)
    assert found.trainable_parameters == 24 * (8 * 1024 + 2048 * 4)
    # LoRA, table 3: 354.92M in all.
    assert found.total_parameters == pytest.approx(354.92e6, rel=1e-3)
