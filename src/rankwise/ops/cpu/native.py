"""Loader of the native library that the package's build makes from csrc/.

It is a plain shared library with a C interface, so one binary serves every torch. Its loops run on torch's own OpenMP
threads: two OpenMP runtimes in one process would spin on the same cores.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from rankwise.errors import QuantizationError

LEVELS = ("portable", "avx2", "avx512")
"""From slow to fast, in the numbering of csrc/rankwise_native.h. On Arm, "portable" includes NEON."""

_INTERFACE = 8
_HOW_TO_BUILD = (
    "install a C++17 compiler (for example `apt install g++`) and run "
    "`pip install --force-reinstall --no-deps --no-binary rankwise rankwise`, or `pip install -e .` in a source tree."
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
    )


def obstacle() -> str | None:
    """Why the library cannot run and what to do, or None where it can."""
    path = _library_path()
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
    path = _library_path()
    if path is None:
        raise QuantizationError("RW607", f"the native library is missing. To get it, {_HOW_TO_BUILD}")
    loaded = ctypes.CDLL(str(path))
    _declare(loaded)
    _share_threads(loaded)
    _set_level(loaded, os.environ.get("RANKWISE_CPU_LEVEL"))
    return loaded


def level() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"portable"``."""
    return LEVELS[library().rw_level()]


def set_level(name: str | None) -> None:
    """Choose the instruction set; None takes the best one of this CPU.

    Raises:
        QuantizationError: RW607, no such level, or this CPU lacks it.
    """
    _set_level(library(), name)


def _set_level(loaded: ctypes.CDLL, name: str | None) -> None:
    best = loaded.rw_best_level()
    if name is not None and name not in LEVELS[: best + 1]:
        raise QuantizationError(
            "RW607", f"RANKWISE_CPU_LEVEL is {name!r}: this CPU and build can run {', '.join(LEVELS[: best + 1])}."
        )
    loaded.rw_set_level(best if name is None else LEVELS.index(name))


def _library_path() -> Path | None:
    return next((path for path in sorted(Path(__file__).parent.glob("_native*")) if path.suffix in _SUFFIXES), None)


_SUFFIXES = (".so", ".dylib", ".dll")


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, integer, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    weight = ctypes.POINTER(Weight)
    signatures = {
        "rw_quantize_4bit": (count, [pointer, integer, count, count, pointer, pointer, pointer, pointer, integer]),
        "rw_dequantize_4bit": (None, [weight, count, count, integer, pointer, integer]),
        "rw_linear_4bit": (None, [weight, pointer, count, count, count, integer, pointer, pointer, integer]),
        "rw_row_norms_4bit": (None, [weight, count, count, integer, pointer, integer]),
        "rw_attention_available": (integer, []),
        "rw_attention_uses_amx": (integer, []),
        "rw_attention_allow_amx": (None, [integer]),
        "rw_attention_forward": (None, [pointer, pointer, pointer, integer]),
        "rw_attention_backward": (None, [pointer] * 7 + [integer]),
        "rw_share_threads": (None, [pointer]),
        "rw_use_huge_pages": (None, [pointer, count]),
        "rw_set_level": (None, [integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Hand over the entry point of the OpenMP runtime that torch brought; without one the library starts threads per
    call."""
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
            return
