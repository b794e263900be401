"""A linear layer with a 4-bit weight:  y = x W'^T + b,  W' = value[code] * absmax (QLoRA, section 3).

Legend: K = in features, N = out features, blocks = ceil(N K / block_size).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from rankwise import ops
from rankwise.compat.torch import own_modules, own_parameters
from rankwise.disk import coded_errors
from rankwise.errors import QuantizationError
from rankwise.ops.checks import check_dtype, check_type
from rankwise.ops.packed_weight import SCALES, PackedWeight, empty_scales, format_of, packed_shape

# After the name of a stack of experts, that of the module that holds its scales.
SUFFIX = "_scales"


class FourBitModule(nn.Module):
    """A module with the scales and the format of a packed weight of ``shape``: `Linear4bit`, `PackedEmbedding` or
    `StackScales`.

    absmax: float32 (blocks,); with double quantization uint8, with nested_absmax float32 (ceil(blocks / 256),) and
    offset float32 (). ``dtype`` is that of the dense weight, to which ``dequantize`` converts. Casts such as
    ``to(torch.float16)`` change ``dtype`` and a bias, never the stored codes and scales.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    order: Tensor | None
    shape: tuple[int, ...]
    quant_type: str
    block_size: int
    dtype: torch.dtype
    compute_dtype: torch.dtype | None

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    def set_scales(
        self,
        quant_type: str,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Set the 4-bit format, and allocate uninitialized buffers for the scales of a weight of this shape.

        Raises:
            QuantizationError: RW615 unknown type or bad block size, RW605 bad dtype.
        """
        check_type(quant_type, block_size)
        check_dtype(dtype, "the dtype of a 4-bit weight")
        self.quant_type, self.block_size, self.dtype = quant_type, block_size, dtype
        for name, buffer in empty_scales(quant_type, math.prod(self.shape), block_size, double_quant, device).items():
            self.register_buffer(name, buffer)
        self.register_buffer("order", None)

    def packed_with(self, codes: Tensor) -> PackedWeight:
        """The 4-bit weight with these codes and this module's scales."""
        return PackedWeight(
            codes=codes,
            absmax=self.absmax,
            shape=self.shape,
            quant_type=self.quant_type,
            block_size=self.block_size,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
            order=self.order,
            dtype=self.dtype,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = {id(scale) for name in SCALES if (scale := getattr(self, name)) is not None}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # A cast would round the scales, and with them every weight, so only the move is applied.
            return tensor.to(moved.device) if id(tensor) in scales and moved.dtype != tensor.dtype else moved

        cast_to = fn(torch.empty(0, dtype=self.dtype, device=self.absmax.device)).dtype
        super()._apply(apply, recurse)
        self.dtype = cast_to
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        """Load codes and scales. A wrong dtype is reported as an error (RW606), since ``copy_`` would cast silently."""
        held = ((name, getattr(self, name, None)) for name in ("weight", *SCALES))
        own = {prefix + name: tensor for name, tensor in held if tensor is not None}
        wrong = [
            f"{name} is {state[name].dtype} and must be {tensor.dtype}"
            for name, tensor in own.items()
            if name in state and state[name].dtype is not tensor.dtype
        ]
        if wrong:
            problem = QuantizationError("RW606", f"the state does not fit a 4-bit layer: {'; '.join(wrong)}.")
            arguments[-1].append(str(problem))
        else:
            super()._load_from_state_dict(state, prefix, *arguments)


class Linear4bit(FourBitModule):
    """A frozen linear layer in NF4, FP4, or a type of a GGUF file, whose rows of blocks are then ``weight``.

    weight: uint8 parameter, (N, K / 2) where K is a multiple of the block, else (ceil(N K / 2), 1): two-dimensional, so
    that FSDP2 shards it by row. ``shape`` is (N, K). bias: (N,) or None. The product runs in the dtype of x, or in
    ``compute_dtype`` if set.
    """

    shape: tuple[int, int]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        was_conv1d: bool = False,
    ) -> None:
        """Make an empty layer for loading; ``from_weight`` and ``from_linear`` make one with a weight.

        ``was_conv1d``: whether the layer replaces a transformers ``Conv1D``, which ``dense_layer`` then returns.

        Raises:
            QuantizationError: RW615 unknown type or bad block size, RW605 bad dtype.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shape = out_features, in_features
        self.compute_dtype, self.was_conv1d = compute_dtype, was_conv1d
        self.set_format(quant_type, block_size, double_quant, dtype or torch.get_default_dtype(), device)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def set_format(
        self,
        quant_type: str,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """As `set_scales`, with an uninitialized buffer for the codes."""
        self.set_scales(quant_type, block_size, double_quant, dtype, device)
        codes = torch.empty(packed_shape(self.shape, block_size), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """Quantize ``weight`` (N, K) of float32, bfloat16 or float16; ``bias`` is used unchanged.

        Raises:
            QuantizationError: RW615 unknown type or bad block size, RW603 NaN or Inf in the weight, RW605 bad
                dtype, RW606 not a matrix.
        """
        if weight.dim() != 2:
            raise QuantizationError("RW606", f"a weight of shape {tuple(weight.shape)} is not a matrix (out, in).")
        found = ops.quantize_weight(weight, quant_type, block_size, double_quant)
        return cls.of(with_large_in_file(found), bias, compute_dtype)

    @classmethod
    def of(
        cls, weight: PackedWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> Linear4bit:
        """The layer that holds the tensors of ``weight``."""
        N, K = weight.shape
        layer = cls(K, N, **format_of(weight), dtype=weight.dtype, compute_dtype=compute_dtype, device="meta")
        layer.take(weight)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, **weight_format: Any) -> Linear4bit:
        """Quantize an ``nn.Linear`` or a transformers ``Conv1D``; keywords and errors as for ``from_weight``."""
        weight = linear.get_parameter("weight").detach()
        bias = own_parameters(linear)["bias"]
        layer = cls.from_weight(weight.T if is_conv1d(linear) else weight, bias, **weight_format)
        layer.was_conv1d = is_conv1d(linear)
        return layer.train(linear.training)

    def take(self, weight: PackedWeight) -> None:
        """Use the tensors of ``weight``, which must have this layer's format."""
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.absmax, self.nested_absmax, self.offset = weight.absmax, weight.nested_absmax, weight.offset
        self.order = weight.order

    @property
    def packed(self) -> PackedWeight:
        """W' as a `PackedWeight` of this layer's tensors."""
        return self.packed_with(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x (under autocast, in autocast's dtype)."""
        return self._product(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """``x W'^T`` without the bias: (..., N)."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return computed_in(self.compute_dtype, x, lambda z: ops.linear_4bit(z, self.packed, bias))

    def input_grad(self, grad: Tensor) -> Tensor:
        """``grad W'`` in the dtype of grad: (..., N) -> (..., K)."""
        return ops.linear_4bit_input_grad(grad, self.packed)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """W' as a new tensor (N, K) in ``dtype``."""
        return ops.dequantize_weight(self.packed)

    @torch.no_grad()
    def dense_layer(self, weight: Tensor | None = None) -> nn.Module:
        """A frozen dense layer: ``nn.Linear``, or ``Conv1D`` (whose weight is (K, N)) if this layer replaced one.

        ``weight``: (N, K) of any dtype, such as a merged one; default W'. The bias is cast to the weight's dtype.
        """
        W = in_file(self.dequantize()) if weight is None else weight.detach()
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(W.dtype), requires_grad=False)
        dense: nn.Module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        if self.was_conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                dense = Conv1D(*self.shape)
        dense.weight = nn.Parameter(W.T.contiguous() if self.was_conv1d else W, requires_grad=False)
        if bias is None and self.was_conv1d:
            bias = nn.Parameter(W.new_zeros(self.out_features), requires_grad=False)
        dense.register_parameter("bias", bias)
        dense.train(self.training)
        return dense

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||W'_n|| over K in float32 (N,), for W' rounded to ``dtype``."""
        return ops.row_norms_4bit(self.packed)

    @torch.no_grad()
    def row_cross(self, A: Tensor, B: Tensor) -> Tensor:
        """<W'_n A^T, B_n> for A (R, K), B (N, R) in float32 (N,), for W' rounded to ``dtype``, without a dense W'."""
        return ops.row_cross_4bit(self.packed, A, B)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, block_size={self.block_size}, double_quant={self.double_quant}, "
            f"dtype={self.dtype}"
        )


class PackedEmbedding(FourBitModule):
    """An embedding (V, D) in the blocks of a GGUF file; rows are decoded as they are looked up.

    ``dense``: the module in whose place it stands.
    """

    shape: tuple[int, int]

    def __init__(self, weight: PackedWeight, dense: nn.Embedding) -> None:
        super().__init__()
        self.shape = self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.set_scales(**format_of(weight), dtype=weight.dtype, device="meta")
        self.weight, self.absmax = nn.Parameter(weight.codes, requires_grad=False), weight.absmax
        # Gemma's embeddings multiply their rows.
        self.scale = float(getattr(dense, "embed_scale", 1.0))
        # Not a submodule, and without its weight.
        self.__dict__["dense"] = dense
        del dense.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D), in ``dtype``. Raises IndexError as ``nn.Embedding`` does."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError(f"a token is outside of the embedding's {self.num_embeddings:,} rows")
        shape, order = (ids.numel(), self.embedding_dim), ids.flatten().int()
        weight = dataclasses.replace(self.packed_with(self.weight), shape=shape, order=order)
        rows = ops.dequantize_weight(weight).view(*ids.shape, self.embedding_dim)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale).to(self.dtype)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """W' as a new tensor (V, D) in ``dtype``."""
        return ops.dequantize_weight(self.packed_with(self.weight))

    def dense_layer(self, weight: Tensor | None = None) -> nn.Module:
        """The embedding in whose place this one stands, with ``weight``, default W'."""
        dense: nn.Embedding = self.__dict__["dense"]
        dense.weight = nn.Parameter(self.dequantize() if weight is None else weight, requires_grad=False)
        return dense


def computed_in(dtype: torch.dtype | None, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run(x)`` computed in ``dtype`` if set, and cast to the dtype of x; under autocast, to autocast's dtype."""
    if dtype is None or dtype is x.dtype or torch.is_autocast_enabled(x.device.type):
        return run(x)
    return run(x.to(dtype)).to(x.dtype)


# The file of ``weights_in_file``, while its context is open.
_weights_file: ContextVar[Path | None] = ContextVar("weights_file", default=None)


@contextlib.contextmanager
def weights_in_file(path: Path) -> Iterator[None]:
    """Within this context, weights that are quantized, merged, dequantized or read from a GGUF file are views of the
    file ``path``, so that a process holds one weight at a time. The file is removed at the end."""
    token = _weights_file.set(path)
    try:
        yield
    finally:
        _weights_file.reset(token)
        path.unlink(missing_ok=True)


def in_file(tensor: Tensor) -> Tensor:
    """The tensor as a view of the file of ``weights_in_file``; outside of its context, the tensor itself. Raises
    RunError (RW551) where the file cannot be written."""
    path = _weights_file.get()
    if path is None or not tensor.numel():
        return tensor
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    with coded_errors(path, "or use another folder"), path.open("ab") as file:
        # Aligned for every dtype.
        file.write(bytes(-file.tell() % 64))
        start = file.tell()
        file.write(content.numpy().data)
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c", start, tuple(content.shape)))
    return mapped.view(tensor.dtype).view(tensor.shape)


def with_large_in_file(weight: PackedWeight) -> PackedWeight:
    """The weight with codes and scales as `in_file`."""
    return dataclasses.replace(weight, codes=in_file(weight.codes), absmax=in_file(weight.absmax))


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""
    # By name, so that transformers is not imported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# Names of subclasses of ``nn.Linear`` whose own forward also computes x W^T + b.
PLAIN_SUBCLASSES = frozenset({"FalconLinear"})


def is_dense_linear(module: nn.Module) -> bool:
    """Whether `Linear4bit` can replace the module. Other subclasses of ``nn.Linear`` may use their weight otherwise."""
    is_plain = isinstance(module, nn.Linear) and type(module).__name__ in PLAIN_SUBCLASSES
    return type(module) is nn.Linear or is_plain or is_conv1d(module)


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, or (vocabulary, width) of an embedding."""
    layer: Any = linear
    if isinstance(linear, nn.Embedding):
        return linear.num_embeddings, linear.embedding_dim
    if is_conv1d(linear):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def weight_count(module: nn.Module, leaf: str) -> int:
    """The number of weights in a parameter of a module; each byte of other libraries' codes holds two."""
    parameter, scales = module.get_parameter(leaf), own_modules(module).get(leaf + SUFFIX)
    packed = module if leaf == "weight" else scales
    if isinstance(packed, FourBitModule):
        return math.prod(packed.shape)
    return parameter.numel() * (1 if parameter.dtype.is_floating_point else 2)


def count_weights(model: nn.Module) -> int:
    """The number of weights of a model, without scales of 4-bit weights; tied ones count once."""
    counts = {
        id(parameter): weight_count(module, leaf)
        for module in model.modules()
        for leaf, parameter in own_parameters(module).items()
        if parameter is not None and leaf != "absmax"
    }
    return sum(counts.values())
