"""Fixtures that every part uses: a tiny Llama, a tiny GPT-2, and the project's shared data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SHARED = Path(os.environ.get("RANKWISE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture
def shared() -> Path:
    """The folder with real data and reference results; tests that need it are skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no reference data at {SHARED}; set RANKWISE_SHARED to its folder")
    return SHARED / "data"


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A two-layer Llama of random weights, small enough for exact tests."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def tiny_gpt2(seed: int = 0, **overrides: object) -> GPT2LMHeadModel:
    """A two-layer GPT-2 of random weights: Conv1D layers, fused q, k, v, tied head."""
    settings = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(seed)
    config = GPT2Config(**{**settings, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **overrides})
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return tiny_gpt2()
