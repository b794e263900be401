"""Convert one 4-bit weight between bitsandbytes' format and the tensors of a `Linear4bit`, bit for bit.

Stacked experts have the same format, as in bitsandbytes' ``nn.parametrize``: NAME is then a 3-dimensional parameter.

    NAME                                     uint8 (ceil(n / 2), 1)   codes, first element in the high nibble
    NAME.absmax                              float32 (blocks,); uint8 when double-quantized
    NAME.quant_map                           float32 (16,)
    NAME.nested_absmax, NAME.nested_quant_map  float32 (ceil(blocks / 256),), (256,)   double-quantized only
    NAME.quant_state.bitsandbytes__nf4       uint8: UTF-8 JSON {quant_type, blocksize, dtype, shape, nested_*}

Files are untrusted: every size is derived from the JSON and compared before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.constants import NESTED_BLOCK
from rankwise.errors import QuantizationError, one_line
from rankwise.foreign import JsonObject, checked, parse_json
from rankwise.ops.packed_weight import QUANT_TYPES, PackedWeight, code_values, dynamic_map, packed_shape

STATE = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + name for name in QUANT_TYPES))
MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
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
    return PackedWeight(codes, absmax, shape, stored.quant_type, stored.blocksize, nested_absmax, offset, dtype)


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
