"""Products with a dense frozen weight outside of any adapter: the output head, and layers that nothing adapts."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.ops import selection


def linear_out(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``out <- x W^T``: x (T, K), W (N, K), out (T, N), of one dtype; no autograd."""
    if type(out) is type(x) and selection.takes_native(x):
        from rankwise.ops.cpu import products

        factor = products.Factor.of(W.detach())
        if factor is not None and x.stride(1) == 1 and products.pay(x):
            return products.add_products([products.Term(x, factor)], out)
    return torch.mm(x, W.T, out=out)


def input_grad_out(dy: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``out <- dy W``: dy (T, N), W (N, K), out (T, K), of one dtype; no autograd."""
    if type(out) is type(dy) and selection.takes_native(dy):
        from rankwise.ops.cpu import products

        # On AMX, PyTorch's product is as fast where N is as large as a vocabulary.
        if products.take(dy.dtype) and not products.on_tiles():
            return linear_out(dy, W.T, out)
    return torch.mm(dy, W, out=out)
