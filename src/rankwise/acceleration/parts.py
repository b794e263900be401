"""Parts of a transformer with hand-written gradients: RMSNorm, rotary positions, gated activations, frozen layers; and
the modules of a model that they replace.

A replacement is a bound method on the instance, so that classes stay unchanged and a deep copy of the model has its own
methods. A class's name proves nothing: one instance of each class computes a random input both ways, and the fast
version is used only if the results agree. Element-wise ones save only their input for the backward pass.

T = tokens, D = width.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.base_layer import REPLACED, has_hooks, put_back
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import LowRankPair
from rankwise.adapters.low_rank import drawn_dropout
from rankwise.compat.torch import Ctx, WeakTensorKeyDictionary, is_fake, plain_tensors, unsafe_view, writes_to
from rankwise.compat.transformers import rotary_of, set_rotary
from rankwise.errors import RankwiseError, is_out_of_memory
from rankwise.ops import elementwise
from rankwise.ops.branch import input_grad_out, is_slow_in_torch, linear_out
from rankwise.ops.kept import Handback, Normed, offered_with_heads, remember
from rankwise.ops.low_rank_linear import low_rank_linear_of_glu
from rankwise.ops.selection import computes_in, is_on_card, is_traced, native_on_cpu, takes_triton
from rankwise.quantization.experts import (
    EIGHT_BITS,
    first_leaf,
    foreign,
    forward_frozen,
    native_stack,
    stack_in_eight_bits,
)

ATTRIBUTE = "rankwise_acceleration"


class Undo:
    """The calls that restore a model, run in reverse order of the changes. None is a closure, so that a copy of a
    model has its own.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


def replace_forward(module: nn.Module, forward: Callable[..., object], undo: Undo, **notes: Any) -> None:
    """Replace the forward of ``module`` by ``forward(module, ...)``, and set ``notes`` as attributes of the module.

    ``undo`` restores a forward that was on the instance before.
    """
    module.__dict__[REPLACED] = (module.__dict__.get("forward"), tuple(notes))
    module.__dict__.update(notes)
    module.forward = types.MethodType(forward, module)
    undo.add(functools.partial(put_back, module))


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the module's class defines, bound to it."""
    return types.MethodType(type(module).forward, module)


def is_free(module: nn.Module) -> bool:
    """Whether the forward may be replaced: no forward on the instance, and no hooks, which need the module's call."""
    return "forward" not in module.__dict__ and not has_hooks(module)


Answer = TypeVar("Answer")


def probe(model: nn.Module, ask: Callable[[], Answer], *, grad: bool = False) -> tuple[Answer | None, str | None]:
    """(result of ``ask`` with the model in evaluation mode, None), or (None, why the model cannot run it).

    ``grad``: with gradients enabled, as in a training step. RankwiseErrors and out-of-memory errors are raised.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(grad):
            return ask(), None
    except Exception as error:
        if isinstance(error, RankwiseError) or is_out_of_memory(error):
            raise
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    finally:
        for module, mode in modes:
            module.training = mode


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, w frozen; see ``ops.elementwise.rms_norm``."""
    y, rstd = RmsNorm.apply(x, w, eps, offset, cast_first)
    # If x needs no gradient, the norm saves nothing and x may be overwritten, so that a branch must save y.
    if y.requires_grad:
        remember(y, Normed(h=x.detach(), w=w, rstd=rstd, eps=eps, offset=offset, cast_first=cast_first))
    return y


class RmsNorm(torch.autograd.Function):
    """See ``rms_norm``. Also returns ``1 / sqrt(mean(x^2) + eps)`` of each row."""

    @staticmethod
    def forward(ctx: Ctx[int], x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, ...]:
        y, rstd = elementwise.rms_norm(x.reshape(-1, x.shape[-1]), w, eps, offset, cast_first)
        ctx.save_for_backward(x, w, rstd)
        ctx.kept = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return _shaped(y, x), rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[int], dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, w, rstd = ctx.saved_tensors
        flat = (dy.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        return elementwise.rms_norm_backward(*flat, w, rstd, ctx.kept).view(x.shape), None, None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + rotate_half(x) sin`` for x (B, H, L, D) and cos, sin (B or 1, L, D'), the form of most models."""
    handback = offered_with_heads(x) if torch.is_grad_enabled() else None
    if handback is not None:
        handback.is_promised = True
    return Rope.apply(x, cos, sin, handback if handback is not None and handback.is_wanted else None)


class Rope(torch.autograd.Function):
    """See ``rope``. With a handback, the result is saved, as attention does anyway, and rotated back into x."""

    @staticmethod
    def forward(ctx: Ctx[Handback | None], x: Tensor, cos: Tensor, sin: Tensor, handback: Handback | None) -> Tensor:
        turned = elementwise.rope(x, cos, sin)
        ctx.kept = handback
        ctx.save_for_backward(cos, sin, None if handback is None else turned)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[Handback | None], dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, turned = ctx.saved_tensors
        if ctx.kept is not None:
            ctx.kept.give(turned_back(turned, cos, sin).transpose(1, 2).flatten(2).flatten(0, 1))
        return elementwise.rope(dy, cos, sin, inverse=True), None, None, None


# {cosines of a step, which all layers share: their inverse angles}.
_inverses: MutableMapping[Tensor, tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]]] = WeakTensorKeyDictionary()


def turned_back(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x of ``q = rope(x, cos, sin)``."""
    kept = _inverses.get(cos)
    if kept is None or kept[0] is not sin or kept[1] != (writes_to(cos), writes_to(sin)):
        kept = sin, (writes_to(cos), writes_to(sin)), inverse_angles(cos, sin)
        _inverses[cos] = kept
    _, _, (inverse_cos, inverse_sin) = kept
    return elementwise.rope(q, inverse_cos, inverse_sin, inverse=True)


def inverse_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines with which the transposed rope is the inverse: for each pair of columns the inverse matrix
    ((cos_2, sin_1), (-sin_2, cos_1)) divided by the determinant, which is not 1 where angles are scaled."""
    dtype = torch.promote_types(cos.dtype, torch.float32)
    (cos_1, cos_2), (sin_1, sin_2) = (table.to(dtype).chunk(2, dim=-1) for table in (cos, sin))
    determinant = cos_1 * cos_2 + sin_1 * sin_2
    halves = torch.stack([cos_2, cos_1, sin_2, sin_1]) / determinant
    return halves[:2].movedim(0, -2).flatten(-2), halves[2:].movedim(0, -2).flatten(-2)


class Glu(torch.autograd.Function):
    """``act(gate) * up``."""

    @staticmethod
    def forward(ctx: Ctx[str], gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kept = act
        return _shaped(elementwise.glu(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), act), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[str], dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        rows, of_gate, of_up = (tensor.reshape(-1, gate.shape[-1]) for tensor in (dy, gate, up))
        d_gate, d_up, _ = elementwise.glu_backward(rows, of_gate, of_up, ctx.kept, want_product=False)
        return d_gate.view(gate.shape), d_up.view(gate.shape), None


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` in the shape of ``like``, not as a view: autograd forbids writes to views that a Function returns."""
    return unsafe_view(rows, like.shape)


# Frozen layers without an adapter, on CPUs where PyTorch has no bfloat16 instructions for their products.


class FrozenLinear(torch.autograd.Function):
    """``x W^T + b`` with W (N, K) and b (N,) frozen: x (..., K) -> (..., N)."""

    @staticmethod
    def forward(ctx: Ctx[None], x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        rows = x.reshape(-1, x.shape[-1])
        return linear_out(rows, W, rows.new_empty(len(rows), len(W)), b).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], dy: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = input_grad_out(rows, W, rows.new_empty(len(rows), W.shape[1]))
        return dx.view(*dy.shape[:-1], W.shape[1]), None, None


def use_native_products(model: nn.Module) -> int:
    """Use the native products for frozen layers without an adapter, if they are faster. Returns the layers' number.

    For evaluation and generation; ``optimize_for_training`` does the same for training.
    """
    return replace_linears(model, Undo())


def replace_linears(model: nn.Module, undo: Undo) -> int:
    """Replace every frozen linear layer in bfloat16, if that is faster. Returns the number of layers."""
    parameter = next(model.parameters())
    if not parameter.is_cpu or is_on_card(parameter) or not is_slow_in_torch(torch.bfloat16):
        return 0
    found = [module for module in model.modules() if _is_frozen_linear(module) and is_free(module)]
    for module in found:
        replace_forward(module, _forward, undo)
    return len(found)


def _is_frozen_linear(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) or module.weight.dtype is not torch.bfloat16:
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def _forward(self: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    is_native = x.dtype is torch.bfloat16 and computes_in(x.dtype, x.device)
    if is_traced() or not is_native or not _is_frozen_linear(self):
        return class_forward(self)(x)
    return FrozenLinear.apply(x, self.weight.T if type(self) is Conv1D else self.weight, self.bias)


def replace_experts(model: nn.Module, undo: Undo) -> int:
    """Compute frozen stacked experts without adapters natively, all in one call. Returns the number of modules."""
    parameter = next(model.parameters())
    if not parameter.is_cpu or is_on_card(parameter):
        return 0
    found = [module for module in model.modules() if _is_frozen_experts(module) and is_free(module)]
    found = [module for module in found if all(native_stack(module, leaf) for leaf in _stacks_of(module))]
    for module in found:
        replace_forward(module, _experts_forward, undo)
    return len(found)


def _is_frozen_experts(module: Any) -> bool:
    if not hasattr(module, "has_gate") or foreign(module, first_leaf(module)) is not None:
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def _stacks_of(experts: nn.Module) -> tuple[str, str]:
    return first_leaf(experts), "down_proj"


def stacks_to_eight_bits(model: nn.Module, undo: Undo) -> int:
    """Compute frozen stacks of experts in 8 bits while the model trains. Returns their number."""
    count = 0
    for module in [module for module in model.modules() if _is_frozen_experts(module)]:
        stacks = {leaf: stack_in_eight_bits(module, leaf) for leaf in _stacks_of(module)}
        module.__dict__[EIGHT_BITS] = found = {leaf: stack for leaf, stack in stacks.items() if stack is not None}
        undo.add(functools.partial(_without_eight_bits, module))
        count += len(found)
    return count


def _without_eight_bits(module: nn.Module) -> None:
    module.__dict__.pop(EIGHT_BITS, None)


def _experts_forward(self: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return forward_frozen(self, x, top_k_index, top_k_weights, lambda module, *given: class_forward(module)(*given))


# --- recognising ---


# Largest difference between a module and its fast version, relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Attribute of another library's adapted layer that holds the rankwise layer computing in its place.
STAND_IN = "rankwise_layer"
# (offset, cast_first) of ops.elementwise.rms_norm, Llama's first.
NORM_FORMS = ((0, True), (1, False), (0, False))
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
}


def replace_norms(model: nn.Module, undo: Undo) -> int:
    """Replace every RMSNorm that equals the fast version. Returns their number."""
    norms = [module for module in model.modules() if _looks_like_norm(module)]
    forms: dict[type, tuple[int, bool] | None] = {}
    count = 0
    for module in norms:
        kind = type(module)
        if kind not in forms:
            forms[kind] = _norm_form(module)
        form = forms[kind]
        if form is not None and is_free(module):
            replace_forward(module, _norm_forward, undo, rankwise_norm=(_eps(module), *form))
            count += 1
    return count


def replace_mlps(model: nn.Module, undo: Undo) -> int:
    """Replace every ``down(act(gate(x)) * up(x))``. Returns their number."""
    checked: dict[tuple[type, str], bool] = {}
    count = 0
    for module in list(model.modules()):
        act = _mlp_activation(module)
        if act is None:
            continue
        key = (type(module), act)
        if key not in checked:
            checked[key] = _mlp_agrees(module, act)
        if checked[key] and is_free(module):
            replace_forward(module, _mlp_forward, undo, rankwise_act=act)
            count += 1
    return count


def replace_ropes(model: nn.Module, undo: Undo) -> int:
    """Replace the rotary functions in the Python modules that define this model's layers. Returns their number."""
    names = {type(module).__module__ for module in model.modules()}
    like = torch.empty(0, device=next(model.parameters()).device)
    if not _runs(like):
        return 0
    count = 0
    for name in sorted(names):
        original = rotary_of(name)
        if original is None or not (isinstance(original, FastRope) or _rope_agrees(original, like)):
            continue
        if not isinstance(original, FastRope):
            # For all models of the family, until one of them is restored: the others then compute in plain PyTorch.
            set_rotary(name, FastRope(original))
            undo.add(functools.partial(set_rotary, name, original))
        count += 1
    return count


class FastRope:
    """``apply_rotary_pos_emb`` of one family. Calls with other arguments go to the original."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.original = original

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, unsqueeze_dim: int = 1, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        plain = args or kwargs or unsqueeze_dim != 1 or not all(_is_simple(tensor, cos) for tensor in (q, k))
        if plain or cos.requires_grad or cos.dim() != 3:
            return self.original(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)
        return rope(q, cos, sin), rope(k, cos, sin)


def _is_simple(x: Tensor, cos: Tensor) -> bool:
    return _runs(x) and x.dim() == 4 and x.dtype == cos.dtype and x.shape[2] == cos.shape[1]


def _runs(x: Tensor) -> bool:
    """Whether there is a kernel for ``x``: in Triton, or in the native library, which has none for float16."""
    if is_traced() or x.dtype not in TOLERANCE:
        return False
    if is_on_card(x):
        return takes_triton(x)
    return takes_triton(x) or (x.device.type == "cpu" and x.dtype is not torch.float16 and native_on_cpu())


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    fits = self.weight.dtype == x.dtype and self.weight.shape[0] == x.shape[-1] and self.weight.device == x.device
    if not _runs(x) or self.weight.requires_grad or not fits:
        return class_forward(self)(x)
    return rms_norm(x, self.weight, *self.rankwise_norm)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if not _runs(x) or has_hooks(self.act_fn):
        return class_forward(self)(x)
    return down_of_glu(self.down_proj, self.gate_proj(x), self.up_proj(x), self.rankwise_act)


def down_of_glu(down: nn.Module, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``down(act(gate) * up)``; over an adapted layer the product is not kept for the backward pass."""
    layer = down.__dict__.get(STAND_IN, down)
    if isinstance(layer, AdaptedLayer) and is_free(layer) and not has_hooks(down) and layer.is_ready:
        adapter = layer.at_work
        branch = adapter.branch(layer.base_layer, gate) if isinstance(adapter, LowRankPair) else None
        if adapter is not None and branch is not None:
            return low_rank_linear_of_glu(gate, up, act, branch, drawn_dropout(adapter.dropout, adapter.training))
    return down(Glu.apply(gate, up, act))


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1 and getattr(module, "bias", None) is None
    return is_vector and type(module).__name__.endswith("RMSNorm") and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), float)), None)


@torch.no_grad()
def _norm_form(module: Any) -> tuple[int, bool] | None:
    x, eps = _random(module.weight, 3, module.weight.shape[0]), _eps(module)
    if x is None or eps is None:
        return None
    expected = class_forward(module)(x)
    errors = {}
    for form in NORM_FORMS:
        errors[form] = _difference(rms_norm(x, module.weight, eps, *form), expected)
    best = min(errors, key=lambda form: errors[form])
    return best if errors[best] <= TOLERANCE[x.dtype] else None


def _mlp_activation(module: nn.Module) -> str | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return None
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(act).__name__)


@torch.no_grad()
def _mlp_agrees(module: Any, act: str) -> bool:
    base: Any = module.gate_proj.base_layer if isinstance(module.gate_proj, AdaptedLayer) else module.gate_proj
    dtype = _mlp_dtype(module, base)
    if dtype is None or not hasattr(base, "in_features"):
        return False
    x = _random(torch.empty(0, dtype=dtype, device=base.weight.device), 2, base.in_features)
    if x is None:
        return False
    modes = [(part, part.training) for part in module.modules()]
    # In training mode, since Seed-OSS and T5Gemma have dropout; except adapters, which would draw a mask in each call.
    module.train()
    for layer in (module.gate_proj, module.up_proj, module.down_proj):
        layer.eval()
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            expected = class_forward(module)(x)
        found = down_of_glu(module.down_proj, module.gate_proj(x), module.up_proj(x), act)
    finally:
        for part, mode in modes:
            part.training = mode
    return _difference(found, expected) <= TOLERANCE[x.dtype]


def _mlp_dtype(module: nn.Module, base: Any) -> torch.dtype | None:
    """The dtype of an MLP's input. 4-bit layers have no floating parameter, so their ``dtype`` attribute is read."""
    floating = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    if base.weight.is_floating_point():
        return base.weight.dtype
    return getattr(base, "dtype", next(floating, None))


@torch.no_grad()
def _rope_agrees(original: Callable[..., tuple[Tensor, Tensor]], like: Tensor) -> bool:
    """In a plan on real tensors too: fake ones have no values, and torch prints their errors."""
    if is_fake(like):
        with plain_tensors():
            return _rope_agrees(original, torch.empty(0, dtype=like.dtype))
    shapes = ((2, 3, 5, 16), (2, 1, 5, 16), (2, 5, 8), (2, 5, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, *angles = (torch.randn(shape, generator=generator).to(like) for shape in shapes)
    cos, sin = (half.repeat(1, 1, 2) for half in angles)
    try:
        expected = original(q, k, cos, sin)
    except Exception:  # noqa: BLE001  a function with a different interface is not replaced
        return False
    found = FastRope(original)(q, k, cos, sin)
    pairs = list(zip(found, expected)) if isinstance(expected, tuple) and len(expected) == 2 else []
    return bool(pairs) and all(a.shape == b.shape and _difference(a, b) <= 1e-5 for a, b in pairs)


def _random(like: Tensor, *shape: int) -> Tensor | None:
    """Random numbers like ``like``, or None if its dtype and device have no kernels."""
    if not _runs(like):
        return None
    if is_fake(like):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; 0 on fake tensors, which have no values."""
    if is_fake(found) or is_fake(expected):
        return 0.0
    scale = expected.float().abs().max().clamp_min(1e-6)
    return float((found.float() - expected.float()).abs().max() / scale)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(name, layer) of the adapted layers, including those that compute in place of another library's."""
    for name, module in model.named_modules():
        layer = module.__dict__.get(STAND_IN, module)
        if isinstance(layer, AdaptedLayer):
            yield name, layer
