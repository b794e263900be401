"""Models that look their positions up in a table: a row with more tokens than it has rows cannot be computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt"})
"""Decoders with such a table, by ``model_type``: what a config alone tells. Of a loaded model ``table_rows`` tells."""
_NAME = re.compile(r"wpe|pos")


def config_table_rows(config: Mapping[str, Any]) -> int | None:
    """The most tokens a row, by a config.json; None where positions are computed, or the config does not tell."""
    if config.get("model_type") not in LEARNED:
        return None
    found = (config.get(name) for name in ("n_positions", "max_position_embeddings"))
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def table_rows(model: nn.Module) -> int | None:
    """The same of a model: an embedding named for positions with as many rows as its config has positions (tables of
    images and sounds have others). Offset (OPT) and padding (RoBERTa) rows belong to no token.
    """
    from torch import nn

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.search(name.rpartition(".")[2]):
            rows = module.num_embeddings - (getattr(module, "offset", None) or 0)
            if rows == positions:
                return rows - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def answer_room(model: nn.Module, prompt_tokens: int, wanted: int) -> int:
    """How many of ``wanted`` new tokens a table of positions leaves behind a prompt; 0 where the prompt is too long.

    n new tokens look up prompt + n - 1 positions: the last one is not read again.
    """
    rows = table_rows(model)
    return wanted if rows is None else max(0, min(wanted, rows - prompt_tokens + 1))
