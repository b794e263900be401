"""``optimize_for_training``: apply all accelerations of a training step in place, reversibly, and report them; and
``accelerate_peft``: the same operators in a model that PEFT adapted, with PEFT's parameters and results.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.acceleration import attention
from rankwise.acceleration.attention import replace_masks
from rankwise.acceleration.loss import (
    Head,
    accept_labels,
    answering_head,
    frozen_head,
    head_in_eight_bits,
    losing_head,
    output_head,
)
from rankwise.acceleration.memory import keep_freed_memory, replace_checkpointing
from rankwise.acceleration.parts import (
    ATTRIBUTE,
    STAND_IN,
    Undo,
    adapted_layers,
    class_forward,
    is_free,
    probe,
    replace_experts,
    replace_forward,
    replace_linears,
    replace_mlps,
    replace_norms,
    replace_ropes,
    stacks_to_eight_bits,
)
from rankwise.adapters.base_layer import has_hooks, is_linear, is_own, stored_weight
from rankwise.adapters.layer import AdaptedLayer, SharedInput
from rankwise.adapters.lora import Dora, Lora, LowRankPair
from rankwise.adapters.low_rank import frozen_weight
from rankwise.adapters.switch import adapter_disabled
from rankwise.compat.transformers import attention_of, checkpoints_in_forward, text_config
from rankwise.errors import AdapterError
from rankwise.ops.branch import Frozen
from rankwise.ops.eight_bit import LARGEST, EightBit, calibrate, settle
from rankwise.ops.kept import offered_by
from rankwise.ops.selection import is_on_card
from rankwise.quantization.experts import as_the_step, stacks_in_eight_bits
from rankwise.quantization.linear import Linear4bit, features, is_conv1d


@dataclasses.dataclass(frozen=True)
class Seen:
    """A call of a layer."""

    layer: AdaptedLayer
    x: Tensor
    y: Tensor
    # Whether gradients were recorded.
    grad: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceleration:
    """The changes to a model: counts of modules, and the reasons why some were not changed."""

    # Number of groups of adapted layers that make one pass over their common input.
    shared_inputs: int = 0
    norms: int = 0
    mlps: int = 0
    ropes: int = 0
    # Number of frozen layers without an adapter, for whose products PyTorch has no fast instructions here.
    linears: int = 0
    # Number of modules of frozen experts without adapters that are computed together.
    experts: int = 0
    # Number of layers whose frozen products are in 8 bits, the head among them with its logits.
    eight_bit: int = 0
    attention: bool = False
    fused_loss: bool = False
    keeps_memory: bool = False
    left_alone: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = [
            (self.shared_inputs, f"{self.shared_inputs} groups of layers share one pass over their input"),
            (self.attention, "own attention kernel"),
            (self.norms, f"{self.norms} norms and {self.mlps} gated MLPs fused"),
            (self.ropes, "rotary positions fused"),
            (self.linears, f"bfloat16 products of {self.linears} frozen layers in float32"),
            (self.experts, f"the experts of {self.experts} layers computed together"),
            (self.eight_bit, f"frozen products of {self.eight_bit} layers in 8 bits while training"),
            (self.fused_loss, "loss in chunks of labelled tokens"),
            (self.keeps_memory, "freed memory is kept"),
        ]
        parts = [text for is_done, text in done if is_done]
        return "; ".join([*(parts or ["nothing to speed up"]), *self.left_alone])


def optimize_for_training(
    model: nn.Module, *, keep_memory: bool = True, products: Literal["bfloat16", "int8"] = "bfloat16"
) -> Acceleration:
    """Make training steps of ``model`` faster, in place. Results stay the same up to rounding. With labels,
    calls then return no logits, except under ``torch.no_grad()``.

    Call it after ``add_adapter``. Shared inputs and the fused loss apply to every device. Norms, rotary positions and
    gated MLPs are fused on a CPU and, by Triton, on CUDA. Attention is replaced on CPUs, and on CUDA for concatenated
    rows; the allocator's settings apply to CPUs. In your own loop, ``model(input_ids=ids, labels=ids).loss`` is the
    fused loss, and that output has no logits. Another call starts over.
    ``rankwise.acceleration.restore(model)`` undoes everything except the allocator's thresholds.

    Args:
        model: A transformers model with an adapter.
        keep_memory: On a CPU with glibc, keep freed blocks for the next step instead of returning them to the system.
        products: ``"int8"`` computes the frozen products of adapted layers in 8 bits while the model trains
            (`rankwise.ops.eight_bit`), and the logits of the loss; the first batch gives the scales of input channels.
            Evaluation mode, attention, norms and the adapters themselves keep their precision.

    Returns:
        The changes, and the reasons for parts that were not changed; ``print`` shows them in words.
    """
    restore(model)
    done = optimize(model, Undo(), keep_memory=keep_memory)
    if products == "int8":
        changes = model.__dict__[ATTRIBUTE]
        done = dataclasses.replace(done, eight_bit=use_eight_bit(model, changes["undo"]))
        changes["done"] = done
    return done


def use_eight_bit(model: nn.Module, undo: Undo) -> int:
    """Compute the frozen products of adapted linear layers and of stacked experts in 8 bits, and the logits of a dense
    frozen head for the loss, except where a size is no multiple of 32. Returns their number."""
    count = 0
    for _, layer in adapted_layers(model):
        adapter = layer.at_work
        if isinstance(adapter, LowRankPair) and adapter.parts is None and not layer.is_head:
            if any(size % 32 for size in features(layer.base_layer)):
                continue
            adapter.eight_bit = EightBit()
            undo.add(functools.partial(setattr, adapter, "eight_bit", None))
            count += 1
    count += stacks_to_eight_bits(model, undo)
    head: Head | None = model.__dict__[ATTRIBUTE].get("head")
    module: Any = None if head is None else head.module
    if head is None or type(module) is not nn.Linear or any(size % 32 for size in features(module)):
        return count
    if frozen_head(module, module.weight) is not None:
        head.eight_bit = EightBit()
        count += 1
    return count


def optimize(model: nn.Module, undo: Undo, *, keep_memory: bool = True, fuse_loss: bool = True) -> Acceleration:
    """``optimize_for_training`` of an unchanged model. Adds its undo steps to ``undo``, and rolls back on an error."""
    try:
        return _optimize(model, undo, keep_memory=keep_memory, fuse_loss=fuse_loss)
    except BaseException:
        undo()
        model.__dict__.pop(ATTRIBUTE, None)
        raise


def _optimize(model: nn.Module, undo: Undo, *, keep_memory: bool, fuse_loss: bool) -> Acceleration:
    parameter = next(model.parameters())
    on_cpu = parameter.device.type in ("cpu", "meta") and not is_on_card(parameter)
    left: list[str] = []
    norms, mlps, ropes = fuse_parts(model, undo)
    head, shared_inputs = fuse_what_a_run_shows(model, undo, left, fuse_loss=fuse_loss)
    if on_cpu and checkpoints_in_forward():
        replace_checkpointing(model, undo)
    elif on_cpu:
        left.append("checkpointing stays torch's: before transformers 5.23, it is done around a block's forward")
    done = Acceleration(
        shared_inputs=shared_inputs,
        norms=norms,
        mlps=mlps,
        ropes=ropes,
        linears=replace_linears(model, undo),
        experts=replace_experts(model, undo),
        attention=use_attention(model, undo, left),
        fused_loss=head is not None,
        keeps_memory=keep_memory and on_cpu and keep_freed_memory(),
    )
    if head is not None:
        accept_labels(model, head, undo)
    done = dataclasses.replace(done, left_alone=tuple(left))
    model.__dict__.setdefault(ATTRIBUTE, {}).update(undo=undo, done=done)
    return done


def fuse_parts(model: nn.Module, undo: Undo) -> tuple[int, int, int]:
    """Replace norms, gated MLPs and rotary functions by fused ones. Returns how many of each were replaced."""
    return replace_norms(model, undo), replace_mlps(model, undo), replace_ropes(model, undo)


def rounded_bytes(model: nn.Module) -> int:
    """The bytes that `keep_rounded` takes."""
    return sum(math.prod(frozen.weight.shape) for frozen in _dense_in_eight_bits(model))


def _dense_in_eight_bits(model: nn.Module) -> list[Frozen]:
    """The calibrated dense weights on the CPU whose products are in 8 bits, of layers and of the head."""
    found = []
    for _, layer in adapted_layers(model):
        if isinstance(adapter := layer.at_work, LowRankPair) and adapter.eight_bit is not None:
            frozen = frozen_weight(layer.base_layer, stored_weight(layer.base_layer).new_empty(0))
            if frozen is not None and isinstance(frozen.weight, Tensor):
                found.append(Frozen(frozen.weight, adapter.eight_bit))
    if (head := head_in_eight_bits(model)) is not None:
        module: Any = head[1].module
        found.append(Frozen(module.weight, head[1].eight_bit))
    # With AVX2 alone integers are as large as the weight.
    scales = [frozen.scales for frozen in found]
    return [
        frozen
        for frozen, of in zip(found, scales)
        if of is not None and of.largest == LARGEST and isinstance(frozen.weight, Tensor) and frozen.weight.is_cpu
    ]


@torch.no_grad()
def keep_rounded(model: nn.Module) -> None:
    """Round dense weights of products in 8 bits once, and keep their integers beside them, a byte for each element,
    instead of rounding them in every pass: results stay the same to the bit."""
    weights = [(frozen.eight_bit, frozen) for frozen in _dense_in_eight_bits(model)]
    for eight_bit, _ in weights:
        assert eight_bit is not None, "its products are in 8 bits"
        eight_bit.keeps_rounded = True
    settle(weights)


@torch.no_grad()
def calibrate_products(model: nn.Module, ids: Tensor) -> int:
    """Give the weights whose products are in 8 bits their channel scales, from ids (1, L) through the model without its
    adapters: the same scales whenever the base is the same.

    Layers that no token reaches, such as experts, compute as without 8 bits: a first batch would give a resumed run,
    and each of several processes, other scales. Returns their number.
    """
    adapters = {layer: found for _, layer in adapted_layers(model) if isinstance(found := layer.at_work, LowRankPair)}
    stacks = stacks_in_eight_bits(model)
    inputs: list[Tensor] = []
    readers: list[Frozen] = []
    calibrated: list[Frozen] = []

    def finish() -> None:
        for x in inputs:
            calibrate(x.reshape(-1, x.shape[-1]), [(frozen.eight_bit, frozen) for frozen in readers])
        inputs.clear()
        readers.clear()

    def note(layer: AdaptedLayer, arguments: tuple[Tensor, ...]) -> None:
        if not arguments:
            return
        x = arguments[0]
        if inputs and inputs[0] is not x:
            finish()
        if x.numel() and (frozen := frozen_weight(layer.base_layer, x)) is not None:
            inputs[:] = [x]
            readers.append(Frozen(frozen.weight, adapters[layer].eight_bit))
            calibrated.append(readers[-1])

    def note_logits(module: Any, arguments: tuple[Tensor, ...]) -> None:
        finish()
        readers.append(Frozen(module.weight, eight_bit))
        inputs[:] = [arguments[0]]
        calibrated.append(readers[-1])

    hooks = [layer.register_forward_pre_hook(note) for layer in adapters]
    if (head := head_in_eight_bits(model)) is not None:
        eight_bit = head[1].eight_bit
        hooks.append(head[1].module.register_forward_pre_hook(note_logits))
    try:
        with adapter_disabled(model), as_the_step(stacks.values()):
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    finish()
    settle([(frozen.eight_bit, frozen) for frozen in calibrated])
    settle([(stack.eight_bit, stack.frozen) for stack in stacks.values()])
    left = [adapter for adapter in adapters.values() if adapter.eight_bit and adapter.eight_bit.channel is None]
    for adapter in left:
        adapter.eight_bit = None
    return len(left)


def restore(model: nn.Module) -> None:
    """Undo ``optimize_for_training`` and ``accelerate_peft``, also on a deep copy of a model that they changed."""
    if (state := model.__dict__.pop(ATTRIBUTE, None)) is not None:
        state["undo"]()


def use_attention(model: Any, undo: Undo, left: list[str]) -> bool:
    """Use rankwise's attention. Returns whether it now skips masked keys; if not, ``left`` gets the reason."""
    config = getattr(model, "config", None)
    if config is None or attention_of(config) != "sdpa":
        return False
    parameter = next(model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    text = text_config(config)
    dtype, width = getattr(model, "dtype", dtype), attention.head_width(text)
    why_not = attention.config_obstacle(text) or attention.obstacle(dtype, parameter, width)
    mine = Undo()
    if why_not is None:
        attention.register()
        model.set_attn_implementation(attention.NAME)
        mine.add(functools.partial(model.set_attn_implementation, "sdpa"))
        if replace_masks(model, mine, bounds=True) or not is_on_card(parameter):
            undo.add(mine)
            return True
        why_not = "its layers do not accept the bounds of rows as a mask"
        mine()
    if is_on_card(parameter):
        replace_masks(model, undo, bounds=False)
    if parameter.device.type in ("cpu", "cuda"):
        left.append(f"attention stays torch's: {why_not}")
    return False


def fuse_what_a_run_shows(
    model: nn.Module, undo: Undo, left: list[str] | None = None, *, fuse_loss: bool = True
) -> tuple[Head | None, int]:
    """Run two tokens through the model, and set up the fused loss and shared inputs.

    Returns the head whose loss can be fused, or None, and the number of groups of adapted layers that now share their
    input. ``left`` gets the reasons if there is none.
    """
    left = [] if left is None else left
    seen: list[Seen] = []
    # No layer shares the head's input, and a head with hooks would not be recognised as replaceable.
    layers = {name: layer for name, layer in adapted_layers(model) if layer is not output_head(model)}
    hooks = [layer.register_forward_hook(_noting(seen)) for layer in layers.values()]
    why_not = None
    try:
        head = answering_head(model) if fuse_loss else None
        if head is None:
            seen.clear()
            ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
            why_not = probe(model, lambda: model(input_ids=ids, use_cache=False), grad=True)[1]
    finally:
        for hook in hooks:
            hook.remove()
    head = None if head is None else losing_head(model, head)
    if fuse_loss and head is None:
        left.append("the loss stays the model's own: it is not the next-token loss of the output head's logits")
    if why_not is not None and layers:
        left.append(f"no layers share an input: the model could not be run with only token ids ({why_not})")
    _trust_handbacks(seen, undo)
    shared = _share_inputs({layer: _block_of(name) for name, layer in layers.items()}, seen, undo)
    return head, shared


def _share_inputs(blocks: dict[AdaptedLayer, str], seen: list[Seen], undo: Undo) -> int:
    """Group the adapted layers of a block that got the same tensor in the same gradient mode. Returns the number of
    groups.

    The gradient mode matters, since some models select what they attend to without gradients. Groups do not span
    blocks, since checkpointing recomputes one block at a time.
    """
    groups: dict[tuple[int, bool, str], list[AdaptedLayer]] = {}
    for call in seen:
        groups.setdefault((id(call.x), call.grad, blocks[call.layer]), []).append(call.layer)
    shared = [group for group in groups.values() if len(group) > 1 and len(set(group)) == len(group)]
    for group in shared:
        together = SharedInput(group)
        for layer in group:
            layer.shared = together
            undo.add(functools.partial(setattr, layer, "shared", None))
    return len(shared)


def _block_of(name: str) -> str:
    """The part of a module's name up to its last number, ``model.layers.3``; without a number, the parent module."""
    numbered = re.match(r"(.*\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def _trust_handbacks(seen: list[Seen], undo: Undo) -> None:
    """Let DoRA layers not save their output where a later operation returns it in the backward pass."""
    for call in seen:
        handback = offered_by(call.y)
        adapter = call.layer.at_work
        if handback is not None and handback.is_promised and isinstance(adapter, Dora):
            adapter.comes_back = True
            undo.add(functools.partial(setattr, adapter, "comes_back", False))


def _noting(seen: list[Seen]) -> Callable[[AdaptedLayer, tuple[Tensor, ...], Tensor], None]:
    def note(layer: AdaptedLayer, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            seen.append(Seen(layer, inputs[0], y, torch.is_grad_enabled()))

    return note


# PEFT is not imported: its layers are recognised by their attributes. PEFT still computes everything other than LoRA
# and DoRA over a linear layer: merged weights, several active adapters, mixed batches, other variants.

CARRIES = ("lora_A", "lora_B", "scaling", "lora_dropout", "base_layer", "lora_variant")
DORA_VARIANT = "DoraLinearVariant"
MISSING = "PEFT is not installed (`pip install peft`), and its get_peft_model makes such layers"


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
    assert isinstance(adapter, LowRankPair), "over a linear layer"
    adapter.dropout = _dropout(module, name)
    return A.dtype.is_floating_point


def _parameters(module: Any, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """PEFT's own A, B and m, the last None without DoRA."""
    m = None if module.lora_variant.get(name) is None else module.lora_magnitude_vector[name].weight
    return module.lora_A[name].weight, module.lora_B[name].weight, m


def _adapter_over(module: Any, base: nn.Module, name: str) -> LowRankPair:
    """A rankwise adapter that holds PEFT's parameters."""
    (A, B, m), scaling = _parameters(module, name), module.scaling[name]
    kind = Lora if m is None else Dora
    adapter = kind(base, A.shape[0], scaling, dropout=_dropout(module, name), device="meta")
    adapter.lora_A, adapter.lora_B, adapter.magnitude = A, B, m
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
