"""Merge an adapter into its base model, and write an ordinary model folder.

The base is loaded in the form that the merge needs, merged in memory, and saved by transformers. Merged weights are
views of a file in the unfinished folder, as dense weights of the base are views of its files, so that the process holds
one layer at a time.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

from rankwise.adapters import load_adapter, merge_adapter
from rankwise.adapters.base_layer import make_dense
from rankwise.adapters.checkpoint import BELONGS_ON_FOUR_BITS, read_adapter
from rankwise.adapters.folder import (
    base_model_of,
    dtype_of,
    four_bits_of,
    labels_of,
    read_folder,
    revision_of,
    sha256_of_base,
)
from rankwise.adapters.folder import read_config as read_adapter_config
from rankwise.disk import hold, whole_folder
from rankwise.errors import AdapterError, ModelError, RunError, heard, warn
from rankwise.foreign import Fields
from rankwise.lora_config import LoraConfig
from rankwise.models import ModelSource, fetch_model, load_model, load_skeleton, model_hash, warns_of_other_hub_model
from rankwise.models.folder import INDEX_FILE, read_config
from rankwise.models.load import quiet
from rankwise.models.source import is_other_hub_model
from rankwise.quantization.config import FourBitConfig, Nf4Config, rewrite_bitsandbytes_config
from rankwise.quantization.linear import weights_in_file
from rankwise.quantization.targets import is_finite
from rankwise.quantization.transformers_plugin import FourBitQuantizer, mark_quantized
from rankwise.records import write_json

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
CODE = "*.py"
RECORD_FILE = "merge.json"
NOT_COPIED = ("adapter_config.json", "run.json", INDEX_FILE, "trainer_state.json")

Onto = Literal["original", "quantized"]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The content of ``merge.json``: the merged modules, the weights they were merged into, and the measured effect of
    each way of merging."""

    adapter: str
    base_model: str
    merged_modules: int
    onto: Onto
    verification: Fields | None


def merge_to_folder(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    onto: Onto = "original",
    trust_remote_code: bool = False,
    revision: str | None = None,
    verification: Fields | None = None,
) -> MergeReport:
    """Write the base with the adapter merged to ``output``, which appears whole or not at all, with its record.

    ``model`` is the base, by default the one that the adapter names, at the commit on which it was trained. ``onto``:
    "quantized" merges into the dequantized values of the 4-bit layers on which a run trained, "original" into the
    weights before quantization. Of an adapter that was trained for a merged 4-bit file, the weights of its training
    are written: NF4, or dense ones that Q4_0 takes over exactly.

    Raises AdapterError if the adapter does not fit the base (RW414: no record of a 4-bit base), ModelError if
    the base cannot be read or (RW309) holds no original weights, RunError: RW532 if ``output`` is not empty, RW551
    where it cannot be written, RW582 where another process writes to it. Warns RW417 of another hub model than the
    adapter names, RW415 of other weights than in training.
    """
    with hold(output):
        refuse_to_overwrite(output)
        source = base_source(adapter, model, revision=revision, trust_remote_code=trust_remote_code)
        config = read_folder(adapter)[0]
        quantization = _quantization_to_load(adapter, config, source, onto)
        dtype = dtype_of(adapter) if onto == "quantized" or config.for_merge is not None else None
        _warn_of_another_base(adapter, source)
        with whole_folder(output) as folder, weights_in_file(folder / "weights"):
            loaded, tokenizer = load_model(
                source, dtype=dtype, device="cpu", quantization=quantization, trust_remote_code=trust_remote_code
            )
            count = len(load_adapter(loaded, adapter).modules)
            merge_adapter(loaded, reversible=False)
            _save(loaded, folder, config, is_foreign=foreign_quantization(source) is not None)
            if tokenizer is not None and source.is_gguf:
                tokenizer.save_pretrained(folder)
            _copy_files(adapter, source, folder, code=trust_remote_code)
            report = MergeReport(str(adapter), source.name, count, onto, verification)
            write_json(folder / RECORD_FILE, dataclasses.asdict(report))
    return report


def _save(model: Any, folder: Path, config: LoraConfig, *, is_foreign: bool) -> None:
    """Save a merged model, its layers dense; 4-bit where the adapter was trained for that."""
    if config.for_merge == "nf4":
        mark_quantized(model, Nf4Config(double_quant=True))
    elif isinstance(getattr(model, "hf_quantizer", None), FourBitQuantizer):
        model = model.dequantize()
    elif is_foreign:
        make_dense(model)
    for name, W in model.named_parameters():
        if W.is_floating_point() and W.itemsize > 1 and not is_finite(W.detach()):
            raise AdapterError(
                "RW412",
                f"merging makes NaN or infinity of {name} in {str(W.dtype).removeprefix('torch.')}; the adapter's "
                "numbers or its scale (lora_alpha, r in adapter_config.json) are too large for it.",
            )
    with quiet():
        model.save_pretrained(folder)


def _copy_files(adapter: Path, source: ModelSource, output: Path, *, code: bool) -> None:
    """Copy the base's files that loading does not read, its own Python code where the caller trusts it, and over them
    the run's tokenizer files, since they hold a chat template given for training."""
    for pattern in () if source.is_gguf else (*COPIED, *([CODE] if code else [])):
        for path in source.place.glob(pattern):
            if path.name not in NOT_COPIED and not (output / path.name).exists():
                shutil.copyfile(path, output / path.name)
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
        for path in adapter.glob(pattern):
            shutil.copyfile(path, output / path.name)


def refuse_to_overwrite(output: Path) -> None:
    """Raise RunError (RW532) unless ``output`` is missing or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError("RW532", f"{output} is not empty; give a new folder, nothing is overwritten.")


def base_source(
    adapter: Path, model: str | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """The base to merge into, its files on this machine: ``model``, or the one the adapter was trained on.

    Raises what ``read_adapter`` raises for an adapter that does not fit, before the weights are fetched.
    """
    if model is None:
        model, revision = base_model_of(adapter), revision or revision_of(adapter)
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    source = dataclasses.replace(source, labels=labels_of(adapter))
    # Merging gives the warnings again.
    with heard(lambda warning: False):
        read_adapter(load_skeleton(source, trust_remote_code=trust_remote_code), adapter)
    return fetch_model(source, trust_remote_code=trust_remote_code)


def stored_quantization(source: ModelSource) -> FourBitConfig | None:
    """The format of a base whose files hold 4-bit weights (bitsandbytes'); None for one with dense weights.

    Raises ModelError (RW309) for weights that are quantized in a different way.
    """
    if (method := foreign_quantization(source)) is not None:
        raise ModelError(
            "RW309",
            f"{source.path} holds weights quantized with {method}, which no adapter merges into; give the original "
            "ones with --model, or merge into the dequantized values with --onto quantized.",
        )
    stored = _stored_format(source)
    return None if stored is None else rewrite_bitsandbytes_config(stored)


def _stored_format(source: ModelSource) -> Any:
    return None if source.is_gguf else read_config(source.place).get("quantization_config")


def foreign_quantization(source: ModelSource) -> str | None:
    """transformers' name of the format of quantized weights that are not bitsandbytes' 4 bits; None for other files."""
    stored = _stored_format(source)
    if stored is None or rewrite_bitsandbytes_config(stored) is not None:
        return None
    return str(stored.get("quant_method") if isinstance(stored, dict) else stored)


def _quantization_to_load(adapter: Path, config: LoraConfig, source: ModelSource, onto: Onto) -> FourBitConfig | None:
    """The 4-bit format in which the base is loaded; None for one that is loaded as its files hold it."""
    if onto == "quantized" and foreign_quantization(source) is not None:
        # transformers or its own layers dequantize them; beside experts in MXFP4 a run may have made 4 bits.
        return four_bits_of(adapter)
    stored = stored_quantization(source)
    if config.for_merge is not None:
        return four_bits_of(adapter)
    if onto == "quantized":
        quantization = four_bits_of(adapter)
        if stored is None and quantization is None:
            text = f"{adapter} has no record that it was trained on a 4-bit base; merge it with --onto original."
            raise AdapterError("RW414", text)
        return None if stored is not None else quantization
    if config.init.kind == "loftq":
        raise AdapterError(
            "RW433", f"{adapter} started by loftq, {BELONGS_ON_FOUR_BITS}; merge it with --onto quantized."
        )
    if stored is not None:
        raise ModelError(
            "RW309",
            f"{source.path} holds 4-bit weights and not the original ones; give those with --model, or merge into "
            "the dequantized values with --onto quantized.",
        )
    return None


def check_trained_base(adapter: Path, source: ModelSource) -> None:
    """Raise RunError (RW738) for a base other than the one trained on, over which there is no trained model."""
    trained, named = sha256_of_base(adapter), read_adapter_config(adapter).get("base_model_name_or_path")
    if is_other_hub_model(source.name, named) or (trained is not None and trained != model_hash(source)):
        raise RunError(
            "RW738",
            f"nothing can be proven: {source.name} does not hold the weights that {adapter} was trained on; leave "
            "--model out, or export without --verify.",
        )


def _warn_of_another_base(adapter: Path, source: ModelSource) -> None:
    if warns_of_other_hub_model(source.name, adapter, read_adapter_config(adapter)):
        return
    trained = sha256_of_base(adapter)
    if trained is not None and trained != (found := model_hash(source)):
        warn(
            "RW415",
            f"the adapter in {adapter} was trained on weights with SHA-256 {trained[:12]}..., and those of "
            f"{source.name} have {found[:12]}...; check that this is the base you want to merge into.",
            stacklevel=3,
        )
