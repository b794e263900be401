"""The same model with the same kind of adapter, ours and PEFT's, each set up as its users do."""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rankwise as rw
from rankwise.acceleration.parts import ATTRIBUTE

METHODS = ("lora", "dora", "qlora", "qdora")
DTYPES = ("bfloat16", "float32")
R, ALPHA, ALL_LINEAR = 16, 32, "all-linear"
SIDES = ("ours", "peft")


def is_four_bit(method: str) -> bool:
    return method.startswith("q")


def is_dora(method: str) -> bool:
    return method.endswith("dora")


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[str]:
    """A folder that transformers reads: the demo model is converted once, in bfloat16, with its tokenizer."""
    if model != "demo":
        yield model
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "demo"
        loaded, tokenizer = rw.load_model("demo", dtype=torch.bfloat16)
        loaded.save_pretrained(folder)
        assert tokenizer is not None, "the demo model has one"
        tokenizer.save_pretrained(folder)
        del loaded
        gc.collect()
        yield str(folder)


def adapted(folder: str, method: str, dropout: float, dtype: torch.dtype) -> Any:
    """Our adapters, in float32 (the default), over a base in ``dtype`` or 4 bits."""
    four_bits = rw.Nf4Config(double_quant=True) if is_four_bit(method) else None
    model, _ = rw.load_model(folder, dtype=dtype, quantization=four_bits)
    config = rw.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=is_dora(method))
    rw.add_adapter(model, config)
    return model


def ours(folder: str, method: str, dropout: float, dtype: torch.dtype = torch.bfloat16) -> Any:
    """With ``optimize_for_training`` as `rankwise train` calls it."""
    model = adapted(folder, method, dropout, dtype)
    model.train()
    rw.optimize_for_training(model)
    return model


def peft(folder: str, method: str, dropout: float, dtype: torch.dtype = torch.bfloat16) -> Any:
    """PEFT over transformers, 4-bit layers by bitsandbytes (NF4, double quantization, products in ``dtype``)."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    four_bits = bitsandbytes_config(dtype) if is_four_bit(method) else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=four_bits)
    return get_peft_model(model, peft_config(method, dropout)).train()


def bitsandbytes_config(dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def peft_config(method: str, dropout: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR,
        use_dora=is_dora(method),
        task_type="CAUSAL_LM",
    )


def build(side: str, folder: str, method: str, dropout: float, dtype: str = "bfloat16") -> Any:
    torch.manual_seed(0)
    return {"ours": ours, "peft": peft}[side](folder, method, dropout, getattr(torch, dtype))


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Step:
    """Forward and backward of one batch, every token a label; with an optimizer, its step too."""

    def __init__(self, model: Any, ids: Tensor, *, optimizer: bool = False) -> None:
        self.model, self.ids = model, ids
        self.optimizer = torch.optim.AdamW(trained(model), lr=1e-5) if optimizer else None

    def forward(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss

    def __call__(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def models_own_attention(model: Any) -> Iterator[None]:
    """Our own kernels set aside, so that torch sees, and counts, every product; the results are the same."""
    is_fast = ATTRIBUTE in model.__dict__
    try:
        _compute_by("reference", model, is_fast=is_fast)
        yield
    finally:
        _compute_by("auto", model, is_fast=is_fast)


def _compute_by(implementation: str, model: Any, *, is_fast: bool) -> None:
    """What a step is given back, and so need not keep, is found out with the kernels that run."""
    rw.ops.set_implementation(implementation)
    if is_fast:
        rw.optimize_for_training(model)


def dtypes_of_adapter(model: Any) -> list[str]:
    return sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained(model)})


def silence() -> None:
    """Libraries that report a missing optional package, a deprecation or progress while they load."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
