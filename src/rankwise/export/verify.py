"""What rounding and merging change in a model's outputs.

A server is judged by the effect of rounding to the formats of its files. llama.cpp multiplies weights in blocks with
inputs in 8-bit blocks, and other weights with inputs in 16 bits; beside float32 weights it keeps keys and values in
F16. vLLM computes all in 16 bits.

``merge --verify`` compares every way of merging with the trained model (adapter over its base, 4-bit or not), by
perplexity and by the largest difference of a logit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankwise.adapters import load_adapter, merge_adapter
from rankwise.adapters.folder import dtype_of, four_bits_of
from rankwise.adapters.state import DEFAULT_NAME, adapter_state, base_modules, model_end
from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import heads_of_labels
from rankwise.constants import IGNORED
from rankwise.data import stdlib_rows
from rankwise.errors import ConfigError, RunError
from rankwise.export.converted import HeldOutRow
from rankwise.export.gguf import EMBEDDING, HEAD
from rankwise.export.merged import Onto, base_source, stored_quantization
from rankwise.models import load_model
from rankwise.models.folder import read_config
from rankwise.models.gguf_file import GgufNames, read_gguf_header
from rankwise.quantization.config import FourBitConfig, Nf4Config
from rankwise.quantization.linear import is_conv1d
from rankwise.quantization.targets import target_names
from rankwise.quantization.transformers_plugin import quantize

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Kind
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WHOLE = {"F32": torch.float16, "F16": torch.float16, "BF16": torch.bfloat16}
# The formats in blocks that gguf writes. Others lose no more than the first one here with at most as many bits.
WRITTEN = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


class AsServed(NamedTuple):
    """A model with its adapter in float32, the weights rounded as in a server's files.

    ``compute`` lets it round as the server computes, too. ``is_known``: gguf's own rounding made the files, so that the
    weights are the files' own.
    """

    model: PreTrainedModel
    compute: Callable[[], object]
    is_known: bool


@torch.no_grad()
def round_as_served(
    model: PreTrainedModel, files: Path, *, trained_on: Path | None = None, is_merged: bool = False
) -> AsServed:
    """Round a float32 model with an adapter to the formats of a server's GGUF or folder, in place.

    ``trained_on``: the GGUF from which the base was read; ``is_merged``: ``files`` hold the adapter, so that W + dW is
    rounded and not W. Raises RunError (RW738) for a format whose rounding is not known.
    """
    if is_merged:
        merge_adapter(model, reversible=False)
    kind_of, are_known = _kinds(model, files, trained_on), True
    kinds: list[tuple[nn.Module, Kind]] = []
    # A head of labels stays in float32, in files and servers, too.
    heads = heads_of_labels(model)
    for path, module in [item for item in base_modules(model) if item[0].partition(".")[0] not in heads]:
        for name, W in own_parameters(module).items():
            if W is not None and W.dim() > 1 and W.is_floating_point():
                kind, is_copied = kind_of(f"{path}.{name}", module)
                if not is_copied:
                    W.data = _rounded(W.T, kind, files).T if is_conv1d(module) else _rounded(W, kind, files)
                are_known &= is_copied or kind.name in (*WHOLE, *WRITTEN)
                kinds.append((model.get_submodule(path), kind))

    def compute() -> None:
        if files.is_dir():
            nn.Module.to(model, WHOLE[kinds[0][1].name])
            for head in heads:
                model.get_submodule(head).float()
        else:
            for module, kind in kinds:
                module.register_forward_pre_hook(partial(_round_inputs, kind))

    return AsServed(model, compute, are_known)


def _kinds(
    model: PreTrainedModel, files: Path, trained_on: Path | None
) -> Callable[[str, nn.Module], tuple[Kind, bool]]:
    """A function from a parameter and its module to its format in ``files``, and whether it is a copy of the GGUF that
    was trained on: formats that gguf does not write can be nothing else."""
    from gguf import GGMLQuantizationType

    if files.is_dir():
        config = read_config(files)
        is_half = "float16" in (config.get("dtype"), config.get("torch_dtype"))
        return lambda *_: (GGMLQuantizationType["F16" if is_half else "BF16"], False)
    tensors, names, head = read_gguf_header(files).tensors, GgufNames(model.config), model_end(model, "output")
    before = {} if trained_on is None else read_gguf_header(trained_on).tensors

    def kind_of(key: str, module: nn.Module) -> tuple[Kind, bool]:
        name = EMBEDDING if module is head and HEAD not in tensors else names.of(key)[0].name
        kind = GGMLQuantizationType(tensors[name].ggml_type)
        is_copied = kind.name not in (*WHOLE, *WRITTEN) and name in before and before[name].ggml_type == kind
        return kind, is_copied

    return kind_of


def _rounded(W: Tensor, kind: Kind, files: Path) -> Tensor:
    """W (..., out, in) in ``kind`` and back in float32."""
    import gguf

    if kind.name in WHOLE:
        return W if kind.name == "F32" else W.to(WHOLE[kind.name]).float()

    def bits(kind: Kind) -> float:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return 8 * block_bytes / block

    written = [other for name in WRITTEN if bits(other := gguf.GGMLQuantizationType[name]) <= bits(kind)]
    if not written:
        raise RunError(
            "RW738",
            f"nothing is proven: {files} holds weights in {kind.name}, for whose rounding there is no bound; give a "
            "file of at least 4.5 bits a weight.",
        )
    found = gguf.dequantize(gguf.quantize(np.ascontiguousarray(W.numpy()), written[0]), written[0])
    return torch.from_numpy(found).view(W.shape)


def _round_inputs(kind: Kind, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    import gguf

    if not given or not given[0].is_floating_point():
        return given
    if kind.name in WHOLE:
        return (given[0].to(WHOLE[kind.name]).float(), *given[1:])
    blocks = given[0].unflatten(-1, (-1, gguf.GGML_QUANT_SIZES[kind][0]))
    step = (blocks.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / step).round().mul(step).flatten(-2), *given[1:])


REFERENCE = "adapter, as trained"
MERGED_ONTO: dict[str, Onto] = {"merged onto the original": "original", "merged onto the dequantized": "quantized"}
REQUANTIZED = "onto the original, then 4-bit"
# The weights lie on the values of their blocks already, and rounding takes small changes back.
REQUANTIZED_AGAIN = "onto the dequantized, then 4-bit"

MAX_TOKENS = 1024
CHUNK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the result. The logit difference to the trained model is over all tokens and the vocabulary."""

    name: str
    # Over the trained tokens of the rows.
    perplexity: float
    largest_logit_difference: float
    # The part of the adapter's gain in loss over the base that is left; None if the adapter gains nothing.
    gain_left: float | None = None


@dataclasses.dataclass(frozen=True)
class Verification:
    variants: tuple[Variant, ...]
    # Trained tokens that were measured.
    tokens: int
    base_perplexity: float
    # The writable merge whose logits are closest to those of the trained model.
    closest: Onto


def verify_merge(
    adapter: Path,
    base: str | None = None,
    *,
    rows: Callable[[PreTrainedTokenizerBase], Sequence[HeldOutRow]] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Verification:
    """Load the base as it was trained and in its original form, merge, and measure. Memory: one model at a time.

    ``base``: by default the one that the adapter names; ``rows`` gives the rows to measure on from the tokenizer, by
    default a built-in text. A base that is 4-bit on disk has no original form to measure. Raises what loading model and
    adapter raises.
    """
    source = base_source(adapter, base, revision=revision, trust_remote_code=trust_remote_code)
    stored, dtype = stored_quantization(source), dtype_of(adapter)
    quantization = four_bits_of(adapter) if stored is None else None
    load = functools.partial(load_model, source, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    model, tokenizer = load(quantization=quantization)
    if rows is None or tokenizer is None:
        measure = _Meter([HeldOutRow(chunk[0], chunk[0]) for chunk in text_chunks(tokenizer, default_text())])
    else:
        measure = _Meter(rows(tokenizer))
    measure.base_loss, _ = measure.loss(model, compares=False)
    load_adapter(model, adapter)
    variants = [measure(REFERENCE, model)]
    if (kind := adapter_state(model).configs[DEFAULT_NAME].for_merge) is not None:
        merge_adapter(model, reversible=False)
        variants.append(measure(f"merged, {kind} as trained", model))
        return Verification(tuple(variants), measure.tokens, math.exp(measure.base_loss), "quantized")
    quantizer = getattr(model, "hf_quantizer", None)
    four_bit: FourBitConfig | None = None if quantizer is None else copy.copy(quantizer.quantization_config)
    if four_bit is not None:
        merge_adapter(model, reversible=False)
        model = model.dequantize()
        variants.append(measure("merged onto the dequantized", model))
        quantize(model, four_bit)
        variants.append(measure(REQUANTIZED_AGAIN, model))
    del model
    if stored is None:
        model, _ = load()
        load_adapter(model, adapter)
        merge_adapter(model, reversible=False)
        variants.insert(1, measure("merged onto the original", model))
        four = four_bit or Nf4Config(double_quant=True)
        if target_names(model, four):
            quantize(model, four)
            variants.append(measure(REQUANTIZED, model))
    written = [variant for variant in variants if variant.name in MERGED_ONTO]
    closest = min(written, key=lambda variant: variant.largest_logit_difference)
    return Verification(tuple(variants), measure.tokens, math.exp(measure.base_loss), MERGED_ONTO[closest.name])


def default_text() -> str:
    """Summaries from the standard library's documentation: English text that every machine has."""
    return "\n".join(f"{row.prompt}\n{row.completion}" for row in stdlib_rows("eval"))


def text_chunks(tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[Tensor]:
    """The first tokens of a text, in pieces (1, t). Raises ConfigError (RW115) if there are none."""
    if tokenizer is None:
        raise ConfigError(
            "RW115", "the base has no tokenizer, so no text can be encoded to compare merges; add its tokenizer files."
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS])
    chunks = [chunk[None] for chunk in ids.split(CHUNK_TOKENS) if len(chunk) > 1]
    if not chunks:
        raise ConfigError("RW115", f"the text to compare merges on has {len(ids)} tokens; give one of a few sentences.")
    return chunks


class _Meter:
    """Measures variants on the same rows. The first one is the reference for the logits of the others."""

    def __init__(self, rows: Sequence[HeldOutRow]) -> None:
        self.rows = [row for row in rows if (row.labels[1:] != IGNORED).any()]
        self.tokens = sum(int((row.labels[1:] != IGNORED).sum()) for row in self.rows)
        self.reference: list[Tensor] = []
        self.base_loss = self.trained_loss = math.nan

    @torch.inference_mode()
    def __call__(self, name: str, model: PreTrainedModel) -> Variant:
        loss, largest = self.loss(model)
        gain = self.base_loss - self.trained_loss
        return Variant(name, math.exp(loss), largest, (self.base_loss - loss) / gain if gain > 0 else None)

    @torch.inference_mode()
    def loss(self, model: PreTrainedModel, *, compares: bool = True) -> tuple[float, float]:
        """(mean loss of a trained token, largest difference of a logit from the reference)."""
        model.eval()
        total, largest, kept = 0.0, 0.0, 0
        is_reference = compares and not self.reference
        for index, row in enumerate(self.rows):
            trained = row.labels[1:] != IGNORED
            logits = model(input_ids=row.ids[None]).logits[0, :-1][trained].float()
            total += cross_entropy(logits, row.labels[1:][trained], reduction="sum").item()
            # The logits of a vocabulary take 200 kB a token.
            if is_reference and kept < MAX_TOKENS:
                self.reference.append(logits[: MAX_TOKENS - kept].clone())
                kept += len(logits)
            elif compares and index < len(self.reference):
                before = self.reference[index]
                largest = max(largest, (logits[: len(before)] - before).abs().max().item())
        loss = total / self.tokens
        if is_reference:
            self.trained_loss = loss
        return loss, largest
