"""The native library, which the build compiles from csrc/; 4-bit weights in its form; and memory for its results.

The library has a C interface without torch, so one binary works with every torch. Its loops run on torch's own OpenMP
threads, because the threads of two OpenMP runtimes in one process would compete for the same cores.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.compat.system import share_cores
from rankwise.compat.torch import in_backward_pass
from rankwise.errors import QuantizationError
from rankwise.ops.gguf_blocks import BLOCK_TYPES
from rankwise.ops.packed_weight import PackedWeight, code_table, dynamic_map

# From slow to fast, in the numbering of csrc/rankwise_native.h; a CPU has some of them. On Arm, "portable" includes
# NEON.
LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx")

# The numbers of the dtypes that functions without 4-bit weights take.
DTYPE = {torch.float32: 0, torch.bfloat16: 1}

_INTERFACE = 16
_HOW_TO_BUILD = (
    "install a C++17 compiler (for example `apt install g++`) and, in a copy of rankwise's repository, run "
    "`pip install --force-reinstall --no-deps .` (`-e .` for an editable installation)."
)


class Weight(ctypes.Structure):
    """``rw_weight``: the buffers of one 4-bit weight and its tables."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("dynamic_map", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("ggml_type", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("order", ctypes.c_void_p),
    )


def obstacle() -> str | None:
    """Why the library cannot run and what to do, or None if it can."""
    path = library_path()
    if path is None:
        return f"the native library was not built when rankwise was installed. To get it, {_HOW_TO_BUILD}"
    try:
        found = ctypes.CDLL(str(path)).rw_interface()
    except (OSError, AttributeError) as error:
        return f"{path} does not load ({error}). To build it anew, {_HOW_TO_BUILD}"
    if found != _INTERFACE:
        return f"{path} has interface {found} where this version needs {_INTERFACE}. To build it anew, {_HOW_TO_BUILD}"
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded library at the level of ``RANKWISE_CPU_LEVEL``, or at the best one of this CPU.

    Raises:
        QuantizationError: RW607, no such level, or this CPU lacks it.
    """
    path = library_path()
    if path is None:
        raise QuantizationError("RW607", f"the native library is missing. To get it, {_HOW_TO_BUILD}")
    loaded = ctypes.CDLL(str(path))
    _declare(loaded)
    _share_threads(loaded)
    _set_level(loaded, os.environ.get("RANKWISE_CPU_LEVEL"))
    return loaded


def usable_levels() -> tuple[str, ...]:
    """Those of ``LEVELS`` that this CPU and build have."""
    return _usable(library())


def level() -> str:
    """The instruction set in use, of ``LEVELS``."""
    return LEVELS[library().rw_level()]


def set_level(name: str | None) -> None:
    """Choose the instruction set; None takes the best one of this CPU.

    Raises:
        QuantizationError: RW607, no such level, or this CPU lacks it.
    """
    _set_level(library(), name)


def _usable(loaded: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for number, name in enumerate(LEVELS) if loaded.rw_levels() >> number & 1)


def _set_level(loaded: ctypes.CDLL, name: str | None) -> None:
    usable = _usable(loaded)
    if name is not None and name not in usable:
        raise QuantizationError(
            "RW607", f"RANKWISE_CPU_LEVEL is {name!r}: this CPU and build can run {', '.join(usable)}."
        )
    loaded.rw_set_level(LEVELS.index(usable[-1] if name is None else name))


def library_path() -> Path | None:
    return next((path for path in sorted(Path(__file__).parent.glob("_native*")) if path.suffix in _SUFFIXES), None)


_SUFFIXES = (".so", ".dylib", ".dll")


def _declare(loaded: ctypes.CDLL) -> None:
    """Result and arguments of each function, in the order of csrc/rankwise_native.h."""
    p, i, n, x, u = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_uint32
    w = ctypes.POINTER(Weight)
    signatures = {
        "rw_set_level": (None, [i]),
        "rw_share_threads": (None, [p]),
        "rw_use_huge_pages": (None, [p, n]),
        "rw_quantize_4bit": (n, [p, i, n, n, p, p, p, p, i]),
        "rw_dequantize_4bit": (None, [w, n, n, i, p, i]),
        "rw_linear_4bit": (None, [w, p, n, n, n, i, p, p, i]),
        "rw_row_norms_4bit": (None, [w, n, n, i, p, i]),
        "rw_attention_available": (i, []),
        "rw_attention_takes_float32": (i, []),
        "rw_attention_forward": (None, [p, p, p, i]),
        "rw_attention_backward": (None, [p, p, p, p, p, p, p, i]),
        "rw_low_rank_add": (None, [p, n, p, n, p, x, p, p, n, n, n, i, i]),
        "rw_row_cross": (None, [p, p, p, p, n, n, n, i, i]),
        "rw_scaled_grad": (None, [p, n, p, n, p, p, p, n, n, i, i]),
        "rw_rms_norm": (None, [p, n, p, x, i, i, p, p, n, n, i, i]),
        "rw_rms_norm_backward": (None, [p, n, p, n, p, p, i, p, n, p, n, n, i, i]),
        "rw_glu": (None, [p, n, p, n, p, n, i, p, p, p, n, n, i, i]),
        "rw_rope": (None, [p, p, p, p, n, i, p, p, p, i, i, i]),
        "rw_cross_entropy": (n, [p, n, p, n, n, x, x, x, x, i, i, i, p, i, i]),
        "rw_dropout": (None, [p, p, i, x, u, u, u, n, i, i]),
        "rw_products_available": (i, []),
        "rw_products_are_tiles": (i, []),
        "rw_products_largest": (i, []),
        "rw_products_allow": (None, [i]),
        "rw_quantize_rows": (None, [p, i, n, p, n, n, p, n, p, i, i]),
        "rw_products": (None, [p, i, i, n, n, p, p, p, p, n, i]),
        "rw_grouped_quantize_rows": (None, [p, i, n, p, p, n, n, p, n, p, i, i]),
        "rw_grouped_products": (None, [p, p, i, p, n, i, n, p, p, n, i]),
        "rw_row_product": (None, [i, p, n, p, n, p, n, n, n, n, x, p, i, p, i, p, p, i]),
        "rw_grouped_row_product": (None, [i, p, n, p, n, p, n, n, n, x, i, p, i, i]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Pass the entry point of torch's OpenMP runtime to the library, which otherwise starts threads for each call."""
    folder = Path(torch.__file__).parent / "lib"
    names = [str(path) for pattern in ("libgomp*", "libomp*", "libiomp*") for path in sorted(folder.glob(pattern))]
    for name in [*names, "libgomp.so.1", "libomp.so", "libomp.dylib"]:
        try:
            # RTLD_NOLOAD finds only what torch has already loaded.
            runtime = ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0))
        except OSError:
            continue
        start = getattr(runtime, "GOMP_parallel", None)
        if start is not None:
            loaded.rw_share_threads(ctypes.cast(start, ctypes.c_void_p))
            share_cores(runtime, torch.get_num_threads)
            return


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeWeight:
    """The C view of one weight. It holds the tensors whose memory the C side reads."""

    def __init__(self, weight: PackedWeight) -> None:
        codes, absmax, nested_absmax = weight.codes.contiguous(), weight.absmax.contiguous(), weight.nested_absmax
        nested_absmax = None if nested_absmax is None else nested_absmax.contiguous()
        order = None if weight.order is None else weight.order.contiguous()
        self.buffers = (codes, absmax, nested_absmax, weight.offset, order)
        if weight.in_file_blocks:
            kind, K = BLOCK_TYPES[weight.quant_type], weight.shape[1]
            self.struct = Weight(
                packed=codes.data_ptr(),
                absmax=absmax.data_ptr(),
                elements=weight.elements,
                block_size=kind.elements,
                ggml_type=kind.number,
                columns=K,
                row_bytes=kind.row_bytes(K) if codes.dim() == 2 else 1,
                order=pointer(order),
            )
            return
        self.struct = Weight(
            codes.data_ptr(),
            absmax.data_ptr(),
            pointer(nested_absmax),
            pointer(weight.offset),
            ctypes.addressof(tables(weight.quant_type)[0]),
            None if nested_absmax is None else dynamic_map(codes.device).data_ptr(),
            weight.elements,
            weight.block_size,
        )

    def address(self) -> int:
        """The address of the C view. Each call updates its pointers, because FSDP moves weights between passes."""
        self.struct.packed, self.struct.absmax = self.buffers[0].data_ptr(), self.buffers[1].data_ptr()
        return ctypes.addressof(self.struct)


@cache
def tables(quant_type: str) -> tuple[ctypes.Array[Any], ctypes.Array[Any], ctypes.Array[Any]]:
    """16 values, 15 bounds between them in ascending order, and the 16 codes in that order."""
    table = code_table(quant_type)
    return (ctypes.c_float * 16)(*table.value), (ctypes.c_float * 15)(*table.bound), (ctypes.c_uint8 * 16)(*table.order)


# Memory for large results. `on_huge_pages`: page faults of 4 KiB each make new memory slower to map than to fill.
#
# `roomy`: for results that are freed before tensors that were made after them. For an aligned block of n bytes glibc
# needs a free block of n + 96 bytes, so a freed tensor is too small for the next one of its size. In a forward pass
# every layer would leave a hole: a twentieth of a LoRA step's memory, a twelfth of a DoRA step's. Padding avoids the
# holes. There are three sizes of padding, so that a request fits a freed block with more padding: PyTorch's own
# tensors have none, outputs of products 4 KiB, short-lived tensors 8 KiB.

OF_OUTPUTS, OF_SHORT_LIVED = 4 << 10, 8 << 10
# Minimum bytes. What remains of a reused block is then too large for glibc's small bins, whose blocks are not merged.
_LEAST_BYTES = 256 << 10
_LEAST_BYTES_ON_HUGE_PAGES = 4 << 20


def on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, on huge pages if it is large enough and the system provides them."""
    made = torch.empty(tuple(shape), dtype=dtype)
    if made.nbytes >= _LEAST_BYTES_ON_HUGE_PAGES:
        library().rw_use_huge_pages(made.data_ptr(), made.nbytes)
    return made


def roomy(shape: Sequence[int], dtype: torch.dtype, spare_bytes: int) -> Tensor:
    """An uninitialized tensor, dense, whose storage is larger by ``spare_bytes`` if it is large enough to matter.

    The tensor is not a view, so autograd allows writing to it in place. Inside a backward pass, where checkpointing
    recomputes a layer, there is no padding: saved tensors are freed soon, and small objects in the padding would keep
    glibc from merging the freed blocks (20 to 47 MB more with DoRA).
    """
    shape, count = tuple(shape), math.prod(shape)
    if count * dtype.itemsize < _LEAST_BYTES or in_backward_pass():
        return torch.empty(shape, dtype=dtype)
    return torch.empty(count + spare_bytes // dtype.itemsize, dtype=dtype).resize_(shape)
