"""The private parts of transformers that rankwise uses. Functions import transformers when they need it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightTransform

Config = TypeVar("Config", bound="PreTrainedConfig | None")


@contextlib.contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Within this context, the attribute of each (owner, its name, value) has the value; an owner is anything with
    ``vars``."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in before:
            setattr(*change)


# --- configurations ---

# Subclasses of ``nn.Linear`` whose forward does not return W x + b, so that no update can be added: routers return a
# tuple of scores, grouped layers apply one block of W to each group.
OTHER_RESULTS = frozenset({"Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear"})


def text_config(config: Config) -> Config:
    """The configuration of the text part; one that is not transformers', or None, as it is."""
    return getattr(config, "get_text_config", lambda: config)()


def attention_of(config: PreTrainedConfig | None) -> str | None:
    """The name of the attention implementation, which transformers can set publicly but not read."""
    return getattr(config, "_attn_implementation", None)


def heads_of_labels(model: nn.Module) -> list[str]:
    """The modules beside the layers of a model that answers with labels; empty for any other model."""
    kinds = (kind.__name__ for kind in type(model).__mro__)
    if not any(name.endswith("ForSequenceClassification") for name in kinds):
        return []
    body = getattr(model, "base_model_prefix", "")
    return [name for name, part in model.named_children() if name != body and any(True for _ in part.parameters())]


def names_windows(model: nn.Module) -> bool:
    """Whether the class declares flash-attention support: its layers pass their sliding windows to the attention
    function instead of relying on a mask.
    """
    return getattr(model, "_supports_flash_attn", False)


def choose_experts(config: PreTrainedConfig, name: str) -> None:
    """Set the implementation of experts in all parts of a configuration. A model's ``set_experts_implementation``
    refuses names that the class does not list.
    """
    config._experts_implementation = name


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Register ``name`` as an implementation of experts, for which transformers exports no interface."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def choose_experts_of_module(config: PreTrainedConfig, name: str) -> None:
    """As `choose_experts` for one module's copy of a configuration, without the setter's check of its parts."""
    config._experts_implementation_internal = name


def spreads_experts(experts: nn.Module) -> bool:
    """Whether expert parallelism holds a part of the experts on each device."""
    return getattr(experts, "_is_expert_parallel", False)


def gate_of(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function between the first and the second product of an expert. Families override it."""
    return getattr(experts, "_apply_gate" if experts.has_gate else "act_fn")


# --- a model's declarations about its weights ---


def kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    """The names of modules that the class keeps in float32 instead of float16."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def dense_by_default(model: PreTrainedModel) -> list[str]:
    """Names of the modules that transformers' own quantizers leave dense: heads, modules tied to them, and float32
    ones.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    return [*get_keys_to_not_convert(model), *kept_in_float32(model)]


def is_converted(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's name matches none of ``patterns``, in the notation of ``modules_to_not_convert``."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return should_convert_module(name, list(patterns))


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """{pattern: dtype} of the weights that loading a model in ``dtype`` converts to a different dtype."""
    return model._get_dtype_plan(dtype)


def read_as_given(model: Any, names: Iterable[str]) -> None:
    """Let loading read the weights ``names`` in the dtype that the model is loaded in, as it does from 5.23 on; before,
    it casts them to the dtype of the parameters, which holds codes."""
    before, ours = model._get_dtype_plan, [f"^{re.escape(name)}$" for name in names]
    model._get_dtype_plan = lambda dtype: {**before(dtype), **dict.fromkeys(ours, dtype)}


def mark_quantized(model: PreTrainedModel) -> None:
    """Mark each part of the model that is itself a model as quantized, as loading does."""
    from transformers.quantizers.base import _assign_is_quantized

    _assign_is_quantized(model)


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from initialising the module's missing weights with random numbers."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def is_initialized(tensor: Tensor) -> bool:
    """Whether loading found a weight for the tensor."""
    return getattr(tensor, "_is_hf_initialized", False)


def tie_weights_as(model: Any, is_tied: bool, keys: dict[str, str]) -> tuple[bool, dict[str, str]]:
    """Set the attributes by which saving leaves out tied weights ({name: the one it is tied to}). Returns their
    earlier values.
    """
    before = (model.config.tie_word_embeddings, dict(getattr(model, "all_tied_weights_keys", {})))
    model.config.tie_word_embeddings, model.all_tied_weights_keys = is_tied, keys
    return before


def saved_by_any_rank(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose ``save_pretrained`` now writes in every process that calls it: by itself it writes nothing in
    one of torch.distributed whose rank is not 0."""
    vars(model)["should_save_on_this_rank"] = bool
    return model


# --- conversions between the names and shapes in files and those of a model ---


def conversions_of(model: PreTrainedModel) -> list[WeightTransform] | None:
    """The conversions of loading, whose inverse saving applies; None for a model that was not loaded."""
    return getattr(model, "_weight_conversions", None)


def known_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversions whose inverse saving applies to a model that was not loaded: the family's, without prefixes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known = get_model_conversion_mapping(model, add_legacy=False)
    return [item for item in known if not isinstance(item, PrefixChange)]


def set_conversions(model: PreTrainedModel, conversions: list[WeightTransform]) -> None:
    model._weight_conversions = conversions  # type: ignore[assignment]


def forget_conversions(model: PreTrainedModel) -> None:
    """Drop the conversions, as transformers does from 5.24 on when it dequantizes, so that dense stacks are saved in
    the family's format."""
    vars(model).pop("_weight_conversions", None)


def is_experts_family(kind: str, family: str) -> bool:
    """Whether models of type ``kind`` are converted as those of ``family``; PEFT reads the same table."""
    from transformers import conversion_mapping

    return conversion_mapping._MODEL_TO_CONVERSION_PATTERN.get(kind) == family


# --- loading ---


def is_converted_by_parts(model: PreTrainedModel) -> bool:
    """Whether parameters are made of several tensors of the files, so that no process can read only its rows."""
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(item, WeightConverter) for item in known_conversions(model))


@contextlib.contextmanager
def without_accelerate() -> Iterator[None]:
    """Within this context, ``from_pretrained`` reads GGUF and loads to one device where accelerate is not installed: it
    refuses both without accelerate, and uses nothing of it."""
    from transformers import modeling_utils
    from transformers.integrations import accelerate

    with _replaced(*((asker, "is_accelerate_available", lambda *_: True) for asker in (modeling_utils, accelerate))):
        yield


@contextlib.contextmanager
def before_weights(prepare: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Within this context, ``from_pretrained`` passes each model to ``prepare`` before it reads weights.

    If ``prepare`` made parameters DTensors, a process reads only its own rows of them.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model

    def prepare_and_load(model: PreTrainedModel, *arguments: Any, **more: Any) -> Any:
        prepare(model)
        return load(model, *arguments, **more)

    with _replaced((PreTrainedModel, "_load_pretrained_model", staticmethod(prepare_and_load))):
        yield


# --- the forward pass ---


@contextlib.contextmanager
def fake_masks_looked_at() -> Iterator[None]:
    """Within this context, transformers asks a fake mask whether it hides anything, as it asks a real one.

    By itself it assumes that every fake mask hides something, and keeps a mask that real steps of a single row drop.
    """
    from transformers import masking_utils

    before = vars(masking_utils)["is_tracing"]
    with _replaced((masking_utils, "is_tracing", lambda tensor=None: before())):
        yield


ROTARY = "apply_rotary_pos_emb"


def rotary_of(module_name: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function that turns q and k in the modeling code of a family, or None if that has none."""
    return getattr(sys.modules.get(module_name), ROTARY, None)


def set_rotary(module_name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Replace the function: the modeling code calls it as a global name, and no option chooses it."""
    setattr(sys.modules[module_name], ROTARY, function)


def checkpoints_in_forward() -> bool:
    """Whether a block under gradient checkpointing calls the function within its forward, as from 5.23 on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" not in vars(GradientCheckpointingLayer)


def checkpointing_of(block: Any) -> Callable[..., Any]:
    """The function that a block under gradient checkpointing calls in place of its own forward."""
    return block._gradient_checkpointing_func


@contextlib.contextmanager
def checkpointing_by(block: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context, the block calls ``function``: transformers lets a model choose options, not the function."""
    with _replaced((block, "_gradient_checkpointing_func", function)):
        yield


def collects_outputs() -> bool:
    """Whether the present call was asked for hidden states or attention weights, which hooks collect."""
    from transformers.utils import output_capturing

    return bool(output_capturing._active_collector.get())


def is_collecting_hook(hook: Callable[..., object]) -> bool:
    """Whether a hook is one of those. They stay on their modules when no output is collected."""
    from transformers.utils import output_capturing

    return getattr(hook, "__module__", None) == output_capturing.__name__


# --- reading GGUF ---


# Bytes of a GGUF weight that are dequantized at once.
GGUF_PART_BYTES = 1 << 22


@contextlib.contextmanager
def gguf_read_once(keep: Callable[[Tensor], Tensor] = lambda weight: weight) -> Iterator[None]:
    """Within this context, the GGUF loader caches its two repeated results: the header, and for each module the table
    of names. It holds ``keep(weight)`` of each dense weight, in float32, that it has read; of stacked experts, all.

    Both are pure functions of the gguf package; for the demo model their repetition is half of the loading time.
    """
    import gguf
    import numpy as np
    import torch
    from transformers import modeling_gguf_pytorch_utils as loader

    dequantize = gguf.dequantize

    # By itself gguf holds a weight twice, and the loader copies it once more.
    def dequantized(data: Any, kind: Any) -> Any:
        parts = np.array_split(data, -(-data.nbytes // GGUF_PART_BYTES)) if len(data.shape) > 1 else [data]
        first, start = dequantize(parts[0], kind), 0
        weight = np.empty((*data.shape[:-1], first.shape[-1]), np.float32)
        for part in parts:
            weight[start : start + len(part)] = dequantize(part, kind)
            start += len(part)
        return weight

    of_numpy = types.SimpleNamespace(**{**vars(np), "copy": np.asarray})
    of_torch = types.SimpleNamespace(**{**vars(torch), "from_numpy": lambda array: keep(torch.from_numpy(array))})

    # In tqdm, disable=None means: no bar without a terminal.
    bar = functools.partial(vars(loader)["tqdm"], disable=True if os.environ.get("TQDM_DISABLE") else None)
    repeated = ((gguf, name, functools.cache(getattr(gguf, name))) for name in ("GGUFReader", "get_tensor_name_map"))
    with _replaced(
        *repeated,
        (loader, "tqdm", bar),
        (loader, "torch", of_torch),
        (loader, "np", of_numpy),
        (gguf, "dequantize", dequantized),
    ):
        yield


# --- layers ---


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers would not split between devices; none for a model that does not name their class."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
