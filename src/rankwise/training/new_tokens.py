"""New tokens: they are added to the tokenizer, embedding and head get a row for each, and only these rows train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConfigError
from rankwise.lora_config import LoraConfig


def new_tokens(given: str) -> list[str]:
    """The lines of the file that ``--new-tokens`` names, or its comma-separated parts. Raises ConfigError (RW787)."""
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    except (OSError, ValueError) as error:
        raise ConfigError("RW787", f"--new-tokens {given} cannot be read: {error}.") from None
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens or len(set(tokens)) < len(tokens):
        count = f"{len(tokens)} tokens, {len(set(tokens))} of them different"
        raise ConfigError("RW787", f"--new-tokens {given} names {count}; name at least one, and each once.")
    return tokens


@torch.no_grad()
def add_new_tokens(model: Any, tokenizer: Any, tokens: list[str], config: LoraConfig) -> LoraConfig:
    """Add ``tokens`` to tokenizer, embedding and head. A new row is the mean of the rows of the tokens into which the
    text was split before. Returns the configuration with which the new rows train.

    Raises ConfigError (RW787) for tokens that the tokenizer has already.
    """
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise ConfigError("RW787", f"--new-tokens names {', '.join(known)}, which the tokenizer has; leave them out.")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    before = len(model.get_input_embeddings().weight)
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    ends: dict[int, Any] = {}
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            # A tied head shares the embedding's rows.
            ends.setdefault(id(end.weight), end)
    for end in ends.values():
        _start_rows(end.weight, before, ids, pieces)
    names = {name for name, module in model.named_modules() if any(module is end for end in ends.values())}
    return dataclasses.replace(config, trainable_token_indices=dict.fromkeys(sorted(names), ids))


def _start_rows(W: Tensor, before: int, ids: list[int], pieces: list[list[int]]) -> None:
    """Set the rows ``ids`` of W (vocabulary, dim) to the means of their pieces' rows, or of the first ``before`` rows
    where there are no pieces."""
    for index, own in zip(ids, pieces):
        W[index] = (W[own] if own else W[:before]).float().mean(dim=0)
