"""Models with a table of learned positions, which cannot compute a row with more tokens than the table has rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rankwise.foreign import Fields

if TYPE_CHECKING:
    from torch import nn

# Decoders with such a table, by ``model_type``: what a config alone tells. Of a loaded model ``table_rows`` tells.
LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt"})
_NAME = re.compile(r"wpe|pos")


def config_table_rows(config: Fields) -> int | None:
    """The most tokens of a row, by a config.json; None where positions are computed, or the config does not say."""
    if config.get("model_type") not in LEARNED:
        return None
    found = (config.get(name) for name in ("n_positions", "max_position_embeddings"))
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def table_rows(model: nn.Module) -> int | None:
    """The same for a model: an embedding that is named for positions and has as many rows as its config has positions.

    Tables of images and sounds have another number of rows. Offset (OPT) and padding (RoBERTa) rows belong to no token.
    """
    from torch import nn

    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    positions = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.search(name.rpartition(".")[2]):
            rows = module.num_embeddings - (getattr(module, "offset", None) or 0)
            if rows == positions:
                return rows - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def answer_room(model: nn.Module, prompt_tokens: int, wanted: int) -> int:
    """The number of new tokens, at most ``wanted``, that a table of positions permits after a prompt; 0 for a prompt
    that is too long.

    n new tokens look up prompt + n - 1 positions: the last one is not read again.
    """
    rows = table_rows(model)
    return wanted if rows is None else max(0, min(wanted, rows - prompt_tokens + 1))
