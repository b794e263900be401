"""The wrappers in an adapted model: a base with adapters, and a module that is trained whole.

Wrapping does not change the base's keys in ``model.state_dict()``, so that the state dict still loads into the plain
model.

PiSSA subtracts a pair from a base's weight, W = W_rest + s B_0 A_0. The layer then computes with W_rest, and the
adapter starts at (A_0, B_0). Relative to W, the trained pair is one LoRA of rank 2r at the same scale: s B A - s B_0
A_0 = s [B, -B_0] [A; A_0].

Layers that read the same input (q, k and v; gate and up) are computed together, when the first of them is called, with
one pass over the input for all their A; the others fetch their outputs when they are called. So this needs no change of
the model's code. Two inputs are the same when they are one tensor object, not written to in between, under the same
gradient mode.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import dense_weight, is_quantized, with_weight
from rankwise.adapters.lora import Adapter, LowRankPair, TokenRows
from rankwise.adapters.low_rank import drawn_dropout, low_rank_product, merged_weight
from rankwise.compat.torch import writes_to
from rankwise.ops.low_rank_linear import low_rank_linear
from rankwise.ops.packed_weight import format_of
from rankwise.ops.selection import is_traced
from rankwise.quantization.linear import Linear4bit, features

Over = TypeVar("Over")


class OverBase(nn.Module, Generic[Over]):
    """A frozen base and its adapters, of which at most one is active. Unknown attributes are forwarded to the base."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        # The pair that an adapter's initialisation subtracted from the base.
        self.origin: Origin | None = None
        keep_names(self, "base_layer")

    def adapter(self, name: str) -> Over:
        return cast(Over, self.adapters[name])

    @property
    def at_work(self) -> Over | None:
        """The active adapter."""
        return None if self.active is None else self.adapter(self.active)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            self.base_layer._apply(fn)
            for adapter in self.adapters.values():
                adapter._apply(_keeping_precision(fn))
            if self.origin is not None:
                self.origin._apply(_keeping_precision(fn))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if is_private(name):
                raise
            return getattr(super().__getattr__("base_layer"), name)


def _keeping_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` that never casts below float32."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if not moved.is_floating_point():
            return moved
        dtype = torch.promote_types(moved.dtype, torch.float32)
        return moved if moved.dtype is dtype else tensor.to(moved.device, dtype)

    return apply


class AdaptedLayer(OverBase[Adapter]):
    """A linear layer or an embedding, wrapped with its adapters."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # The group of layers that read the same input and are computed together (set by rankwise.acceleration).
        self.shared: SharedInput | None = None
        # If this layer computes in place of another library's layer: updates it from that layer, and returns whether
        # it may compute.
        self.prepare: Callable[[], bool] | None = None
        # Whether this is the output head, whose weight fused losses use directly, without calling its forward.
        self.is_head = False

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None:
            return self.base_layer(x) if self.origin is None else self.origin(self.base_layer, x)
        # A compiled graph computes the layers of a group separately.
        if self.shared is not None and not is_traced() and (y := self.shared.output(self, x)) is not None:
            return y
        return self.adapters[self.active](self.base_layer, x)

    @property
    def is_ready(self) -> bool:
        """Whether an adapter is active."""
        return (self.prepare is None or self.prepare()) and self.active is not None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that read its dtype; for an output head the adapted weight, with gradients."""
        if self.is_head and isinstance(adapter := self.at_work, LowRankPair | TokenRows):
            return adapter.effective_weight(self.base_layer)
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return features(self.base_layer)[1]


class TrainedCopy(nn.Module):
    """A module of the base and its trained copies, one for each adapter (PEFT's ``modules_to_save``)."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        keep_names(self, "original")

    def add(self, name: str) -> None:
        # The copy has parameters of its own, so a tied head is untied here.
        self.adapters[name] = copy.deepcopy(self.original).requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.chosen()(*args, **kwargs)

    def chosen(self) -> nn.Module:
        return self.original if self.active is None else self.adapters[self.active]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if is_private(name):
                raise
            return getattr(self.chosen(), name)


def is_private(name: str) -> bool:
    """Whether the name begins with an underscore. Such names are not forwarded to the base: copy.deepcopy and
    accelerate would act on the wrong module.
    """
    return name.startswith("_")


def keep_names(wrapper: nn.Module, inner: str) -> None:
    """Omit ``inner.`` from the keys of the wrapper's state dict, for saving and loading."""
    wrapper.register_state_dict_post_hook(functools.partial(_without_prefix, inner))
    wrapper.register_load_state_dict_pre_hook(functools.partial(_with_prefix, inner))


def _without_prefix(inner: str, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    start = f"{prefix}{inner}."
    for key in [key for key in state if key.startswith(start)]:
        state[prefix + key.removeprefix(start)] = state.pop(key)


def _with_prefix(inner: str, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    # Every other key goes to the inner module: a 4-bit layer also reads keys of bitsandbytes' format.
    own = (f"{prefix}adapters.", f"{prefix}{inner}.")
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[f"{prefix}{inner}.{key.removeprefix(prefix)}"] = state.pop(key)


class Origin(nn.Module):
    """The pair (A_0, B_0) of a base that holds W_rest. While no adapter is active, the pair restores W.

    A (r, in) and B (out, r) are buffers outside of the state dict, since the adapter's file holds them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """``W x + b`` as ``W_rest x + s B_0 A_0 x + b``, equal up to rounding, since W itself is not kept."""
        return torch.add(base(x), low_rank_product(x, self.A, self.B), alpha=self.scaling)

    def restored(self, rest: nn.Module) -> nn.Module:
        """A base that holds W, made from ``rest``, which holds W_rest."""
        return with_weight(rest, merged_weight(dense_weight(rest), self.A, self.B, self.scaling))

    def taken_out_of(self, base: nn.Module, W: Tensor) -> nn.Module:
        """A base that holds ``W_rest = W - s B_0 A_0``, 4-bit if ``base`` is; W (out, in) is not quantized."""
        rest = merged_weight(W, self.A, self.B, -self.scaling).to(getattr(base, "dtype", W.dtype))
        if not is_quantized(base):
            return with_weight(base, rest)
        assert isinstance(base, Linear4bit), "the one quantized base that can be made again"
        layer = Linear4bit.from_weight(
            rest.to(base.weight.device), base.bias, **format_of(base), compute_dtype=base.compute_dtype
        )
        layer.was_conv1d = base.was_conv1d
        return layer.train(base.training)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs that the other layers of a group have not fetched yet, for one input."""

    x: weakref.ref[Tensor]
    version: int
    grad: bool
    # {id of the layer: its output}.
    waiting: dict[int, Tensor]

    def are_of(self, x: Tensor) -> bool:
        return self.x() is x and self.version == writes_to(x) and self.grad == torch.is_grad_enabled()


class SharedInput:
    """A group of adapted layers. If they cannot be computed together, each computes by itself."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        # Weak, since a removed layer must not keep the others alive. Copied layers are not in the group, and compute by
        # themselves.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._kept: Outputs | None = None

    def output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """The output of ``layer`` for x, or None if the layer has to compute it by itself."""
        # Read once, since another thread may replace self._kept; it does not add to these outputs.
        kept = self._kept
        if kept is not None and kept.are_of(x):
            y = kept.waiting.pop(id(layer), None)
            if y is not None:
                return y
        self._kept = None
        return self._compute(layer, x)

    def _compute(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        layers = [member for member in (ref() for ref in self._layers) if member is not None]
        adapters = _compatible(layers) if layer in layers else None
        if adapters is None:
            return None
        branches = []
        for adapter, member in zip(adapters, layers, strict=True):
            branch = adapter.branch(member.base_layer, x)
            if branch is None:
                return None
            branches.append(branch)
        ys = low_rank_linear(x, branches, drawn_dropout(adapters[0].dropout, adapters[0].training))
        waiting = {id(member): y for member, y in zip(layers, ys)}
        y = waiting.pop(id(layer))
        self._kept = Outputs(weakref.ref(x), writes_to(x), torch.is_grad_enabled(), waiting)
        return y


def _compatible(layers: Sequence[AdaptedLayer]) -> list[LowRankPair] | None:
    """The active adapters of the layers if all have the same dropout, mode and dtype; else None."""
    if not all(layer.is_ready for layer in layers):
        return None
    adapters = [adapter for layer in layers if isinstance(adapter := layer.at_work, LowRankPair)]
    kinds = {(adapter.dropout, adapter.training, adapter.lora_A.dtype) for adapter in adapters}
    return adapters if len(adapters) == len(layers) and len(kinds) == 1 else None
