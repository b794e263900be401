"""Load a base model: a folder, a hub id, a GGUF file (dequantized into an ordinary model) or the demo model.

The loaded model is in evaluation mode, complete (no tensor is newly initialised), and ``save_pretrained`` can save it.

A skeleton is a model without its weights: shapes and names on torch's meta device.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.compat.transformers import gguf_read_once, heads_of_labels, text_config, without_accelerate
from rankwise.constants import FILE_BITS, MXFP4, TEMPLATE_FILE
from rankwise.errors import ModelError, RankwiseError, one_line, some_of, warn
from rankwise.foreign import Fields
from rankwise.labels import NUMBER, Labels, labels_of_head
from rankwise.models.device import choose_device
from rankwise.models.folder import (
    answers_labels,
    auto_class,
    check_architecture,
    check_folder,
    has_tokenizer,
    read_config,
)
from rankwise.models.gguf_file import config_of_gguf, read_gguf_header
from rankwise.models.source import ModelSource, fetch_model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from rankwise.quantization import FourBitConfig
    from rankwise.quantization.linear import FourBitModule

# transformers' names of formats whose layers have no gradient, and which transformers can load as dense weights.
DEQUANTIZED_ON_LOADING = ("fp8", "mxfp4", "compressed-tensors")
Model = str | os.PathLike[str] | ModelSource


def load_model(
    model: Model,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model, or a source's model with its head of labels, and its tokenizer.

    Args:
        model: A hub id, a folder, a ``.gguf`` file, or ``"demo"``. A ``ModelSource`` with labels gets a head for them,
            new and random where the files hold none.
        dtype: The dtype of the weights. None keeps the stored one (float32 for GGUF); ``"auto"`` takes bfloat16 where
            the device computes in it.
        device: None loads to the CPU, as transformers does; ``"auto"`` takes a CUDA GPU, else the CPU.
        quantization: A transformers quantization config, such as ``Nf4Config``. Each tensor is quantized as it is
            read. GGUF weights are dequantized first.
        trust_remote_code: Run Python code that comes with a hub repository.
        revision: A branch, tag or commit of a hub repository.

    Returns:
        The model and its tokenizer; None if the source has no tokenizer.

    Raises:
        ModelError: RW301 to RW317, one for each way in which a source cannot be loaded.
    """
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code)
    choice = choose_device(device or "cpu", "auto" if isinstance(dtype, str) and dtype == "auto" else dtype)
    wanted = None if dtype is None else choice.dtype
    if is_of_file(quantization) and not source.is_gguf:
        raise ModelError("RW316", f"--base-bits file is for a GGUF file, and {source.name} is none; leave it out.")
    if source.is_gguf:
        loaded = _load_gguf(source, wanted, choice.device, quantization)
    else:
        loaded = _load_folder(source, wanted, choice.device, quantization, trust_remote_code)
    check_finite(loaded, source)
    if source.labels is not None:
        keep_heads_exact(loaded)
    if quantization is not None:
        remember_originals(loaded, source, trust_remote_code=trust_remote_code)
    # The name under which adapters record their base: a hub id or an absolute path, never a cache folder.
    loaded.name_or_path = loaded.config.name_or_path = source.base_model
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        _check_vocabulary(loaded, tokenizer, source)
        tell_padding(loaded, tokenizer, source)
    return loaded, tokenizer


def is_of_file(quantization: Any) -> bool:
    """Whether a GGUF base is to stay in its own bits."""
    return getattr(quantization, "quant_type", None) == FILE_BITS


def tell_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Tell a decoder's head of labels, which reads the last token that is no padding, what padding is."""
    if source.labels is not None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def keep_heads_exact(model: nn.Module) -> None:
    """Let the head compute in float32: it trains whole, and steps are lost in 16 bits."""
    for head in map(model.get_submodule, heads_of_labels(model)):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def remember_originals(loaded: PreTrainedModel, source: ModelSource, *, trust_remote_code: bool) -> None:
    """Let a quantized model load its original weights again, which the inits PiSSA and LoftQ need."""
    marked: Any = loaded
    marked.rankwise_originals = lambda: load_model(source, trust_remote_code=trust_remote_code)[0]


def names_chat_template(model: Model, *, trust_remote_code: bool = False, revision: str | None = None) -> bool:
    """Whether the files name a chat template, without loading the tokenizer; False where that is unsure."""
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    path = source.place
    if source.is_gguf:
        return "tokenizer.chat_template" in read_gguf_header(path).metadata
    config = path / "tokenizer_config.json"
    return (path / TEMPLATE_FILE).is_file() or (config.is_file() and b'"chat_template"' in config.read_bytes())


def load_tokenizer(
    model: Model, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None if the folder or GGUF file has none. Raises ModelError (RW317)."""
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    path = source.place
    if source.is_gguf and "tokenizer.ggml.tokens" not in read_gguf_header(path).metadata:
        return None
    if not source.is_gguf and not has_tokenizer(path):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if source.is_gguf:
            with tempfile.TemporaryDirectory() as nowhere, quiet():
                # The class that AutoTokenizer would choose after reading the whole header, which takes seconds.
                tokenizer = PreTrainedTokenizerFast.from_pretrained(nowhere, gguf_file=str(path.resolve()))
        else:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers may raise anything for such a folder; the cause is chained.
        raise ModelError("RW317", f"the tokenizer in {path} cannot be loaded: {one_line(error)}.") from error
    tokenizer.name_or_path = source.base_model
    return tokenizer


def _load_folder(
    source: ModelSource, dtype: torch.dtype | None, device: str, quantization: Any, trust_remote_code: bool
) -> PreTrainedModel:
    path = source.place
    config = check_folder(path, trust_remote_code=trust_remote_code, labelled=source.labels is not None)
    arguments = dict(_quantization_arguments(path, config, quantization, trust_remote_code, device))
    if source.labels is not None:
        _check_same_labels(config, source)
        arguments["config"] = _with_labels(arguments.get("config") or _config(source, trust_remote_code), source.labels)
    placed: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    model = _from_pretrained(
        source,
        str(path),
        dtype="auto" if dtype is None else dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **arguments,
        **placed,
    )
    if quantization is not None and config.get("quantization_config") is not None:
        _warn_of_another_format(model, path, quantization)
    return model


def _check_same_labels(config: Fields, source: ModelSource) -> None:
    """Raise ModelError (RW308) if the files hold a head of other labels; names that transformers made are none."""
    labels, stored = source.labels, config.get("id2label")
    if labels is None or not answers_labels(config) or not isinstance(stored, dict) or labels.problem == NUMBER:
        return
    named = labels_of_head(stored, None).names
    if named != labels.names and not all(name.startswith("LABEL_") for name in named):
        raise ModelError(
            "RW308",
            f"{source.name} has a head for the labels {some_of(named)}, and these are {some_of(labels.names)}; name "
            "the labels of the data as the model does, or give the model without that head.",
        )


def _with_labels(config: Any, labels: Labels) -> PreTrainedConfig:
    """A copy of the config for a model with a head of these labels."""
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: place for place, name in enumerate(labels.names)}
    config.problem_type = labels.problem
    return config


def _quantization_arguments(
    path: Path, config_file: Fields, quantization: QuantizationConfigMixin | None, trust_remote_code: bool, device: str
) -> Mapping[str, PreTrainedConfig | QuantizationConfigMixin | None]:
    """The quantization arguments for transformers. Raises ModelError (RW316) if a checkpoint's format excludes the
    requested one.

    A bitsandbytes checkpoint loads into `Linear4bit` layers in its stored format, also if a different 4-bit format is
    requested. On a CPU experts in MXFP4 stay as they are, and a requested format is that of the other layers.
    """
    from rankwise.quantization.transformers_plugin import register

    register()
    stored = config_file.get("quantization_config")
    if stored is None:
        return {"quantization_config": quantization}
    if not isinstance(stored, dict):
        kind = type(stored).__name__
        raise ModelError("RW316", f"the quantization_config in {path} is a {kind} and no object; download it again.")
    from transformers import AutoConfig

    from rankwise.quantization import FourBitConfig, adopt_bitsandbytes_config
    from rankwise.quantization.config import Mxfp4Config

    config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if keeps_mxfp4(config_file, device) and isinstance(quantization, FourBitConfig | None):
        del config.quantization_config
        kept = copy.copy(quantization) or Mxfp4Config()
        kept.experts_in_mxfp4 = True
        return {"config": config, "quantization_config": kept}
    held = adopt_bitsandbytes_config(config)
    if held is None and quantization is None:
        return _read_densely(path, config, stored)
    if held is None or not isinstance(quantization, FourBitConfig | None):
        method = stored.get("quant_method")
        asked = "" if held is None else f", and a {type(quantization).__name__} cannot be applied to it"
        raise ModelError(
            "RW316",
            f"the checkpoint in {path} is already quantized ({method}){asked}; "
            "load it without a quantization, or give the original.",
        )
    return {"config": config}


def keeps_mxfp4(config: Fields, device: str) -> bool:
    """Whether the experts of a ``config.json``'s model stay in the file's MXFP4 on this device."""
    stored = config.get("quantization_config")
    return device == "cpu" and isinstance(stored, Mapping) and stored.get("quant_method") == MXFP4


def _read_densely(path: Path, config: PreTrainedConfig, stored: Fields) -> Mapping[str, PreTrainedConfig]:
    """Let transformers dequantize the weights while it loads them, and warn (RW179)."""
    method = stored.get("quant_method")
    if method not in DEQUANTIZED_ON_LOADING:
        return {}
    warn(
        "RW179",
        f"{path} holds weights in {method}, which are dequantized while they are read: the model takes the memory of "
        "its dense original.",
    )
    config.quantization_config = {**stored, "dequantize": True}
    return {"config": config}


def _warn_of_another_format(model: PreTrainedModel, path: Path, asked: FourBitConfig) -> None:
    """Warn (RW324) if stored layers have a format that was not requested. Checked on the layers, since config.json
    has no block size.
    """
    from rankwise.quantization.targets import four_bit_modules

    wanted = _format_of(asked)
    for layer in four_bit_modules(model):
        if (held := _format_of(layer)) != wanted:
            warn("RW324", f"{path} holds weights in {held}, which are used instead of {wanted}.")
            return


def _format_of(source: FourBitConfig | FourBitModule) -> str:
    double = "with" if source.double_quant else "without"
    return f"{source.quant_type} (blocks of {source.block_size}, {double} double quantization)"


def _load_gguf(source: ModelSource, dtype: torch.dtype | None, device: str, quantization: Any) -> PreTrainedModel:
    import torch
    import transformers

    from rankwise.quantization.linear import in_file

    wanted = torch.float32 if dtype is None else dtype
    path = source.place.resolve()
    if is_of_file(quantization):
        return _load_own_bits(source, dtype or torch.float32, device, quantization)
    _check_types(path)
    # Before GgufConfig, transformers 5 always dequantized.
    has_config = hasattr(transformers, "GgufConfig")
    dequantized = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_config else {}
    # Loaded from an empty folder, since transformers would read an adapter_config.json next to the file.
    reading = gguf_read_once(lambda W: in_file(W.to(wanted)))
    with tempfile.TemporaryDirectory() as nowhere, _explaining(source), quiet(), reading:
        config = config_of_gguf(path)
        model = _from_pretrained(
            source,
            nowhere,
            config=config,
            gguf_file=str(path),
            dtype=wanted,
            **dequantized,
        )
    # So that it trains and saves like any other model.
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    # The title in the file, which would be written to config.json.
    model.config.__dict__.pop("_model_name_or_path", None)
    if source.labels is not None:
        model = _with_head(model, source.labels)
    if device != "cpu":
        model.to(device)  # type: ignore[arg-type]
    if quantization is not None:
        from rankwise.quantization import quantize

        quantize(model, quantization)
    return model


def _load_own_bits(source: ModelSource, dtype: torch.dtype, device: str, quantization: Any) -> PreTrainedModel:
    """The model of a GGUF file whose weights stay in their blocks."""
    if device != "cpu":
        raise ModelError(
            "RW316",
            f"{source.name} in its own bits runs on a CPU only, and the device is {device}; give --base-bits 16, or "
            "--device cpu.",
        )
    from rankwise.models.gguf_base import load_own_bits
    from rankwise.quantization.transformers_plugin import mark_quantized

    path = source.place.resolve()
    with _explaining(source), quiet(), gguf_read_once():
        model = load_own_bits(path, config_of_gguf(path), dtype)
    model.config.__dict__.pop("_model_name_or_path", None)
    if source.labels is not None:
        model = _with_head(model, source.labels)
    mark_quantized(model, quantization)
    return model


def _check_types(path: Path) -> None:
    """Raise ModelError (RW316) with the name of a tensor whose type gguf cannot dequantize."""
    import gguf
    import numpy as np

    names = {gguf.GGMLQuantizationType(one.ggml_type): name for name, one in read_gguf_header(path).tensors.items()}
    for kind, name in names.items():
        try:
            gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            said = f"{path} stores {name!r} as {kind.name}, which the installed gguf cannot dequantize"
            raise ModelError("RW316", f"{said}; take a file of a different type, such as Q4_K_M.") from None


def _with_head(model: Any, labels: Labels) -> PreTrainedModel:
    """A language model's layers under a new head of labels; raises ModelError (RW303) if there is no such class."""
    kind = auto_class(model.config.model_type, labelled=True)
    if kind is None:
        raise ModelError("RW303", f"a {model.config.model_type!r} model takes no head of labels; give one that does.")
    found = kind.from_config(_with_labels(model.config, labels), dtype=model.dtype)
    setattr(found, found.base_model_prefix, model.base_model)
    return found.eval()


def _from_pretrained(source: ModelSource, folder: str, **arguments: Any) -> PreTrainedModel:
    kind = None if source.is_gguf else read_config(Path(folder)).get("model_type")
    with _explaining(source), quiet(), without_accelerate():
        # Wrong shapes are collected and raised together below.
        loaded = auto_class(kind, labelled=source.labels is not None and not source.is_gguf).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    model, info = loaded
    # A head of labels may be new, and then replaces the stored one.
    heads = tuple(f"{name}." for name in heads_of_labels(model))
    problems = sorted(f"{name} is missing" for name in info["missing_keys"] if not name.startswith(heads))
    problems += sorted(
        f"{name} is {tuple(got)}, expected {tuple(wanted)}" for name, got, wanted in info["mismatched_keys"]
    )
    problems += list(info["error_msgs"])
    if source.labels is not None and problems and all(".pooler." in problem for problem in problems):
        raise ModelError(
            "RW308",
            f"{source.name} was saved without the pooler that a head of labels reads; add a new one "
            "(AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and the tokenizer), and train the new "
            "folder with --modules-to-save pooler.",
        )
    if problems:
        raise ModelError("RW308", f"the weights of {source.name} do not fit its config: {some_of(problems)}.")
    if info["unexpected_keys"] and not heads:
        warn(
            "RW318",
            f"{source.name} holds tensors that the model does not have: {some_of(sorted(info['unexpected_keys']))}.",
        )
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report, whose content rankwise reports itself; progress bars only on a terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explaining(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except RankwiseError:
        raise
    except Exception as error:
        # transformers may raise anything for such files; the cause is chained.
        raise ModelError("RW316", f"transformers cannot load {source.name}: {one_line(error)}.") from error


def check_finite(model: PreTrainedModel, source: ModelSource) -> None:
    """Raise ModelError (RW323) for NaN or infinity in the weights, in one pass over them."""
    import torch

    from rankwise.compat.torch import own_part
    from rankwise.quantization.targets import is_finite

    held = ((name, own_part(parameter.detach())) for name, parameter in model.named_parameters())
    # Packed weights of other libraries have classes of their own.
    broken = [name for name, W in held if type(W) is torch.Tensor and W.is_floating_point() and not is_finite(W)]
    if broken:
        raise ModelError(
            "RW323", f"the weights of {source.name} hold NaN or infinity in {some_of(broken)}; get them again."
        )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        warn(
            "RW319",
            f"the tokenizer of {source.name} knows {len(tokenizer):,} tokens and the model {rows:,}; the rest fail.",
        )


def load_skeleton(model: Model, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``model`` describes, on the meta device; its weights need not be there.

    Raises ModelError: as ``fetch_model`` does; RW302 to RW304 and RW310 for a config that describes no such model.
    """
    source = fetch_model(model, trust_remote_code=trust_remote_code, weights=False)
    if not source.is_gguf:
        labelled = source.labels is not None
        check_architecture(
            read_config(source.place), source.place, trust_remote_code=trust_remote_code, labelled=labelled
        )
    try:
        with quiet():
            return skeleton_of(_config(source, trust_remote_code), source.labels, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        # transformers may raise anything for such a config; the cause is chained.
        raise ModelError(
            "RW303", f"transformers cannot build the model that {source.path} describes: {one_line(error)}."
        ) from error


def skeleton_of(
    config: PreTrainedConfig, labels: Labels | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a config, on the meta device. transformers may raise anything."""
    import torch
    from transformers.initialization import no_init_weights

    config = config if labels is None else _with_labels(config, labels)
    with torch.device("meta"), no_init_weights():
        kind = auto_class(config.model_type, labelled=labels is not None)
        skeleton = kind.from_config(config, trust_remote_code=trust_remote_code)
    # ``no_init_weights`` leaves this out, too.
    skeleton.tie_weights()
    return skeleton


def _config(source: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    if source.is_gguf:
        with gguf_read_once():
            return config_of_gguf(source.place)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(source.path), trust_remote_code=trust_remote_code)


# model_type of decoders with learned positions, for configs. For a loaded model ``table_rows`` finds the table.
LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt"})
_NAME = re.compile(r"wpe|pos")


def config_table_rows(config: Fields) -> int | None:
    """The longest row, in tokens, of a model with learned positions, by its config.json; None for all other models."""
    if config.get("model_type") not in LEARNED:
        return None
    found = (config.get(name) for name in ("n_positions", "max_position_embeddings"))
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def table_rows(model: nn.Module) -> int | None:
    """The longest row, in tokens, of a loaded model with learned positions; None if its positions are computed.

    The table is the embedding whose name says positions and whose size is that of the config; tables for images and
    sounds have other sizes. The extra rows of OPT (offset) and RoBERTa (padding) are not counted.
    """
    from torch import nn

    config = getattr(model, "config", None)
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.search(name.rpartition(".")[2]):
            rows = module.num_embeddings - (getattr(module, "offset", None) or 0)
            if rows == positions:
                return rows - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def answer_room(model: nn.Module, prompt_tokens: int, wanted: int) -> int:
    """The number of new tokens, at most ``wanted``, that the learned positions permit after a prompt; 0 for a prompt
    that is too long.

    n new tokens need prompt + n - 1 positions, since the last token is not fed back.
    """
    rows = table_rows(model)
    return wanted if rows is None else max(0, min(wanted, rows - prompt_tokens + 1))
