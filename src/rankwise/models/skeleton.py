"""A model without its weights: shapes and names on torch's meta device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rankwise.compat.transformers import gguf_read_once
from rankwise.errors import ModelError
from rankwise.models.folder import auto_class, check_architecture, read_config
from rankwise.models.gguf_config import config_of_gguf
from rankwise.models.quiet import quiet, reason_of
from rankwise.models.source import ModelSource, fetch_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_skeleton(
    model: str | os.PathLike[str] | ModelSource, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """The causal language model that ``model`` describes, on the meta device; its weights need not be there.

    Raises ModelError: as ``fetch_model`` does; RW302 to RW304 and RW310 for a config that describes no such model.
    """
    source = model
    if not isinstance(source, ModelSource) or source.path is None:
        source = fetch_model(source, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    assert source.path is not None
    if not source.is_gguf:
        check_architecture(read_config(source.path), source.path, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            return skeleton_of(_config(source, trust_remote_code), trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        # transformers may raise anything for such a config; the cause is chained.
        raise ModelError(
            "RW303", f"transformers cannot build the model that {source.path} describes: {reason_of(error)}."
        ) from error


def skeleton_of(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, on the meta device. transformers may raise anything."""
    import torch

    with torch.device("meta"):
        return auto_class(config.model_type).from_config(config, trust_remote_code=trust_remote_code)


def _config(source: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    assert source.path is not None
    if source.is_gguf:
        with gguf_read_once():
            return config_of_gguf(source.path)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(source.path), trust_remote_code=trust_remote_code)
