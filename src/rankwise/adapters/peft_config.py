"""Convert a LoraConfig to PEFT's ``adapter_config.json`` and back.

Unknown fields that only describe how an adapter was made are ignored; those that change what it computes are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise.errors import AdapterError, ConfigError
from rankwise.foreign import Fields, JsonObject, read_object
from rankwise.lora_config import LoraConfig

CONFIG_FILE = "adapter_config.json"
# PEFT's task_type of a model with a head of labels.
LABELS_TASK = "SEQ_CLS"

_SHARED_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)

# Further fields that PEFT writes, with the only supported value: any other changes the result and is refused.
_FIXED_FIELDS: JsonObject = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

# PEFT's defaults of the fields whose defaults in `LoraConfig` are others.
_PEFT_DEFAULTS: JsonObject = {"r": 8, "lora_alpha": 8}

# Initialisations that do not change the base's weights. Others (pissa, olora, corda, lora_ga, loftq, ...) change them.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def to_peft(config: LoraConfig, targets: str | Sequence[str], base_model: str | None, conv1d: bool) -> JsonObject:
    """The JSON document. ``targets`` replaces the config's target_modules, since "all-linear" depends on the model."""
    fields: JsonObject = {name: getattr(config, name) for name in _SHARED_FIELDS}
    fields |= {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "lora_alpha": _whole(config.lora_alpha),
        "trainable_token_indices": _as_lists(config.trainable_token_indices),
        "alpha_pattern": {key: _whole(value) for key, value in config.alpha_pattern.items()},
        "rank_pattern": dict(config.rank_pattern),
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**_FIXED_FIELDS, **fields}.items()))


def from_peft(document: Fields, source: Path) -> LoraConfig:
    """The configuration in a PEFT document. Raises AdapterError (RW410), which names every unsupported field."""
    kind = document.get("peft_type")
    if kind != "LORA":
        raise AdapterError("RW410", f"{source} is of peft_type {kind!r}; rankwise reads LORA (LoRA and DoRA) only.")
    refused = [
        name for name, harmless in _FIXED_FIELDS.items() if document.get(name) not in (harmless, None, False, [])
    ]
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


def scaled_alpha(config: LoraConfig) -> Callable[[float, int], float]:
    """The function (alpha, n) -> lora_alpha with which one LoRA of rank n r has the scale of n parts of rank r."""
    return (lambda alpha, n: alpha * n**0.5) if config.use_rslora else (lambda alpha, n: alpha * n)


def _as_lists(rows: Sequence[int] | Mapping[str, Sequence[int]] | None) -> dict[str, list[int]] | Sequence[int] | None:
    return {key: list(ids) for key, ids in rows.items()} if isinstance(rows, Mapping) else rows and list(rows)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
