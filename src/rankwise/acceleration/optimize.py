"""``optimize_for_training``: apply all accelerations of a training step in place, reversibly, and report them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.acceleration import attention
from rankwise.acceleration.attention import replace_masks
from rankwise.acceleration.checkpointing import replace_checkpointing
from rankwise.acceleration.loss import Head, accept_labels, answering_head, losing_head, output_head
from rankwise.acceleration.memory import keep_freed_memory
from rankwise.acceleration.parts import adapted_layers, replace_linears, replace_mlps, replace_norms, replace_ropes
from rankwise.acceleration.replace import ATTRIBUTE, Undo, probe
from rankwise.adapters.dora import Dora
from rankwise.adapters.inject import adapter_disabled
from rankwise.adapters.layer import AdaptedLayer, SharedInput
from rankwise.adapters.lora import Lora
from rankwise.adapters.low_rank import frozen_weight
from rankwise.compat.transformers import attention_of, checkpoints_in_forward, text_config
from rankwise.constants import EQUAL_IN_EIGHT_BITS
from rankwise.ops.branch import Frozen, eight_bit_pays
from rankwise.ops.eight_bit import EightBit, calibrate, settle
from rankwise.ops.saved import offered_by
from rankwise.ops.selection import is_on_card
from rankwise.quantization.linear import features


@dataclasses.dataclass(frozen=True)
class Seen:
    """A call of a layer."""

    layer: AdaptedLayer
    x: Tensor
    y: Tensor
    # Whether gradients were recorded.
    grad: bool


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """The changes to a model: counts of modules, and the reasons why some were not changed."""

    # Number of groups of adapted layers that make one pass over their common input.
    shared_inputs: int = 0
    norms: int = 0
    mlps: int = 0
    ropes: int = 0
    # Number of frozen layers without an adapter, for whose products PyTorch has no fast instructions here.
    linears: int = 0
    # Number of layers whose frozen products are in 8 bits.
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
            (self.eight_bit, f"frozen products of {self.eight_bit} layers in 8 bits while training"),
            (self.fused_loss, "loss in chunks of labelled tokens"),
            (self.keeps_memory, "freed memory is kept"),
        ]
        parts = [text for is_done, text in done if is_done]
        return "; ".join([*(parts or ["nothing to speed up"]), *self.left_alone])


def optimize_for_training(
    model: nn.Module, *, keep_memory: bool = True, products: Literal["bfloat16", "int8"] = "bfloat16"
) -> Acceleration:
    """Make training steps of ``model`` faster, in place. Results stay the same up to rounding.

    Call it after ``add_adapter``. Shared inputs and the fused loss apply to every device. Norms, rotary positions and
    gated MLPs are fused on a CPU and, by Triton, on CUDA. Attention is replaced on CPUs, and on CUDA for concatenated
    rows; the allocator's settings apply to CPUs. In your own loop, ``model(input_ids=ids, labels=ids).loss`` is the
    fused loss, and that output has no logits, except without gradients. Another call starts over.
    ``rankwise.acceleration.restore(model)`` undoes everything except the allocator's thresholds.

    Args:
        model: A transformers model with an adapter.
        keep_memory: On a CPU with glibc, keep freed blocks for the next step instead of returning them to the system.
        products: ``"int8"`` computes the frozen products of adapted layers in 8 bits while the model trains
            (`rankwise.ops.eight_bit`); the first batch gives the scales of input channels. Evaluation mode, attention,
            norms, head, loss and the adapters themselves keep their precision.

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


def choose_products(model: nn.Module) -> tuple[Literal["bfloat16", "int8"], str]:
    """The frozen products that ``--products auto`` takes for this model on this device, and why."""
    family = getattr(getattr(model, "config", None), "model_type", "")
    if family not in EQUAL_IN_EIGHT_BITS:
        return "bfloat16", "--products int8 may be faster; it was not yet shown to learn as well on this family"
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if not eight_bit_pays(parameter):
        return "bfloat16", "8 bits are not known to be 1.2 times as fast here"
    return "int8", f"as good for {family} models, and faster here; --products to change"


def use_eight_bit(model: nn.Module, undo: Undo) -> int:
    """Compute the frozen products of adapted linear layers in 8 bits, except those of the head and those whose sizes
    are no multiples of 32. Returns their number."""
    count = 0
    for _, layer in adapted_layers(model):
        adapter = layer.at_work
        if isinstance(adapter, Lora | Dora) and adapter.parts is None and not layer.is_head:
            if any(size % 32 for size in features(layer.base_layer)):
                continue
            adapter.eight_bit = EightBit()
            undo.add(functools.partial(setattr, adapter, "eight_bit", None))
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
    head, shared_inputs = look_into(model, undo, left, fuse_loss=fuse_loss)
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


@torch.no_grad()
def calibrate_products(model: nn.Module, ids: Tensor) -> None:
    """Give the weights whose products are in 8 bits their channel scales, from ids (1, L) through the model without its
    adapters: the same scales whenever the base is the same."""
    adapters = {layer: found for _, layer in adapted_layers(model) if isinstance(found := layer.at_work, Lora | Dora)}
    inputs: list[Tensor] = []
    readers: list[Frozen] = []
    calibrated: list[Frozen] = []

    def finish() -> None:
        for x in inputs:
            calibrate(x.reshape(-1, x.shape[-1]), readers)
        inputs.clear()
        readers.clear()

    def note(layer: AdaptedLayer, arguments: tuple[Tensor, ...]) -> None:
        if not arguments:
            return
        x = arguments[0]
        if inputs and inputs[0] is not x:
            finish()
        if (frozen := frozen_weight(layer.base_layer, x)) is not None:
            inputs[:] = [x]
            readers.append(Frozen(frozen.weight, adapters[layer].eight_bit))
            calibrated.append(readers[-1])

    hooks = [layer.register_forward_pre_hook(note) for layer in adapters]
    try:
        with adapter_disabled(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    finish()
    settle(calibrated)


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


def look_into(
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
