"""A tiny Llama with LoRA or DoRA and a data set of random ids: small enough to train in a second, exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.adapters import add_adapter
from rankwise.config import LoraConfig
from rankwise.training.arguments import sft_arguments
from rankwise.training.trainer import RankwiseTrainer

WORDS = [f"w{index}" for index in range(90)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Two cores are shared; tiny matrices gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words w0 ... w89 and the usual special tokens, built in code."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def encoded_rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 4 to 12 ids whose first two are the prompt and whose last is the stop token 2."""
    draw = random.Random(seed)
    ids = [[1, *(draw.randrange(4, 94) for _ in range(draw.randrange(3, 10))), 2] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def small_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
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
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


TrainerMaker = Callable[..., RankwiseTrainer]


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TrainerMaker:
    """A trainer over the tiny model; keyword arguments override the defaults of any of its parts."""

    def make(
        folder: Path | None = None,
        *,
        lora: LoraConfig | None = LoraConfig(r=4, lora_dropout=0.1),  # noqa: B008  (frozen)
        model: LlamaForCausalLM | None = None,
        rows: int = 37,
        eval_rows: int = 0,
        trainer: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> RankwiseTrainer:
        model = model or small_llama()
        torch.manual_seed(7)
        if lora is not None:
            add_adapter(model, lora)
        given: dict[str, Any] = {
            "device_type": "cpu",
            "precision": "no",
            "batch_size": 2,
            "gradient_accumulation": 2,
            "max_steps": 20,
            "epochs": 1.0,
            "learning_rate": 1e-2,
            "schedule": "linear",
            "warmup_steps": 4,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optimizer": "adamw_torch",
            "seed": 3,
            "packing": False,
            "max_length": 32,
            "gradient_checkpointing": False,
            "evaluate": eval_rows > 0,
            "eval_steps": 5 if eval_rows else None,
            "eval_on_start": False,
            "save_steps": 10,
            "logging_steps": 5,
            "tensorboard": False,
        }
        return RankwiseTrainer(
            model=model,
            args=sft_arguments(folder or tmp_path / "run", **{**given, **arguments}),
            processing_class=tokenizer,
            train_dataset=encoded_rows(rows),
            eval_dataset=encoded_rows(eval_rows, seed=9) if eval_rows else None,
            **(trainer or {}),
        )

    return make
