"""A tiny Llama with LoRA or DoRA and a data set of random ids: small enough to train in a second, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training_rows import WORDS, encoded_rows, write_rows
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.adapters import add_adapter
from rankwise.config import TrainSettings
from rankwise.lora_config import LoraConfig
from rankwise.training.arguments import Surroundings, sft_arguments
from rankwise.training.run import train
from rankwise.training.trainer import RankwiseTrainer
from tiny_models import tiny_llama


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores are shared; tiny matrices gain nothing from a second."""
    with one_thread():
        yield


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words w0 ... w89 and the usual special tokens, built in code."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


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
        precision: str = "no",
        padding_free: bool = False,
        **arguments: Any,
    ) -> RankwiseTrainer:
        model = model or tiny_llama()
        torch.manual_seed(7)
        if lora is not None:
            add_adapter(model, lora)
        given: dict[str, Any] = {
            "batch_size": 2,
            "gradient_accumulation": 2,
            "max_steps": 20,
            "learning_rate": 1e-2,
            "warmup_steps": 4,
            "seed": 3,
            "max_length": 32,
            "eval_steps": 5 if eval_rows else None,
            "save_steps": 10,
            "logging_steps": 5,
            **arguments,
        }
        settings = TrainSettings(model="M", data="D", output=folder or tmp_path / "run", **given)
        return RankwiseTrainer(
            model=model,
            args=sft_arguments(
                settings,
                Surroundings(
                    device_type="cpu",
                    precision=precision,
                    evaluates=eval_rows > 0,
                    eval_on_start=False,
                    padding_free=padding_free,
                ),
            ),
            processing_class=tokenizer,
            train_dataset=encoded_rows(rows),
            eval_dataset=encoded_rows(eval_rows, seed=9) if eval_rows else None,
            **(trainer or {}),
        )

    return make


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any) -> Path:
    return save_base(tmp_path / "base", tokenizer)


def save_base(folder: Path, tokenizer: Any) -> Path:
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, model_folder: Path) -> Any:
    return partial(settings_in, tmp_path, model_folder)


def settings_in(folder: Path, model_folder: Path, **changes: Any) -> TrainSettings:
    given = {
        "model": str(model_folder),
        "data": str(write_rows(folder / "train.jsonl", 40)),
        "eval_data": str(write_rows(folder / "eval.jsonl", 6, seed=1)),
        "output": folder / "run",
        "r": 4,
        "max_steps": 8,
        "batch_size": 2,
        "max_length": 16,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_steps": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    return TrainSettings.model_validate({**given, **changes})


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with dropout that nothing stopped; read only."""
    folder = tmp_path_factory.mktemp("straight")
    # The tests that compare with it run on one thread, and sums over two threads differ in their last bits.
    with one_thread():
        train(settings_in(folder, save_base(folder / "base", make_tokenizer()), lora_dropout=0.1))
    return folder / "run"
