"""4-bit weights: `Linear4bit`, `quantize`, loading through transformers, and bitsandbytes' checkpoint format.

The names load on first use, so that ``import rankwise.quantization`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.quantization.config import FourBitConfig as FourBitConfig
    from rankwise.quantization.config import Fp4Config as Fp4Config
    from rankwise.quantization.config import Nf4Config as Nf4Config
    from rankwise.quantization.config import adopt_bitsandbytes_config as adopt_bitsandbytes_config
    from rankwise.quantization.config import rewrite_bitsandbytes_config as rewrite_bitsandbytes_config
    from rankwise.quantization.experts import dequantize as dequantize
    from rankwise.quantization.linear import Linear4bit as Linear4bit
    from rankwise.quantization.transformers_plugin import QuantizationReport as QuantizationReport
    from rankwise.quantization.transformers_plugin import quantize as quantize

_HOMES = {
    "FourBitConfig": "config",
    "Fp4Config": "config",
    "Linear4bit": "linear",
    "Nf4Config": "config",
    "QuantizationReport": "transformers_plugin",
    "adopt_bitsandbytes_config": "config",
    "dequantize": "experts",
    "quantize": "transformers_plugin",
    "rewrite_bitsandbytes_config": "config",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.quantization' has no attribute {name!r}")
    if _HOMES[name] == "config":
        # The method must be registered with transformers before `from_pretrained` gets such a config.
        importlib.import_module("rankwise.quantization.transformers_plugin").register()
    return getattr(importlib.import_module(f"rankwise.quantization.{_HOMES[name]}"), name)
