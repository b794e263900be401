"""A model folder, checked before transformers sees it: config.json, code, architecture, weights and their headers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from rankwise.errors import ModelError, some_of, warn
from rankwise.foreign import Fields, Json, JsonObject, read_header, read_object, refuse_pickles
from rankwise.records import record_of

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)

# Settings in which transformers takes a kernel of the hub by the name of its repository.
KERNELS = re.compile(r"(^|\.)_?(attn|experts)_implementation(\.|$)")


def check_folder(folder: Path, *, trust_remote_code: bool = False, labelled: bool = False) -> JsonObject:
    """The config of ``folder``, a causal language model in safetensors; ``labelled``: one that takes a head of labels.

    Raises ModelError: RW302 no or unreadable config.json, or an adapter; RW303 unknown architecture; RW304 a model that
    needs its own code; RW305 no weights or missing shards; RW306 damaged weights; RW307 pickled weights only. Warns
    RW320 if the folder's own code is not used.
    """
    config = read_config(folder)
    check_architecture(config, folder, trust_remote_code=trust_remote_code, labelled=labelled)
    refuse_pickles(folder)
    if (folder / GENERATION_FILE).is_file():
        # transformers would go on without a damaged one.
        _read_object(folder / GENERATION_FILE)
    for name in existing_weights(folder, config):
        read_header(folder / name)
    return config


def read_config(folder: Path) -> JsonObject:
    """``config.json`` of a model folder. Raises ModelError (RW302), which says what the folder holds instead."""
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError("RW302", f"{folder} {_what_it_is_instead(folder)}.")
    if (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            "RW302",
            f"{folder} holds both a model and an adapter ({ADAPTER_FILE}); move the adapter to another folder.",
        )
    return _read_object(folder / CONFIG_FILE)


def _values(content: Json, key: str = "") -> Iterator[tuple[str, Json]]:
    """Every (``KEY.KEY``, value) of a JSON document that is neither an object nor a list, whose values have its key."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _values(value, f"{key}.{name}" if key else name)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, key)
    else:
        yield key, content


def _what_it_is_instead(folder: Path) -> str:
    if (folder / ADAPTER_FILE).is_file():
        record = record_of(folder)
        named = record.settings.get("model") if record else None
        base = named or _read_object(folder / ADAPTER_FILE).get("base_model_name_or_path") or "its base model"
        return f"is an adapter and no model; give {base} as the model and this folder as --adapter"
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if ggufs:
        return f"holds GGUF files and no {CONFIG_FILE}; give the file itself: {folder / ggufs[0]}"
    return f"holds no {CONFIG_FILE}, so it is not a model folder; give one that save_pretrained wrote or the hub offers"


def _read_object(path: Path) -> JsonObject:
    # The configs of some families hold infinities.
    return read_object(path, error=ModelError, code="RW302")


def check_architecture(config: Fields, folder: Path, *, trust_remote_code: bool, labelled: bool = False) -> None:
    """Raise ModelError (RW303, RW304) unless transformers can build a causal language model from this config, or with
    ``labelled`` one with a head of labels."""
    if not labelled and answers_labels(config):
        raise ModelError(
            "RW303",
            f"{folder} answers with labels and writes no text; `rankwise predict --model` answers with it, and `train "
            "--objective classify` trains it.",
        )
    has_code = bool(config.get("auto_map"))
    if trust_remote_code and has_code:
        return
    kernels = [value for key, value in _values(config) if KERNELS.search(key) and "/" in str(value)]
    if kernels and not trust_remote_code:
        raise ModelError(
            "RW304",
            f"{folder} asks for the kernel {kernels[0]!r}, which is code of another repository; read that code, and "
            "allow it with --trust-remote-code, or remove the setting from its config.json.",
        )
    model_type = config.get("model_type")
    known = _is_known(model_type)
    if known and auto_class(model_type, labelled=labelled) is not None:
        if has_code:
            warn("RW320", f"{folder} brings code of its own, which is not run: transformers' own {model_type} is used.")
        return
    if has_code:
        raise ModelError(
            "RW304",
            f"{folder} is a {model_type!r} model that needs Python code of its own; read that code, and allow it with "
            "--trust-remote-code (trust_remote_code=True).",
        )
    import transformers

    why = f"which transformers {transformers.__version__} does not know (a newer one may)"
    if known:
        why = "which takes no head of labels" if labelled else "which is not a causal language model"
    raise ModelError("RW303", f"{folder} is a {model_type!r} model, {why}; give a different model.")


def _is_known(model_type: object) -> TypeGuard[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def answers_labels(config: Fields) -> bool:
    """Whether the config is of a model with a head of labels."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


def auto_class(model_type: object, *, labelled: bool = False) -> Any:
    """transformers' auto class for such a model, ``labelled`` for one with a head of labels; None if there is none.

    transformers registers some multimodal models as causal language models (Gemma 3) and others not (Qwen2.5-VL). Both
    generate text from text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    if labelled:
        takes = not _is_known(model_type) or CONFIG_MAPPING[model_type] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        return AutoModelForSequenceClassification if takes else None

    # A model with its own code names its class itself.
    if not _is_known(model_type) or (kind := CONFIG_MAPPING[model_type]) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    sees = {"text_config", "vision_config"} <= set(getattr(kind, "sub_configs", ()))
    return AutoModelForImageTextToText if sees and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


def weights_names(folder: Path, config: Fields | None = None) -> list[str]:
    """The names of the safetensors files that transformers would load, whether or not they exist.

    Raises ModelError (RW305) if there are none, or a name leads out of the folder.
    """
    named = (config or {}).get("transformers_weights")
    if named is not None:
        return _shards(folder, str(named)) if str(named).endswith(".index.json") else [_inside(folder, str(named))]
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return _shards(folder, INDEX_FILE)
    raise ModelError("RW305", f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}; download it again.")


def existing_weights(folder: Path, config: Fields) -> list[str]:
    """``weights_names``, all of which exist. Raises ModelError (RW305)."""
    names = weights_names(folder, config)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            "RW305",
            f"{folder} lacks {len(missing)} of {len(names)} weights files: {some_of(missing)}; download it again.",
        )
    return names


def _shards(folder: Path, index: str) -> list[str]:
    weight_map = _read_object(folder / _inside(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("RW305", f"{folder / index} maps no tensor to a file; download it again.")
    return sorted({_inside(folder, str(name)) for name in weight_map.values()})


def _inside(folder: Path, name: str) -> str:
    """``name``, if it is a plain safetensors file name. Raises ModelError (RW305) otherwise."""
    if (
        Path(name).name != name
        or "\\" in name
        or "\0" in name
        or not name.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ModelError(
            "RW305", f"{folder} names {name!r} as weights, which is not a safetensors file of that folder."
        )
    return name


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
