"""Liger's kernels on CUDA for the parts of a model that are not ours: RMSNorm, rotary positions, gated activations.

    y = (offset + w) * x / sqrt(mean(x^2) + eps)      q' = q cos + rotate_half(q) sin      act(gate) * up

A kernel takes a part's place only where both give the same results and gradients on random numbers on the device, and
where it leaves alone what it was given. Some of Liger's functions write into their inputs, which other layers may have
kept: RoPE into q and k, its backward pass into their gradients, and that of a gated activation over gate and up, which
DoRA needs for the gradient of its magnitude. They get copies here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankwise.acceleration.recognise import (
    ROPE,
    _difference,
    _eps,
    _looks_like_norm,
    _mlp_activation,
    is_fake,
)
from rankwise.acceleration.replace import Undo, class_forward, is_free, replace_forward
from rankwise.adapters.base_layer import has_hooks
from rankwise.adapters.layer import AdaptedLayer
from rankwise.ops.selection import is_traced

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Of the largest value, between a part and its twin.
NORM_FORMS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))
# (offset, casting mode) of Liger's RMSNorm. "gemma" multiplies by the weight before it rounds.
ACTIVATIONS = ("silu", "gelu_tanh")
# Those of Liger's gated products.
HOW_TO_INSTALL = "install it with: pip install 'rankwise[cuda]'"


class Kernels(Protocol):
    """What is used of Liger, with its argument order. GLU and RoPE write into their arguments."""

    def rms_norm(self, x: Tensor, w: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        """Differentiable in x and w."""

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...

    def rope_backward_(self, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...

    def glu(self, gate: Tensor, up: Tensor, act: str) -> Tensor: ...

    def glu_backward_(self, gate: Tensor, up: Tensor, dout: Tensor, act: str) -> tuple[Tensor, Tensor]: ...


class Installed:
    """`Kernels` of the package liger-kernel, from 0.5 on."""

    def __init__(self) -> None:
        from liger_kernel.ops import geglu, rms_norm, rope, swiglu

        self._norm, self._rope = rms_norm.LigerRMSNormFunction, rope
        self._forward = {"silu": swiglu.swiglu_forward, "gelu_tanh": geglu.geglu_forward}
        self._backward = {"silu": swiglu.swiglu_backward, "gelu_tanh": geglu.geglu_backward}

    def rms_norm(self, x: Tensor, w: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        # The last argument keeps Liger from writing dx over dy, which a residual connection still needs.
        return cast(Tensor, self._norm.apply(x, w, eps, offset, casting, False))

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, *_ = self._rope.rope_forward(q, k, cos, sin)
        return q, k

    def rope_backward_(self, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = self._rope.rope_backward(dq, dk, cos, sin)
        return dq, dk

    def glu(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        return cast(Tensor, self._forward[act](gate, up)[2])

    def glu_backward_(self, gate: Tensor, up: Tensor, dout: Tensor, act: str) -> tuple[Tensor, Tensor]:
        d_gate, d_up = self._backward[act](gate, up, dout)
        return d_gate, d_up


def obstacle() -> str | None:
    """Why Liger cannot be used, and what to do; or None."""
    return None if importlib.util.find_spec("liger_kernel") else f"liger-kernel is not installed; {HOW_TO_INSTALL}"


@cache
def kernels() -> Kernels:
    """Liger's, loaded at the first use."""
    return Installed()


def runs_on(x: Tensor) -> bool:
    """Whether the kernels work on ``x``."""
    return x.is_cuda and x.dtype in TOLERANCE and not is_fake(x) and not is_traced()


class Glu(torch.autograd.Function):
    """``act(gate) * up``; kept for the backward pass: gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return kernels().glu(gate.contiguous(), up.contiguous(), act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        gate, up = (kept.clone(memory_format=torch.contiguous_format) for kept in ctx.saved_tensors)
        return *kernels().glu_backward_(gate, up, dout.contiguous(), ctx.act), None


class Rope(torch.autograd.Function):
    """``q cos + rotate_half(q) sin`` and the same of k: (B, H, L, D), cos and sin (B or 1, L, D')."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return kernels().rope_(q.clone(), k.clone(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
        return *kernels().rope_backward_(dq.clone(), dk.clone(), *ctx.saved_tensors), None, None


def replace_parts(model: nn.Module, undo: Undo, left: list[str]) -> tuple[int, int, int]:
    """Liger's kernels wherever they agree: the numbers of norms, gated MLPs and rotary functions.

    What stays torch's, and why, is added to ``left``.
    """
    parts = (("norms", replace_norms), ("gated MLPs", replace_mlps), ("rotary positions", replace_ropes))
    why_not = obstacle()
    if why_not is not None:
        left.append(f"{', '.join(name for name, _ in parts)} stay torch's: {why_not}")
        return 0, 0, 0
    norms, mlps, ropes = (replace(model, undo, left) for _, replace in parts)
    return norms, mlps, ropes


def replace_norms(model: nn.Module, undo: Undo, left: list[str]) -> int:
    """Every RMSNorm that Liger's equals; gives their number."""
    forms: dict[type, tuple[float, str] | None] = {}
    count = 0
    norms: list[Any] = [module for module in model.modules() if _looks_like_norm(module)]
    for module in norms:
        if type(module) not in forms:
            forms[type(module)] = _norm_form(module, left) if runs_on(module.weight) else None
        form = forms[type(module)]
        if form is not None and is_free(module):
            replace_forward(module, _norm_forward, undo, rankwise_liger=form)
            count += 1
    return count


def replace_mlps(model: nn.Module, undo: Undo, left: list[str]) -> int:
    """Every ``down(act(gate(x)) * up(x))``; gives their number."""
    checked: dict[tuple[type, str], bool] = {}
    count = 0
    for module in list(model.modules()):
        act = _mlp_activation(module)
        if act not in ACTIVATIONS or not is_free(module):
            continue
        key = (type(module), act)
        if key not in checked:
            checked[key] = _mlp_agrees(module, act, left)
        if checked[key]:
            replace_forward(module, _mlp_forward, undo, rankwise_liger=act)
            count += 1
    return count


def replace_ropes(model: nn.Module, undo: Undo, left: list[str]) -> int:
    """The rotary functions of the Python modules that define this model's layers; gives their number."""
    like = next(model.parameters())
    count = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        namespace: Any = sys.modules.get(name)
        original = getattr(namespace, ROPE, None)
        if original is None or isinstance(original, LigerRope) or not _rope_agrees(original, like, left):
            continue
        twin = LigerRope(original)
        setattr(namespace, ROPE, twin)
        undo.add(_putting_back(namespace, twin))
        count += 1
    return count


def _putting_back(namespace: Any, twin: LigerRope) -> Callable[[], None]:
    """Unless another model's change came on top."""

    def put_back() -> None:
        if getattr(namespace, ROPE, None) is twin:
            setattr(namespace, ROPE, twin.original)

    return put_back


class LigerRope:
    """``apply_rotary_pos_emb`` of one family; calls of another form or on another device go to the original."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, unsqueeze_dim: int = 1, **kwargs: Any
    ) -> Any:
        plain = args or kwargs or unsqueeze_dim != 1 or cos.dim() != 3 or cos.requires_grad
        if plain or not all(runs_on(x) and x.dim() == 4 and x.dtype == cos.dtype for x in (q, k)):
            return self.original(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)
        return Rope.apply(q, k, cos, sin)


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    if not runs_on(x) or self.weight.dtype != x.dtype:
        return cast(Tensor, class_forward(self)(x))
    return kernels().rms_norm(x, self.weight, cast(float, _eps(self)), *self.rankwise_liger)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if not runs_on(x) or has_hooks(self.act_fn):
        return cast(Tensor, class_forward(self)(x))
    return _mlp(self, x, self.rankwise_liger)


def _mlp(module: Any, x: Tensor, act: str) -> Tensor:
    return cast(Tensor, module.down_proj(Glu.apply(module.gate_proj(x), module.up_proj(x), act)))


def _norm_form(module: Any, left: list[str]) -> tuple[float, str] | None:
    """The first form that agrees; Llama's stands first."""
    x = _random(module.weight, 3, module.weight.shape[0])
    why_not: str | None = None
    for form in NORM_FORMS:
        twin = _norm_of(module.weight, cast(float, _eps(module)), form)
        why_not = _disagreement(twin, class_forward(module), [x])
        if why_not is None:
            return form
    left.append(f"{type(module).__name__} stays torch's: {why_not}")
    return None


def _norm_of(weight: Tensor, eps: float, form: tuple[float, str]) -> Callable[[Tensor], Tensor]:
    return lambda x: kernels().rms_norm(x, weight, eps, *form)


def _mlp_agrees(module: Any, act: str, left: list[str]) -> bool:
    base: Any = module.gate_proj.base_layer if isinstance(module.gate_proj, AdaptedLayer) else module.gate_proj
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None or not hasattr(base, "in_features"):
        return False
    dtype = base.weight.dtype if base.weight.is_floating_point() else getattr(base, "dtype", like.dtype)
    like = like.detach().new_empty(0, dtype=dtype)
    if not runs_on(like):
        return False
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        x = _random(like, 2, base.in_features)
        why_not = _disagreement(lambda x: _mlp(module, x, act), class_forward(module), [x])
    finally:
        for part, mode in modes:
            part.training = mode
    if why_not is not None:
        left.append(f"{type(module).__name__} stays torch's: {why_not}")
    return why_not is None


def _rope_agrees(original: Callable[..., Any], like: Tensor, left: list[str]) -> bool:
    if not like.is_floating_point() or not runs_on(like):
        return False
    # As attention lays them out: (B, L, H, D) in memory.
    q, k = (_random(like, 2, 5, heads, 16).transpose(1, 2) for heads in (3, 1))
    angles = _random(like, 2, 5, 8).float().repeat(1, 1, 2)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    twin = LigerRope(original)
    why_not = _disagreement(lambda q, k: twin(q, k, cos, sin), lambda q, k: original(q, k, cos, sin), [q, k])
    if why_not is not None:
        left.append(f"{ROPE} stays torch's: {why_not}")
    return why_not is None


def _disagreement(twin: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor]) -> str | None:
    """Why the twin cannot stand in: other results or gradients, changed inputs or cotangents, an error. Else None."""
    try:
        expected, found = _results(plain, inputs), _results(twin, inputs)
    except Exception as error:  # noqa: BLE001  whatever a kernel, or a part of another form, raises: the reason is said
        return f"{type(error).__name__}: {error}"
    limit = TOLERANCE[inputs[0].dtype]
    same = [a.shape == b.shape and a.dtype == b.dtype and _difference(a, b) <= limit for a, b in zip(found, expected)]
    return None if len(found) == len(expected) and all(same) else "Liger's kernel gives another result"


@torch.enable_grad()
def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, gradients, and the inputs and cotangents as they are afterwards."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    # A part is never given a leaf, which no function may write into.
    held = [x.view_as(x) for x in given]
    out = function(*held)
    outputs = list(out) if isinstance(out, tuple) else [out]
    cotangents = [_random(y, *y.shape) for y in outputs]
    grads = torch.autograd.grad(outputs, given, cotangents)
    return [*(y.detach() for y in outputs), *grads, *(x.detach() for x in held), *cotangents]


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)
