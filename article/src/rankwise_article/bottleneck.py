"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), a baseline of comparisons.

After the attention and after the feed-forward sublayer of every block, before the residual is added,

    h  <-  h + W_up gelu(W_down h + b_down) + b_up

with W_down (width, d), and W_up (d, width) zero at the start, so that training starts at the base model. The paper also
trains the layer norms; here the base stays frozen, as in Pfeiffer et al. 2021. Unlike LoRA, it cannot be merged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from rankwise.errors import ConfigError

Output = Tensor | tuple[Tensor | None, ...]
# The names of a block's sublayers in transformers.
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class Bottleneck(nn.Module):
    """``h + W_up gelu(W_down h + b_down) + b_up`` with float32 parameters, computed in the dtype of ``h`` (..., d)."""

    def __init__(self, d: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, d, device=device))
        self.down_bias = nn.Parameter(torch.zeros(width, device=device))
        self.up = nn.Parameter(torch.zeros(d, width, device=device))
        self.up_bias = nn.Parameter(torch.zeros(d, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, h: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            value.to(h.dtype) for value in (self.down, self.down_bias, self.up, self.up_bias)
        )
        return h + linear(gelu(linear(h, down, down_bias)), up, up_bias)


def add_bottleneck(model: nn.Module, width: int) -> nn.ModuleDict:
    """Freeze ``model`` and add two bottlenecks to every block. Returns {sublayer's path with "/" for ".": bottleneck}.

    Raises ConfigError (RA170) for a model whose blocks have no sublayers of known names.
    """
    found = list(sublayers(model))
    if not found:
        raise ConfigError(
            "RA170",
            f"bottleneck adapters need blocks with attention and feed-forward sublayers, and {type(model).__name__} "
            f"has none named {', '.join((*ATTENTION, *FEED_FORWARD))}; use lora.",
        )
    d = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    model.requires_grad_(False)
    bottlenecks = nn.ModuleDict()
    for path, module in found:
        bottleneck = Bottleneck(d, width, next(itertools.chain(module.parameters(), module.buffers())).device)
        bottlenecks[path.replace(".", "/")] = bottleneck
        module.register_forward_hook(_after(bottleneck))
    return bottlenecks


def sublayers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the attention and the feed-forward sublayers of the blocks, in order."""
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in (*ATTENTION, *FEED_FORWARD) and parent.rpartition(".")[2].isdigit():
            yield path, module


def _after(bottleneck: Bottleneck) -> Callable[[nn.Module, tuple[Tensor, ...], Output], Output]:
    """A forward hook. Attention returns a tuple with its output first, a feed-forward layer returns a tensor."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Output) -> Output:
        if isinstance(output, tuple):
            return (bottleneck(output[0]), *output[1:])
        return bottleneck(output)

    return hook
