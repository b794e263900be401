"""rankwise: fine-tune a language model with low-rank adapters, wisely.

The names in ``__all__`` are the public API. They are imported at first use, so that ``import rankwise`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.acceleration import accelerate_peft as accelerate_peft
    from rankwise.acceleration import optimize_for_training as optimize_for_training
    from rankwise.adapters import adapter_config as adapter_config
    from rankwise.adapters import adapter_disabled as adapter_disabled
    from rankwise.adapters import adapter_parameters as adapter_parameters
    from rankwise.adapters import add_adapter as add_adapter
    from rankwise.adapters import disable_adapter as disable_adapter
    from rankwise.adapters import enable_adapter as enable_adapter
    from rankwise.adapters import load_adapter as load_adapter
    from rankwise.adapters import merge_adapter as merge_adapter
    from rankwise.adapters import remove_adapter as remove_adapter
    from rankwise.adapters import save_adapter as save_adapter
    from rankwise.adapters import set_adapter as set_adapter
    from rankwise.adapters import unmerge_adapter as unmerge_adapter
    from rankwise.export.adapter import export_adapter as export_adapter
    from rankwise.export.pairs import combine_adapters as combine_adapters
    from rankwise.lora_config import LoraConfig as LoraConfig
    from rankwise.models import load_model as load_model
    from rankwise.quantization import Fp4Config as Fp4Config
    from rankwise.quantization import Linear4bit as Linear4bit
    from rankwise.quantization import Nf4Config as Nf4Config
    from rankwise.quantization import quantize as quantize
    from rankwise.verbs.compare import compare as compare
    from rankwise.verbs.evaluate import evaluate as evaluate
    from rankwise.verbs.plan import plan as plan
    from rankwise.verbs.train import batches as batches
    from rankwise.verbs.train import train as train

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
    "batches": "rankwise.verbs.train",
    "combine_adapters": "rankwise.export.pairs",
    "compare": "rankwise.verbs.compare",
    "disable_adapter": "rankwise.adapters",
    "enable_adapter": "rankwise.adapters",
    "evaluate": "rankwise.verbs.evaluate",
    "export_adapter": "rankwise.export.adapter",
    "load_adapter": "rankwise.adapters",
    "load_model": "rankwise.models",
    "merge_adapter": "rankwise.adapters",
    "optimize_for_training": "rankwise.acceleration",
    "plan": "rankwise.verbs.plan",
    "quantize": "rankwise.quantization",
    "remove_adapter": "rankwise.adapters",
    "save_adapter": "rankwise.adapters",
    "set_adapter": "rankwise.adapters",
    "train": "rankwise.verbs.train",
    "unmerge_adapter": "rankwise.adapters",
}

__all__ = sorted(_HOMES)


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
