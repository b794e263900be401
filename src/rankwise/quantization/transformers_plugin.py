"""``quantize``, and the quantizer that transformers calls: quantizes while shards load, reads and writes bitsandbytes
checkpoints.

``from_pretrained`` builds the model on the meta device and calls ``_process_model_before_weight_loading``, which
replaces the linear layers to quantize by empty 4-bit ones. It then passes dense weights to `QuantizeOperation`, the
tensors of 4-bit weights to `DeserializeOperation`, which replaces their layers, and those of experts in MXFP4 to
`Mxfp4Operation`. transformers turns exceptions of all into a report, so they are collected and raised at the end.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from rankwise import ops
from rankwise.compat import transformers as compat
from rankwise.compat.torch import is_fake, is_sharded, own_parameters, own_part, own_rows, rows_of_all
from rankwise.constants import MXFP4
from rankwise.errors import QuantizationError, RankwiseError, RunError, some_of
from rankwise.ops.checks import DTYPES
from rankwise.ops.gguf_blocks import BLOCK_TYPES, LARGEST_EXPONENT
from rankwise.ops.packed_weight import QUANT_TYPES, PackedWeight, format_of
from rankwise.quantization.config import METHOD, PARTS, FourBitConfig, check_shape, from_bitsandbytes, to_bitsandbytes
from rankwise.quantization.experts import (
    StackScales,
    dequantize,
    four_bit_stacks,
    obstacle,
    put_stack,
    quantize_stack,
    replace_layer,
    stack_at,
    stack_tensors,
)
from rankwise.quantization.linear import (
    SUFFIX,
    FourBitModule,
    Linear4bit,
    features,
    is_conv1d,
    is_dense_linear,
    with_large_in_file,
)
from rankwise.quantization.targets import (
    dense_linear_names,
    expert_tensors,
    four_bit_layers,
    four_bit_modules,
    is_finite,
    target_names,
    target_stacks,
    warn_about_experts,
)

# What transformers passes to an operation for one name.
Read = Tensor | list[Tensor]


def register() -> None:
    """Register the method with transformers. `rankwise.quantization` calls this when ``FourBitConfig`` is imported."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(FourBitQuantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FourBitConfig)


def mark_quantized(model: PreTrainedModel, config: FourBitConfig) -> None:
    """Set on a model that ``quantize`` changed the attributes that ``from_pretrained`` sets on a quantized model."""
    register()
    marked: Any = model
    quantizer = FourBitQuantizer(config, pre_quantized=False)
    marked.is_quantized, marked.quantization_method = True, METHOD
    marked.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    compat.mark_quantized(model)
    describe(model, quantizer.quantization_config)


def describe(model: nn.Module, config: FourBitConfig) -> None:
    """Update the fields of ``config`` that describe the model's layers, as ``config.json`` stores them."""
    first = next(four_bit_modules(model), None)
    config.dense_modules = dense_linear_names(model)
    if first is not None:
        config.weights_dtype, config.double_quant, config.block_size = first.dtype, first.double_quant, first.block_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The result of ``quantize``."""

    # Names of the layers that are 4-bit now.
    layers: tuple[str, ...]
    # Names of the stacked expert tensors that are 4-bit now.
    stacks: tuple[str, ...]
    # Linear layers that stay dense.
    dense: tuple[str, ...]
    # Stacked expert tensors that stay dense.
    experts: tuple[str, ...]
    # Bytes of the dense weights before quantization.
    bytes_before: int
    # Bytes of their codes and scales.
    bytes_after: int

    def __str__(self) -> str:
        kept = ", ".join(self.dense[:3]) + (", ..." if len(self.dense) > 3 else "")
        stacks = f" and {len(self.stacks)} tensors of experts" if self.stacks else ""
        return (
            f"{len(self.layers)} layers{stacks} quantized "
            f"({self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB); "
            f"{len(self.dense)} stay dense{f' ({kept})' if kept else ''}"
        )


@torch.no_grad()
def quantize(model: nn.Module, config: FourBitConfig) -> QuantizationReport:
    """Replace the linear layers of ``model`` by 4-bit ones, in place, one at a time, freeing each dense weight.

    Stacked experts are quantized too, and then computed one expert at a time. The output head, embeddings and
    ``config.modules_to_not_convert`` stay dense. transformers then regards the model as quantized: adapters can be
    trained on it, and ``save_pretrained`` writes bitsandbytes' format.

    Raises:
        QuantizationError: RW603 for NaN or infinity in a weight, RW605 for a weight of a different dtype, RW610 where
            nothing can be quantized, or the model is quantized or has adapters, RW615 for a different config. The model
            is then unchanged.

    Warns (RW613) of experts that cannot be quantized, with the reason.
    """
    _check_model(model, config)
    targets, stacks = target_names(model, config), target_stacks(model, config)
    _check_weights(model, [*(f"{names[0]}.weight" for names in targets), *stacks])
    weight_format = {**format_of(config), "compute_dtype": config.compute_dtype}
    bytes_before = bytes_after = 0
    for names in targets:
        bytes_before += model.get_parameter(f"{names[0]}.weight").nbytes
        layer = Linear4bit.from_linear(model.get_submodule(names[0]), **weight_format)
        bytes_after += layer.weight.nbytes + sum(buffer.nbytes for buffer in layer.buffers())
        for name in names:
            replace_layer(model, name, layer)
    for name in stacks:
        path, _, leaf = name.rpartition(".")
        bytes_before += model.get_parameter(name).nbytes
        stack = quantize_stack(model.get_submodule(path), leaf, **weight_format)
        bytes_after += stack.codes.nbytes + sum(buffer.nbytes for buffer in stack.scales.buffers())
    warn_about_experts(model, config)
    if isinstance(model, PreTrainedModel):
        mark_quantized(model, config)
    layers = tuple(names[0] for names in targets)
    dense, experts = tuple(dense_linear_names(model)), tuple(expert_tensors(model))
    return QuantizationReport(
        layers=layers,
        stacks=tuple(stacks),
        dense=dense,
        experts=experts,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
    )


def _check_model(model: nn.Module, config: FourBitConfig) -> None:
    if not isinstance(config, FourBitConfig) or not config.quant_type:
        raise QuantizationError(
            "RW615", f"quantize needs an Nf4Config or Fp4Config, and got a {type(config).__name__}."
        )
    if isinstance(model, Linear4bit) or is_conv1d(model) or type(model) is nn.Linear:
        raise QuantizationError(
            "RW610", "quantize replaces layers inside a model; use Linear4bit.from_linear for a single layer."
        )
    if getattr(getattr(model, "rankwise_adapters", None), "configs", None):
        raise QuantizationError(
            "RW610",
            "the model has adapters; quantize it before adding adapters, or merge them with reversible=False.",
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    if method != METHOD or any(four_bit_modules(model)):
        raise QuantizationError("RW610", f"the model is quantized already ({getattr(method, 'value', method)}).")


def _check_weights(model: nn.Module, names: list[str]) -> None:
    weights = [(name.removesuffix(".weight"), model.get_parameter(name)) for name in names]
    wrong = [f"{name} ({W.dtype})" for name, W in weights if W.dtype not in DTYPES]
    if wrong:
        raise QuantizationError(
            "RW605",
            f"4-bit quantization takes float32, bfloat16 or float16, and not the weights of {some_of(wrong)}: convert "
            "them first, or name them in modules_to_not_convert.",
        )
    broken = [name for name, W in weights if not (W.is_meta or is_fake(W) or is_finite(W))]
    if broken:
        raise QuantizationError(
            "RW603",
            f"NaN or infinity in the weights of {some_of(broken)}: 4-bit types have no code for them. "
            "The checkpoint is damaged or the training that made it diverged; use a different one.",
        )


class FourBitQuantizer(HfQuantizer):
    """The ``HfQuantizer`` of a 4-bit model, which transformers calls while it loads, trains and saves the model."""

    requires_calibration = False
    quantization_config: FourBitConfig
    serialized_names = {"weight": ["weight", *(f"weight.{part}" for part in PARTS)]}  # noqa: RUF012  (transformers' own)

    def __init__(self, quantization_config: FourBitConfig, **arguments: Any) -> None:
        # A copy: `describe` writes facts about this model into it, and the caller may reuse the original.
        super().__init__(copy.copy(quantization_config), **arguments)
        self.failures: list[RankwiseError] = []
        self.loaded: set[str] = set()
        self.transposed: set[str] = set()

    def validate_environment(self, *_: object, device_map: Any = None, **__: object) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise QuantizationError("RW615", "4-bit layers cannot be offloaded to disk; give a device_map without it.")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        module, leaf = _owner(model, param_name)
        stack = stack_at(module, leaf)
        is_quantized = stack is not None and not stack.is_in_file_blocks
        return (leaf == "weight" and isinstance(module, Linear4bit)) or is_quantized

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # The Trainer detects PEFT adapters only, and refuses a quantized model without one unless this is True.
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOperation(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": DeserializeOperation}

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Add the conversions that read stored 4-bit experts before all others, with the model's names as targets."""
        found = super().update_weight_conversions(weight_conversions, model)
        if self.quantization_config.experts_in_mxfp4:
            ends = {_end(name) for name, stack in four_bit_stacks(model) if stack.is_in_file_blocks}
            of_file = [
                WeightConverter(
                    [rf"\.{re.escape(end)}_{part}$" for part in MXFP4_PARTS], f".{end}", [Mxfp4Operation(self)]
                )
                for end in sorted(ends)
            ]
            return [*of_file, *found]
        return [*self._stack_conversions(model), *found] if self.pre_quantized else found

    def _stack_conversions(self, model: PreTrainedModel) -> list[WeightConverter]:
        stacks = [*expert_tensors(model), *(name for name, _ in four_bit_stacks(model))]
        conversions = []
        for end in sorted({_end(name) for name in stacks}):
            endings = ("", *(f".{part}" for part in PARTS))
            parts = {rf"\.{re.escape(end + part)}$": f"weight{part}" for part in endings}
            conversions.append(WeightConverter([*parts], f".{end}", [DeserializeOperation(self, parts)]))
        return conversions

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        config = self.quantization_config
        if config.experts_in_mxfp4:
            put_mxfp4(model)
        if not self.pre_quantized and config.quant_type in QUANT_TYPES:
            stacks = target_stacks(model, self.quantization_config)
            for names in target_names(model, self.quantization_config):
                self._put_empty(model, names)
            for name in stacks:
                self._put_empty_stack(model, name)
            layers = [f"{name}.weight" for name, _ in four_bit_layers(model)]
            compat.read_as_given(model, [*layers, *stacks])
        return model

    def _put_empty(self, model: PreTrainedModel, names: list[str], stored: PackedWeight | None = None) -> Linear4bit:
        """Replace the dense layer by an empty `Linear4bit`, whose weight is loaded later; return the new layer."""
        linear = model.get_submodule(names[0])
        config = self.quantization_config
        layer = Linear4bit(
            *features(linear),
            **format_of(stored or config),
            # The dtype that the model is loaded in: a merged layer must have the dtype of its neighbours.
            dtype=linear.get_parameter("weight").dtype,
            compute_dtype=config.compute_dtype,
            device="meta",
            was_conv1d=is_conv1d(linear),
        )
        layer.bias = own_parameters(linear)["bias"]
        layer.train(linear.training)
        for name in names:
            if is_conv1d(linear) and stored is None:
                self.transposed.add(f"{name}.weight")
            model.set_submodule(name, layer)
        return layer

    def _put_empty_stack(self, model: PreTrainedModel, name: str, stored: PackedWeight | None = None) -> StackScales:
        """Replace a dense tensor of experts by an empty stack. Raises QuantizationError RW611 for a stored stack that
        does not fit the model."""
        module, leaf = _owner(model, name)
        dense, config = model.get_parameter(name), self.quantization_config
        if stored is not None:
            check_shape(name, stored.shape, dense.shape)
            if (reason := obstacle(module, leaf, tuple(stored.shape), stored.block_size)) is not None:
                raise QuantizationError("RW611", f"the 4-bit experts {name} cannot be computed with: {reason}.")
        scales = StackScales(
            tuple(dense.shape),
            **format_of(stored or config),
            dtype=dense.dtype,
            compute_dtype=config.compute_dtype,
            device="meta",
        )
        put_stack(module, leaf, scales)
        # Otherwise transformers' initialization fills missing codes with random numbers before RW612 is raised.
        compat.mark_initialized(module)
        return scales

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        self._raise_failures(model)
        # transformers would run the inverse conversions while saving, but `bitsandbytes_state` writes the tensors.
        conversions = compat.conversions_of(model) or []
        compat.set_conversions(model, [item for item in conversions if not _is_ours(item)])
        describe(model, self.quantization_config)
        if self.quantization_config.experts_in_mxfp4:
            return model
        warn_about_experts(model, self.quantization_config, stored=self.pre_quantized)
        return model

    def _raise_failures(self, model: PreTrainedModel) -> None:
        missing = [name for name, _ in four_bit_layers(model) if f"{name}.weight" not in self.loaded]
        for name, stack in four_bit_stacks(model):
            path = name.rpartition(".")[0]
            others = stack.experts.named_parameters(prefix=path, recurse=False)
            missing += [other for other, tensor in others if not compat.is_initialized(tensor)]
        missing = list(dict.fromkeys(missing))
        if self.pre_quantized and not self.loaded and not self.failures:
            raise QuantizationError(
                "RW611", "config.json says that the checkpoint is 4-bit, but it holds no 4-bit weight."
            )
        if missing and not self.failures:
            raise QuantizationError(
                "RW612", f"the checkpoint has no weights for {some_of(missing)}; it belongs to a different model."
            )
        if self.failures:
            messages = dict.fromkeys(failure.message.rstrip(".") for failure in self.failures)
            raise type(self.failures[0])(self.failures[0].code, f"{some_of(messages, 3, '; ')}.")

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state in bitsandbytes' layout; called by ``save_pretrained`` before it writes the config."""
        state = bitsandbytes_state(model)
        _keep_stacks_whole(model)
        if any(four_bit_modules(model)):
            model.config.quantization_config = self.quantization_config
            describe(model, self.quantization_config)
        else:
            # Merged: config.json must not say 4-bit. The quantizer stays, since unmerging restores the 4-bit layers.
            model.config.__dict__.pop("quantization_config", None)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize(model, dtype)
        compat.forget_conversions(model)
        return model


def put_mxfp4(model: nn.Module, device: torch.device | str = "meta") -> None:
    """Replace all dense stacks of experts by empty ones in MXFP4. Raises QuantizationError (RW611) for experts that
    cannot be computed with so."""
    kind = BLOCK_TYPES[MXFP4]
    for name in expert_tensors(model):
        module, leaf = _owner(model, name)
        dense = model.get_parameter(name)
        E, N, K = dense.transpose(1, 2).shape if getattr(module, "is_transposed", False) else dense.shape
        reason = obstacle(module, leaf, (E, N, K), kind.elements)
        if reason is None and K % kind.elements:
            reason = f"their rows of {K} weights are not whole blocks of {kind.elements}"
        if reason is not None:
            raise QuantizationError("RW611", f"the experts {name} in MXFP4 cannot be computed with: {reason}.")
        scales = StackScales(
            (E, N, K), quant_type=MXFP4, block_size=kind.elements, double_quant=False, dtype=dense.dtype, device=device
        )
        put_stack(module, leaf, scales)
        compat.mark_initialized(module)


def bitsandbytes_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with every 4-bit layer and stack of experts under bitsandbytes' names."""
    state = model.state_dict(keep_vars=True)
    # By identity: a wrapper around a layer may show it under a name that is not its path.
    names = {id(tensor): name for name, tensor in state.items()}
    for _, layer in four_bit_layers(model):
        name = names[id(layer.weight)]
        prefix = name.removesuffix("weight")
        for own in ("weight", "absmax", "nested_absmax", "offset"):
            state.pop(prefix + own, None)
        state.update({prefix + key: tensor for key, tensor in to_bitsandbytes("weight", layer.packed).items()})
    for _, stack in four_bit_stacks(model):
        name = names[id(stack.codes)]
        for own in ("absmax", "nested_absmax", "offset"):
            state.pop(f"{name}{SUFFIX}.{own}", None)
        state.update(to_bitsandbytes(name, stack.packed))
    return {name: tensor.detach() if isinstance(tensor, Tensor) else tensor for name, tensor in state.items()}


def _keep_stacks_whole(model: PreTrainedModel) -> None:
    """Remove conversions that would split 4-bit stacks: ``save_pretrained`` may write one tensor for each expert."""
    stacks = [name for name, _ in four_bit_stacks(model)]
    if not stacks:
        return
    found = compat.conversions_of(model)
    found = compat.known_conversions(model) if found is None else found
    compat.set_conversions(model, [item for item in found if not _makes(item, stacks)])


def _makes(conversion: WeightTransform, names: list[str]) -> bool:
    """Whether the conversion makes one of the parameters ``names``."""
    return isinstance(conversion, WeightConverter) and any(
        re.search(rf"{target}(?!\w)", name) for target in conversion.target_patterns for name in names
    )


class QuantizeOperation(ConversionOps):
    """Turns a dense weight into codes and scales as soon as it is read."""

    def __init__(self, hf_quantizer: FourBitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Read], *_: object, model: Any = None, **__: object) -> dict[str, Any]:
        tensors: dict[str, Read] = {}
        for name, value in input_dict.items():
            module, leaf = _owner(model, name)
            stack = stack_at(module, leaf)
            if stack is not None:
                found = self._quantized(name, _single(value), stack.scales)
                tensors |= stack_tensors(found, name)
            elif leaf == "weight" and isinstance(module, Linear4bit):
                found = self._quantized(name, _single(value), module)
                tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in found.tensors.items()}
            else:
                tensors[name] = value
        return tensors

    def _quantized(self, name: str, value: Tensor, layer: FourBitModule) -> PackedWeight:
        quantizer = self.hf_quantizer
        weight = value.T if name in quantizer.transposed else value
        quantizer.loaded.add(name)
        shared = layer if isinstance(layer, Linear4bit) and is_sharded(layer.weight) else None
        shape = layer.shape if shared is None else (len(own_part(shared.weight)), shared.in_features)
        double_quant = layer.double_quant and shared is None
        try:
            if weight.shape != shape:
                raise QuantizationError("RW612", f"it has shape {tuple(weight.shape)} where the model needs {shape}")
            found = ops.quantize_weight(weight, layer.quant_type, layer.block_size, double_quant)
        except QuantizationError as error:
            quantizer.failures.append(QuantizationError(error.code, f"{name}: {error.message}"))
            # Loading continues; `_raise_failures` raises at its end.
            nothing = torch.zeros(shape, device=value.device)
            found = ops.quantize_weight(nothing, layer.quant_type, layer.block_size, double_quant)
        if shared is not None:
            return _scaled_with_others(found, shared)
        try:
            return with_large_in_file(found)
        except RunError as failure:
            quantizer.failures.append(failure)
            return found


def _scaled_with_others(share: PackedWeight, layer: Linear4bit) -> PackedWeight:
    """This process's rows of a sharded weight, with second-level scales that are computed from the rows of all
    processes.
    """
    blocks = layer.in_features // layer.block_size
    absmax = rows_of_all(share.absmax.view(len(share.codes), blocks), layer.weight).flatten()
    nested_absmax = offset = None
    if layer.double_quant:
        absmax, nested_absmax, offset = ops.quantize_absmax(absmax)
    return dataclasses.replace(share, absmax=own_rows(absmax, layer.absmax), nested_absmax=nested_absmax, offset=offset)


class DeserializeOperation(ConversionOps):
    """Turns the tensors of a stored 4-bit weight into codes and scales. Dense weights pass, cast to the model's dtype.

    ``parts``: {pattern that matches a tensor: the name that it would have for a linear layer}, where the two differ.
    """

    def __init__(self, hf_quantizer: FourBitQuantizer, parts: Mapping[str, str] = MappingProxyType({})) -> None:
        self.hf_quantizer, self.parts = hf_quantizer, parts

    def __deepcopy__(self, memo: dict[int, object]) -> DeserializeOperation:
        # transformers copies the operation for each weight; all copies must share one quantizer.
        return DeserializeOperation(self.hf_quantizer, self.parts)

    def convert(
        self, input_dict: dict[str, Read], *_: object, model: Any = None, full_layer_name: str = "", **__: object
    ) -> dict[str, Any]:
        parts = {self.parts.get(name, name): _single(value) for name, value in input_dict.items()}
        if set(parts) == {"weight"} and parts["weight"].is_floating_point():
            return {full_layer_name: parts["weight"].to(_wanted_dtype(model, full_layer_name))}
        try:
            return self._deserialized(parts, model, full_layer_name)
        except QuantizationError as error:
            self.hf_quantizer.failures.append(error)
            return {}

    def _deserialized(self, parts: dict[str, Tensor], model: PreTrainedModel, full_name: str) -> dict[str, Tensor]:
        module, leaf = _owner(model, full_name)
        named = {name.replace("weight", full_name, 1): tensor for name, tensor in parts.items()}
        stored = from_bitsandbytes(named, full_name)
        self.hf_quantizer.loaded.add(full_name)
        if leaf != "weight":
            return self._stack(stored, model, full_name)
        prefix = full_name.removesuffix("weight")
        if is_dense_linear(module):
            module = self.hf_quantizer._put_empty(model, [prefix.removesuffix(".")], stored)
        if not isinstance(module, Linear4bit):
            raise QuantizationError(
                "RW611",
                f"the 4-bit weight {full_name} belongs to a {type(module).__name__}, which is not a linear layer.",
            )
        check_shape(full_name, stored.shape, module.shape)
        module.set_format(stored.quant_type, stored.block_size, stored.double_quant, module.dtype, "meta")
        return {prefix + name: tensor for name, tensor in stored.tensors.items()}

    def _stack(self, stored: PackedWeight, model: PreTrainedModel, name: str) -> dict[str, Tensor]:
        module, leaf = _owner(model, name)
        stack = stack_at(module, leaf)
        scales = self.hf_quantizer._put_empty_stack(model, name, stored) if stack is None else stack.scales
        check_shape(name, stored.shape, scales.shape)
        return stack_tensors(stored, name)


# The ends of the names of a stack's tensors in gpt-oss' files: codes (E, N, K / 32, 16), exponents (E, N, K / 32).
MXFP4_PARTS = ("blocks", "scales")


class Mxfp4Operation(ConversionOps):
    """Gives a stack in MXFP4 its two tensors of the file, of which they stay views."""

    def __init__(self, hf_quantizer: FourBitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, object]) -> Mxfp4Operation:
        return Mxfp4Operation(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Read], *_: object, model: Any = None, full_layer_name: str = "", **__: object
    ) -> dict[str, Any]:
        module, leaf = _owner(model, full_layer_name)
        scales = getattr(module, leaf + SUFFIX)
        E, N, K = scales.shape
        parts = {name.rpartition("_")[2].rstrip("$"): _single(value) for name, value in input_dict.items()}
        wanted = {"blocks": (E, N, K // 32, 16), "scales": (E, N, K // 32)}
        wrong = [
            f"{leaf}_{name} is {'missing' if part is None else f'{tuple(part.shape)} of {part.dtype}'}"
            for name, shape in wanted.items()
            if (part := parts.get(name)) is None or tuple(part.shape) != shape or part.dtype is not torch.uint8
        ]
        if not wrong and int(parts["scales"].max()) > LARGEST_EXPONENT:
            wrong = [f"{leaf}_scales holds exponents above {LARGEST_EXPONENT}, whose weights are infinite"]
        if wrong:
            fault = f"{full_layer_name} in MXFP4 wants uint8 of {wanted}: {'; '.join(wrong)}"
            self.hf_quantizer.failures.append(QuantizationError("RW611", f"{fault}."))
            return {}
        self.hf_quantizer.loaded.add(full_layer_name)
        return {
            full_layer_name: parts["blocks"].reshape(E * N, K // 2),
            f"{full_layer_name}{SUFFIX}.absmax": parts["scales"].reshape(-1),
        }


def _end(name: str) -> str:
    """The last two components of a stack's name, the same in every layer: experts.gate_up_proj."""
    return ".".join(name.split(".")[-2:])


def _wanted_dtype(model: Any, name: str) -> torch.dtype:
    """The dtype of a weight that stays dense, which transformers does not cast here: the dtype plan's, where one of its
    patterns matches, else the parameter's.
    """
    parameter = model.get_parameter_or_buffer(name)
    for pattern, dtype in compat.dtype_plan(model, model.config.dtype).items():
        if re.search(pattern.replace("*", ".*"), name):
            return dtype
    return parameter.dtype


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _single(value: Read) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _is_ours(conversion: WeightTransform) -> bool:
    return any(isinstance(item, DeserializeOperation) for item in getattr(conversion, "operations", ()))
