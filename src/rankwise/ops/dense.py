"""Products with a dense frozen weight outside of any layer: the output head."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.ops import selection


def linear_out(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``out <- x W^T``: x (T, K), W (N, K), out (T, N), of one dtype; no autograd."""
    if type(out) is type(x) and selection.takes_native(x):
        from rankwise.ops.cpu import products

        factor = products.Factor.of(W.detach())
        if factor is not None and x.stride(1) == 1 and x.shape[0] >= products.LEAST_ROWS and products.take(x.dtype):
            return products.add_products([products.Term(x, factor)], out)
    return torch.mm(x, W.T, out=out)
