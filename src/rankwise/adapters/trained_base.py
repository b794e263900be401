"""The base that an adapter was trained on, from its run folder or PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.adapters.peft_config import LABELS_TASK, read_config
from rankwise.config import DEMO
from rankwise.errors import AdapterError, ModelError, RunError
from rankwise.foreign import Fields
from rankwise.labels import Labels, labels_of_head, read_labels
from rankwise.records import RUN_FILE, RunRecord, record_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rankwise.quantization.config import FourBitConfig


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


def labels_of(adapter: Path) -> Labels | None:
    """The labels with which an adapter answers, from its file or from the size of its head; None for one that writes
    text. Raises AdapterError (RW410) for a folder from which they do not follow.
    """
    from rankwise.adapters.checkpoint import read_folder
    from rankwise.adapters.saving import LABELS_KEY

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
    from rankwise.adapters.checkpoint import read_folder

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
