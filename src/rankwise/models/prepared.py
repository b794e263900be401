"""Prepared base models on disk, from which runs map their frozen weights instead of copying them into memory.

Quantizing or reading a GGUF file takes time, and its result would be the process's own memory. So the result is written
to a folder once, one weight at a time, and every run maps that folder: pages are read when they are needed, the system
may drop them again, and all processes of a machine share them. The folder's name is a hash of the weights and of the
preparation. The files of a model that needs no preparation are mapped as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.disk import cache_folder, hold, whole_folder
from rankwise.errors import RunError
from rankwise.models.describe import model_hash
from rankwise.models.folder import read_config
from rankwise.models.load import load_model, load_tokenizer, quiet, remember_originals
from rankwise.models.source import ModelSource, fetch_model
from rankwise.quantization.config import FourBitConfig
from rankwise.quantization.linear import weights_in_file
from rankwise.quantization.targets import four_bit_modules

VERSION = 2
# Seconds between two looks at whether another process has prepared the same base.
WAIT_SECONDS = 0.2


def user_cache(device: str, *, mapped: bool) -> Path | None:
    """Where prepared bases are kept when no folder is named: in the user's cache, for a CPU that maps them."""
    return cache_folder() / "bases" if mapped and device == "cpu" else None


def load_prepared(
    source: ModelSource,
    *,
    dtype: torch.dtype | None,
    device: str,
    quantization: FourBitConfig | None,
    trust_remote_code: bool,
    cache: Path | None,
    mapped: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """(model, tokenizer) of ``load_model``, bit for bit the same, with weights mapped from files where ``mapped``.

    A base that needs preparation is kept in ``cache`` if one is given; the first call fills it.
    Raises RunError (RW551, RW552) if that cannot be written, and what ``load_model`` raises.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if cache is None or not needs_preparation(source, quantization):
        model, tokenizer = load_model(source, quantization=quantization, **arguments)
    else:
        folder = cache / f"base-{_key(source, dtype, quantization)[:32]}"
        if not folder.is_dir():
            # A head of labels is new in every run.
            text = dataclasses.replace(source, labels=None)
            # What follows draws the same numbers, whether the base was prepared before or not.
            with torch.random.fork_rng(devices=[]):
                _prepare(folder, text, quantization, {**arguments, "device": "cpu"})
        kept = dataclasses.replace(fetch_model(str(folder)), labels=source.labels)
        model, _ = load_model(kept, quantization=copy.copy(quantization), **arguments)
        if quantization is not None:
            _describe_as_asked(model, quantization)
            remember_originals(model, source, trust_remote_code=trust_remote_code)
        # Adapters name the original model as their base, not the prepared copy.
        model.name_or_path = model.config.name_or_path = source.base_model
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    for tensor in (*model.parameters(), *model.buffers()) if not mapped else ():
        if type(tensor.data) is torch.Tensor:
            tensor.data = tensor.detach().clone()
    return model, tokenizer


def _prepare(folder: Path, source: ModelSource, quantization: FourBitConfig | None, arguments: Any) -> None:
    """Write the prepared base to ``folder``, whole or not at all. Waits where another process is writing it."""
    while not folder.is_dir():
        try:
            with hold(folder):
                if not folder.is_dir():
                    with whole_folder(folder) as unfinished, weights_in_file(unfinished / "codes"):
                        model, _ = load_model(source, quantization=quantization, **arguments)
                        with quiet():
                            model.save_pretrained(unfinished)
        except RunError as error:
            if error.code != "RW582":
                raise RunError(
                    error.code,
                    f"{error.message.rstrip('.')}. The prepared base is kept there; --cache names another folder, "
                    "--no-mmap keeps it in memory.",
                ) from error
            time.sleep(WAIT_SECONDS)


def _describe_as_asked(model: Any, quantization: FourBitConfig) -> None:
    """Give a cached model the quantization config of a fresh one: a checkpoint's also has dense modules and a dtype."""
    for holder in (model.config, model.hf_quantizer):
        for name in ("compute_dtype", "modules_to_not_convert"):
            setattr(holder.quantization_config, name, getattr(quantization, name))
    for layer in four_bit_modules(model):
        layer.compute_dtype = quantization.compute_dtype


def needs_preparation(source: ModelSource, quantization: FourBitConfig | None) -> bool:
    is_made = source.is_gguf or (quantization is not None and not is_quantized(source))
    return is_made and (source.labels is None or source.is_gguf or _writes_text(source))


def _writes_text(source: ModelSource) -> bool:
    """Whether the files hold a model that can be prepared without a head of labels."""
    names = map(str, read_config(source.place).get("architectures") or ())
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def is_quantized(source: ModelSource) -> bool:
    """Whether the files hold the weights as GGUF or quantized."""
    return source.is_gguf or read_config(source.place).get("quantization_config") is not None


def _key(source: ModelSource, dtype: torch.dtype | None, quantization: FourBitConfig | None) -> str:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "rankwise")}
    format_ = None if quantization is None else quantization.to_loading_dict()
    content = (VERSION, model_hash(source), str(dtype), format_, libraries)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
