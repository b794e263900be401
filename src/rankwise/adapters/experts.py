"""LoRA on stacked experts (PEFT's ``target_parameters``):  P(x) = W_e x + b_e + s B_e A_e x  for rows x of expert e.

A stack is one parameter of an experts module: all its experts' matrices of one kind, dense or 4-bit. An expert's branch
is computed on the rows that are routed to it; ``B A`` is never formed. If it applies, one operator with hand-written
gradients computes both stacks of a module; else autograd runs one expert after the other.

Legend: E experts, r rank, K = in and N = out features of one expert's matrix. W is stored as (E, N, K), or as (E, K, N)
where the module is transposed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.base_layer import with_own_weights
from rankwise.adapters.layer import OverBase
from rankwise.adapters.low_rank import init_low_rank_, merged_weight
from rankwise.compat.torch import own_parameters, share_hooks
from rankwise.compat.transformers import gate_of
from rankwise.ops.experts import ExpertBranch, low_rank_experts
from rankwise.ops.selection import computes_in, is_traced
from rankwise.quantization.experts import (
    dequantize_stack,
    first_leaf,
    forward_by_expert,
    frozen_branch,
    product,
    stack_at,
    weighed,
)
from rankwise.quantization.linear import in_file


@dataclasses.dataclass(frozen=True)
class StackShape:
    """The shape (E, in, out) of a stack, and the device of its weights."""

    experts: int
    in_features: int
    out_features: int
    device: torch.device


def stack_shape(module: nn.Module, leaf: str) -> StackShape:
    """The shape of the stack ``leaf`` in an experts module with transformers' interface."""
    stack, parameter = stack_at(module, leaf), module.get_parameter(leaf)
    shape = parameter.shape if stack is None else stack.scales.shape
    transposed = module.is_transposed if stack is None else stack.transposed
    K, N = shape[1:] if transposed else shape[:0:-1]
    return StackShape(shape[0], K, N, parameter.device)


class StackLora(nn.Module):
    """The low-rank pairs of one stack: lora_A (E, r, in) and lora_B (E, out, r)."""

    def __init__(self, stack: StackShape, r: int, scaling: float) -> None:
        super().__init__()
        self.r, self.scaling = r, scaling
        empty = partial(torch.empty, dtype=torch.float32, device=stack.device)
        self.lora_A = nn.Parameter(empty(stack.experts, r, stack.in_features))
        self.lora_B = nn.Parameter(empty(stack.experts, stack.out_features, r))

    def reset_parameters(self, *, zero_b: bool = True) -> None:
        # One draw for all experts, as for a linear layer of rank E r.
        init_low_rank_(self.lora_A.data.flatten(0, 1), self.lora_B.data.flatten(0, 1), zero_b=zero_b)

    def low_rank(self, index: int, x: Tensor) -> Tensor:
        """``s B_e A_e x`` of one expert: (t, in) -> (t, out)."""
        A, B = self.lora_A[index].to(x.dtype), self.lora_B[index].to(x.dtype)
        return F.linear(F.linear(x, A), B) * self.scaling

    def merge(self, W: Tensor, *, transposed: bool) -> Tensor:
        """``W_e + s B_e A_e`` of every expert, as a new tensor in W's layout and dtype."""
        merged = torch.empty_like(W, memory_format=torch.contiguous_format)
        for index, (A, B) in enumerate(zip(self.lora_A.detach(), self.lora_B.detach())):
            dense = merged_weight(W[index].T if transposed else W[index], A, B, self.scaling)
            merged[index] = dense.T if transposed else dense
        return merged

    def extra_repr(self) -> str:
        return f"experts={self.lora_A.shape[0]}, r={self.r}, scaling={self.scaling:g}"


class ExpertsLora(nn.Module):
    """One adapter of an experts module: {stack's name: `StackLora`} of the stacks that it adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleDict()

    def pairs(self) -> Iterable[tuple[str, StackLora]]:
        return cast(Iterable[tuple[str, StackLora]], self.stacks.items())

    def of(self, leaf: str) -> StackLora | None:
        return dict(self.pairs()).get(leaf)

    def merge(self, base: nn.Module) -> nn.Module:
        """A module like ``base`` whose adapted stacks are dense and merged; ``base`` does not change."""
        merged: Any = with_own_weights(base)
        for leaf, lora in self.pairs():
            stack = stack_at(merged, leaf)
            if stack is not None:
                dequantize_stack(stack)
            W = lora.merge(merged.get_parameter(leaf).detach(), transposed=bool(merged.is_transposed))
            setattr(merged, leaf, nn.Parameter(in_file(W), requires_grad=False))
        return merged


class AdaptedExperts(OverBase[ExpertsLora]):
    """An experts module, wrapped with its adapters. Hooks on the base run at calls of this wrapper."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        share_hooks(self, base_layer)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, k) of expert indices, top_k_weights (T, k) -> (T, H)."""
        if (adapter := self.at_work) is None:
            return self.base_layer.forward(hidden_states, top_k_index, top_k_weights)
        return experts_forward(self.base_layer, adapter, hidden_states, top_k_index, top_k_weights)


def experts_forward(
    base: Any, adapter: ExpertsLora, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``sum over k of p_tk f_e(x_t)`` with the adapter's branches in both products of f_e."""
    branches = branches_of(base, adapter, hidden_states)
    if branches is None:

        def multiply(module: nn.Module, leaf: str, index: int, x: Tensor) -> Tensor:
            lora = adapter.of(leaf)
            y = product(module, leaf, index, x)
            return y if lora is None else y + lora.low_rank(index, x)

        return forward_by_expert(base, hidden_states, top_k_index, top_k_weights, multiply)
    outputs = low_rank_experts(hidden_states, top_k_index, base.num_experts, gate_of(base), *branches)
    return weighed(base, outputs, top_k_weights, hidden_states.dtype)


def branches_of(base: nn.Module, adapter: ExpertsLora, x: Tensor) -> tuple[ExpertBranch, ExpertBranch] | None:
    """The operator's arguments for both products, or None if the operator does not apply: in compiled graphs, under
    autocast to a dtype other than x's, and with weights that train or have a different dtype.
    """
    if is_traced() or not computes_in(x.dtype, x.device):
        return None
    up, down = (_branch(base, leaf, adapter.of(leaf), x.dtype) for leaf in (first_leaf(base), "down_proj"))
    return None if up is None or down is None else (up, down)


def _branch(base: nn.Module, leaf: str, lora: StackLora | None, dtype: torch.dtype) -> ExpertBranch | None:
    frozen = frozen_branch(base, leaf, dtype)
    if frozen is None or lora is None:
        return frozen
    return dataclasses.replace(frozen, scale=lora.scaling, A=lora.lora_A, B=lora.lora_B)


def ordered_stacks(base: nn.Module, leaves: Iterable[str]) -> list[str]:
    """``leaves`` in the order of the module's parameters, in which PEFT nests its wrappers."""
    wanted = set(leaves)
    return [leaf for leaf in own_parameters(base) if leaf in wanted]


def peft_keys(path: str, leaves: Sequence[str]) -> dict[str, str]:
    """{stack: prefix of its keys in PEFT's file}. The last is outermost; each level inwards adds ``.base_layer``."""
    inwards = range(len(leaves) - 1, -1, -1)
    return {leaf: f"{path}{'.base_layer' * depth}." for leaf, depth in zip(leaves, inwards)}


def peft_A(A: Tensor) -> Tensor:
    """A (E, r, in) in the layout of PEFT's file: (E r, in), all ranks of one expert before the next expert."""
    return A.flatten(0, 1)


def peft_B(B: Tensor) -> Tensor:
    """B (E, out, r) in the layout of PEFT's file: (out, r E), rank 0 of all experts before rank 1."""
    return B.permute(1, 2, 0).flatten(1)


def from_peft_A(A: Tensor, experts: int) -> Tensor:
    return A.unflatten(0, (experts, -1))


def from_peft_B(B: Tensor, experts: int) -> Tensor:
    return B.unflatten(1, (-1, experts)).permute(2, 0, 1)
