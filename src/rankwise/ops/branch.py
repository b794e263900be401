"""The arguments of the adapter operator: frozen weights, their low-rank branches, dropout; and dense products."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.ops import elementwise, selection
from rankwise.ops.eight_bit import EightBit, Scales, input_grad, product
from rankwise.ops.four_bit import dequantize_weight, linear_4bit, linear_4bit_input_grad
from rankwise.ops.packed_weight import PackedWeight

# Rows up to which 4-bit kernels decode the weight: see `rankwise.ops.cpu.four_bit` and `rankwise.ops.triton.four_bit`.
_FEW_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A weight W (N, K) that never trains: dense, a transposed view of a dense one, or in 4 bits."""

    weight: Tensor | PackedWeight
    # Where its products are in 8 bits.
    eight_bit: EightBit | None = None

    @property
    def scales(self) -> Scales | None:
        """The scales of 8-bit products; None if products are in the dtype of the rows."""
        return None if self.eight_bit is None else self.eight_bit.scales(self)

    def product(self, x: Tensor) -> Tensor:
        """``x W^T``, a new tensor: x (T, K) -> (T, N)."""
        return F.linear(x, self.weight) if isinstance(self.weight, Tensor) else linear_4bit(x, self.weight)

    def add_input_grad(self, dz: Tensor, dx: Tensor | None, gain: Tensor | None = None) -> Tensor:
        """``dx + dz W``, in place where dx (T, K) is given: dz (T, N) -> (T, K). ``gain``: see `dense`."""
        if (scales := self.scales) is not None:
            made = input_grad(dz, self.dense(dz.dtype), scales, gain)
            return made.to(dz.dtype) if dx is None else dx.add_(made)
        if dx is not None:
            return dx.addmm_(dz, self.dense(dz.dtype, gain))
        if isinstance(self.weight, Tensor) or gain is not None:
            return dz @ self.dense(dz.dtype, gain)
        return linear_4bit_input_grad(dz, self.weight)

    def dense(self, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
        """W; for a 4-bit weight a new tensor of ``dtype``, whose rows are multiplied by ``gain`` (N,) if given."""
        return self.weight if isinstance(self.weight, Tensor) else dequantize_weight(self.weight, dtype, gain)

    def parts(self, dtype: torch.dtype) -> tuple[Tensor]:
        """W, as `rankwise.ops.eight_bit` reads it."""
        return (self.dense(dtype).detach(),)

    def is_decoded_for(self, x: Tensor) -> bool:
        """Whether W is 4-bit and x (T, K) has so few rows that kernels compute the product without a dense W."""
        return not isinstance(self.weight, Tensor) and x.shape[0] <= _FEW_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One layer: its frozen weight and its trained tensors. ``m`` and ``gain`` are None without DoRA."""

    frozen: Frozen
    scale: float
    A: Tensor  # (r, K)
    B: Tensor  # (N, r)
    bias: Tensor | None = None
    m: Tensor | None = None  # (N,)
    gain: Tensor | None = None  # (N,) in float32: m / ||W + s B A||, no entry of m zero.
    comes_back: bool = False  # Whether a later operation returns the output in the backward pass (`ops.kept`).

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.A, self.B, self.bias, self.m


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the input of A: each element of x is kept with probability 1 - p. The mask follows from the seed."""

    p: float
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """``drop(x)`` of x (T, K)."""
        return elementwise.dropout(x, self.p, self.seed)

    def add_(self, dx: Tensor, z: Tensor) -> Tensor:
        """``dx + drop(z)`` of z (T, K), in place."""
        return elementwise.dropout_add_(dx, z, self.p, self.seed)


@dataclasses.dataclass
class BranchGrads:
    """Gradients of the trained tensors of one branch; None for a tensor that needs none."""

    B: Tensor | None = None
    bias: Tensor | None = None
    m: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which tensors of a branch need a gradient."""

    A: bool
    B: bool
    bias: bool
    m: bool


def grad_of_bias(dy: Tensor, branch: Branch) -> Tensor:
    """``sum_T dy`` (N,)."""
    assert branch.bias is not None, "the branch has a bias"
    return dy.float().sum(0).to(branch.bias.dtype)


def grad_of_m(dot: Tensor, dy: Tensor, branch: Branch) -> Tensor:
    """dm (N,) from ``dot = sum_T dy * y``."""
    assert branch.m is not None, "the branch has a magnitude"
    if branch.bias is not None:
        dot = dot - branch.bias.float() * dy.float().sum(0)
    # y is proportional to m, so dot / m is the gradient where m is not 0. For a row of norm 0, it is 0.
    m = branch.m.float()
    is_zero = m == 0
    return torch.where(is_zero, 0.0, dot / torch.where(is_zero, 1.0, m)).to(branch.m.dtype)


# Products with a frozen weight outside of any adapter: the output head, and layers without an adapter.


def linear_out(
    x: Tensor, W: Tensor | PackedWeight, out: Tensor, bias: Tensor | None = None, scales: Scales | None = None
) -> Tensor:
    """``out <- x W^T + bias``: x (T, K), W (N, K), out (T, N), bias (N,), of one dtype; no autograd. ``scales``: of a
    product in 8 bits."""
    if _takes_native(x, out):
        from rankwise.ops.cpu import products

        factor, term = products.Factor.of_frozen(W, scales), None
        if factor is not None and scales is not None and products.take(x.dtype):
            q, a = products.quantize_rows(x, scales.per_channel)
            term = products.Term(a=q, W=factor, in_bytes=products.InBytes(a, scales, factor, across=False))
        elif factor is not None and scales is None and products.pay(x, factor):
            term = products.Term(a=x, W=factor)
        if term is not None:
            return products.add_products([term], out, bias=None if bias is None else bias.float())
    if scales is not None:
        made = product(x, Frozen(W).dense(x.dtype), scales)
        return out.copy_(made if bias is None else made + bias)
    if isinstance(W, PackedWeight):
        return out.copy_(linear_4bit(x, W, bias))
    return torch.mm(x, W.T, out=out) if bias is None else torch.addmm(bias, x, W.T, out=out)


def input_grad_out(dy: Tensor, W: Tensor | PackedWeight, out: Tensor, scales: Scales | None = None) -> Tensor:
    """``out <- dy W``: dy (T, N), W (N, K), out (T, K), of one dtype; no autograd. ``scales``: of a product in 8 bits,
    of dithered rows."""
    if _takes_native(dy, out):
        from rankwise.ops.cpu import products

        factor = products.Factor.of_frozen(W, scales)
        if factor is not None and scales is not None and products.take(dy.dtype):
            q, b = products.quantize_rows(dy, scales.row, dither=True)
            in_bytes = products.InBytes(b, scales, factor, across=True)
            return products.add_products([products.Term(a=q, W=factor, across=True, in_bytes=in_bytes)], out)
        wanted = products.take if isinstance(W, PackedWeight) else products.sum_faster
        if factor is not None and scales is None and wanted(dy.dtype):
            return products.add_products([products.Term(a=dy, W=factor, across=True)], out)
    if scales is not None:
        return out.copy_(input_grad(dy, Frozen(W).dense(dy.dtype), scales))
    return out.copy_(linear_4bit_input_grad(dy, W)) if isinstance(W, PackedWeight) else torch.mm(dy, W, out=out)


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
