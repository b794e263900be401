"""Measure on a text how each way of merging changes the trained model.

The reference is the trained model (adapter over its base, 4-bit or not); every variant is compared with it by
perplexity and by the largest difference of a logit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rankwise.adapters import load_adapter, merge_adapter
from rankwise.adapters.trained_base import dtype_of
from rankwise.data import stdlib_rows
from rankwise.errors import DataError
from rankwise.export.merged import Onto, base_source, named_format, stored_quantization
from rankwise.export.rounding import rounding_cost
from rankwise.models import load_model
from rankwise.quantization.config import FourBitConfig
from rankwise.quantization.in_place import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE = "adapter, as trained"
MERGED_ONTO: dict[str, Onto] = {"merged onto the original": "original", "merged onto the dequantized": "quantized"}
REQUANTIZED = "merged, then 4-bit again"

MAX_TOKENS = 1024
CHUNK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the result. The logit difference to the trained model is over all tokens and the vocabulary."""

    name: str
    perplexity: float
    largest_logit_difference: float


@dataclasses.dataclass(frozen=True)
class Verification:
    variants: tuple[Variant, ...]
    tokens: int
    # The writable merge whose logits are closest to those of the trained model.
    closest: Onto
    # Largest difference of a logit between a merged model and its own weights computed in the next wider dtype.
    rounding: float


def verify_merge(
    adapter: Path,
    base: str | None = None,
    *,
    text: str | None = None,
    trained_on: FourBitConfig | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Verification:
    """Load the base as it was trained and in its original form, merge, and measure. Memory: one model at a time.

    ``base``: by default the one that the adapter names; ``trained_on``: its 4-bit format in training, where the folder
    has no record. A base that is 4-bit on disk has no original form to measure.
    Raises DataError (RW220) for a text that is too short, and what loading model and adapter raises.
    """
    source = base_source(adapter, base, revision=revision, trust_remote_code=trust_remote_code)
    stored, dtype = stored_quantization(source), dtype_of(adapter)
    quantization = named_format(adapter, trained_on) if stored is None else None
    load = functools.partial(load_model, source, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    model, tokenizer = load(quantization=quantization)
    ids = text_chunks(tokenizer, default_text() if text is None else text)
    load_adapter(model, adapter)
    measure = _Meter(ids)
    variants = [measure(REFERENCE, model)]
    quantizer = getattr(model, "hf_quantizer", None)
    four_bit: FourBitConfig | None = None if quantizer is None else copy.copy(quantizer.quantization_config)
    if four_bit is not None:
        merge_adapter(model, reversible=False)
        model = model.dequantize()
        variants.append(measure("merged onto the dequantized", model))
        rounding = rounding_cost(model, ids)
        quantize(model, four_bit)
        variants.append(measure(REQUANTIZED, model))
    del model
    if stored is None:
        model, _ = load()
        load_adapter(model, adapter)
        merge_adapter(model, reversible=False)
        variants.insert(1, measure("merged onto the original", model))
        rounding = rounding_cost(model, ids)
    written = [variant for variant in variants if variant.name in MERGED_ONTO]
    closest = min(written, key=lambda variant: variant.largest_logit_difference)
    return Verification(tuple(variants), sum(chunk.numel() for chunk in ids), MERGED_ONTO[closest.name], rounding)


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises DataError: RW201 it cannot be opened, RW205 another encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("RW201", f"cannot open {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError("RW205", f"{path} is not UTF-8 (byte {error.start}); convert it with iconv.") from None


def default_text() -> str:
    """Summaries from the standard library's documentation: English text that every machine has."""
    return "\n".join(f"{row.prompt}\n{row.completion}" for row in stdlib_rows("eval"))


def text_chunks(tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[Tensor]:
    """The first tokens of a text, in pieces (1, t). Raises DataError: RW219 no tokenizer, RW220 a text too short."""
    if tokenizer is None:
        raise DataError(
            "RW219", "the base has no tokenizer, so no text can be encoded to compare merges; add its tokenizer files."
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS])
    chunks = [chunk[None] for chunk in ids.split(CHUNK_TOKENS) if len(chunk) > 1]
    if not chunks:
        raise DataError("RW220", f"the text to compare merges on has {len(ids)} tokens; give one of a few sentences.")
    return chunks


class _Meter:
    """Measures variants. The first one is the reference for the logits of the others."""

    def __init__(self, ids: list[Tensor]) -> None:
        self.ids = ids
        self.reference: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, name: str, model: PreTrainedModel) -> Variant:
        model.eval()
        total, count, largest = 0.0, 0, 0.0
        seen = []
        for index, chunk in enumerate(self.ids):
            logits = model(input_ids=chunk).logits[0].float()
            total += cross_entropy(logits[:-1], chunk[0, 1:], reduction="sum").item()
            count += chunk.shape[1] - 1
            if self.reference:
                largest = max(largest, (logits - self.reference[index]).abs().max().item())
            else:
                seen.append(logits)
        self.reference = self.reference or seen
        return Variant(name, math.exp(total / count), largest)
