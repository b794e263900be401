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
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from rankwise.constants import NESTED_BLOCK
from rankwise.errors import QuantizationError, one_line, some_of
from rankwise.foreign import JsonObject, checked, parse_json
from rankwise.ops.packed_weight import QUANT_TYPES, PackedWeight, code_values, dynamic_map, packed_shape
from rankwise.weights_file import TensorInfo, read_header

STATE = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + name for name in QUANT_TYPES))
MAX_STATE_BYTES = 4096

_DTYPE_CODES = {torch.uint8: "U8", torch.float32: "F32"}


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


@dataclass(frozen=True)
class StoredWeight:
    """The format and shape of a stored weight."""

    quant_type: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: float | None = None

    @property
    def double_quant(self) -> bool:
        return self.offset is not None


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
    parts = {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}
    sizes = {part: _size(tensor) for part, tensor in parts.items()}
    if name in state:
        sizes[""] = _size(state[name])
    state_key = state_part(name, sizes)
    stored = parse_state(name, state_key, bytes(parts[state_key].detach().cpu().reshape(-1).tolist()))
    check_sizes(name, stored, sizes)
    return _packed(name, stored, state[name].detach(), parts)


def _size(tensor: Tensor) -> tuple[str, int]:
    return _DTYPE_CODES.get(tensor.dtype, str(tensor.dtype)), tensor.numel() * tensor.element_size()


def state_part(name: str, sizes: Mapping[str, tuple[str, int]]) -> str:
    """The name of the part with the JSON, whose dtype and size are checked; ``sizes`` as for ``check_sizes``."""
    found = [part for part in sizes if part.startswith("quant_state.")]
    if len(found) != 1:
        raise _broken(name, f"has {len(found)} quant_state entries where one belongs")
    dtype, size_bytes = sizes[found[0]]
    if dtype != "U8" or size_bytes > MAX_STATE_BYTES:
        raise _broken(
            name, f"has a quant_state of {size_bytes:,} bytes of {dtype}: up to {MAX_STATE_BYTES} of U8 belong"
        )
    return found[0]


def parse_state(name: str, part: str, text: bytes) -> StoredWeight:
    """Parse the JSON of one stored weight. Raises QuantizationError (RW611), which names the weight and the fault."""
    try:
        state = checked(_State, parse_json(text))
    except ValueError as error:
        raise _broken(name, f"has a quant_state that is not bitsandbytes' ({one_line(error)})") from None
    if part != STATE + state.quant_type:
        raise _broken(name, f"has the 4-bit type {state.quant_type} under {part}")
    dtype = getattr(torch, state.dtype)
    return StoredWeight(state.quant_type, state.blocksize, dtype, tuple(state.shape), state.nested_offset)


def check_sizes(name: str, stored: StoredWeight, sizes: Mapping[str, tuple[str, int]]) -> None:
    """Raise QuantizationError (RW611), all faults at once, unless every part is there and fills its shape.

    ``sizes``: part (``""`` for the codes) -> (dtype as safetensors names it, bytes).
    """
    n = math.prod(stored.shape)
    blocks = math.ceil(n / stored.block_size)
    wanted = {"absmax": ("U8", blocks) if stored.double_quant else ("F32", 4 * blocks), "quant_map": ("F32", 64)}
    if stored.double_quant:
        wanted |= {"nested_absmax": ("F32", 4 * math.ceil(blocks / NESTED_BLOCK)), "nested_quant_map": ("F32", 1024)}
    # The codes may be stored under any dtype (bnb_4bit_quant_storage); only their bytes count.
    codes = sizes.get("", ("", -1))
    faults = [] if codes[1] == (n + 1) // 2 else [f"its codes {_found(codes)} where {(n + 1) // 2:,} bytes belong"]
    for part, want in wanted.items():
        found = sizes.get(part, ("", -1))
        if found != want:
            faults.append(f"its {part} {_found(found)} where {want[1]:,} bytes of {want[0]} belong")
    if not stored.double_quant:
        faults += [f"it has a {part} and no nested_offset" for part in sizes if part.startswith("nested_")]
    if faults:
        raise _broken(name, f"of shape {stored.shape} is incomplete: {', '.join(faults)}")


def _found(size: tuple[str, int]) -> str:
    return "are missing" if size[1] < 0 else f"take {size[1]:,} bytes of {size[0]}"


def _packed(name: str, stored: StoredWeight, codes: Tensor, parts: dict[str, Tensor]) -> PackedWeight:
    device, nested_absmax, offset = codes.device, None, None
    codes = codes.contiguous().view(torch.uint8).reshape(packed_shape(stored.shape, stored.block_size))
    absmax = parts["absmax"].detach().reshape(-1)
    tables = [("quant_map", code_values(stored.quant_type, device))]
    if stored.offset is not None:
        nested_absmax = parts["nested_absmax"].detach().reshape(-1)
        offset = torch.tensor(stored.offset, dtype=torch.float32, device=device)
        tables.append(("nested_quant_map", dynamic_map(device)))
    for part, table in tables:
        if not torch.allclose(parts[part].reshape(-1), table, rtol=0, atol=1e-6):
            raise _broken(name, f"has a {part} of its own: only the standard tables are known")
    scales = absmax if nested_absmax is None else nested_absmax
    if not torch.isfinite(scales).all():
        raise _broken(name, "has scales (absmax) that are NaN or infinite")
    return PackedWeight(
        codes, absmax, stored.shape, stored.quant_type, stored.block_size, nested_absmax, offset, stored.dtype
    )


def _broken(name: str, fault: str) -> QuantizationError:
    return QuantizationError("RW611", f"the 4-bit weight {name} {fault}.")


# The 4-bit weights of checkpoints, whose sizes are checked before anything is allocated.

_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)", re.DOTALL)

# Endings of the names of weights, and of stacked experts.
_ENDS = ("weight", "_proj")


def stored_weights(files: Iterable[str | Path]) -> dict[str, StoredWeight]:
    """{name of the codes: 4-bit weight} of a checkpoint. The parts of a weight may be in several files.

    Raises:
        QuantizationError: RW611 for a damaged file, or with all weights that are incomplete or contradictory.
    """
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for file in map(Path, files):
        header = read_header(file, error=QuantizationError, code="RW611")
        tensors |= {name: (file, info) for name, info in header.tensors.items()}
    found, faults = {}, []
    for name, sizes in _grouped(tensors).items():
        try:
            found[name] = _stored(name, sizes, tensors)
        except QuantizationError as error:
            faults.append(error.message.rstrip("."))
    if faults:
        raise QuantizationError(
            "RW611", f"{some_of(faults, 3, '; ')}. The checkpoint is damaged; download or write it again."
        )
    return found


def _grouped(tensors: Mapping[str, tuple[Path, TensorInfo]]) -> dict[str, dict[str, tuple[str, int]]]:
    """{weight: {part: (dtype, bytes)}}, with the codes under ``""``."""
    groups: dict[str, dict[str, tuple[str, int]]] = {}
    for name, (_, info) in tensors.items():
        match = _PART.fullmatch(name)
        if match:
            groups.setdefault(match[1], {})[match[2]] = info.dtype, info.size_bytes
        elif name.endswith(_ENDS) and info.dtype == "U8" and len(info.shape) == 2 and info.shape[1] == 1:
            # The shape is that of bitsandbytes' codes. Without scales, the weight is reported as incomplete.
            groups.setdefault(name, {})
    for name, sizes in groups.items():
        if name in tensors:
            info = tensors[name][1]
            sizes[""] = info.dtype, info.size_bytes
    # A tensor of a different kind may be named absmax.
    return {
        name: sizes
        for name, sizes in groups.items()
        if name.endswith(_ENDS) or any(part.startswith("quant_state.") for part in sizes)
    }


def _stored(
    name: str, sizes: dict[str, tuple[str, int]], tensors: Mapping[str, tuple[Path, TensorInfo]]
) -> StoredWeight:
    part = state_part(name, sizes)
    with safe_open(tensors[f"{name}.{part}"][0], framework="numpy") as file:
        stored = parse_state(name, part, file.get_tensor(f"{name}.{part}").tobytes())
    check_sizes(name, stored, sizes)
    return stored
