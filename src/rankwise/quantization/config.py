"""The options of 4-bit quantization, as a transformers quantization config that ``from_pretrained`` takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankwise.errors import QuantizationError
from rankwise.foreign import Fields, JsonObject
from rankwise.ops.checks import check_dtype, check_type
from rankwise.ops.packed_weight import QUANT_TYPES

# rankwise's name among transformers' quantization methods. Files never hold it: checkpoints are bitsandbytes'.
METHOD = "rankwise_4bit"


@dataclass
class FourBitConfig(QuantizationConfigMixin):
    """The common part of `Nf4Config` and `Fp4Config`; use one of them.

    Raises:
        QuantizationError: RW605 compute dtype, RW615 anything else of the wrong kind.
    """

    quant_type: ClassVar[str] = ""

    quant_method: Any = field(default=METHOD, init=False, repr=False)
    # Elements per scale along the row-major flattening: a power of two from 32 to 4096.
    block_size: int = 64
    # Store the scales in 8 bits, which saves 0.37 bits per parameter (QLoRA, section 3).
    double_quant: bool = False
    # Modules, in addition to the output head, that stay dense: names, their beginnings or ends, or regular expressions.
    modules_to_not_convert: Sequence[str] | None = None
    # The dtype of the products, a torch.dtype or its name; None means that of the activations.
    compute_dtype: Any = None
    # Set when a model is quantized: the dtype of its dense weights, written to config.json as the compute dtype.
    weights_dtype: torch.dtype | None = field(default=None, init=False, repr=False, compare=False)
    # Set when a model is quantized: the linear layers that stay dense, written to config.json.
    dense_modules: list[str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.block_size) is not int:
            raise QuantizationError("RW615", f"block_size is {self.block_size!r}: use a whole number, 64 is usual.")
        check_type(self.quant_type, self.block_size)
        if type(self.double_quant) is not bool:
            raise QuantizationError("RW615", f"double_quant is {self.double_quant!r}: use True or False.")
        self.modules_to_not_convert = _names(self.modules_to_not_convert)
        self.compute_dtype = dtype_named(self.compute_dtype, "compute_dtype")

    @classmethod
    def from_dict(cls, config_dict: JsonObject, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config from the result of ``to_loading_dict``; transformers calls this method in its loader."""
        given = {key: value for key, value in config_dict.items() if key not in ("quant_method", "quant_type")}
        quant_type = config_dict.get("quant_type", cls.quant_type)
        if quant_type not in CONFIGS:
            raise QuantizationError("RW615", f"there is no 4-bit type {quant_type!r}: use nf4 or fp4.")
        unknown = given.keys() - {item.name for item in fields(cls) if item.init}
        if unknown:
            raise QuantizationError("RW615", f"a 4-bit config has no {', '.join(sorted(unknown))}.")
        config = CONFIGS[quant_type](**given)
        return (config, kwargs) if return_unused_kwargs else config

    def to_loading_dict(self) -> JsonObject:
        """The argument of ``from_dict`` as JSON, for a model config whose checkpoint is to load into `Linear4bit`."""
        return {
            "quant_method": METHOD,
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "modules_to_not_convert": self.modules_to_not_convert,
            "compute_dtype": None if self.compute_dtype is None else _name(self.compute_dtype),
        }

    def to_dict(self) -> JsonObject:
        """The ``quantization_config`` of ``config.json``, by which transformers and bitsandbytes read it."""
        compute = self.compute_dtype or self.weights_dtype or torch.float32
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": _name(compute),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.dense_modules or self.modules_to_not_convert,
            "llm_int8_threshold": 6.0,
        }


@dataclass
class Nf4Config(FourBitConfig):
    """4-bit NormalFloat: 16 quantiles of the normal distribution (QLoRA, section 3)."""

    quant_type: ClassVar[str] = "nf4"


@dataclass
class Fp4Config(FourBitConfig):
    """4-bit floating point: a sign, two bits of exponent, one of mantissa."""

    quant_type: ClassVar[str] = "fp4"


# {name of the type: config}.
CONFIGS: dict[str, type[FourBitConfig]] = {kind.quant_type: kind for kind in (Nf4Config, Fp4Config)}


def _names(names: Collection[str] | None) -> list[str] | None:
    if names is None:
        return None
    is_list = isinstance(names, list | tuple | set | frozenset)
    if not is_list or not all(isinstance(name, str) and name for name in names):
        raise QuantizationError("RW615", f"modules_to_not_convert is {names!r}: give a list of module names.")
    return sorted(names) if isinstance(names, set | frozenset) else list(names)


def dtype_named(dtype: torch.dtype | str | None, what: str) -> torch.dtype | None:
    """A torch.dtype from a dtype or its name; None for None. Raises QuantizationError (RW605), which names ``what``."""
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise QuantizationError("RW605", f"{what} is {dtype!r}: use float32, bfloat16 or float16.")
    check_dtype(found, what)
    return found


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def rewrite_bitsandbytes_config(config: Fields) -> FourBitConfig | None:
    """The FourBitConfig for a bitsandbytes checkpoint, with which it loads into `Linear4bit` layers.

    ``config``: the content of ``config.json``, or its ``quantization_config``. None if it does not describe a 4-bit
    checkpoint of bitsandbytes.

    Raises:
        QuantizationError: RW615 unknown ``bnb_4bit_quant_type``, RW605 unknown ``bnb_4bit_compute_dtype``.
    """
    stored = config.get("quantization_config", config)
    # load_in_4bit decides, as in transformers: old checkpoints have no quant_method.
    if not isinstance(stored, Mapping) or not (stored.get("load_in_4bit") or stored.get("_load_in_4bit")):
        return None
    # transformers' defaults for fields that the file lacks.
    quant_type = stored.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in QUANT_TYPES:
        found = repr(quant_type)[:60]
        raise QuantizationError("RW615", f"the checkpoint's bnb_4bit_quant_type is {found}: use nf4 or fp4.")
    return CONFIGS[quant_type](
        double_quant=bool(stored.get("bnb_4bit_use_double_quant", False)),
        modules_to_not_convert=stored.get("llm_int8_skip_modules"),
        compute_dtype=stored.get("bnb_4bit_compute_dtype", "float32"),
    )


def adopt_bitsandbytes_config(config: Any) -> FourBitConfig | None:
    """Rewrite the quantization of a transformers config in place, so that ``from_pretrained(folder, config=config)``
    gives `Linear4bit` layers from a bitsandbytes checkpoint. For other configs nothing changes, and None is returned.
    """
    stored = getattr(config, "quantization_config", None)
    ours = rewrite_bitsandbytes_config(stored) if isinstance(stored, Mapping) else None
    if ours is not None:
        config.quantization_config = ours.to_loading_dict()
    return ours
