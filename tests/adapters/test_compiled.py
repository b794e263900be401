"""``torch.compile`` of an adapted model: one graph whatever the layers, made once, with the results of eager mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from adapted_models import IDS
from torch._dynamo.utils import counters

import rankwise as rw
from tables import long, thinned
from tiny_models import tiny_gpt2, tiny_llama

ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "dora_embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
}


def model_of(adapter: str, *, four_bit: bool) -> Any:
    model = tiny_llama(num_hidden_layers=2)
    if four_bit:
        rw.quantize(model, rw.Nf4Config(block_size=32))
    rw.add_adapter(model, rw.LoraConfig(r=3, init_lora_weights=False, **ADAPTERS[adapter]))
    return model.train()


def losses(model: Any, forward: Any) -> list[float]:
    optimizer = torch.optim.SGD(rw.adapter_parameters(model).values(), lr=0.1)
    found = []
    for _ in range(4):
        loss = forward(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@thinned({"adapter": list(ADAPTERS), "four_bit": [False, True]})
def test_a_compiled_model_trains_as_an_eager_one_in_one_graph(adapter, four_bit):
    model = model_of(adapter, four_bit=four_bit)
    expected = losses(other := copy.deepcopy(model), other)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert losses(model, compiled) == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert expected[-1] != expected[0]


def test_norms_kept_in_eager_mode_are_not_taken_into_a_graph():
    model = model_of("dora", four_bit=False)
    model(input_ids=IDS)
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=IDS)
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter.mul_(1.5)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_fused_projection_compiles():
    torch._dynamo.reset()
    model = tiny_gpt2(n_layer=1)
    parts = {"c_attn": [True, False, True]}
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["c_attn"], enable_lora=parts, use_dora=True))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["dora", *long([("lora",)])])
def test_an_optimized_model_compiles_within_the_limit(adapter):
    # Where a graph breaks, transformers' cache has a guard of its own for each layer.
    model = tiny_llama(num_hidden_layers=10, use_cache=False)
    rw.add_adapter(model, rw.LoraConfig(r=3, init_lora_weights=False, **ADAPTERS[adapter]))
    expected = losses(other := copy.deepcopy(model), other)
    rw.optimize_for_training(model)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert losses(model, torch.compile(model, backend="eager")) == pytest.approx(expected, rel=1e-4)
    assert not any("is_inference" in reason for reason in counters["graph_break"])
