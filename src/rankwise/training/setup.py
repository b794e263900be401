"""Everything a run needs in memory: rows, model, adapter. Nothing is written here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rankwise.adapters import add_adapter
from rankwise.adapters.baselines import add_baseline
from rankwise.config import BASELINES, LoraConfig
from rankwise.data import Encoded, Rows, chat_text, encode_rows, read_rows, read_template, warn_of_overlap
from rankwise.data.encoded_cache import encode_rows_once
from rankwise.errors import ConfigError, RunError, warn
from rankwise.models import ModelSource, choose_device, fetch_model
from rankwise.models.positions import answer_room, table_rows
from rankwise.quantization.config import FourBitConfig
from rankwise.training.arguments import mixed_precision
from rankwise.training.prepared import load_prepared

ANSWER_TOKENS = 64
EVAL_ROWS = 256
PROBE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded rows, and what the record says about them."""

    train: Encoded
    evaluation: Encoded | None
    rows: Rows
    template: str | None
    # Jinja text of --chat-template.
    eval_rows: Rows | None = None

    @property
    def sets(self) -> list[Encoded]:
        return [self.train] if self.evaluation is None else [self.train, self.evaluation]

    def describe(self) -> dict[str, dict[str, Any]]:
        """{"train": ..., "eval": ...}: where each set came from, its sha256 and what became of its rows."""
        described = {"train": _described(self.rows, self.train)}
        if self.template is not None:
            described["train"]["chat_template_sha256"] = hashlib.sha256(self.template.encode()).hexdigest()
        if self.evaluation is not None and self.eval_rows is not None:
            described["eval"] = _described(self.eval_rows, self.evaluation)
        return described


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to train, and how."""

    source: ModelSource
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    # In which the model computes.
    precision: str
    # "no", "bf16" or "fp16": the Trainer's mixed precision.
    device_reason: str


def read_data(
    *,
    train: str,
    evaluation: str | None,
    eval_limit: int | None,
    columns: dict[str, str | None],
    chat_template: Path | None,
    skip_bad_rows: int = 0,
) -> tuple[Rows, Rows | None, str | None]:
    """Training rows, evaluation rows and the text of the chat template; all errors are DataErrors of the readers.

    A source with several splits gives its ``train`` for training and its ``validation`` for evaluation.
    """
    options: dict[str, Any] = {**columns, "skip_bad_rows": skip_bad_rows}
    rows = read_rows(train, split="train", **options)
    eval_rows = None if evaluation is None else read_rows(evaluation, split="validation", **options)
    if eval_rows is not None:
        eval_rows = limited(eval_rows, eval_limit)
        warn_of_overlap(rows, eval_rows)
    return rows, eval_rows, None if chat_template is None else read_template(chat_template)


def limited(rows: Rows, limit: int | None) -> Rows:
    """The first ``limit`` rows (all for 0); by default EVAL_ROWS spread evenly, because files are often sorted."""
    if limit is not None:
        return rows[:limit] if limit else rows
    step = max(1, len(rows) // EVAL_ROWS)
    sample = rows[: step * EVAL_ROWS : step]
    if len(sample) < len(rows):
        warn(
            "RW528",
            f"each evaluation takes {len(sample)} of the {len(rows):,} rows of {rows.source}, spread evenly; "
            "--eval-limit 0 takes all.",
        )
    return sample


def encode_data(
    rows: Rows,
    eval_rows: Rows | None,
    tokenizer: Any,
    *,
    max_length: int,
    template: str | None,
    skip_bad_rows: int = 0,
    cache: Path | None = None,
) -> Data:
    """Token ids and labels of both sets, by the same rules."""
    options: dict[str, Any] = {
        "max_length": max_length,
        "chat_template": template,
        "skip_bad_rows": skip_bad_rows,
    }
    encode = encode_rows if cache is None else functools.partial(encode_rows_once, cache=cache)
    train = encode(rows, tokenizer, name="train", **options)
    evaluation = None
    if eval_rows is not None:
        evaluation = encode(eval_rows, tokenizer, name="eval", **options)
    return Data(train, evaluation, rows, template, eval_rows)


def load_for_training(
    name: str,
    *,
    method: str,
    quantization: FourBitConfig | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    revision: str | None,
    cache: Path | None = None,
) -> Loaded:
    """The base model on its device, in the dtype that the method needs, in training mode."""
    choice = choose_device(device, dtype)
    where = torch.device(choice.device)
    weights, precision = mixed_precision(method, choice.dtype, where.type)
    source = fetch_model(name, revision=revision, trust_remote_code=trust_remote_code)
    model, tokenizer = load_prepared(
        source,
        dtype=weights,
        device=choice.device,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        cache=cache,
    )
    if tokenizer is None:
        raise ConfigError("RW115", f"{name} comes without a tokenizer, so text cannot be encoded for it.")
    return Loaded(source, model, tokenizer, where, choice.dtype, precision, choice.reason)


def attach(model: Any, method: str, config: LoraConfig, seed: int) -> int:
    """Put the method's adapter on the model, or free all of it for ``full``; gives the count of what trains."""
    set_seed(seed)
    if method == "full":
        model.requires_grad_(True)
        return sum(parameter.numel() for parameter in model.parameters())
    if method in BASELINES:
        return add_baseline(model, method, config.r)
    return add_adapter(model, config).trainable_parameters


def answerer(
    model: Any, tokenizer: Any, prompt: str, *, chat: bool, template: str | None, ending: str
) -> Callable[[], str]:
    """A function that lets the model answer ``prompt``, greedily: it draws no random numbers.

    ``ending`` is what the prompts of the training rows end with where no template writes them. Raises RunError (RW533)
    for a prompt beyond the model's learned positions.
    """
    if chat:
        text = chat_text(tokenizer, [{"role": "user", "content": prompt}], chat_template=template)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt.removesuffix(ending) + ending, return_tensors="pt")
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    tokens = ids["input_ids"].shape[1]
    room = answer_room(model, tokens, ANSWER_TOKENS)
    if not room:
        raise RunError(
            "RW533",
            f"--sample-prompt has {tokens:,} tokens, and this {type(model).__name__} has learned positions for "
            f"{table_rows(model):,}; give a shorter one.",
        )

    @torch.no_grad()
    def answer() -> str:
        on_device = {key: value.to(model.device) for key, value in ids.items()}
        output = model.generate(
            **on_device,
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        return str(tokenizer.decode(output[0, tokens:], skip_special_tokens=True)).strip()

    return answer


def probe_of(dataset: Any, device: torch.device) -> dict[str, Tensor]:
    """The first training row, at most 64 tokens: input_ids (1, L)."""
    ids = list(dataset[0]["input_ids"])[:PROBE_TOKENS]
    return {"input_ids": torch.tensor([ids], device=device)}


def _described(rows: Rows, encoded: Encoded) -> dict[str, Any]:
    place = {
        "source": rows.source,
        "format": rows.format,
        "prompt_ending": rows.prompt_ending,
        "sha256": rows.sha256,
    }
    return place | {key: value for key, value in dataclasses.asdict(encoded.report).items() if key != "name"}
