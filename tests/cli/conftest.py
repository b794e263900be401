"""A tiny model folder with a tokenizer, and a way to call the command line in this process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.cli.main import main
from several import Nursery, nursery
from tiny_models import save_with_tokenizer, tiny_gpt2

SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


class Done(NamedTuple):
    """What a call left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict:
        return json.loads(self.stdout)


@pytest.fixture
def rankwise(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def plan(rankwise: Callable[..., Done], model_folder: Path) -> Callable[..., Done]:
    """``rankwise plan`` of the tiny model."""
    return functools.partial(rankwise, "plan", "--model", model_folder, "--batch-size", 4, "--max-length", 64)


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, rows_file: Path) -> Iterator[Nursery]:
    """What forks processes of ``rankwise``, of which none has to import torch."""
    folder = tmp_path_factory.mktemp("several")
    command = ["train", "--model", model_folder, "--data", rows_file, "--eval-data", rows_file, "--device", "cpu"]
    command += ["--method", "qdora", "--max-steps", 1, "--r", 2, "--output", folder / "warm"]
    with nursery(folder, command) as made:
        yield made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of random weights over bytes, with a chat template."""
    import torch

    folder = tmp_path_factory.mktemp("tiny-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 12 positions with the tokenizer of bytes."""
    model = tiny_gpt2(vocab_size=259, n_positions=12)
    return save_with_tokenizer(model, model_folder, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run_folder(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished two-step run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    command = ["train", "--model", model_folder, "--data", rows_file, "--eval-data", rows_file, "--output", folder]
    command += ["--max-steps", 2, "--batch-size", 2, "--r", 2, "--logging-steps", 1, "--learning-rate", 0.01]
    assert main([str(part) for part in command]) == 0
    return folder
