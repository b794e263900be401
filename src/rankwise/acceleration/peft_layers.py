"""``accelerate_peft``: rankwise's operators in a model that PEFT adapted, with PEFT's parameters and results.

PEFT is not imported: its layers are recognised by their attributes (lora_A, lora_B, scaling, base_layer). PEFT still
computes everything other than LoRA and DoRA over a linear layer: merged weights, several active adapters, mixed
batches, other variants.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.acceleration.optimize import Acceleration, optimize, restore
from rankwise.acceleration.parts import STAND_IN
from rankwise.acceleration.replace import Undo, class_forward, is_free, replace_forward
from rankwise.adapters.base_layer import has_hooks, is_linear, is_own
from rankwise.adapters.dora import Dora
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import Lora
from rankwise.errors import AdapterError
from rankwise.quantization.linear import Linear4bit, is_conv1d

CARRIES = ("lora_A", "lora_B", "scaling", "lora_dropout", "base_layer", "lora_variant")
DORA_VARIANT = "DoraLinearVariant"
MISSING = "PEFT is not installed (`pip install 'rankwise[peft]'`), and its get_peft_model makes such layers"


def accelerate_peft(model: nn.Module) -> Acceleration:
    """Make the LoRA and DoRA layers of a PEFT model faster, in place.

    Parameters and state dict do not change, so PEFT saves, loads, merges and switches adapters as before. DoRA's
    dropout acts on the low-rank path only, whereas PEFT computes the frozen product a second time.
    ``rankwise.acceleration.restore(model)`` undoes the changes.

    Returns:
        The changes, as for ``optimize_for_training``.

    Raises:
        AdapterError: RW416 if the model has no PEFT LoRA layer over a linear layer.
    """
    restore(model)
    undo = Undo()
    count = sum(_take_over(module, undo) for module in list(model.modules()))
    if count == 0:
        # PEFT is looked up, not imported, since only models that PEFT has adapted need it.
        is_there = importlib.util.find_spec("peft") is not None
        remedy = "give what get_peft_model returned" if is_there else MISSING
        raise AdapterError(
            "RW416", f"this {type(model).__name__} has no LoRA layer of PEFT's over a linear layer; {remedy}."
        )
    return optimize(model, undo, fuse_loss=False)


def _take_over(module: Any, undo: Undo) -> bool:
    if not all(hasattr(module, name) for name in CARRIES) or not is_free(module):
        return False
    base = _base_view(module.base_layer)
    # For a single parameter, PEFT adds B A to the stored layout.
    if base is None or (is_conv1d(base) and hasattr(module, "parameter_name")):
        return False
    layer = AdaptedLayer(base)
    layer.prepare = functools.partial(_prepare, weakref.ref(module), layer)
    replace_forward(module, _forward, undo, **{STAND_IN: layer})
    return True


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layer: AdaptedLayer = self.__dict__[STAND_IN]
    if args or kwargs or not layer.is_ready:
        return class_forward(self)(x, *args, **kwargs)
    return layer(x)


def _prepare(reference: weakref.ref[Any], layer: AdaptedLayer) -> bool:
    """Update the adapter and the mode of ``layer`` from PEFT's layer. Returns False if PEFT has to compute."""
    module = reference()
    layer.active = None
    if module is None or module.__dict__.get(STAND_IN) is not layer:
        return False
    name = _sole_adapter(module)
    if name is None or not _is_current(module, layer, name):
        return False
    layer.active = name
    layer.adapters[name].training = module.training
    return True


def _sole_adapter(module: Any) -> str | None:
    """The name of the only active adapter, if rankwise's operators support it; else None."""
    if module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1:
        return None
    variant = module.lora_variant.get(names[0])
    kind = variant if isinstance(variant, type) else type(variant)
    is_plain = variant is None or kind.__name__ == DORA_VARIANT
    return names[0] if is_plain and module.lora_A[names[0]].bias is None else None


def _is_current(module: Any, layer: AdaptedLayer, name: str) -> bool:
    """Make sure that ``layer`` holds PEFT's own parameters of this adapter. Returns False if it cannot."""
    if not _still_views(layer.base_layer, module.base_layer):
        return False
    parts = (module.lora_A, module.lora_B, module.lora_dropout, module.lora_magnitude_vector)
    if any(has_hooks(part[name]) for part in parts if name in part):
        return False
    A, B, m = _parameters(module, name)
    known = layer.adapter(name) if name in layer.adapters else None
    held = () if known is None else (known.lora_A, known.lora_B, known.magnitude)
    is_same = len(held) == 3 and all(a is b for a, b in zip(held, (A, B, m)))
    if known is None or not is_same or known.scaling != module.scaling[name]:
        if getattr(module.lora_B[name], "bias", None) is not None:
            return False
        layer.adapters[name] = _adapter_over(module, layer.base_layer, name)
    adapter = layer.adapter(name)
    assert isinstance(adapter, Lora | Dora), "over a linear layer"
    adapter.dropout = _dropout(module, name)
    return A.dtype.is_floating_point


def _parameters(module: Any, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """PEFT's own A, B and m, the last None without DoRA."""
    m = None if module.lora_variant.get(name) is None else module.lora_magnitude_vector[name].weight
    return module.lora_A[name].weight, module.lora_B[name].weight, m


def _adapter_over(module: Any, base: nn.Module, name: str) -> Lora | Dora:
    """A rankwise adapter that holds PEFT's parameters."""
    (A, B, m), scaling = _parameters(module, name), module.scaling[name]
    kind = Lora if m is None else Dora
    adapter = kind(base, A.shape[0], scaling, dropout=_dropout(module, name), device="meta")
    if isinstance(adapter, Dora) and m is not None:
        adapter.magnitude = m
    adapter.lora_A, adapter.lora_B = A, B
    return adapter


def _dropout(module: Any, name: str) -> float:
    return float(getattr(module.lora_dropout[name], "p", 0.0))


def _base_view(base: nn.Module) -> nn.Module | None:
    """The base layer, or for bitsandbytes' 4-bit layer a `Linear4bit` over the same memory; None for other classes."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if state is not None:
        return _four_bit_view(base, state)
    return base if is_linear(base) else None


def _four_bit_view(base: Any, state: Any) -> Linear4bit | None:
    if state.quant_type not in ("nf4", "fp4") or len(state.shape) != 2:
        return None
    nested = bool(state.nested)
    layer = Linear4bit(
        state.shape[1],
        state.shape[0],
        quant_type=state.quant_type,
        block_size=state.blocksize,
        double_quant=nested,
        dtype=state.dtype,
        device="meta",
    )
    # With quant_storage, the same bytes may be typed as 16- or 32-bit numbers.
    packed = base.weight.data.view(torch.uint8)
    if packed.numel() != layer.weight.numel() or not torch.is_tensor(state.absmax):
        return None
    weight = dataclasses.replace(layer.packed, codes=packed.view(layer.weight.shape), absmax=state.absmax)
    if nested:
        offset = state.offset.reshape(()).float()
        weight = dataclasses.replace(weight, nested_absmax=state.state2.absmax, offset=offset)
    layer.take(weight)
    layer.bias = base.bias
    layer.compute_dtype = base.compute_dtype if base.compute_type_is_set else None
    return layer.requires_grad_(False)


def _still_views(layer: nn.Module, base: Any) -> bool:
    """Whether ``layer`` is the base, or still views the base's memory.

    bitsandbytes' layer repacks its weight for evaluation on a CPU, and moves with its model.
    """
    if layer is base:
        return True
    if not isinstance(layer, Linear4bit) or not is_own(base):
        return False
    return bool(layer.weight.data_ptr() == base.weight.data_ptr() and layer.weight.device == base.weight.device)
