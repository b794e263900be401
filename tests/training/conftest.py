"""A tiny Llama with LoRA or DoRA and a data set of random ids: small enough to train in a second, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from training_rows import WORDS, encoded_rows, write_rows
from transformers import PreTrainedTokenizerFast

from rankwise.adapters import add_adapter
from rankwise.config import TrainSettings
from rankwise.lora_config import LoraConfig
from rankwise.training.checkpoints import Checkpoint
from rankwise.training.learning import LEARNING, make_loop, paced
from rankwise.training.loop import Loop
from rankwise.training.parts import Pace, Updates, learned_of, part_of
from rankwise.training.run import progress_of, train
from rankwise.training.setup import LoadedBase
from rankwise.training.step import Computing
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


LoopMaker = Callable[..., Loop]


@pytest.fixture
def loop_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> LoopMaker:
    """A loop over the tiny model; keyword arguments override the defaults of any of its parts."""

    def make(
        folder: Path | None = None,
        *,
        lora: LoraConfig | None = LoraConfig(r=4, lora_dropout=0.1),  # noqa: B008  (frozen)
        model: Any = None,
        rows: int | Dataset = 37,
        eval_rows: int | Dataset = 0,
        autocast: torch.dtype | None = None,
        flat: bool = False,
        resumed: Checkpoint | None = None,
        **arguments: Any,
    ) -> Loop:
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
        train, held_out = (
            SimpleNamespace(dataset=encoded_rows(given, seed) if isinstance(given, int) else given)
            for given, seed in ((rows, 0), (eval_rows, 9))
        )
        data: Any = SimpleNamespace(train=train, evaluation=held_out if len(held_out.dataset) else None, max_length=32)
        device = torch.device("cpu")
        computing = part_of(Computing, settings, products="bfloat16")
        base = LoadedBase(
            source=None,
            model=model,
            tokenizer=tokenizer,
            device=device,
            dtype=torch.float32,
            autocast=autocast,
            device_reason="a test",
            facts={},
        )  # type: ignore[arg-type]
        learning = LEARNING[settings.objective](learned_of(settings))
        pace = part_of(Pace, settings)
        objective = learning.objective(base, data, pace, "flat" if flat or settings.packing else "padded")
        return make_loop(
            objective,
            paced(objective, pace),
            part_of(Updates, settings, rate=settings.learning_rate),
            base,
            computing,
            settings.output,
            progress=progress_of(resumed),
            is_evaluated=True,
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
