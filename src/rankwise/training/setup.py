"""Everything a run needs in memory: rows, model, adapter. Nothing is written here."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from rankwise.adapters import add_adapter
from rankwise.config import LoraConfig
from rankwise.data import Encoded, Rows, encode_rows, read_rows, read_template
from rankwise.errors import ConfigError
from rankwise.models import choose_device, load_model, load_tokenizer
from rankwise.training.arguments import mixed_precision

ANSWER_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded rows, and what the record says about them."""

    train: Encoded
    evaluation: Encoded | None
    rows: Rows
    template: str | None
    # Jinja text of --chat-template.
    hashes: dict[str, str | None]
    # sha256 of each input.


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to train, and how."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    # In which the model computes.
    precision: str
    # "no", "bf16" or "fp16": the Trainer's mixed precision.
    device_reason: str
    total_parameters: int


def read_data(
    *,
    train: str,
    evaluation: str | None,
    eval_limit: int | None,
    columns: dict[str, str | None],
    chat_template: Path | None,
) -> tuple[Rows, Rows | None, str | None]:
    """Training rows, evaluation rows and the text of the chat template; all errors are DataErrors of the readers.

    A source with several splits gives its ``train`` for training and its ``validation`` for evaluation.
    """
    rows = read_rows(train, split="train", **columns)
    eval_rows = None if evaluation is None else read_rows(evaluation, split="validation", **columns)
    if eval_rows is not None and eval_limit is not None:
        eval_rows = eval_rows[:eval_limit]
    return rows, eval_rows, None if chat_template is None else read_template(chat_template)


def encode_data(
    rows: Rows, eval_rows: Rows | None, tokenizer: Any, *, max_length: int, template: str | None
) -> Data:
    """Token ids and labels of both sets, by the same rules."""
    train = encode_rows(rows, tokenizer, max_length=max_length, chat_template=template, name="train")
    evaluation = None
    if eval_rows is not None:
        evaluation = encode_rows(eval_rows, tokenizer, max_length=max_length, chat_template=template, name="eval")
    hashes = {
        "data": rows.sha256,
        "eval_data": None if eval_rows is None else eval_rows.sha256,
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }
    return Data(train, evaluation, rows, template, hashes)


def load_for_training(
    name: str, *, method: str, dtype: str, device: str, trust_remote_code: bool, revision: str | None
) -> Loaded:
    """The base model on its device, in the dtype that the method needs, in training mode."""
    quantization = _quantization(method)
    choice = choose_device(device)
    compute = choice.dtype if dtype == "auto" else getattr(torch, dtype)
    weights, precision = mixed_precision(method, compute, torch.device(choice.device).type)
    model, tokenizer = load_model(
        name,
        dtype=weights,
        device=str(choice.device),
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    return Loaded(model, tokenizer, torch.device(choice.device), compute, precision, choice.reason, total)


def tokenizer_of(name: str, *, trust_remote_code: bool, revision: str | None) -> Any:
    """The tokenizer alone, so that rows are checked before weights are loaded."""
    return load_tokenizer(name, trust_remote_code=trust_remote_code, revision=revision)


def attach(model: Any, method: str, config: LoraConfig, seed: int) -> int:
    """Put the method's adapter on the model, or free all of it for ``full``; gives the count of what trains."""
    set_seed(seed)
    if method == "full":
        model.requires_grad_(True)
        return sum(parameter.numel() for parameter in model.parameters())
    return add_adapter(model, config).trainable_parameters


def answerer(
    model: Any, tokenizer: Any, prompt: str, *, chat: bool, template: str | None
) -> Callable[[], str]:
    """A function that lets the model answer ``prompt``, greedily: it draws no random numbers."""
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def answer() -> str:
        on_device = {key: value.to(model.device) for key, value in ids.items()}
        output = model.generate(
            **on_device,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        return str(tokenizer.decode(output[0, on_device["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    return answer


def _quantization(method: str) -> Any:
    if method not in ("qlora", "qdora"):
        return None
    spec = importlib.util.find_spec("rankwise.quantization")
    four_bit = importlib.import_module("rankwise.quantization") if spec else None
    if not hasattr(four_bit, "Nf4Config"):
        raise ConfigError(
            "RW114", f"--method {method} needs 4-bit layers, which this version does not have; use lora or dora."
        )
    return four_bit.Nf4Config(double_quant=True)
