"""``bottleneck``, ``prefix`` and ``dora_through`` as methods of ``rankwise train`` and ``rankwise compare``.

``prefix`` is saved in PEFT's format: ``prompt_embeddings`` (P, 2 * layers * heads * head size), the keys and values of
each layer in turn. PEFT has none of the others; they are saved as one tensor per parameter, and their
``adapter_config.json`` has a ``peft_type`` that PEFT refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise.adapters import MethodType
from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject, read_json
from rankwise.records import write_bytes, write_json
from rankwise_article.bottleneck import add_bottleneck
from rankwise_article.dora_through import add_dora_through
from rankwise_article.prefix import Prefix, add_prefix

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# The attribute of the model that holds the trained module, so that it is among the model's parameters.
ATTRIBUTE = "rankwise_baseline"
TYPES = {"prefix": "PREFIX_TUNING", "bottleneck": "BOTTLENECK", "dora_through": "DORA_THROUGH"}
ADDED: Mapping[str, Callable[[nn.Module, int], nn.Module]] = {
    "prefix": add_prefix,
    "bottleneck": add_bottleneck,
    "dora_through": add_dora_through,
}


def add_baseline(model: nn.Module, method: str, size: int) -> int:
    """Freeze the model and add the baseline, in place. Returns the number of trained parameters.

    ``size``: width of the bottlenecks, length of the prefix, or rank. Raises ConfigError as those in ``ADDED`` do.
    """
    part = ADDED[method](model, size)
    part.method, part.size = method, size  # type: ignore[assignment]
    setattr(model, ATTRIBUTE, part)
    return sum(parameter.numel() for parameter in part.parameters())


def _add(method: str, model: nn.Module, size: int) -> int:
    return add_baseline(model, method, size)


def save_baseline(model: nn.Module, folder: Path) -> None:
    """Write the model's baseline as ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``."""
    part = getattr(model, ATTRIBUTE)
    tensors = _prompt_embeddings(part) if isinstance(part, Prefix) else _plain(part)
    config: JsonObject = {
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "inference_mode": True,
        "peft_type": TYPES[part.method],
        "task_type": "CAUSAL_LM",
    }
    config |= _prefix_config(part) if isinstance(part, Prefix) else {"width": part.size}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def load_baseline(model: nn.Module, folder: Path) -> None:
    """Add the baseline in ``folder`` to the model, frozen. Raises ConfigError (RA172) if there is none, or it does
    not fit.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
        method = {name: method for method, name in TYPES.items()}[config["peft_type"]]
        size = int(config["num_virtual_tokens" if method == "prefix" else "width"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("RA172", f"{folder} holds no baseline ({error!r}); give the folder of a run.") from None
    add_baseline(model, method, size)
    load_baseline_weights(model, folder)
    getattr(model, ATTRIBUTE).requires_grad_(False)


@torch.no_grad()
def load_baseline_weights(model: nn.Module, folder: Path) -> None:
    """Copy the tensors that ``save_baseline`` wrote into the model's parameters. Raises ConfigError (RA172) if they
    do not fit.
    """
    part = getattr(model, ATTRIBUTE)
    wanted = _prompt_embeddings(part) if isinstance(part, Prefix) else _plain(part)
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    shapes = [{key: tuple(value.shape) for key, value in group.items()} for group in (tensors, wanted)]
    if shapes[0] != shapes[1]:
        odd = sorted({key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key)})
        raise ConfigError("RA172", f"the tensors in {folder} do not fit this model: {', '.join(odd[:5])}.")
    if isinstance(part, Prefix):
        layers, heads, length, size = part.keys.shape
        pairs = tensors["prompt_embeddings"].view(length, layers, 2, heads, size).permute(2, 1, 3, 0, 4)
        part.keys.copy_(pairs[0])
        part.values.copy_(pairs[1])
        return
    for key, parameter in part.named_parameters():
        parameter.copy_(tensors[key])


def _plain(part: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in part.named_parameters()}


def _prompt_embeddings(prefix: Prefix) -> dict[str, Tensor]:
    pairs = torch.stack([prefix.keys.detach(), prefix.values.detach()], 1).cpu()
    # (layers, 2, heads, P, size) -> (P, layers, 2, heads, size)
    return {"prompt_embeddings": pairs.permute(3, 0, 1, 2, 4).reshape(prefix.length, -1).contiguous()}


def _prefix_config(prefix: Prefix) -> JsonObject:
    layers, heads, length, size = prefix.keys.shape
    return {
        "encoder_hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "prefix_projection": False,
        "token_dim": heads * size,
    }


BOTTLENECK, PREFIX, DORA_THROUGH = (
    MethodType(functools.partial(_add, method), save_baseline, load_baseline_weights, load_baseline)
    for method in ("bottleneck", "prefix", "dora_through")
)
