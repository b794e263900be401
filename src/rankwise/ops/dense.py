"""Products with a dense frozen weight outside of any adapter: the output head, and layers without an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.ops import selection


def linear_out(x: Tensor, W: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out <- x W^T + bias``: x (T, K), W (N, K), out (T, N), bias (N,), of one dtype; no autograd."""
    if _takes_native(x, out):
        from rankwise.ops.cpu import products

        factor = products.Factor.of(W.detach())
        if factor is not None and products.pay(x, factor):
            return products.add_products([products.Term(x, factor)], out, bias=None if bias is None else bias.float())
    return torch.mm(x, W.T, out=out) if bias is None else torch.addmm(bias, x, W.T, out=out)


def input_grad_out(dy: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``out <- dy W``: dy (T, N), W (N, K), out (T, K), of one dtype; no autograd."""
    if _takes_native(dy, out):
        from rankwise.ops.cpu import products

        factor = products.Factor.of(W.detach())
        # With AMX tiles, PyTorch's product is as fast for an N as large as a vocabulary.
        if factor is not None and products.replace_torch(dy.dtype):
            return products.add_products([products.Term(dy, factor, across=True)], out)
    return torch.mm(dy, W, out=out)


def is_slow_in_torch(dtype: torch.dtype) -> bool:
    """Whether the functions above support ``dtype`` and PyTorch's products have no instructions for it."""
    if not selection.native_on_cpu():
        return False
    from rankwise.ops.cpu import products

    return products.replace_torch(dtype)


def eight_bit_pays(like: Tensor) -> bool:
    """Whether products in 8 bits are at least 1.2 times as fast as those in the dtype of ``like`` on its device."""
    if not selection.takes_native(like):
        return False
    from rankwise.ops.cpu import products

    return products.bytes_pay(like.dtype)


def _takes_native(rows: Tensor, out: Tensor) -> bool:
    return type(out) is type(rows) and selection.takes_native(rows) and rows.stride(1) == 1
