"""What families of mixtures differ in: adapted and fast, each computes as merged in transformers' own loop."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import RankwiseWarning
from rankwise.quantization import dequantize
from rankwise.quantization.experts import four_bit_stacks
from tables import thinned
from tiny_models import tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2], [7, 3, 3, 50, 41, 8, 22, 90]])
OLMOE = {"intermediate_size": 32, "num_experts": 4}
# {what it shows: (family, sizes, the layers with experts)}. Routers of gpt_oss and deepseek_v3 have biases.
FAMILIES: dict[str, tuple[str, dict[str, Any], set[int]]] = {
    "a gated shared expert": ("qwen2_moe", {}, {0, 1}),
    "shared experts after a dense layer": ("deepseek_v2", {}, {1}),
    "a bias that chooses, and scaled weights": (
        "deepseek_v3",
        {
            "intermediate_size": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5,
            "head_dim": 8,
        },
        {0, 1},
    ),
    "biases, clamped and transposed": ("gpt_oss", {"swiglu_limit": 0.05}, {0, 1}),
    "one expert of a token": ("mixtral", {"num_experts_per_tok": 1}, {0, 1}),
    "normalised weights": ("qwen3_moe", {"norm_topk_prob": True}, {0, 1}),
    "raw weights": ("olmoe", {**OLMOE, "num_experts_per_tok": 2, "norm_topk_prob": False}, {0, 1}),
    "dense and sparse in turns": ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}, {1, 3}),
    "a dense layer by name": ("qwen3_moe", {"mlp_only_layers": [0]}, {1}),
}


def adapted(case: str, four_bit: bool) -> nn.Module:
    family, sizes, layers = FAMILIES[case]
    model = tiny_moe(family, **sizes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    if four_bit:
        rw.quantize(model, rw.Nf4Config(block_size=32))
    torch.manual_seed(1)
    report = rw.add_adapter(
        model,
        rw.LoraConfig(
            r=3,
            target_modules=["o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    assert {int(item.name.split(".")[2]) for item in report.modules if item.experts} == layers
    return model


def computed(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the gradient of a function of them in the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0]


@thinned({"case": list(FAMILIES), "four_bit": [False, True]})
def test_an_adapted_mixture_is_the_merged_one_in_transformers_own_loop(case: str, four_bit: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankwiseWarning)
        fast, plain = adapted(case, four_bit), adapted(case, four_bit)
    assert (len(list(four_bit_stacks(fast))) > 0) == four_bit
    rw.optimize_for_training(fast.train())
    rw.merge_adapter(plain, reversible=False)
    dequantize(plain)
    plain.set_experts_implementation("eager")
    for ours, theirs in zip(computed(fast), computed(plain.train()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("limit", [0.05, 7.0])
def test_the_clamp_is_reached(limit: float) -> None:
    """Else its case above would show nothing."""
    base, clamped = tiny_moe("gpt_oss"), tiny_moe("gpt_oss", swiglu_limit=limit)
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, clamped(IDS).logits) == (limit == 7.0)
