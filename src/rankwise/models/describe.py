"""The facts about a base model in a run's record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.constants import TEMPLATE_FILE
from rankwise.foreign import JsonObject
from rankwise.models.folder import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES, existing_weights, read_config
from rankwise.models.source import ModelSource, fetch_model
from rankwise.weights_file import sha256_of_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Further files of a tokenizer.
TOKENIZER_PARTS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", TEMPLATE_FILE)


def model_hash(model: str | ModelSource) -> str:
    """SHA-256 of the model's weights: that of a single file, or that of the sorted lines ``HASH  NAME``."""
    return sha256_of_files(weights_files(fetch_model(model)))


def settings_hash(source: ModelSource) -> str | None:
    """SHA-256 of the other files on which a model's answers depend: its configs and those of its tokenizer.

    None for a GGUF, whose one file holds all.
    """
    if source.is_gguf:
        return None
    files = [source.place / name for name in (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES, *TOKENIZER_PARTS)]
    return sha256_of_files(file for file in files if file.is_file())


def weights_files(source: ModelSource) -> list[Path]:
    """The weights files of a source on this machine. Raises ModelError (RW305) for a missing file."""
    if source.is_gguf:
        return [source.place]
    return [source.place / name for name in existing_weights(source.place, read_config(source.place))]


def model_facts(model: PreTrainedModel, source: str | ModelSource) -> JsonObject:
    """The facts of a loaded base model without adapters.

    ``parameters`` counts tied weights once. Keys: name, kind, base_model, path, revision, sha256, architecture,
    model_type, parameters, dtype, quantization.
    """
    from rankwise.compat.torch import class_of
    from rankwise.quantization.linear import count_weights

    found = fetch_model(source)
    return {
        "name": found.name,
        "kind": found.kind,
        "base_model": found.base_model,
        "path": None if found.path is None else str(found.path.resolve()),
        "revision": found.revision,
        "sha256": model_hash(found),
        "architecture": class_of(model).__name__,
        "model_type": model.config.model_type,
        "parameters": count_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": _quantization(model),
    }


def _quantization(model: PreTrainedModel) -> JsonObject | None:
    """The complete 4-bit format; config.json's quantization_config lacks the block size."""
    config = getattr(model.config, "quantization_config", None)
    for method in ("to_loading_dict", "to_dict"):
        if hasattr(config, method):
            config = getattr(config, method)()
    return config
