"""rankwise: fine-tune a language model with low-rank adapters, wisely.

The names in ``__all__`` are the public API. They are imported at first use, so that ``import rankwise`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.acceleration import accelerate_peft, optimize_for_training
    from rankwise.adapters import (
        adapter_config,
        adapter_disabled,
        adapter_parameters,
        add_adapter,
        disable_adapter,
        enable_adapter,
        hotswap_adapter,
        load_adapter,
        merge_adapter,
        mixed_adapters,
        remove_adapter,
        save_adapter,
        set_adapter,
        unmerge_adapter,
    )
    from rankwise.export.adapter import export_adapter
    from rankwise.export.pairs import combine_adapters
    from rankwise.lora_config import LoraConfig
    from rankwise.models import load_model
    from rankwise.quantization import Fp4Config, Linear4bit, Nf4Config, quantize

_HOMES = {
    "Fp4Config": "rankwise.quantization",
    "Linear4bit": "rankwise.quantization",
    "LoraConfig": "rankwise.lora_config",
    "Nf4Config": "rankwise.quantization",
    "accelerate_peft": "rankwise.acceleration",
    "adapter_config": "rankwise.adapters",
    "adapter_disabled": "rankwise.adapters",
    "adapter_parameters": "rankwise.adapters",
    "add_adapter": "rankwise.adapters",
    "combine_adapters": "rankwise.export.pairs",
    "disable_adapter": "rankwise.adapters",
    "enable_adapter": "rankwise.adapters",
    "export_adapter": "rankwise.export.adapter",
    "hotswap_adapter": "rankwise.adapters",
    "load_adapter": "rankwise.adapters",
    "load_model": "rankwise.models",
    "merge_adapter": "rankwise.adapters",
    "mixed_adapters": "rankwise.adapters",
    "optimize_for_training": "rankwise.acceleration",
    "quantize": "rankwise.quantization",
    "remove_adapter": "rankwise.adapters",
    "save_adapter": "rankwise.adapters",
    "set_adapter": "rankwise.adapters",
    "unmerge_adapter": "rankwise.adapters",
}

__all__ = [
    "Fp4Config",
    "Linear4bit",
    "LoraConfig",
    "Nf4Config",
    "accelerate_peft",
    "adapter_config",
    "adapter_disabled",
    "adapter_parameters",
    "add_adapter",
    "combine_adapters",
    "disable_adapter",
    "enable_adapter",
    "export_adapter",
    "hotswap_adapter",
    "load_adapter",
    "load_model",
    "merge_adapter",
    "mixed_adapters",
    "optimize_for_training",
    "quantize",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "ops", "__version__"})


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("rankwise.ops")
    if name == "__version__":
        # The installed metadata holds the version, which the build took from the git tag.
        return importlib.import_module("importlib.metadata").version("rankwise")
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
