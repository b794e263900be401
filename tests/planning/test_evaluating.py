"""An evaluation's peak by the closed form against a forward pass of the model on fake tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from planning_models import config_of, skeleton

from rankwise.planning import MemoryEstimate, Workload
from rankwise.planning.architectures import shape_of
from rankwise.planning.assemble import EVALUATION_ERROR
from rankwise.planning.closed_form import of_shape
from rankwise.planning.dry_run import trace
from rankwise.planning.evaluating import cast_bytes, written_bytes
from rankwise.planning.step import loss_of
from rankwise.planning.step_facts import StepFacts
from tables import thinned

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
CHANGES = {"gpt2": {"intermediate_size": 512, "n_positions": 4096}}


def forward_only(model: Any, batch: Any, autocast: Any) -> torch.Tensor:
    """The loss of an evaluation, then something to go back from that holds nothing."""
    with torch.no_grad():
        loss_of(model, batch, autocast)
    return torch.stack([parameter.sum() * 0 for parameter in model.parameters() if parameter.requires_grad]).sum()


def tensors(estimate: MemoryEstimate) -> int:
    return estimate.peak_bytes - estimate.breakdown["overhead"]


DENSE = [(family, method) for family in ("llama", "qwen3", "gemma2", "gpt2") for method in ("lora", "qdora", "full")]
# The experts' gradients, were they trained, would outweigh a forward pass of so few tokens.
MIXTURES = [("qwen3_moe", "lora"), ("qwen3_moe", "qdora")]


@thinned({"family,method": [*DENSE, *MIXTURES], "device": ["cpu", "cuda"]})
def test_an_evaluation_holds_what_its_forward_pass_does(family, method, device):
    changes = SMALL | CHANGES.get(family, {})
    workload = Workload(batch_size=4, max_length=512, r=8, device_type=device)
    found = of_shape(shape_of(config_of(family, **changes)), method, dataclasses.replace(workload, evaluation=True))
    counted = trace(skeleton(family, **changes), method, workload, loss=forward_only)
    assert counted.phase == found.phase == "forward"
    assert tensors(found) == pytest.approx(tensors(counted), rel=EVALUATION_ERROR)


@pytest.mark.parametrize("method", ["lora", "qdora", "full"])
def test_it_takes_less_than_training_on_the_same_rows(method):
    workload = Workload(batch_size=4, max_length=512, r=8)
    shape = shape_of(config_of("llama"))
    evaluated = of_shape(shape, method, dataclasses.replace(workload, evaluation=True))
    assert evaluated.peak_bytes < of_shape(shape, method, workload).peak_bytes


@thinned({"family,method": [("llama", "lora"), ("llama", "qdora"), ("qwen3", "lora")], "device": ["cpu", "cuda"]})
def test_answers_hold_their_keys_and_values(family, method, device):
    """Of many answers and a small step generation is the peak, in the closed form and in the dry run."""
    workload = Workload(batch_size=1, max_length=512, r=8, device_type=device, trained_share=0.5)
    writing = dataclasses.replace(workload, written=64, prompts=8)
    found = of_shape(shape_of(config_of(family, **SMALL)), method, writing)
    counted, step = (trace(skeleton(family, **SMALL), method, work) for work in (writing, workload))
    assert counted.phase == found.phase == "generation"
    # 64 rows of 512 tokens, 4 layers, keys and values of 2 heads of 32 in bfloat16.
    assert tensors(counted) > tensors(step) + 0.8 * 64 * 512 * 4 * 2 * 64 * 2
    assert tensors(found) == pytest.approx(tensors(counted), rel=EVALUATION_ERROR)


def test_copies_of_autocast_are_of_every_weight_in_a_product():
    shape = shape_of(config_of("llama", **SMALL))
    table_and_norm = shape.vocabulary * shape.hidden + shape.hidden

    def copies(method, dtype):
        return cast_bytes(StepFacts.of(shape, method, Workload(dtype=dtype)))

    assert copies("full", "bfloat16") == 2 * (shape.parameters - table_and_norm)
    assert copies("full", "float32") == copies("lora", "bfloat16") == copies("qdora", "bfloat16") == 0


@pytest.mark.parametrize("prompts", [1, 8])
def test_a_layer_more_keeps_the_keys_and_values_of_all_prompts(prompts):
    workload = Workload(batch_size=2, max_length=512, trained_share=0.5, written=16, prompts=prompts)

    def at_prompts(layers):
        step = StepFacts.of(shape_of(config_of("llama", **SMALL | {"num_hidden_layers": layers})), "lora", workload)
        return written_bytes(step, 0)["generation of prompts"]["transient"]

    # Keys and values of 2 heads of 32 in bfloat16.
    assert at_prompts(5) - at_prompts(4) == prompts * workload.prompt_tokens * 2 * 64 * 2


def test_answers_of_a_model_with_windows_keep_a_window_of_keys_and_values():
    workload = Workload(batch_size=1, max_length=256, r=2, trained_share=0.5, written=32, prompts=4)
    sizes = SMALL | {"num_hidden_layers": 2}
    whole, windowed = (
        tensors(trace(skeleton("mistral", **sizes, sliding_window=window), "lora", workload)) for window in (None, 16)
    )
    assert windowed < 0.95 * whole


def test_many_prompts_at_once_are_the_most_that_an_evaluation_of_rewards_holds():
    shape = shape_of(config_of("llama", **SMALL | {"intermediate_size": 4096}))
    workload = Workload(batch_size=64, max_length=512, r=8, written=64, prompts=64, trained_share=0.1, evaluation=True)
    short = dataclasses.replace(workload, prompts=8)
    assert of_shape(shape, "lora", workload).peak_bytes > of_shape(shape, "lora", short).peak_bytes


def test_answers_beyond_the_room_for_keys_and_values_are_not_written_together():
    config = config_of("llama", **SMALL | {"num_key_value_heads": 4, "head_dim": 256, "num_hidden_layers": 32})
    workload = Workload(batch_size=1, max_length=2048, r=8, device_type="cpu", written=64, prompts=8)
    few = dataclasses.replace(workload, written=16)
    # 2 x 32 layers x 1024 x 2 bytes x 2,048 tokens are 0.27 GB a row: 4 rows make a GiB.
    assert of_shape(shape_of(config), "lora", workload).breakdown == of_shape(shape_of(config), "lora", few).breakdown
