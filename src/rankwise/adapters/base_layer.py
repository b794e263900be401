"""The interface of a base layer to its adapters.

A base is ``nn.Linear``, transformers' ``Conv1D`` (its weight is stored transposed), ``nn.Embedding`` (as a linear layer
over one-hot ids: in = vocabulary, out = dimension), or any module with ``in_features``, ``out_features``, a forward and
``dequantize() -> (out, in)``, such as a 4-bit layer.

Another library's quantized layers (torchao, HQQ, GPTQ, AWQ) are bases too:

forward     y = layer(x)    by the library's own kernel
backward    dx = dy W       W (out, in) is dequantized again, since most of these kernels have no gradient
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.compat.torch import Ctx, hooks_around, with_own_parts
from rankwise.compat.transformers import OTHER_RESULTS
from rankwise.ops.kept import Key, frozen_key
from rankwise.quantization.linear import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Attribute of a module whose forward rankwise replaced: the former forward, and the names of attributes it added.
REPLACED = "rankwise_replaced"
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, which run only when the module is called."""
    return any(hooks_around(module))


def is_own(module: nn.Module) -> bool:
    """Whether the module computes what its class defines: it has no hooks, and no forward on the instance except
    rankwise's.
    """
    return not has_hooks(module) and ("forward" not in module.__dict__ or REPLACED in module.__dict__)


def is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or is_linear(module)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer with a readable weight.

    Packed weights of another library are readable where ``dequantizer`` knows their format. ``OTHER_RESULTS`` are not
    linear layers.
    """
    if type(module).__name__ in OTHER_RESULTS or why_not(module):
        return False
    if dequantizer(module) is not None:
        return True
    if all(hasattr(module, name) for name in ("in_features", "out_features", "dequantize")):
        return True
    weight = getattr(module, "weight", None)
    readable = isinstance(weight, Tensor) and weight.is_floating_point()
    return readable and (isinstance(module, nn.Linear) or is_conv1d(module))


def why_not(module: nn.Module) -> str:
    """Why a layer with a weight cannot be adapted; "" if it can be, or if its class name is reason enough."""
    if isinstance(module, CONVOLUTIONS):
        return "is a convolution, whose update is not a product B A x, and which no server supports"
    # By name: torch gives MultiheadAttention's out_proj a class of its own.
    if isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "belongs to torch's MultiheadAttention, which uses its weights without calling a layer's forward"
    if stored := foreign_format(module):
        return f"holds its weight as {stored}, which rankwise cannot read"
    return ""


def foreign_format(module: nn.Module) -> str:
    """The weight format of a linear layer that another library quantized and rankwise cannot dequantize; else ""."""
    if hasattr(module, "dequantize") or dequantizer(module) is not None or not hasattr(module, "in_features"):
        return ""
    packed = next((name for name in PACKED if hasattr(module, name)), "")
    weight = getattr(module, "weight", None)
    if packed or not isinstance(weight, Tensor):
        return f"{packed} of a {type(module).__name__}" if packed else ""
    kind = type(weight)
    if kind.__module__.partition(".")[0] not in ("torch", "rankwise"):
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    # A weight of 8-bit elements needs scales, which other attributes hold.
    return str(weight.dtype) if weight.dtype.itemsize == 1 else ""


def is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "dequantize")


def stored_weight(base: nn.Module) -> Tensor:
    """The base's attribute ``weight``, in its own shape and format."""
    W = base.weight
    assert isinstance(W, Tensor), "a base has a weight"
    return W


def dense_weight(base: nn.Module) -> Tensor:
    """W as (out, in) in the base's dtype: a view of the layer's weight, or a new tensor if it is quantized."""
    if is_quantized(base):
        layer: Any = base
        return layer.dequantize()
    W = stored_weight(base).detach()
    return W.T if is_conv1d(base) or isinstance(base, nn.Embedding) else W


def scaled_rows(base: nn.Module, rows: Tensor) -> Tensor:
    """``rows`` times the constant by which some embeddings multiply their rows: a tensor (Gemma) or a float (Bart)."""
    scale = getattr(base, "embed_scale", None)
    return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def frozen_product(base: nn.Module, x: Tensor) -> Tensor:
    """``W x`` without the bias: (..., out)."""
    if is_own(base):
        if type(base) is nn.Linear:
            return F.linear(x, base.weight)
        if is_conv1d(base):
            return x @ stored_weight(base)
        if hasattr(base, "product"):
            return base.product(x)  # type: ignore[operator]
    y, bias = base(x), getattr(base, "bias", None)
    return y if bias is None else y - bias


def weight_dtype(base: nn.Module) -> torch.dtype:
    """The floating dtype in which the base computes."""
    dtype = stored_weight(base).dtype
    return dtype if dtype.is_floating_point else base.dtype  # type: ignore[return-value]


def weight_device(base: nn.Module) -> torch.device:
    # Layers of other libraries may keep packed weights in buffers.
    return next(itertools.chain(base.parameters(), base.buffers())).device


def weight_key(base: nn.Module) -> Key:
    """A key that changes whenever the base's weight is replaced, written to, moved or cast."""
    W = stored_weight(base)
    return *frozen_key(W), weight_dtype(base), W.device


def put_back(module: nn.Module) -> None:
    """Undo ``acceleration.parts.replace_forward``; does nothing where the module's forward was not replaced."""
    before, notes = module.__dict__.pop(REPLACED, (None, None))
    if notes is None:
        return
    for name in notes:
        module.__dict__.pop(name, None)
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = before


def with_own_weights(base: nn.Module) -> nn.Module:
    """A shallow copy whose parameters can be replaced, without the own forward of ``base``, which is bound to it."""
    copied = copy.copy(base)
    with_own_parts(copied)
    put_back(copied)
    copied.__dict__.pop("forward", None)
    return copied


def with_weight(base: nn.Module, W: Tensor) -> nn.Module:
    """A plain layer that holds W (out, in), with the class of ``base`` (``nn.Linear`` if it is quantized) and its
    bias.
    """
    if is_quantized(base):
        layer: Any = base
        return layer.dense_layer(W) if hasattr(base, "dense_layer") else _linear(W, getattr(base, "bias", None))
    plain = with_own_weights(base)
    transposed = is_conv1d(base) or isinstance(base, nn.Embedding)
    plain.weight = nn.Parameter(W.T.contiguous() if transposed else W, requires_grad=False)
    return plain


def _linear(W: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(W, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


# Attributes in which such layers keep their packed weight, if not in ``weight``.
PACKED = ("qweight", "W_q", "weight_packed")


def dequantizer(layer: nn.Module) -> Callable[[], Tensor] | None:
    """A function that returns the layer's dense weight (out, in); None for a module of no known format."""
    known: Any = layer
    weight = getattr(layer, "weight", None) if "weight" in dict(layer.named_parameters(recurse=False)) else None
    if weight is not None and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize
    if type(layer).__name__ == "HQQLinear":
        return known.dequantize
    if hasattr(layer, "qweight") and hasattr(layer, "dequantize_weight"):
        # gptqmodel gives (in, out).
        return lambda: known.dequantize_weight().T
    return None


class ForeignLinear(nn.Module):
    """``layer`` with the interface that adapters need of a quantized base."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The packed weight as the library stores it. Caches compare it to notice that the weight was replaced."""
        name = next((name for name in PACKED if hasattr(self.layer, name)), "weight")
        found = getattr(self.layer, name)
        assert isinstance(found, Tensor), f"{name} of a quantized layer"
        return found

    @property
    def bias(self) -> Tensor | None:
        found = getattr(self.layer, "bias", None)
        return found if isinstance(found, Tensor) else None

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes, cached since every forward pass of DoRA needs it."""
        return self.dequantize().dtype

    def dequantize(self) -> Tensor:
        """W (out, in)."""
        read = dequantizer(self.layer)
        assert read is not None, "chosen so"
        return read().detach()

    def forward(self, x: Tensor) -> Tensor:
        return _OwnForward.apply(x, self, self.bias)


def make_readable(model: nn.Module) -> None:
    """Wrap every layer of another library's format in a ``ForeignLinear``, so that gradients pass through it."""
    inner = {id(module.layer) for module in model.modules() if isinstance(module, ForeignLinear)}
    for path, module in list(model.named_modules()):
        if id(module) not in inner and dequantizer(module) is not None:
            model.set_submodule(path, ForeignLinear(module))


def make_foreign(model: nn.Module) -> None:
    """Undo ``make_readable``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, ForeignLinear):
            model.set_submodule(path, module.layer)


def make_dense(model: PreTrainedModel) -> None:
    """Replace layers that another library quantized by ``nn.Linear``, and remove the model's quantization config."""
    make_foreign(model)
    found = {name: read for name, module in model.named_modules() if (read := dequantizer(module)) is not None}
    for name, read in found.items():
        bias = getattr(model.get_submodule(name), "bias", None)
        model.set_submodule(name, _linear(read().detach(), bias))
    # Merging may have replaced every quantized layer already.
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)


class _OwnForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Ctx[ForeignLinear], x: Tensor, base: ForeignLinear, bias: Tensor | None) -> Tensor:
        ctx.kept = base
        return base.layer(x)

    @staticmethod
    def backward(ctx: Ctx[ForeignLinear], dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        wants_x, _, wants_bias = ctx.needs_input_grad
        dx = dy @ ctx.kept.dequantize().to(dy.dtype) if wants_x else None
        return dx, None, dy.flatten(0, -2).sum(0) if wants_bias else None
