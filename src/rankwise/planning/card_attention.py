"""Attention that saves what it saves on a CUDA device, for a trace on the CPU, whose kernels save other tensors.

B rows, H heads, Hkv key-value heads, L positions, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from rankwise.compat.torch import Ctx
from rankwise.compat.transformers import attention_of
from rankwise.ops.selection import as_autocast

NAME = "rankwise_card"


def use_card_attention(model: PreTrainedModel) -> None:
    """Replace torch's scaled_dot_product_attention in the model by the functions of this module."""
    if attention_of(model.config) != "sdpa":
        return
    AttentionInterface.register(NAME, card_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def card_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, L, D), key and value (B, Hkv, L, D) -> (B, L, H, D).

    With a mask transformers repeats keys and values for every head (without one the kernel groups them), and torch
    turns a boolean mask into an additive one of the query's dtype, again in every layer.
    """
    query, key, value = map(as_autocast, (query, key, value))
    bias = None
    if attention_mask is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        bias = torch.empty(attention_mask.shape, dtype=query.dtype, device=query.device)
    return _Kept.apply(query, key, value, bias), None


class _Kept(torch.autograd.Function):
    """Saves q, k, v, the mask, the output and a float32 log-sum per head and position, as flash and memory-efficient
    attention do, without computing attention."""

    @staticmethod
    def forward(ctx: Ctx[None], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        B, H, L, _ = q.shape
        out = q.new_empty(B, L, H, v.shape[-1])
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(B, H, L, dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
