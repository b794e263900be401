"""Models over bytes, small enough to compare every number, and what tests of tasks share."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankwise.evaluation.engine import Engine
from tiny_models import tiny_llama

SPECIAL = ["<pad>", "<s>", "</s>"]
VOCABULARY = len(SPECIAL) + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def byte_model(seed: int = 0, **overrides: Any) -> Any:
    """A Llama of random weights over bytes; larger weights than usual, so that its choices differ."""
    model = tiny_llama(seed, vocab_size=VOCABULARY, max_position_embeddings=512, **overrides)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    # Neither padding nor <s> is ever the likeliest: answers have text.
    model.lm_head.weight.data[:2] = 0
    return model


def byte_engine(**options: Any) -> Engine:
    return Engine(model=byte_model(), tokenizer=byte_tokenizer(), **options)


def save_byte_model(folder: Path) -> Path:
    byte_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arc_docs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the form of ARC, of three to five choices."""
    draw = random.Random(seed)
    docs = []
    for _ in range(count):
        texts = [" ".join(draw.choices(("red", "a blue", "stone", "ice"), k=draw.randint(1, 3))) for _ in range(4)]
        labels = ["A", "B", "C", "D"]
        choices = {"text": texts, "label": labels}
        question = f"{draw.randint(100, 999)} is what kind of a thing, and why?"
        docs.append({"question": question, "choices": choices, "answerKey": draw.choice(labels)})
    return docs


def nobody(done: int, total: int) -> None:
    """Watches no progress."""
