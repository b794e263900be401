"""Low-rank adapters: LoRA and DoRA on any base layer, with PEFT's names and file format."""

from rankwise.adapters.checkpoint import load_adapter, load_tensors
from rankwise.adapters.inject import add_adapter, plan_adapter
from rankwise.adapters.saving import adapter_parameters, adapter_tensors, save_adapter
from rankwise.adapters.state import AdaptedModule, AdapterReport, adapter_config, has_adapter, report
from rankwise.adapters.switch import (
    adapter_disabled,
    disable_adapter,
    enable_adapter,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)

__all__ = [
    "AdaptedModule",
    "AdapterReport",
    "adapter_config",
    "adapter_disabled",
    "adapter_parameters",
    "adapter_tensors",
    "add_adapter",
    "disable_adapter",
    "enable_adapter",
    "has_adapter",
    "load_adapter",
    "load_tensors",
    "merge_adapter",
    "plan_adapter",
    "remove_adapter",
    "report",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
