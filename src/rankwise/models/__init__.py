"""Base models: their sources, checks, loading, and devices.

Nothing here imports torch or transformers before a function needs it.
"""

from rankwise.config import DEMO_HUB_ID
from rankwise.models.device import DeviceChoice, choose_device
from rankwise.models.load import load_model, load_skeleton, load_tokenizer
from rankwise.models.source import (
    ModelSource,
    fetch_model,
    is_other_hub_model,
    model_facts,
    model_hash,
    resolve_model,
    settings_hash,
    warns_of_other_hub_model,
)

__all__ = [
    "DEMO_HUB_ID",
    "DeviceChoice",
    "ModelSource",
    "choose_device",
    "fetch_model",
    "is_other_hub_model",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "model_facts",
    "model_hash",
    "resolve_model",
    "settings_hash",
    "warns_of_other_hub_model",
]
