"""Models with learned positions, which cannot compute more tokens per row than their table has rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rankwise.compat.transformers import text_config
from rankwise.foreign import Fields

if TYPE_CHECKING:
    from torch import nn

# model_type of decoders with learned positions, for configs. For a loaded model ``table_rows`` finds the table.
LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt"})
_NAME = re.compile(r"wpe|pos")


def config_table_rows(config: Fields) -> int | None:
    """The longest row, in tokens, of a model with learned positions, by its config.json; None for all other models."""
    if config.get("model_type") not in LEARNED:
        return None
    found = (config.get(name) for name in ("n_positions", "max_position_embeddings"))
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def table_rows(model: nn.Module) -> int | None:
    """The longest row, in tokens, of a loaded model with learned positions; None if its positions are computed.

    The table is the embedding whose name says positions and whose size is that of the config; tables for images and
    sounds have other sizes. The extra rows of OPT (offset) and RoBERTa (padding) are not counted.
    """
    from torch import nn

    config = getattr(model, "config", None)
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.search(name.rpartition(".")[2]):
            rows = module.num_embeddings - (getattr(module, "offset", None) or 0)
            if rows == positions:
                return rows - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def answer_room(model: nn.Module, prompt_tokens: int, wanted: int) -> int:
    """The number of new tokens, at most ``wanted``, that the learned positions permit after a prompt; 0 for a prompt
    that is too long.

    n new tokens need prompt + n - 1 positions, since the last token is not fed back.
    """
    rows = table_rows(model)
    return wanted if rows is None else max(0, min(wanted, rows - prompt_tokens + 1))
