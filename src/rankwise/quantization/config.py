"""The options of 4-bit quantization, as a transformers quantization config that ``from_pretrained`` takes; and
bitsandbytes' format of a weight, which becomes the tensors of a `Linear4bit` and back, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankwise.constants import FILE_BITS, MXFP4, NESTED_BLOCK
from rankwise.errors import QuantizationError, one_line
from rankwise.foreign import Fields, JsonObject, checked, parse_json
from rankwise.ops.checks import check_dtype, check_type
from rankwise.ops.packed_weight import QUANT_TYPES, PackedWeight, code_values, dynamic_map, packed_shape

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
    # Whether the files hold the stacked experts in MXFP4, in which they stay.
    experts_in_mxfp4: bool = field(default=False, init=False, repr=False, compare=False)
    # Set when a model is quantized: the linear layers that stay dense, written to config.json.
    dense_modules: list[str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.block_size) is not int:
            raise QuantizationError("RW615", f"block_size is {self.block_size!r}: use a whole number, 64 is usual.")
        if self.quant_type not in (FILE_BITS, MXFP4):
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


@dataclass
class FileConfig(FourBitConfig):
    """The bits in which a GGUF file holds its weights; nothing is quantized."""

    quant_type: ClassVar[str] = FILE_BITS


@dataclass
class Mxfp4Config(FourBitConfig):
    """Stacked experts in MXFP4, as gpt-oss' files hold them; nothing is quantized."""

    quant_type: ClassVar[str] = MXFP4


# {name of the type: config}.
CONFIGS: dict[str, type[FourBitConfig]] = {kind.quant_type: kind for kind in (Nf4Config, Fp4Config, FileConfig)}


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


# A weight NAME in bitsandbytes' format. Stacked experts have the same format, as in bitsandbytes' ``nn.parametrize``:
# NAME is then a 3-dimensional parameter.
#
#     NAME                                     uint8 (ceil(n / 2), 1)   codes, first element in the high nibble
#     NAME.absmax                              float32 (blocks,); uint8 when double-quantized
#     NAME.quant_map                           float32 (16,)
#     NAME.nested_absmax, NAME.nested_quant_map  float32 (ceil(blocks / 256),), (256,)   double-quantized only
#     NAME.quant_state.bitsandbytes__nf4       uint8: UTF-8 JSON {quant_type, blocksize, dtype, shape, nested_*}
#
# Files are untrusted: every size is derived from the JSON and compared before it is used.

STATE = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + name for name in QUANT_TYPES))
MAX_STATE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class _State:
    """The JSON of a stored weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["float32", "bfloat16", "float16"]
    # (out, in), or of stacked experts (E, N, K).
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**48)]], Field(min_length=2, max_length=3)]
    # Of double-quantized scales; the offset is a float32.
    nested_blocksize: Literal[256] = 256
    nested_dtype: Literal["float32"] = "float32"
    nested_offset: Annotated[float, Field(ge=-3.5e38, le=3.5e38)] | None = None


def check_shape(name: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise QuantizationError RW611 unless the stored weight has the shape that the model wants."""
    if tuple(stored) != tuple(wanted):
        raise _broken(name, f"is stored as {tuple(stored)} where the model needs {tuple(wanted)}")


def to_bitsandbytes(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors of ``weight`` under bitsandbytes' names, ``NAME`` and ``NAME.*``."""
    if weight.in_file_blocks:
        raise QuantizationError(
            "RW615",
            f"{name} is in a file's own bits ({weight.quant_type}), which bitsandbytes has not; dequantize the model "
            "to save it.",
        )
    codes = weight.codes.detach()
    # Each weight gets its own copy of the tables, since safetensors refuses tensors that share memory.
    tensors = {
        name: codes.reshape(-1, 1),
        f"{name}.absmax": weight.absmax.detach(),
        f"{name}.quant_map": code_values(weight.quant_type, codes.device).clone(),
    }
    if weight.nested_absmax is not None:
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax.detach()
        tensors[f"{name}.nested_quant_map"] = dynamic_map(codes.device).clone()
    tensors[f"{name}.{STATE}{weight.quant_type}"] = torch.tensor(list(_state_json(weight)), dtype=torch.uint8)
    return tensors


def _state_json(weight: PackedWeight) -> bytes:
    state: JsonObject = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.offset is not None:
        offset = weight.offset.item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def from_bitsandbytes(state: Mapping[str, Tensor], name: str = "weight") -> PackedWeight:
    """Read and check the weight ``name`` of a state dict.

    Raises:
        QuantizationError: RW611 if parts are missing, have a wrong size or contradict each other, or the JSON is
            invalid.
    """
    parts = {part: state[f"{name}.{part}"].detach() for part in PARTS if f"{name}.{part}" in state}
    stored = _read_state(name, parts)
    _check_sizes(name, stored, parts if name not in state else {**parts, "codes": state[name]})
    codes = state[name].detach()
    device, nested_absmax, offset = codes.device, None, None
    codes = codes.contiguous().view(torch.uint8).reshape(packed_shape(stored.shape, stored.blocksize))
    absmax = parts["absmax"].reshape(-1)
    tables = [("quant_map", code_values(stored.quant_type, device))]
    if stored.nested_offset is not None:
        nested_absmax = parts["nested_absmax"].reshape(-1)
        offset = torch.tensor(stored.nested_offset, dtype=torch.float32, device=device)
        tables.append(("nested_quant_map", dynamic_map(device)))
    for part, table in tables:
        if not torch.allclose(parts[part].reshape(-1), table, rtol=0, atol=1e-6):
            raise _broken(name, f"has a {part} of its own: only the standard tables are known")
    scales = absmax if nested_absmax is None else nested_absmax
    if not torch.isfinite(scales).all():
        raise _broken(name, "has scales (absmax) that are NaN or infinite")
    shape, dtype = tuple(stored.shape), getattr(torch, stored.dtype)
    return PackedWeight(
        codes=codes,
        absmax=absmax,
        shape=shape,
        quant_type=stored.quant_type,
        block_size=stored.blocksize,
        nested_absmax=nested_absmax,
        offset=offset,
        dtype=dtype,
    )


def _read_state(name: str, parts: Mapping[str, Tensor]) -> _State:
    found = [part for part in parts if part.startswith("quant_state.")]
    if len(found) != 1:
        raise _broken(name, f"has {len(found)} quant_state entries where one belongs")
    content = parts[found[0]]
    if content.dtype is not torch.uint8 or content.numel() > MAX_STATE_BYTES:
        raise _broken(name, f"has a quant_state that is not up to {MAX_STATE_BYTES} bytes of uint8")
    try:
        state = checked(_State, parse_json(bytes(content.flatten().tolist())))
    except ValueError as error:
        raise _broken(name, f"has a quant_state that is not bitsandbytes' ({one_line(error)})") from None
    if found[0] != STATE + state.quant_type:
        raise _broken(name, f"has the 4-bit type {state.quant_type} under {found[0]}")
    return state


def _check_sizes(name: str, stored: _State, parts: Mapping[str, Tensor]) -> None:
    """Raise QuantizationError (RW611), all faults at once, unless every part is there and fills its shape."""
    n = math.prod(stored.shape)
    blocks = math.ceil(n / stored.blocksize)
    # (dtype, bytes); the codes may be stored under any dtype (bnb_4bit_quant_storage).
    wanted = {"codes": (None, (n + 1) // 2), "absmax": (torch.float32, 4 * blocks), "quant_map": (torch.float32, 64)}
    if stored.nested_offset is not None:
        wanted["absmax"] = torch.uint8, blocks
        wanted["nested_absmax"] = torch.float32, 4 * math.ceil(blocks / NESTED_BLOCK)
        wanted["nested_quant_map"] = torch.float32, 1024
    faults = []
    for part, (dtype, size) in wanted.items():
        if (tensor := parts.get(part)) is None:
            faults.append(f"{part}: missing")
        elif tensor.nbytes != size or dtype not in (None, tensor.dtype):
            faults.append(f"{part}: {tensor.nbytes:,} bytes of {tensor.dtype} where {size:,} belong")
    if stored.nested_offset is None:
        faults += [f"it has a {part} and no nested_offset" for part in parts if part.startswith("nested_")]
    if faults:
        raise _broken(name, f"of shape {tuple(stored.shape)} is incomplete ({', '.join(faults)})")


def _broken(name: str, fault: str) -> QuantizationError:
    return QuantizationError("RW611", f"the 4-bit weight {name} {fault}.")
