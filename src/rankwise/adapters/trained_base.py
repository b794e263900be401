"""What a run folder or a PEFT folder says about the base its adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.adapters.peft_config import read_config
from rankwise.errors import AdapterError
from rankwise.records import RUN_FILE, load_record

if TYPE_CHECKING:
    import torch

    from rankwise.quantization.config import FourBitConfig


def base_model_of(adapter: Path) -> str:
    """The base model that the folder names. Raises AdapterError (RW413) when it names none."""
    if (adapter / RUN_FILE).is_file():
        named = load_record(adapter).settings.get("model")
    else:
        named = read_config(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise AdapterError("RW413", f"the adapter in {adapter} does not name its base model; give --model.")
    return named


def quantization_of(adapter: Path) -> FourBitConfig | None:
    """The 4-bit format of the base that a run trained on, by its record; None for a 16-bit base or without a record."""
    from rankwise.quantization.bitsandbytes_format import rewrite_bitsandbytes_config

    if not (adapter / RUN_FILE).is_file():
        return None
    stored = load_record(adapter).base_model.get("quantization")
    return rewrite_bitsandbytes_config(stored) if stored else None


def dtype_of(adapter: Path) -> torch.dtype | None:
    """The dtype of the base that a run trained on, by its record; None without one."""
    import torch

    if not (adapter / RUN_FILE).is_file():
        return None
    dtype = getattr(torch, str(load_record(adapter).base_model.get("dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else None
