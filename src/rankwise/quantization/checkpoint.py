"""Find the 4-bit weights in bitsandbytes' checkpoints, and check their sizes before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rankwise.errors import QuantizationError, some_of
from rankwise.quantization.bitsandbytes_format import StoredWeight, check_sizes, parse_state, state_part
from rankwise.weights_file import TensorInfo, read_header

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
            groups.setdefault(match[1], {})[match[2]] = _size(info)
        elif name.endswith(_ENDS) and info.dtype == "U8" and len(info.shape) == 2 and info.shape[1] == 1:
            # The shape is that of bitsandbytes' codes. Without scales, the weight is reported as incomplete.
            groups.setdefault(name, {})
    for name, sizes in groups.items():
        if name in tensors:
            sizes[""] = _size(tensors[name][1])
    # A tensor of another kind may be named absmax.
    return {
        name: sizes
        for name, sizes in groups.items()
        if name.endswith(_ENDS) or any(part.startswith("quant_state.") for part in sizes)
    }


def _size(info: TensorInfo) -> tuple[str, int]:
    return info.dtype, info.end - info.begin


def _stored(
    name: str, sizes: dict[str, tuple[str, int]], tensors: Mapping[str, tuple[Path, TensorInfo]]
) -> StoredWeight:
    part = state_part(name, sizes)
    file, info = tensors[f"{name}.{part}"]
    stored = parse_state(name, part, _read(file, info))
    check_sizes(name, stored, sizes)
    return stored


def _read(file: Path, info: TensorInfo) -> bytes:
    with open(file, "rb") as content:
        header_bytes = int.from_bytes(content.read(8), "little")
        content.seek(8 + header_bytes + info.begin)
        return content.read(info.end - info.begin)
