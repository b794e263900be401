"""Sums of products of matrices in the native library: a frozen weight and its low-rank branch in one pass.

    out (T, N) = g * sum_i a_i W_i^T + b        with W_i dense, of 4 bits, or a small float32 matrix

Sums are float32 and rounded once; results do not depend on the number of threads. If the processor multiplies pairs
of bfloat16 (AMX, AVX-512 BF16), rows are bfloat16 and factors are rounded to bfloat16. With AVX2, which cannot, rows
may also be float32, and all operands are widened to float32. See `take`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rankwise.compat.torch import is_fake, plain_tensors
from rankwise.ops.cpu.native import DTYPE, NativeWeight, level, library, pointer
from rankwise.ops.eight_bit import LARGEST, Scales
from rankwise.ops.packed_weight import PackedWeight

MOST_TERMS = 16

# Number of rows from which packing the weight pays, against PyTorch's product (bfloat16 on tiles; float32) and the
# kernel that multiplies while it decodes (4-bit weights, sums in float32).
_LEAST_ROWS, _LEAST_ROWS_WIDENED, _LEAST_ROWS_OF_FOUR_BITS_WIDENED = 32, 4, 16

# Products of layers are 0.6 of a step in float32. It is 1.2 times as fast if integers take this part of their time.
_MOST_TIME_OF_INTEGERS = 0.7

_DTYPE_OF_WEIGHT = {**DTYPE, torch.int8: 3}

# Rows of integers are padded to a multiple of these elements.
_STEP = 64


@dataclasses.dataclass(frozen=True)
class Factor:
    """The right factor of a term, in its memory layout: rows of ``stride`` elements.

    ``across``: the rows in memory are columns of the matrix W (N, K).
    """

    data: Tensor | NativeWeight
    stride: int
    across: bool = False

    @classmethod
    def of_frozen(cls, W: Tensor | PackedWeight, scales: Scales | None) -> Factor | None:
        """The same of what a product of a frozen weight reads: its kept integers, where it has them."""
        rounded = None if scales is None else scales.rounded
        return cls.of(W if rounded is None else rounded)

    @classmethod
    def of(cls, W: Tensor | PackedWeight) -> Factor | None:
        """A 4-bit W (N, K), a dense one or a transposed view of one; None if the native library cannot read it: not
        on a CPU, of a different dtype, or without dense rows."""
        if isinstance(W, PackedWeight):
            if not W.codes.is_cpu:
                return None
            # Fake codes are never read.
            return cls(W.codes if is_fake(W.codes) else NativeWeight(W), W.shape[1])
        if W.dtype not in _DTYPE_OF_WEIGHT or not W.is_cpu:
            return None
        if W.stride(1) == 1:
            return cls(W, W.stride(0))
        return cls(W, W.stride(1), across=True) if W.stride(0) == 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """``a W^T`` of a (T, K) and W (N, K), or, with ``across``, ``a W`` of a (T, N).

    ``gain`` float32, one per element that is summed over, and ``scale`` multiply W before it is rounded to bfloat16.
    ``in_bytes``: a is what `quantize_rows` made, and W is rounded to integers too, 8 bits or `largest`.
    ``exact``: on tiles, a float32 W without ``across`` is not rounded but split into a sum of two bfloat16 matrices.
    ``a_rest`` (T, K), laid out as a, is the rounding error of a, and is added to a.
    """

    a: Tensor
    W: Factor
    across: bool = False
    gain: Tensor | None = None
    scale: float = 1.0
    exact: bool = False
    a_rest: Tensor | None = None
    in_bytes: InBytes | None = None


class InBytes:
    """The scales of a product of integers (`rankwise.ops.eight_bit`), in the native library's form: those of the rows,
    the factors of W (N, K) as it lies in memory, and those of the result's columns."""

    def __init__(self, of_rows: Tensor, scales: Scales, W: Factor, *, across: bool) -> None:
        by_row, by_column = scales.per_row, scales.channel
        if W.across:
            by_row, by_column = by_column, by_row
        self.tensors = of_rows, by_row, by_column, scales.per_channel if across else scales.row

    def address(self) -> int:
        """The address of the C view, ``rw_eight_bit``. Fake tensors have none."""
        self.struct = (ctypes.c_void_p * 4)(*(tensor.data_ptr() for tensor in self.tensors))
        return ctypes.addressof(self.struct)


def bytes_pay(dtype: torch.dtype) -> bool:
    """Whether steps with terms in 8 bits are at least 1.2 times as fast as with rows of ``dtype``.

    True with AVX-VNNI (1.9 times) and AVX-512 VNNI (1.3). With AMX it depends on the model: 1.1 times on ``demo``, 1.5
    at the size of Llama 3.2 1B. Processors with AVX2 alone multiply integers of 16 bits as fast as floats, or up to
    twice as fast: this one is measured.
    """
    if not take(dtype) or level() == "amx":
        return False
    return level() in ("avx_vnni", "avx512_bf16") or seconds_of_integers(dtype, level()) <= _MOST_TIME_OF_INTEGERS


@functools.cache
@plain_tensors()
def seconds_of_integers(dtype: torch.dtype, level: str) -> float:
    """The time of a small product of integers, as a part of that of the same product in ``dtype``. A plan asks too,
    where tensors would be fake."""
    x, W, out = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype), torch.empty(256, 512, dtype=dtype)
    scales, factor = Scales.of(W, torch.ones(512), largest()), Factor.of(W)
    assert factor is not None, "a dense weight"
    q, a = quantize_rows(x, scales.per_channel)
    integers = Term(a=q, W=factor, in_bytes=InBytes(a, scales, factor, across=False))
    terms = Term(a=x, W=factor), integers
    floats, whole = (seconds_alone(functools.partial(add_products, [term], out), 0.05) for term in terms)
    return whole / floats


def seconds_alone(call: Callable[[], object], least: float) -> float:
    """Seconds of a call on one thread, by its clock, over ``least`` seconds: beside other programs, several threads
    wait for each other, and may be slower than one."""
    threads, calls, seconds = torch.get_num_threads(), 0, 0.0
    torch.set_num_threads(1)
    try:
        call()
        begun = time.thread_time()
        while seconds < least:
            call()
            calls, seconds = calls + 1, time.thread_time() - begun
    finally:
        torch.set_num_threads(threads)
    return seconds / calls


def largest() -> int:
    """The integer to which terms in 8 bits are rounded: 127, or 1,023 with AVX2 alone, which multiplies integers of 16
    bits; 0 without sums of products."""
    return int(library().rw_products_largest())


def quantize_rows(
    x: Tensor, factor: Tensor, sizes: Tensor | None = None, *, dither: bool = False
) -> tuple[Tensor, Tensor]:
    """`rankwise.ops.eight_bit.quantize_rows` up to `largest`, of x (T, K) with dense rows and a dtype that `take`
    admits: int16, or bytes plus 128 as uint8. The scales are followed by unused ones.

    sizes: int64 (E,), of groups of rows, each of which has a factor (E, K) and a dither of its own.
    """
    T, K = x.shape
    stride = -(-K // _STEP) * _STEP
    # Rows at such a distance fall into few cache sets.
    stride += _STEP if stride % 2048 == 0 else 0
    q = torch.empty((T, stride), dtype=torch.int16 if largest() > LARGEST else torch.uint8)[:, :K]
    scale = torch.empty(-(-T // 32) * 32)
    if is_fake(x):
        return q, scale
    given = x.data_ptr(), DTYPE[x.dtype], x.stride(0), factor.data_ptr()
    made, threads = (K, q.data_ptr(), stride * q.itemsize, scale.data_ptr()), torch.get_num_threads()
    if sizes is None:
        library().rw_quantize_rows(*given, T, *made, dither, threads)
    else:
        library().rw_grouped_quantize_rows(*given, sizes.data_ptr(), len(sizes), *made, dither, threads)
    return q, scale


def available() -> bool:
    """Whether this CPU and build have sums of products."""
    return bool(library().rw_products_available())


def take(dtype: torch.dtype) -> bool:
    """Whether sums of products take rows of ``dtype`` here."""
    return available() and (dtype is torch.bfloat16 or (dtype is torch.float32 and not on_tiles()))


def pay(rows: Tensor, W: Factor) -> bool:
    """Whether sums of products take these rows (T, K) and are faster than other products with the frozen weight W."""
    if not take(rows.dtype):
        return False
    if rows.dtype is torch.float32 or on_tiles():
        return rows.shape[0] >= _LEAST_ROWS
    return rows.shape[0] >= (_LEAST_ROWS_WIDENED if isinstance(W.data, Tensor) else _LEAST_ROWS_OF_FOUR_BITS_WIDENED)


def replace_torch(dtype: torch.dtype) -> bool:
    """Whether sums of products take rows of ``dtype``, while PyTorch's products have no instruction for it and are far
    slower."""
    return dtype is torch.bfloat16 and take(dtype) and not on_tiles()


def sum_faster(dtype: torch.dtype) -> bool:
    """Whether sums over a vocabulary are faster than PyTorch's: of bfloat16, but with AMX."""
    return dtype is torch.bfloat16 and take(dtype) and level() != "amx"


def on_tiles() -> bool:
    """Whether sums of products multiply pairs of bfloat16, with AMX or AVX-512."""
    return bool(library().rw_products_are_tiles())


def allow(allowed: bool, pairs: Literal["measured", "widened", "dots"] = "measured") -> None:
    """Switch sums of products off (and on again) for the whole process, or choose how AVX-512 multiplies ``pairs`` of
    bfloat16, instead of the quicker way: for tests."""
    library().rw_products_allow({"measured": 1, "widened": 2, "dots": 3}[pairs] if allowed else 0)


def add_products(
    terms: Sequence[Term],
    out: Tensor,
    g: Tensor | None = None,
    bias: Tensor | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """out (T, N), rows dense, is overwritten with ``g * (sum of at most 16 terms) + bias``.

    Every a has out's dtype, which `take` admits, and dense rows; g and bias are float32 (N,). ``rest``, laid out as
    out, is overwritten with the rounding error of out. Nothing is computed for fake tensors.
    """
    if is_fake(out):
        return out
    T, N = out.shape
    # The library sums terms in 8 bits before the others.
    array = (_Term * len(terms))(*map(_struct, sorted(terms, key=lambda term: term.in_bytes is None)))
    library().rw_products(
        array, len(terms), DTYPE[out.dtype], T, N, pointer(g), pointer(bias), out.data_ptr(), pointer(rest),
        out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def row_product(
    q: Tensor,
    m: Tensor,
    *,
    y: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: float = 1.0,
    gain: Tensor | None = None,
    by_column: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """``scale * gain * q^T m`` (R, C), or its transpose, and ``sum_T m * y / divisor`` (C,) float32 where y is given.

    q (T, R), m and y (T, C) of one dtype, which `take` admits, with dense rows; gain and divisor (C,) float32. Where
    divisor is 0, the quotient is 0. ``dtype``: the dtype of the first result, float32 or bfloat16.
    """
    (T, R), C = q.shape, m.shape[1]
    out = torch.empty((C, R) if by_column else (R, C), dtype=dtype)
    dot = None if y is None else torch.empty(C, dtype=torch.float32)
    if is_fake(out):
        return out, dot
    library().rw_row_product(
        DTYPE[q.dtype], q.data_ptr(), q.stride(0), m.data_ptr(), m.stride(0), pointer(y),
        0 if y is None else y.stride(0), T, R, C, scale, pointer(gain), by_column, out.data_ptr(), DTYPE[dtype],
        pointer(divisor), pointer(dot), torch.get_num_threads(),
    )  # fmt: skip
    return out, dot


def add_grouped_products(
    terms: Sequence[Term], apart: Sequence[int], sizes: Tensor, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`add_products` of groups of rows, each with weights of its own, in one pass; without g and rest.

    sizes: int64 (E,), the rows of each group. Each term has the first group's weight; that of group e begins e
    ``apart`` elements behind, and a term in 8 bits, which comes first, has the scales of all their rows (E, N). out
    (S, N); bias float32 (E, N).
    """
    if is_fake(out):
        return out
    count = len(terms)
    library().rw_grouped_products(
        (_Term * count)(*map(_struct, terms)), (ctypes.c_int64 * count)(*apart), count, sizes.data_ptr(), len(sizes),
        DTYPE[out.dtype], out.shape[1], pointer(bias), out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def grouped_row_product(
    q: Tensor, m: Tensor, sizes: Tensor, *, scale: float = 1.0, by_column: bool = False, dtype: torch.dtype
) -> Tensor:
    """``scale * q^T m`` of each group of rows, zero for one without rows: (E, R, C), or transposed (E, C, R).

    q (S, R) and m (S, C) as for `row_product`, sizes as for `add_grouped_products`; dtype: float32 or bfloat16.
    """
    R, C = q.shape[1], m.shape[1]
    out = torch.zeros((len(sizes), C, R) if by_column else (len(sizes), R, C), dtype=dtype)
    if not is_fake(out):
        library().rw_grouped_row_product(
            DTYPE[q.dtype], q.data_ptr(), q.stride(0), m.data_ptr(), m.stride(0), sizes.data_ptr(), len(sizes), R, C,
            scale, by_column, out.data_ptr(), DTYPE[dtype], torch.get_num_threads(),
        )  # fmt: skip
    return out


class _Term(ctypes.Structure):
    """``rw_term``."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("w", ctypes.c_void_p),
        ("w_stride", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("w_dtype", ctypes.c_int),
        ("across", ctypes.c_int),
        ("a_rest", ctypes.c_void_p),
        ("exact", ctypes.c_int),
        ("eight_bit", ctypes.c_void_p),
        ("w_first", ctypes.c_int64),
    )


def _struct(term: Term) -> _Term:
    data, dense, packed, dtype = term.W.data, None, None, torch.bfloat16
    if isinstance(data, Tensor):
        dense, dtype = data.data_ptr(), data.dtype
    else:
        packed = data.address()
    a = term.a
    return _Term(
        a.data_ptr(), a.stride(0), a.shape[1], dense, term.W.stride, packed, pointer(term.gain), term.scale,
        _DTYPE_OF_WEIGHT[dtype], term.across != term.W.across, pointer(term.a_rest), term.exact,
        None if term.in_bytes is None else term.in_bytes.address(),
    )  # fmt: skip
