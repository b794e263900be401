"""Prepared base models on disk, from which runs map their frozen weights instead of copying them into memory; and the
files that a model maps.

Quantizing or reading a GGUF file takes time, and its result would be the process's own memory. So the result is written
to a folder once, one weight at a time, and every run maps that folder: pages are read when they are needed, the system
may drop them again, and all processes of a machine share them. The folder's name is a hash of the weights and of the
preparation. The files of a model that needs no preparation are mapped as they are.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.compat.system import cache_folder
from rankwise.compat.torch import own_part
from rankwise.compat.transformers import saved_by_any_rank
from rankwise.disk import InUse, hold, whole_folder
from rankwise.errors import ModelError, RunError
from rankwise.models.folder import CONFIG_FILE, read_config
from rankwise.models.load import is_of_file, load_model, load_tokenizer, quiet, remember_originals, tell_padding
from rankwise.models.source import ModelSource, Version, fetch_model, file_version, model_hash, settings_hash
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
        if not _is_whole(folder):
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
        # The prepared base has no tokenizer of its own.
        if (tokenizer := load_tokenizer(source, trust_remote_code=trust_remote_code)) is not None:
            tell_padding(model, tokenizer, source)
    for tensor in (*model.parameters(), *model.buffers()) if not mapped else ():
        if type(tensor.data) is torch.Tensor:
            tensor.data = tensor.detach().clone()
    return model, tokenizer


def _prepare(folder: Path, source: ModelSource, quantization: FourBitConfig | None, arguments: Any) -> None:
    """Write the prepared base to ``folder``, whole or not at all. Waits where another process is writing it.

    Of several processes the first writes, whatever its rank: each machine may have its own cache, and no process waits
    for another at a barrier.
    """
    while not _is_whole(folder):
        try:
            with hold(folder):
                if not _is_whole(folder):
                    with whole_folder(folder, replace=True) as unfinished, weights_in_file(unfinished / "codes"):
                        model, _ = load_model(source, quantization=quantization, **arguments)
                        with quiet():
                            saved_by_any_rank(model).save_pretrained(unfinished)
                        assert _is_whole(unfinished), "save_pretrained has written no weights"
        except InUse:
            time.sleep(WAIT_SECONDS)
        except RunError as error:
            raise RunError(
                error.code,
                f"{error.message.rstrip('.')}. The prepared base is kept there; --cache names another folder, "
                "--no-mmap keeps it in memory.",
            ) from error


def _is_whole(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and any(folder.glob("*.safetensors"))


def _describe_as_asked(model: Any, quantization: FourBitConfig) -> None:
    """Give a cached model the quantization config of a fresh one: a checkpoint's also has dense modules and a dtype."""
    for holder in (model.config, model.hf_quantizer):
        for name in ("compute_dtype", "modules_to_not_convert"):
            setattr(holder.quantization_config, name, getattr(quantization, name))
    for layer in four_bit_modules(model):
        layer.compute_dtype = quantization.compute_dtype


def needs_preparation(source: ModelSource, quantization: FourBitConfig | None) -> bool:
    if is_of_file(quantization):
        return False
    is_made = source.is_gguf or (quantization is not None and not is_quantized(source))
    if source.labels is None or source.is_gguf:
        return is_made
    # A head of labels is not prepared.
    names = map(str, read_config(source.place).get("architectures") or ())
    return is_made and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def is_quantized(source: ModelSource) -> bool:
    """Whether the files hold the weights as GGUF or quantized."""
    return source.is_gguf or read_config(source.place).get("quantization_config") is not None


def _key(source: ModelSource, dtype: torch.dtype | None, quantization: FourBitConfig | None) -> str:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "rankwise")}
    format_ = None if quantization is None else quantization.to_loading_dict()
    content = (VERSION, model_hash(source), settings_hash(source), str(dtype), format_, libraries)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class MappedFiles(NamedTuple):
    """Files, and how many bytes of a model's frozen weights are views of them."""

    bytes: int
    versions: dict[Path, Version]

    def check(self) -> None:
        """Raise ModelError (RW305) for a file that was written to. One that was deleted or replaced does no harm, since
        the mapping keeps the old one."""
        for path, version in self.versions.items():
            if path.exists() and (now := file_version(path)) != version and now[0] == version[0]:
                raise ModelError(
                    "RW305",
                    f"{path} was changed while its weights were in use, so the model is not the one that was loaded; "
                    "start again, and resume from the last checkpoint if there is one.",
                )


def mapped_files(model: nn.Module) -> MappedFiles:
    """The files behind the frozen tensors of ``model`` on a CPU (on Linux; none elsewhere).

    Trained tensors do not count: writing to them makes their pages the process's own memory.
    """
    regions = _mapped_regions()
    starts = [start for start, _, _ in regions]
    found: dict[int, tuple[int, Path]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        held = own_part(tensor.detach())
        # Tensor subclasses of other libraries (packed weights) may have no storage of their own.
        if type(held) is not Tensor or held.device.type != "cpu" or tensor.requires_grad or not held.numel():
            continue
        region = bisect.bisect_right(starts, held.data_ptr()) - 1
        if region >= 0 and held.data_ptr() < regions[region][1]:
            found[held.data_ptr()] = held.nbytes, regions[region][2]
    paths = {path for _, path in found.values() if path.exists()}
    return MappedFiles(sum(size for size, _ in found.values()), {path: file_version(path) for path in paths})


def _mapped_regions() -> list[tuple[int, int, Path]]:
    """(first address, end, file) of each file that this process maps, by address."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    # ``7f00-7f80 rw-p 00000000 08:02 135522 /file``: no file where the inode is 0.
    fields = [line.split(maxsplit=5) for line in lines]
    files = [(field[0].split("-"), field[5]) for field in fields if field[4] != "0" and len(field) == 6]
    return sorted((int(start, 16), int(end, 16), Path(path)) for (start, end), path in files)
