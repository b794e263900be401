"""A disk cache of prepared base models, keyed by a hash of the weights and of the preparation.

Reading a GGUF file and quantizing take seconds to minutes, and every run of a comparison needs the same result. A model
that needs no preparation (a folder, without quantization) is not cached.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.disk import hold, whole_folder
from rankwise.errors import RunError
from rankwise.models import ModelSource, load_model, model_hash
from rankwise.models.folder import read_config
from rankwise.models.load import load_tokenizer, remember_originals
from rankwise.quantization.config import FourBitConfig
from rankwise.quantization.targets import four_bit_modules

VERSION = 1


def load_prepared(
    source: ModelSource,
    *,
    dtype: torch.dtype | None,
    device: str,
    quantization: FourBitConfig | None,
    trust_remote_code: bool,
    cache: Path | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """(model, tokenizer) of ``load_model``, or bit for bit the same from ``cache``, which the first call fills."""
    arguments: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if cache is None or not is_worth_keeping(source, quantization):
        return load_model(source, quantization=quantization, **arguments)
    folder = cache / f"base-{_key(source, dtype, quantization)[:32]}"
    if not folder.is_dir():
        model, tokenizer = load_model(source, quantization=quantization, **arguments)
        _keep(model, folder)
        return model, tokenizer
    model, _ = load_model(str(folder), quantization=copy.copy(quantization), **arguments)
    if quantization is not None:
        _describe_as_asked(model, quantization)
        remember_originals(model, source, trust_remote_code=trust_remote_code)
    # Adapters name the original model as their base, not the cached copy.
    model.name_or_path = model.config.name_or_path = source.base_model
    return model, load_tokenizer(source, trust_remote_code=trust_remote_code)


def _describe_as_asked(model: Any, quantization: FourBitConfig) -> None:
    """Give a cached model the quantization config of a fresh one: a checkpoint's also has dense modules and a dtype."""
    for holder in (model.config, model.hf_quantizer):
        for name in ("compute_dtype", "modules_to_not_convert"):
            setattr(holder.quantization_config, name, getattr(quantization, name))
    for layer in four_bit_modules(model):
        layer.compute_dtype = quantization.compute_dtype


def is_worth_keeping(source: ModelSource, quantization: FourBitConfig | None) -> bool:
    return source.is_gguf or (quantization is not None and not is_quantized(source))


def is_quantized(source: ModelSource) -> bool:
    """Whether the files hold the weights as GGUF or quantized."""
    if source.is_gguf:
        return True
    assert source.path is not None
    return read_config(source.path).get("quantization_config") is not None


def _key(source: ModelSource, dtype: torch.dtype | None, quantization: FourBitConfig | None) -> str:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "rankwise")}
    format_ = None if quantization is None else quantization.to_loading_dict()
    content = (VERSION, model_hash(source), str(dtype), format_, libraries)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _keep(model: PreTrainedModel, folder: Path) -> None:
    """Write the folder whole or not at all. Where another process has written the same folder, that one stays."""
    try:
        with hold(folder):
            if not folder.exists():
                with whole_folder(folder) as unfinished:
                    model.save_pretrained(unfinished)
    except RunError as error:
        if error.code != "RW582":
            raise
