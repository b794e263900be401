"""What an adapter's folder says: the LoraConfig in PEFT's ``adapter_config.json``, and the base that the adapter was
trained on, from its run folder or PEFT folder.

Unknown fields that only describe how an adapter was made are ignored; those that change what it computes are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.config import DEMO
from rankwise.constants import FILE_BITS
from rankwise.errors import AdapterError, ConfigError, ModelError, RunError
from rankwise.foreign import Fields, JsonObject, WeightsHeader, parse_json, read_header, read_object, refuse_pickles
from rankwise.labels import Labels, labels_of_head, read_labels
from rankwise.lora_config import FIXED_FIELDS, LoraConfig, unsupported
from rankwise.methods import other_kinds
from rankwise.records import RUN_FILE, RunRecord, record_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rankwise.quantization.config import FourBitConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Metadata keys of that file: of fused projections; of "loftq" adapters, which belong on 4-bit weights (in PEFT's own
# field, "loftq" would make PEFT initialise the adapter again); of the format that a layer trains for; of labels.
PARTS_KEY = "rankwise.enable_lora"
INIT_KEY = "rankwise.init"
MERGE_KEY = "rankwise.for_merge"
LABELS_KEY = "rankwise.labels"
# Fields of fused projections, stored in the metadata because PEFT's fields cannot express them.
PARTS_FIELDS = ("enable_lora", "rank_pattern", "alpha_pattern")
# PEFT's task_type of a model with a head of labels.
LABELS_TASK = "SEQ_CLS"

# Fields of LoraConfig that PEFT's file has not, or has in other words.
_OWN_FIELDS = ("enable_lora", "for_merge", "init_lora_weights", "other_kind")
_SHARED_FIELDS = tuple(field.name for field in dataclasses.fields(LoraConfig) if field.name not in _OWN_FIELDS)

# PEFT's defaults of the fields whose defaults in `LoraConfig` are others.
_PEFT_DEFAULTS: JsonObject = {"r": 8, "lora_alpha": 8}

# Initialisations that do not change the base's weights. Others (pissa, olora, corda, lora_ga, loftq, ...) change them.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def to_peft(config: LoraConfig, targets: str | Sequence[str], base_model: str | None, conv1d: bool) -> JsonObject:
    """The JSON document. ``targets`` replaces the config's target_modules, since "all-linear" depends on the model."""
    fields: JsonObject = {name: getattr(config, name) for name in _SHARED_FIELDS}
    rows = config.trainable_token_indices
    fields |= {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "lora_alpha": _whole(config.lora_alpha),
        "trainable_token_indices": dict(rows) if isinstance(rows, Mapping) else rows,
        "alpha_pattern": {key: _whole(value) for key, value in config.alpha_pattern.items()},
        "rank_pattern": dict(config.rank_pattern),
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": _peft_type(config.other_kind),
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**FIXED_FIELDS, **fields}.items()))


def _peft_type(other_kind: str | None) -> str:
    """PEFT's field, by which it refuses a kind of adapters that it does not have."""
    return (other_kind or "lora").upper()


def from_peft(document: Fields, source: Path) -> LoraConfig:
    """The configuration in a PEFT document. Raises AdapterError (RW410), which names every unsupported field."""
    kind = document.get("peft_type")
    known = {_peft_type(other): other for other in (None, *other_kinds())}
    if str(kind) not in known:
        raise AdapterError("RW410", f"{source} is of peft_type {kind!r}; rankwise reads LORA (LoRA and DoRA) only.")
    refused = unsupported(document)
    init = document.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        refused.append("init_lora_weights")
    if refused:
        shown = ", ".join(f"{name}={document[name]!r}" for name in refused)
        raise AdapterError(
            "RW410",
            f"{source} sets {shown}, which changes what the adapter computes and is not supported; use PEFT.",
        )
    fields = {name: document[name] for name in _SHARED_FIELDS if document.get(name) is not None}
    fields["other_kind"] = known[str(kind)]
    # A null here is refused below, as in PEFT.
    fields |= {name: document.get(name, default) for name, default in _PEFT_DEFAULTS.items()}
    if fields.get("target_parameters"):
        # A PEFT file without target_modules adapts only parameters.
        fields.setdefault("target_modules", ())
    try:
        return LoraConfig(**fields)
    except (ConfigError, TypeError, ValueError) as error:
        raise AdapterError("RW410", f"{source} is not a valid LoRA configuration: {error}") from None


def read_config(folder: Path) -> JsonObject:
    """The JSON document of an adapter folder. Raises AdapterError (RW409) if it is missing or not a JSON object."""
    if not folder.is_dir():
        raise AdapterError("RW409", f"there is no folder {folder}; give the folder of an adapter.")
    if not (folder / CONFIG_FILE).exists():
        raise AdapterError("RW409", f"{folder} holds no {CONFIG_FILE}; give the folder of an adapter.")
    return read_object(folder / CONFIG_FILE, error=AdapterError, code="RW409")


def read_folder(folder: Path) -> tuple[LoraConfig, WeightsHeader]:
    """The configuration and the weights header of an adapter folder. Raises AdapterError (RW409, RW410, RW411)."""
    document = read_config(folder)
    refuse_pickles(folder, error=AdapterError, code="RW409")
    header = read_header(folder / WEIGHTS_FILE, error=AdapterError, code="RW409")
    _check_dtypes({key: info.dtype for key, info in header.tensors.items()}, folder)
    return _with_parts(from_peft(document, folder / CONFIG_FILE), header.metadata), header


def _with_parts(config: LoraConfig, metadata: Mapping[str, str]) -> LoraConfig:
    """The inverse of ``saving._as_one_lora``, by the file's metadata. Raises AdapterError (RW409)."""
    if metadata.get(INIT_KEY) == "loftq":
        config = dataclasses.replace(config, init_lora_weights="loftq")
    try:
        stored = parse_json(metadata[PARTS_KEY]) if PARTS_KEY in metadata else None
        fields = {name: stored[name] for name in PARTS_FIELDS} if stored is not None else {}
        fields["for_merge"] = metadata.get(MERGE_KEY)
        return dataclasses.replace(config, **fields)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise AdapterError("RW409", f"the metadata {PARTS_KEY} of {WEIGHTS_FILE} cannot be read: {error}.") from None


def _check_dtypes(dtypes: Mapping[str, str], folder: Path) -> None:
    odd = [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype not in ("F32", "F16", "BF16", "F64")]
    if odd:
        raise AdapterError(
            "RW411", f"the adapter in {folder} holds tensors that are not floating-point weights: {', '.join(odd)}."
        )


def scaled_alpha(config: LoraConfig) -> Callable[[float, int], float]:
    """The function (alpha, n) -> lora_alpha with which one LoRA of rank n r has the scale of n parts of rank r."""
    return (lambda alpha, n: alpha * n**0.5) if config.use_rslora else (lambda alpha, n: alpha * n)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def base_model_of(adapter: Path) -> str:
    """The base model that the folder names; from a run's record, as an absolute path or hub id if these are known.

    Raises AdapterError (RW413) if the folder names none.
    """
    record = record_of(adapter)
    named = read_config(adapter).get("base_model_name_or_path") if record is None else _named_by(record)
    if not isinstance(named, str) or not named:
        raise AdapterError("RW413", f"the adapter in {adapter} does not name its base model; give --model.")
    return named


def revision_of(adapter: Path) -> str | None:
    """The commit of the hub model in a run's record; None for a local base or without a record."""
    facts = _facts(adapter)
    revision = facts.get("revision")
    return revision if facts.get("kind") == "hub" and isinstance(revision, str) else None


def sha256_of_base(adapter: Path) -> str | None:
    """SHA-256 of the base's weights in a run's record, as ``models.model_hash`` gives it; None without a record."""
    found = _facts(adapter).get("sha256")
    return found if isinstance(found, str) else None


def quantization_of(adapter: Path) -> FourBitConfig | None:
    """The 4-bit format of the base that a run's adapter belongs on; None for a dense base or without a record.

    This is the format of training, except for PiSSA: a saved PiSSA adapter belongs on the original, dense weights.
    Raises RunError (RW501) for an invalid description.
    """
    record = record_of(adapter)
    stored = None if record is None else record.base_model.get("quantization")
    if record is None or not stored or str(record.settings.get("init", "")).startswith("pissa"):
        return None
    from rankwise.quantization.config import METHOD, FourBitConfig

    if not isinstance(stored, Mapping) or stored.get("quant_method") != METHOD:
        raise RunError("RW501", f"{adapter / RUN_FILE} describes the 4-bit base as {str(stored)[:60]!r}; repair it.")
    found: FourBitConfig = FourBitConfig.from_dict(dict(stored))
    return found


def four_bits_of(adapter: Path) -> FourBitConfig | None:
    """`quantization_of`, and None for a base in its GGUF file's own bits, which are the same weights expanded."""
    found = quantization_of(adapter)
    return None if found is not None and found.quant_type == FILE_BITS else found


def labels_of(adapter: Path) -> Labels | None:
    """The labels with which an adapter answers, from its file or from the size of its head; None for one that writes
    text. Raises AdapterError (RW410) for a folder from which they do not follow.
    """
    if read_config(adapter).get("task_type") != LABELS_TASK:
        return None
    _, header = read_folder(adapter)
    if (text := header.metadata.get(LABELS_KEY)) is not None:
        try:
            return read_labels(text)
        except (ValueError, TypeError) as error:
            raise AdapterError("RW410", f"the labels in the metadata of {adapter} cannot be used: {error}.") from None
    # The last of a head's matrices has a row for each label.
    rows = [info.shape[0] for key, info in header.tensors.items() if key.endswith(".weight") and ".lora_" not in key]
    if not rows:
        raise AdapterError("RW410", f"{adapter} is of task_type {LABELS_TASK} and holds no head (modules_to_save).")
    return labels_of_head({place: f"LABEL_{place}" for place in range(min(rows))}, None)


def dtype_of(adapter: Path) -> torch.dtype | None:
    """The dtype of the base in a run's record; None without a record."""
    import torch

    dtype = getattr(torch, str(_facts(adapter).get("dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def tokenizer_with_rows(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The base's ``tokenizer``, or the one in the adapter's folder where the adapter has rows for new tokens, or where
    that one knows more tokens.
    """
    rows = read_folder(adapter)[0].token_rows
    has_new = any(token >= len(tokenizer) for ids in rows.values() for token in ids)
    if not has_new and not (adapter / "tokenizer_config.json").is_file():
        return tokenizer
    own = tokenizer_of(adapter)
    return own if has_new or len(own) > len(tokenizer) else tokenizer


def tokenizer_of(adapter: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in an adapter's folder. Raises ModelError (RW317)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "RW317", f"the adapter in {adapter} has new tokens, and its tokenizer cannot be loaded: {error}."
        ) from error


def _named_by(record: RunRecord) -> str | None:
    """The hub id, ``demo``, or the absolute path of the base; the name as typed where none of these is known."""
    facts, typed = record.base_model, record.settings.get("model")
    if facts.get("kind") == "demo":
        return DEMO
    if facts.get("kind") == "hub":
        return facts.get("name") or typed
    places = [place for place in (facts.get("base_model"), typed) if isinstance(place, str)]
    return next((place for place in places if Path(place).expanduser().exists()), places[0] if places else None)


def _facts(adapter: Path) -> Fields:
    record = record_of(adapter)
    return {} if record is None else record.base_model
