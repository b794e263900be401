"""Stacked experts in 4 bits, or in the blocks of a file.

    y_t = sum over the k experts e of token t of  p_te f_e(x_t),     f_e(x) = down_e(gate(up_e(x)))

transformers stores all experts' matrices of a kind as one parameter (E, N, K); a name in the config selects the
implementation that computes with it. In 4 bits the parameter holds codes, a submodule holds the scales, and the name is
rankwise's: one call of the native library computes with all experts, or one expert after the other, forward and
backward, so that no expert is dense for longer than its product.

Legend: E experts, k of them for a token, T tokens, S = T k; (N, K) one expert's matrix as stored: (out, in), or
(in, out) where the module is transposed; b block size.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import ops
from rankwise.compat.torch import Ctx, own_modules, share_hooks
from rankwise.compat.transformers import choose_experts_of_module, gate_of, register_experts, spreads_experts
from rankwise.constants import MXFP4, NESTED_BLOCK
from rankwise.ops.cpu.native import NativeWeight
from rankwise.ops.cpu.products import Factor
from rankwise.ops.eight_bit import EightBit, error_of_rows
from rankwise.ops.experts import (
    DenseStack,
    ExpertBranch,
    FrozenStack,
    NativeBranch,
    RowsByExpert,
    Stacked,
    inverse,
    low_rank_experts,
    rows_per_expert,
)
from rankwise.ops.gguf_blocks import BLOCK_TYPES
from rankwise.ops.packed_weight import SCALES, PackedWeight
from rankwise.ops.selection import as_autocast, computes_in, is_traced, transforms_functions
from rankwise.quantization.config import dtype_named
from rankwise.quantization.linear import (
    SUFFIX,
    FourBitModule,
    Linear4bit,
    PackedEmbedding,
    computed_in,
    with_large_in_file,
)

# rankwise's name among transformers' implementations of experts.
IMPLEMENTATION = "rankwise_4bit"
# A module's attribute: {stack: `StackEightBit`}.
EIGHT_BITS = "rankwise_eight_bits"
LEAVES = ("gate_up_proj", "up_proj", "down_proj")


class StackScales(FourBitModule):
    """Scales and format of one 4-bit stack; its codes, uint8 (E, N K / 2), are a parameter of the experts module.

    The scales, E N K / b, are those of the whole stack, as in bitsandbytes. In the blocks of a file (N, K) is always
    (out, in), and the codes are those of a weight (E N, K). Errors: see `set_scales`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        quant_type: str,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.compute_dtype = tuple(shape), compute_dtype
        self.set_scales(quant_type, block_size, double_quant, dtype, device)

    def of_expert(self, index: int, codes: Tensor) -> PackedWeight:
        """The packed weight (N, K) of expert ``index`` with these ``codes`` (N K / 2,).

        Where a block of 256 double-quantized scales spans two experts, the scales are converted to float32.
        """
        blocks = math.prod(self.shape[1:]) // self.block_size
        begin, end = index * blocks, (index + 1) * blocks
        found = partial(dataclasses.replace, self.packed_with(codes), shape=self.shape[1:])
        if self.nested_absmax is None or self.offset is None:
            return found(absmax=self.absmax[begin:end])
        first = begin // NESTED_BLOCK
        nested = self.nested_absmax[first : math.ceil(end / NESTED_BLOCK)]
        scales = self.absmax[first * NESTED_BLOCK : end]
        if begin % NESTED_BLOCK == 0:
            return found(absmax=scales, nested_absmax=nested, offset=self.offset)
        absmax = ops.dequantize_absmax(scales, nested, self.offset)
        return found(absmax=absmax[begin - first * NESTED_BLOCK :], nested_absmax=None, offset=None)

    def extra_repr(self) -> str:
        return (
            f"{self.shape}, quant_type={self.quant_type}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Stack:
    """One 4-bit stack in its experts module."""

    experts: nn.Module
    leaf: str

    @property
    def codes(self) -> nn.Parameter:
        return self.experts.get_parameter(self.leaf)

    @property
    def scales(self) -> StackScales:
        return getattr(self.experts, self.leaf + SUFFIX)

    @property
    def is_in_file_blocks(self) -> bool:
        return self.scales.quant_type in BLOCK_TYPES

    @property
    def transposed(self) -> bool:
        """Whether (N, K) is (in, out)."""
        return bool(self.experts.is_transposed) and not self.is_in_file_blocks

    def of_expert(self, index: int) -> PackedWeight:
        """The packed weight (N, K) of expert ``index``."""
        if not self.is_in_file_blocks:
            return self.scales.of_expert(index, self.codes[index])
        N = self.scales.shape[1]
        return self.packed.rows(slice(index * N, (index + 1) * N))

    def product(self, x: Tensor, index: int, *, transposed: bool) -> Tensor:
        """``x W_e'^T`` of one expert, or ``x W_e'`` if ``transposed``; differentiable in x. Saves no dense weight."""
        x = as_autocast(x)
        if transforms_functions() or not (torch.is_grad_enabled() and x.requires_grad):
            return self.run(x, index, across=transposed)
        return _Product.apply(x, self, index, transposed)

    def run(self, x: Tensor, index: int, *, across: bool) -> Tensor:
        W = self.of_expert(index)
        return ops.linear_4bit_input_grad(x, W) if across else ops.linear_4bit(x, W)

    @property
    def packed(self) -> PackedWeight:
        """W' of all experts (E, N, K), or (E N, K) in the blocks of a file, as a `PackedWeight`."""
        found, (E, N, K) = self.scales.packed_with(self.codes), self.scales.shape
        return dataclasses.replace(found, shape=(E * N, K)) if self.is_in_file_blocks else found

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """W' of all experts as a new tensor in the module's layout and the scales' ``dtype``."""
        E, N, K = self.scales.shape
        if not self.is_in_file_blocks or not self.experts.is_transposed:
            return ops.dequantize_weight(self.packed).view(E, N, K)
        W = torch.empty(E, K, N, dtype=self.scales.dtype, device=self.codes.device)
        for index in range(E):
            W[index] = ops.dequantize_weight(self.of_expert(index)).T
        return W


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Ctx[tuple[Stack, int, bool]], x: Tensor, stack: Stack, index: int, transposed: bool) -> Tensor:
        ctx.kept = stack, index, transposed
        return stack.run(x, index, across=transposed)

    @staticmethod
    def backward(ctx: Ctx[tuple[Stack, int, bool]], grad: Tensor) -> tuple[Tensor | None, ...]:
        stack, index, transposed = ctx.kept
        return stack.run(grad, index, across=not transposed), None, None, None


# (experts module, name of a stack, index of an expert, its rows (t, K)) -> product with its matrix (t, N).
Product = Callable[[nn.Module, str, int, Tensor], Tensor]


# (experts module, hidden states, experts of each token, their weights) -> output.
Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def product(module: nn.Module, leaf: str, index: int, x: Tensor) -> Tensor:
    """``W_e x + b_e`` of one expert, dense or 4-bit: (t, K) -> (t, N)."""
    stack = stack_at(module, leaf)
    if stack is not None:
        y = computed_in(stack.scales.compute_dtype, x, lambda z: stack.product(z, index, transposed=stack.transposed))
    else:
        W = getattr(module, leaf)[index]
        y = x @ W if module.is_transposed else F.linear(x, W)
    return y + getattr(module, f"{leaf}_bias")[index] if module.has_bias else y


def forward_by_expert(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, multiply: Product = product
) -> Tensor:
    """``y`` of experts, one after the other.

    self: the experts module; hidden_states (T, H), top_k_index (T, k) of expert indices, top_k_weights (T, k) -> (T, H)
    in hidden_states' dtype. Equal to the eager implementation on dequantized weights; differentiable in hidden_states
    and top_k_weights.
    """
    k = top_k_index.shape[1]
    experts = top_k_index.reshape(-1)
    order = experts.argsort(stable=True)
    # Sorted by expert, so that rows are gathered and scattered in one operation, also in the backward pass.
    rows = hidden_states[order // k].split(rows_per_expert(experts, self.num_experts))
    gate, first = gate_of(self), first_leaf(self)
    parts = [
        multiply(self, "down_proj", index, gate(multiply(self, first, index, x)))
        for index, x in enumerate(rows)
        if x.shape[0]
    ]
    del rows
    outputs = torch.cat(parts)
    del parts
    outputs = outputs[inverse(order)]
    return weighed(self, outputs, top_k_weights, hidden_states.dtype)


def forward_frozen(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, otherwise: Forward = forward_by_expert
) -> Tensor:
    """The function that transformers calls for experts under `IMPLEMENTATION`: all in one call of the native library,
    or ``otherwise`` where it does not apply. Arguments and result: see `forward_by_expert`.
    """
    dtype = hidden_states.dtype
    if not is_traced() and computes_in(dtype, hidden_states.device):
        up, down = (frozen_branch(self, leaf, dtype) for leaf in (first_leaf(self), "down_proj"))
        if up is not None and down is not None and up.native(hidden_states) and down.native(hidden_states):
            y = low_rank_experts(hidden_states, top_k_index, self.num_experts, gate_of(self), up, down)
            return weighed(self, y, top_k_weights, dtype)
    return otherwise(self, hidden_states, top_k_index, top_k_weights)


def frozen_branch(base: Any, leaf: str, dtype: torch.dtype) -> ExpertBranch | None:
    """The frozen products of a stack for the operator of experts, or None where its weights train or compute in a
    dtype other than ``dtype``."""
    parameter, stack = base.get_parameter(leaf), stack_at(base, leaf)
    bias = base.get_parameter(f"{leaf}_bias") if base.has_bias else None
    if parameter.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype is not dtype)):
        return None
    if stack is None:
        if parameter.dtype is not dtype:
            return None
        dense = DenseStack(parameter.transpose(1, 2) if base.is_transposed else parameter)
        return ExpertBranch(frozen=dense, bias=bias, eight_bit=_eight_bit(base, leaf))
    if not stack.scales.dtype is dtype is (stack.scales.compute_dtype or dtype):
        return None
    return ExpertBranch(frozen=PackedStack(stack, stack.transposed), bias=bias, eight_bit=_eight_bit(base, leaf))


@dataclasses.dataclass(eq=False)
class StackEightBit:
    """The scales of a stack whose products are in 8 bits while its module trains, or also computes as the step does."""

    experts: nn.Module
    frozen: FrozenStack
    eight_bit: EightBit | None = dataclasses.field(default_factory=EightBit)
    as_the_step: bool = False


def native_stack(base: Any, leaf: str) -> NativeBranch | None:
    """What computes a frozen stack natively, for rows of its own dtype; None where the library does not take them."""
    parameter, stack = base.get_parameter(leaf), stack_at(base, leaf)
    dtype = parameter.dtype if stack is None else stack.scales.dtype
    branch = frozen_branch(base, leaf, dtype)
    return None if branch is None else branch.native(torch.empty(0, dtype=dtype, device=parameter.device))


def stack_in_eight_bits(base: Any, leaf: str) -> StackEightBit | None:
    """What computes a stack in 8 bits; None where the native library cannot: it wants rows in memory that are those of
    W (N, K), and both sizes multiples of 32."""
    native = native_stack(base, leaf)
    if native is None or native.W.first.across or any(size % 32 for size in native.W.shape):
        return None
    return StackEightBit(base, native.branch.frozen)


def _eight_bit(base: nn.Module, leaf: str) -> EightBit | None:
    stack: StackEightBit | None = base.__dict__.get(EIGHT_BITS, {}).get(leaf)
    return stack.eight_bit if stack and (base.training or stack.as_the_step) else None


def stacks_in_eight_bits(model: nn.Module) -> dict[str, StackEightBit]:
    """{path: what holds the scales} of the stacks of experts whose products are in 8 bits."""
    return {
        f"{name.removesuffix('.base_layer')}.{leaf}": stack
        for name, module in model.named_modules()
        for leaf, stack in module.__dict__.get(EIGHT_BITS, {}).items()
        if stack.eight_bit is not None
    }


@contextmanager
def as_the_step(stacks: Iterable[StackEightBit]) -> Iterator[None]:
    """A context in which these are in 8 bits in evaluation mode too."""
    used = list(stacks)
    for stack in used:
        stack.as_the_step = True
    try:
        yield
    finally:
        for stack in used:
            stack.as_the_step = False


@torch.no_grad()
def errors_in_eight_bits(base: Any, x: Tensor, chosen: Tensor) -> dict[str, float]:
    """{stack: the error of its frozen product in 8 bits} for the rows that reach it: x (T, H), chosen (T, k)."""
    order = chosen.reshape(-1).argsort(stable=True)
    rows, z = RowsByExpert(chosen.reshape(-1)[order], base.num_experts), x[order // chosen.shape[1]]
    errors = {}
    for leaf in (first_leaf(base), "down_proj"):
        branch = frozen_branch(base, leaf, x.dtype)
        if branch is None:
            break
        exact = dataclasses.replace(branch, eight_bit=None).forward(z, rows)[0]
        if branch.eight_bit is not None:
            errors[leaf] = error_of_rows(branch.forward(z, rows)[0], exact)
        if leaf != "down_proj":
            z = gate_of(base)(exact)
    return errors


@dataclasses.dataclass(frozen=True)
class PackedStack:
    """A 4-bit stack. Without the native library each product dequantizes one expert after the other."""

    stack: Stack
    transposed: bool

    def factor(self) -> Stacked:
        packed, (rows, columns) = self.stack.packed, self.stack.scales.shape[1:]
        first = Factor(NativeWeight(packed), columns, across=self.transposed)
        return Stacked(first, (columns, rows) if self.transposed else (rows, columns), rows * columns)

    @property
    def weight(self) -> PackedWeight:
        return self.stack.packed

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        for index in range(self.stack.scales.shape[0]):
            W = ops.dequantize_weight(self.stack.of_expert(index), dtype)
            yield W.T if self.transposed else W

    def product(self, x: Tensor, rows: RowsByExpert) -> Tensor:
        return self._run(x, rows, across=self.transposed)

    def input_grad(self, dz: Tensor, rows: RowsByExpert) -> Tensor:
        return self._run(dz, rows, across=not self.transposed)

    def _run(self, x: Tensor, rows: RowsByExpert, *, across: bool) -> Tensor:
        N, K = self.stack.scales.shape[1:]
        y = x.new_empty(x.shape[0], K if across else N)
        for index, mine in rows.slices():
            y[mine] = self.stack.run(x[mine], index, across=across)
        return y


def weighed(module: Any, outputs: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum over k of p_tk y_tk``: outputs (T k, H) of each token's experts, top_k_weights (T, k) -> (T, H)."""
    if getattr(module, "has_post_expert_norm", False):
        outputs = module.post_expert_norm(outputs)
    weighted = outputs.view(*top_k_weights.shape, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(dtype)


def first_leaf(module: nn.Module) -> str:
    """The name of the stack of the first product."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def stack_at(experts: nn.Module, leaf: str) -> Stack | None:
    """The 4-bit stack ``leaf`` of a module, or None if it has none."""
    return Stack(experts, leaf) if isinstance(own_modules(experts).get(leaf + SUFFIX), StackScales) else None


def four_bit_stacks(model: nn.Module) -> Iterator[tuple[str, Stack]]:
    """(path of the parameter, stack), of every 4-bit stack."""
    for name, module in model.named_modules():
        for leaf in LEAVES:
            stack = stack_at(module, leaf)
            if stack is not None:
                yield f"{name}.{leaf}" if name else leaf, stack


def foreign(experts: nn.Module, leaf: str) -> str | None:
    """Why rankwise cannot compute with ``leaf``, or None for a stack with transformers' interface."""
    understood = all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "config"))
    if not understood or leaf not in LEAVES:
        return f"{type(experts).__name__} does not use transformers' interface for experts"
    if spreads_experts(experts):
        return "its experts are spread over devices"
    return None


def obstacle(experts: nn.Module, leaf: str, shape: tuple[int, ...], block_size: int) -> str | None:
    """Why a stack (E, N, K) cannot be 4-bit, or None if it can."""
    if (reason := foreign(experts, leaf)) is not None:
        return reason
    weights = math.prod(shape[1:])
    if weights % block_size or not weights:
        return f"the {weights:,} weights of an expert are not a whole number of blocks of {block_size}"
    return None


def stack_tensors(weight: PackedWeight, name: str) -> dict[str, Tensor]:
    """The tensors of ``weight`` (E, N, K) under the names of a stack at ``name``."""
    scales = {f"{name}{SUFFIX}.{key}": tensor for key, tensor in weight.tensors.items() if key != "weight"}
    return {name: weight.codes.reshape(weight.shape[0], -1), **scales}


def put_stack(experts: nn.Module, leaf: str, scales: StackScales, codes: Tensor | None = None) -> Stack:
    """Replace the dense parameter ``leaf`` by a 4-bit stack; without ``codes``, by an empty one for loading."""
    if codes is None:
        E, N, K = scales.shape
        shape = (E * N, K // 2) if scales.quant_type == MXFP4 else (E, N * K // 2)
        codes = torch.empty(shape, dtype=torch.uint8, device=scales.absmax.device)
    setattr(experts, leaf, nn.Parameter(codes, requires_grad=False))
    experts.add_module(leaf + SUFFIX, scales)
    _use_ours(experts)
    return Stack(experts, leaf)


def quantize_stack(experts: nn.Module, leaf: str, *, compute_dtype: torch.dtype | None, **weight_format: Any) -> Stack:
    """Replace the dense parameter ``leaf`` (E, N, K) by a 4-bit stack, in place.

    ``weight_format``: quant_type, block_size, double_quant. Raises QuantizationError RW603 for NaN or Inf.
    """
    W = experts.get_parameter(leaf).detach()
    scales = StackScales(W.shape, dtype=W.dtype, compute_dtype=compute_dtype, device="meta", **weight_format)
    weight = with_large_in_file(ops.quantize_weight(W, **weight_format))
    for name in SCALES:
        setattr(scales, name, getattr(weight, name))
    return put_stack(experts, leaf, scales, weight.codes.reshape(W.shape[0], -1))


def dequantize_stack(stack: Stack, dtype: torch.dtype | None = None) -> None:
    """Replace the stack by a dense, frozen parameter in ``dtype`` (default: the stack's)."""
    experts, W = stack.experts, stack.dequantize()
    delattr(experts, stack.leaf + SUFFIX)
    setattr(experts, stack.leaf, nn.Parameter(W if dtype is None else W.to(dtype), requires_grad=False))
    if all(stack_at(experts, leaf) is None for leaf in LEAVES):
        experts.config = experts.__dict__.pop("dense_config")


def _use_ours(experts: Any) -> None:
    """Select rankwise's implementation in a copy of this module's config, so that other experts keep theirs."""
    if "dense_config" in experts.__dict__:
        return
    register_experts(IMPLEMENTATION, forward_frozen)
    experts.dense_config = experts.config
    experts.config = copy.copy(experts.config)
    choose_experts_of_module(experts.config, IMPLEMENTATION)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer ``name`` by ``layer``, which gets the old one's hooks."""
    share_hooks(layer, model.get_submodule(name))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | str | None = None) -> int:
    """Replace every packed layer of ``model`` and every 4-bit stack of experts by its dense values W', in place.
    Returns their number.

    ``dtype``: that of the new weights, or its name; None keeps each weight's own. Raises QuantizationError (RW605) for
    an unknown dtype.
    """
    wanted = dtype_named(dtype, "dtype")
    # A tied head shares the embedding's codes.
    tied: dict[Tensor, Any] = {item.weight: None for item in model.modules() if isinstance(item, PackedEmbedding)}
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear4bit | PackedEmbedding):
            places.setdefault(id(module), []).append(name)
    # A list of names holds no reference to the layers, so that each is freed once it is replaced.
    for names in places.values():
        layer = model.get_submodule(names[0])
        assert isinstance(layer, Linear4bit | PackedEmbedding), "found by its class"
        dense = layer.dense_layer(None if wanted is None else layer.dequantize().to(wanted))
        if (codes := layer.weight) in tied:
            dense.weight = tied[codes] = dense.weight if tied[codes] is None else tied[codes]
        for name in names:
            replace_layer(model, name, dense)
        del layer
    stacks = [stack for _, stack in four_bit_stacks(model)]
    for stack in stacks:
        dequantize_stack(stack, wanted)
    return len(places) + len(stacks)
