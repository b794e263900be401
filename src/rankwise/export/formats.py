"""The trained model as a server's files hold it: weights and inputs rounded to their formats, the rest in float32.

Its distance from the trained model is the loss by which a server's own distance is judged. llama.cpp multiplies weights
in blocks with inputs in 8-bit blocks, and weights in 16 bits with inputs in 16 bits; it keeps keys and values in F16
beside float32 weights, too. vLLM computes in the 16 bits of the model's config.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.adapters import merge_adapter
from rankwise.adapters.state import base_modules, model_end
from rankwise.compat.torch import own_parameters
from rankwise.errors import RunError
from rankwise.export.gguf_adapter import EMBEDDING, HEAD
from rankwise.export.gguf_names import GgufNames
from rankwise.models.folder import read_config
from rankwise.models.gguf_file import read_gguf_header
from rankwise.quantization.linear import is_conv1d

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Kind
    from transformers import PreTrainedModel

WHOLE = ("F32", "F16", "BF16")
# The formats in blocks that gguf writes. Others lose no more than the one here with at most as many bits.
WRITTEN = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@torch.no_grad()
def round_as_served(
    model: PreTrainedModel, files: Path, *, trained_on: Path | None = None, is_merged: bool = False
) -> None:
    """Round a float32 model with an adapter to the formats of ``files``, a GGUF or a folder, in place.

    ``trained_on``: the GGUF from which the base was read; ``is_merged``: the files hold the adapter, so that W + dW is
    rounded and not W. Raises RunError (RW738) for a format whose rounding is not known.
    """
    if is_merged:
        merge_adapter(model, reversible=False)
    kind_of = _kinds(model, files, trained_on)
    for path, module in list(base_modules(model)):
        for name, W in own_parameters(module).items():
            if W is None or W.dim() < 2 or not W.is_floating_point():
                continue
            kind, is_copied = kind_of(f"{path}.{name}", module)
            if not is_copied:
                W.data = _rounded(W.T, kind).T if is_conv1d(module) else _rounded(W, kind)
            model.get_submodule(path).register_forward_pre_hook(partial(_round_inputs, kind))


def _kinds(
    model: PreTrainedModel, files: Path, trained_on: Path | None
) -> Callable[[str, nn.Module], tuple[Kind, bool]]:
    """A function from a parameter and its module to its format in ``files``, and whether they hold a copy of it."""
    import gguf

    if files.is_dir():
        config = read_config(files)
        is_half = "float16" in (config.get("dtype"), config.get("torch_dtype"))
        whole = gguf.GGMLQuantizationType.F16 if is_half else gguf.GGMLQuantizationType.BF16
        return lambda *_: (whole, False)
    tensors, names, head = read_gguf_header(files).tensors, GgufNames(model.config), model_end(model, "output")
    before = {} if trained_on is None else read_gguf_header(trained_on).tensors

    def kind_of(key: str, module: nn.Module) -> tuple[Kind, bool]:
        name = EMBEDDING if module is head and HEAD not in tensors else names.of(key)[0].name
        kind = gguf.GGMLQuantizationType(tensors[name].ggml_type)
        if kind.name not in (*WHOLE, *WRITTEN) and name in before and before[name].ggml_type == kind:
            return kind, True
        return _written(kind, files), False

    return kind_of


def _written(kind: Kind, files: Path) -> Kind:
    import gguf

    if kind.name in (*WHOLE, *WRITTEN):
        return kind

    def bits(kind: Kind) -> float:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return 8 * block_bytes / block

    for other in (gguf.GGMLQuantizationType[name] for name in WRITTEN):
        if bits(other) <= bits(kind):
            return other
    raise RunError(
        "RW738",
        f"nothing is proven: {files} holds weights in {kind.name}, for whose rounding rankwise has no bound; give a "
        f"file of at least {bits(other):g} bits a weight.",
    )


def _rounded(W: Tensor, kind: Kind) -> Tensor:
    """W (..., out, in) in ``kind`` and back in float32."""
    import gguf

    if kind.name in WHOLE:
        return W if kind.name == "F32" else W.to(_dtype(kind)).float()
    return torch.from_numpy(gguf.dequantize(gguf.quantize(np.ascontiguousarray(W.numpy()), kind), kind)).view(W.shape)


def _round_inputs(kind: Kind, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    import gguf

    if not given or not given[0].is_floating_point():
        return given
    x = given[0]
    if kind.name not in WHOLE:
        blocks = x.unflatten(-1, (-1, gguf.GGML_QUANT_SIZES[kind][0]))
        step = (blocks.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
        return ((blocks / step).round().mul(step).flatten(-2), *given[1:])
    return (x.to(_dtype(kind)).float(), *given[1:])


def _dtype(kind: Kind) -> torch.dtype:
    return torch.bfloat16 if kind.name == "BF16" else torch.float16
