"""The wrappers in an adapted model: a base with adapters, and a module that is trained whole.

Wrapping does not change the base's keys in ``model.state_dict()``, so that the state dict still loads into the plain
model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import frozen_product
from rankwise.adapters.dora import Dora
from rankwise.adapters.lora import Lora
from rankwise.adapters.operator import Adapter
from rankwise.adapters.origin import Origin
from rankwise.adapters.token_rows import TokenRows
from rankwise.errors import AdapterError
from rankwise.ops.selection import is_traced
from rankwise.quantization.linear import features

if TYPE_CHECKING:
    from rankwise.adapters.shared_input import SharedInput

Over = TypeVar("Over")


class OverBase(nn.Module, Generic[Over]):
    """A frozen base and its adapters, of which at most one is active. Unknown attributes are forwarded to the base."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        # Names of the adapters whose A and B follow casts of the base (``adapter_dtype="base"``).
        self.cast_with_base: set[str] = set()
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
            for name, adapter in self.adapters.items():
                adapter._apply(_keeping_precision(adapter, fn, cast_pair=name in self.cast_with_base))
            if self.origin is not None:
                self.origin._apply(_keeping_precision(self.origin, fn, cast_pair=bool(self.cast_with_base)))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if is_private(name):
                raise
            return getattr(super().__getattr__("base_layer"), name)


def _keeping_precision(
    adapter: nn.Module, fn: Callable[[Tensor], Tensor], *, cast_pair: bool
) -> Callable[[Tensor], Tensor]:
    """``fn`` that never casts m below float32, and casts A and B below float32 only with ``cast_pair``."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if not moved.is_floating_point():
            return moved
        m = getattr(adapter, "magnitude", None)
        # ``fn`` gets each parameter's gradient too.
        is_magnitude = m is not None and (tensor is m or tensor is m.grad)
        if cast_pair and not is_magnitude:
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
        # Where this layer computes in place of another library's layer: updates it from that layer, and returns whether
        # it may compute.
        self.prepare: Callable[[], bool] | None = None
        # Whether this is the output head, whose weight fused losses use directly, without calling its forward.
        self.is_head = False
        # Within `mixed_adapters`: the name of the adapter of each row of a batch.
        self.mixed: Sequence[str] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None:
            if self.mixed is not None:
                return self._mixed_output(x, self.mixed)
            return self.base_layer(x) if self.origin is None else self.origin(self.base_layer, x)
        # A compiled graph computes the layers of a group separately.
        if self.shared is not None and not is_traced() and (y := self.shared.output(self, x)) is not None:
            return y
        return self.adapters[self.active](self.base_layer, x)

    def _mixed_output(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One product with W for all rows, and each adapter on its own rows. Raises AdapterError (RW625).

        `generate` repeats each row consecutively (beams, several answers to a prompt), equally often for each name.
        """
        repeated, left = divmod(x.shape[0], len(names)) if names else (0, 0)
        # The rows of flattened tokens are unknown, since a mixture sorts them by expert.
        if left or not repeated or (x.is_floating_point() and x.dim() < 3):
            raise AdapterError(
                "RW625",
                f"{len(names)} adapters are named, and a layer got an input of shape {tuple(x.shape)}; name one for "
                "each row of the batch, in a model whose adapted layers read (batch, tokens, features).",
            )
        y = frozen_product(self.base_layer, x)
        each = [name for name in names for _ in range(repeated)]
        for name in dict.fromkeys(name for name in names if name in self.adapters):
            rows = torch.tensor([index for index, one in enumerate(each) if one == name], device=x.device)
            y[rows] = self.adapter(name).over(self.base_layer, x[rows], y[rows])
        bias = getattr(self.base_layer, "bias", None)
        return y if bias is None else y + bias

    @property
    def is_ready(self) -> bool:
        """Whether an adapter is active."""
        return (self.prepare is None or self.prepare()) and self.active is not None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that read its dtype; for an output head the adapted weight, with gradients."""
        if self.is_head and isinstance(adapter := self.at_work, Lora | Dora | TokenRows):
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
    wrapper.register_state_dict_post_hook(_without_prefix(inner))
    wrapper.register_load_state_dict_pre_hook(_with_prefix(inner))


class _without_prefix:  # noqa: N801  (a function with state; a closure could not be deep-copied or pickled)
    def __init__(self, inner: str) -> None:
        self.inner = inner

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        start = f"{prefix}{self.inner}."
        for key in [key for key in state if key.startswith(start)]:
            state[prefix + key.removeprefix(start)] = state.pop(key)


class _with_prefix:  # noqa: N801
    def __init__(self, inner: str) -> None:
        self.inner = inner

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        # Every other key goes to the inner module: a 4-bit layer also reads keys of bitsandbytes' format.
        own = (f"{prefix}adapters.", f"{prefix}{self.inner}.")
        for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
            state[f"{prefix}{self.inner}.{key.removeprefix(prefix)}"] = state.pop(key)
