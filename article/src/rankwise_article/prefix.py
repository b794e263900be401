"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190), a baseline of comparisons.

Every attention layer gets P more keys and values before those of the text, and only these are trained:

    attention(q, [K_prefix; K], [V_prefix; V])          K_prefix, V_prefix: (P, heads of keys, head size) per layer

They start as the model's keys and values of P random tokens of its vocabulary, which trains far better than random
numbers (section 7.4 of the paper). As in PEFT's default, the paper's reparametrization by an MLP is left out. Keys are
stored after their rotation: the prefix has the positions 0 to P - 1, and the text follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ConfigError

Call = tuple[tuple[Tensor, ...], dict[str, Any]]
# transformers 5.2x renames the argument.
CACHE_NAMES = ("cache", "past_key_values")


class Prefix(nn.Module):
    """The trained prefix: ``keys`` and ``values`` (layers, heads, P, head size) in float32."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys.float().contiguous())
        self.values = nn.Parameter(values.float().contiguous())

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def fill(self, cache: Any, batch: int, dtype: torch.dtype) -> None:
        """Put the prefix, repeated for each of ``batch`` rows and cast to ``dtype``, into an empty cache."""
        for layer in range(len(self.keys)):
            pair = (part[layer].to(dtype).expand(batch, -1, -1, -1) for part in (self.keys, self.values))
            cache.update(*pair, layer)


def add_prefix(model: nn.Module, length: int) -> Prefix:
    """Freeze ``model`` and put a prefix of ``length`` positions before every text that it reads.

    The initial tokens are drawn with torch's generator. Raises ConfigError (RA171) for a model whose cache does not
    hold keys and values of one shape in every layer and, in a forward pass of training, for one with gradient
    checkpointing, which drops caches.
    """
    model.requires_grad_(False)
    prefix = Prefix(*_initial(model, length))
    # On the part without the head, which some callers call directly.
    inner: Any = model.base_model
    inner.register_forward_pre_hook(_in_front(prefix), with_kwargs=True)
    return prefix


@torch.no_grad()
def _initial(model: Any, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values (layers, heads, P, head size) of ``length`` random tokens, as the model computes them."""
    from transformers import DynamicCache

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, length)).to(model.device)
    training = model.training
    model.eval()
    cache = DynamicCache()
    model(input_ids=ids, use_cache=True, **{_cache_name(model): cache})
    model.train(training)
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    shapes = {tuple(key.shape) if isinstance(key, Tensor) else () for key, _ in pairs}
    if len(shapes) != 1 or () in shapes or next(iter(shapes))[2] != length:
        raise ConfigError(
            "RA171",
            f"prefix tuning needs keys and values of equal shapes in every layer, and {type(model).__name__} keeps "
            "something else; use lora.",
        )
    keys, values = zip(*pairs)
    return torch.cat(keys), torch.cat(values)


def _seen(mask: Tensor, length: int) -> Tensor:
    """``length`` mask columns that hide nothing, for a mask (B, L), or (B, 1, L, L) of booleans or -inf."""
    shape = (*mask.shape[:-1], length)
    return mask.new_zeros(shape) if mask.dim() == 4 and mask.is_floating_point() else mask.new_ones(shape)


def _cache_name(model: nn.Module) -> str:
    return CACHE_NAMES["cache" not in inspect.signature(model.forward).parameters]


def _in_front(prefix: Prefix) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], Call]:
    """A forward pre-hook that passes the prefix as a cache and extends the mask and the positions by its length."""

    def hook(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Call:
        from transformers import DynamicCache

        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise ConfigError(
                "RA171",
                "prefix tuning passes its prefix as a cache, which gradient checkpointing drops; train without "
                "--gradient-checkpointing.",
            )
        if inputs:
            named["input_ids"], inputs = inputs[0], inputs[1:]
        ids = named.get("input_ids")
        text = named["inputs_embeds"] if ids is None else ids
        batch = text.shape[0]
        cache = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
        if cache is None:
            cache = named[_cache_name(module)] = DynamicCache()
        # In the first call of a generation the cache is empty; later calls bring the filled one.
        if cache.get_seq_length() == 0:
            prefix.fill(cache, batch, module.dtype)
        if isinstance(mask := named.get("attention_mask"), Tensor):
            named["attention_mask"] = torch.cat([_seen(mask, prefix.length), mask], -1)
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + prefix.length
        return inputs, named

    return hook
