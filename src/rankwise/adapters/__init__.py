"""Low-rank adapters: LoRA and DoRA on any base layer, in PEFT's names and PEFT's format."""

from rankwise.adapters.checkpoint import (
    adapter_parameters,
    adapter_tensors,
    load_adapter,
    load_tensors,
    save_adapter,
)
from rankwise.adapters.inject import (
    AdaptedModule,
    AdapterReport,
    adapter_config,
    adapter_disabled,
    add_adapter,
    disable_adapter,
    enable_adapter,
    has_adapter,
    plan_adapter,
    remove_adapter,
    report,
    set_adapter,
)
from rankwise.adapters.merge import merge_adapter, unmerge_adapter

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
