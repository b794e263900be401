"""4-bit operators in the native library, with the signatures of `rankwise.ops.reference` and the same results.

Quantized and dequantized values equal the reference to the bit. Products use the same dequantized weight and sum in
float32. The callers in ``rankwise.ops.table`` have checked types, shapes and buffer sizes.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, get_num_threads
from torch.nn import functional

from rankwise.compat.torch import storage_users
from rankwise.constants import KEPT_BYTES
from rankwise.ops import reference
from rankwise.ops.cpu import elementwise, products
from rankwise.ops.cpu.native import NativeWeight, library, on_huge_pages, pointer, tables
from rankwise.ops.packed_weight import PackedWeight, packed_shape
from rankwise.ops.reference import dequantize_absmax, not_finite, quantize_absmax, row_cross_in_chunks

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Up to this number of rows, decoding into registers and caches is faster than dequantizing the whole weight for a dense
# product (measured).
_FEW_ROWS = 64

_kept = threading.local()


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w, any shape -> packed uint8 (`packed_shape`), absmax float32 (blocks,)."""
    w, n = w.detach().contiguous(), w.numel()
    packed = on_huge_pages(packed_shape(w.shape, block_size), torch.uint8)
    absmax = torch.empty(math.ceil(n / block_size), dtype=torch.float32)
    _, bound, order = tables(quant_type)
    bad = library().rw_quantize_4bit(
        w.data_ptr(),
        _DTYPE[w.dtype],
        n,
        block_size,
        bound,
        order,
        packed.data_ptr(),
        absmax.data_ptr(),
        get_num_threads(),
    )
    if bad >= 0:
        start = bad * block_size
        raise not_finite(w.view(-1)[start : start + block_size], start)
    return packed, absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W' = value[code] * absmax, in ``dtype``."""
    out = _memory(weight.shape, dtype, exact=True)
    _dequantize_into(out, NativeWeight(weight))
    return out


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N)."""
    N, K = weight.shape
    T = math.prod(x.shape[:-1])
    if T > _FEW_ROWS:
        if products.take(x.dtype):
            # This product decodes the weight into caches instead of memory.
            return _product(x, products.Factor(NativeWeight(weight), weight.shape[1]), N, across=False, bias=bias)
        return functional.linear(x, _dense(weight, x.dtype), bias)
    x, y = x.contiguous(), torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    bias, native = None if bias is None else bias.contiguous(), NativeWeight(weight)
    library().rw_linear_4bit(
        native.struct,
        x.data_ptr(),
        T,
        N,
        K,
        _DTYPE[x.dtype],
        pointer(bias),
        y.data_ptr(),
        get_num_threads(),
    )
    return y


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = dL/dy W'. grad (..., N) -> (..., K)."""
    # Without AMX tiles, PyTorch's bfloat16 product with a transposed matrix is slower, even for a few rows.
    if products.replace_torch(grad.dtype) or (math.prod(grad.shape[:-1]) > _FEW_ROWS and products.take(grad.dtype)):
        return _product(grad, products.Factor(NativeWeight(weight), weight.shape[1]), weight.shape[1], across=True)
    return grad @ _dense(weight, grad.dtype)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """||W'_n||, float32 (N,), of W' rounded to ``dtype`` and accumulated in float32."""
    N, K = weight.shape
    norms, native = torch.empty(N, dtype=torch.float32), NativeWeight(weight)
    library().rw_row_norms_4bit(native.struct, N, K, _DTYPE[dtype], norms.data_ptr(), get_num_threads())
    return norms


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """cross_n = <W'_n A^T, B_n>, float32 (N,), of W' rounded to ``dtype``."""
    cross = reference.row_cross if dtype is torch.float16 else elementwise.row_cross
    return row_cross_in_chunks(weight, B, lambda part, B: cross(dequantize_4bit(part, dtype), A, B))


def _product(a: Tensor, factor: products.Factor, columns: int, *, across: bool, bias: Tensor | None = None) -> Tensor:
    """``a W'^T + b``, or with ``across`` ``a W'``: a (..., summed over) -> (..., columns)."""
    rows = a.reshape(-1, a.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = on_huge_pages((*a.shape[:-1], columns), a.dtype)
    term = products.Term(a=rows, W=factor, across=across)
    products.add_products([term], out.view(-1, columns), bias=None if bias is None else bias.float())
    return out


def _dequantize_into(out: Tensor, weight: NativeWeight) -> None:
    library().rw_dequantize_4bit(weight.struct, 0, out.numel(), _DTYPE[out.dtype], out.data_ptr(), get_num_threads())


def _dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dequantized weight, (N, K), in memory that the next call reuses once this tensor is released."""
    out = _memory(weight.shape, dtype, exact=False)
    _dequantize_into(out, NativeWeight(weight))
    return out


def is_kept(size_bytes: int) -> bool:
    """Whether a dense weight's memory is reused for the next one: page faults of new memory take ten times as long as
    dequantizing."""
    return KEPT_BYTES[0] <= size_bytes <= KEPT_BYTES[1]


def _memory(shape: Sequence[int], dtype: torch.dtype, *, exact: bool) -> Tensor:
    """An uninitialized tensor, if possible in this thread's cached storage. ``exact``: the storage must have no
    spare bytes."""
    size, shape = math.prod(shape) * dtype.itemsize, tuple(shape)
    if not is_kept(size):
        return on_huge_pages(shape, dtype)
    kept: Tensor | None = getattr(_kept, "tensor", None)
    if kept is not None:
        storage: torch.UntypedStorage = _kept.storage
        fits = storage.nbytes() == size or (storage.nbytes() > size and not exact)
        # `_kept` itself has two references; a third one is a tensor that is still in use.
        if fits and storage_users(storage) == 2:
            # With cold caches, a new tensor over the storage takes 0.1 ms, resizing this one a tenth.
            if kept.shape != shape or kept.dtype is not dtype:
                kept = _keep(lambda: torch.empty(0, dtype=dtype).set_(storage).resize_(shape))
            return kept.data
        # The old memory is freed first, so that the peak does not hold both.
        del kept, storage
        _kept.tensor = _kept.storage = None
    return _keep(lambda: on_huge_pages(shape, dtype)).data


def _keep(make: Callable[[], Tensor]) -> Tensor:
    """The result of ``make``, kept for this thread. It is made outside inference mode, whose tensors cannot be saved
    for a backward pass.
    """
    with torch.inference_mode(False):
        made = make()
    _kept.tensor, _kept.storage = made, made.untyped_storage()
    return made


__all__ = [
    "dequantize_4bit",
    "dequantize_absmax",
    "linear_4bit",
    "linear_4bit_input_grad",
    "quantize_4bit",
    "quantize_absmax",
    "row_cross_4bit",
    "row_norms_4bit",
]
