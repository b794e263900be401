"""DoRA with the gradient of the norm, as the article prints its layer; a baseline of comparisons.

    y = g * (W x + s B A x) + b,    g = m / ||W + s B A||
    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>                                           per row

rankwise and DoRA's section 4.3 take the norm as a constant in the backward pass (NVlabs' ``dora_simple``); here the
gradient flows through it. W: (out, in), A: (r, in), B: (out, r), m: (out,); s = 2, that is alpha = 2 r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rankwise.errors import ConfigError

SCALING = 2.0


class Direction(nn.Module):
    """The trained part of one layer: A, B and m in float32."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        weight = base.weight.detach().float()
        self.A = nn.Parameter(torch.empty(r, base.in_features, device=weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=weight.device))
        self.m = nn.Parameter(weight.norm(dim=1))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


class DoraThrough(nn.Module):
    """A frozen linear layer and its direction, which the model holds elsewhere as well."""

    def __init__(self, base: nn.Linear, direction: Direction) -> None:
        super().__init__()
        self.base, self.direction = base, direction
        self.in_features, self.out_features = base.in_features, base.out_features
        self.squared = base.weight.detach().float().square().sum(1)

    def gain(self) -> Tensor:
        A, B, W = self.direction.A, self.direction.B, self.base.weight
        cross = (linear(A.to(W.dtype), W).T.float() * B).sum(1)
        own = (B @ (A @ A.T) * B).sum(1)
        return self.direction.m / (self.squared + 2 * SCALING * cross + SCALING**2 * own).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        g, dtype = self.gain(), x.dtype
        y = linear(x, self.base.weight)
        # y + (g - 1) y: in bfloat16 a gain close to 1 would round to 1.
        y = torch.addcmul(y, y, (g - 1).to(dtype))
        low = linear(linear(x, self.direction.A.to(dtype)), self.direction.B.to(dtype))
        y = torch.addcmul(y, low, (g * SCALING).to(dtype))
        return y if self.base.bias is None else y + self.base.bias


def add_dora_through(model: nn.Module, r: int) -> nn.ModuleDict:
    """Freeze ``model`` and wrap every linear layer but the head. Returns {path with "/" for ".": direction}.

    Raises ConfigError (RA170) for a model without linear layers.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = [(path, part) for path, part in model.named_modules() if type(part) is nn.Linear and part is not head]
    if not found:
        raise ConfigError("RA170", f"dora_through needs linear layers, and {type(model).__name__} has none; use dora.")
    directions = nn.ModuleDict()
    for path, base in found:
        directions[path.replace(".", "/")] = direction = Direction(base, r)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, DoraThrough(base, direction))
    return directions
