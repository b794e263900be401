"""Traces of a few layers, extended to all, meet the trace of all; and what is kept of them on disk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from planning_models import FAMILIES, extended, of_config, skeleton, trace
from transformers import AutoConfig

from rankwise.models.folder import auto_class
from rankwise.planning import Workload, estimate, extend
from rankwise.planning.extend import Cut, cut_of
from tables import long, thinned

METHODS = ("full", "lora", "qlora", "dora", "qdora")
# Layers alternate in Gemma 2 (2), SmolLM3 (4) and Gemma 3 (6); the others have one kind.
DEPTH = {"gemma3_text": 26, "gemma3": 26, "smollm3": 36}
GRID = list(
    itertools.product(
        sorted({*FAMILIES} - {"idefics3", "smolvlm"}),
        METHODS,
        (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")),
        (False, True),
        ((1, 256), (8, 1024)),
    )
)
# Of families that only transformers knows.
SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "head_dim": 64}
OTHERS = ("stablelm", "cohere", "starcoder2", "glm", "olmo", "helium", "persimmon", "ernie4_5", "exaone4", "seed_oss")
OTHERS += ("hunyuan_v1_dense", "nemotron", "cohere2", "arcee")
MORE = {"exaone4": {"sliding_window": 64, "sliding_window_pattern": 4}}


def assert_within_a_hundredth(model, method, workload, layers=None):
    assert cut_of(model) is not None
    whole, quick = trace(model, method, workload), extended(model, method, workload)
    assert quick.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert quick.trainable_parameters == whole.trainable_parameters
    assert quick.phase == whole.phase


@thinned(
    {
        "family": ["llama", "gemma2", "gpt2", "mixtral"],
        "method": ["full", "qdora"],
        "device": ["cuda", "cpu"],
        "checkpointing": [False, True],
    }
)
def test_a_few_layers_tell_of_all(family, method, device, checkpointing):
    model = skeleton(family, num_hidden_layers=12 if family == "gemma2" else 8)
    workload = Workload(batch_size=2, max_length=256, device_type=device, gradient_checkpointing=checkpointing)
    assert_within_a_hundredth(model, method, workload)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_offloading": True},
        {"evaluation": True},
        {"accumulates": True},
        {"fast": False},
        {"written": 8, "prompts": 2, "trained_share": 0.5, "device_type": "cpu"},
        {"devices": 8, "strategy": "fsdp"},
        {"optimizer": "rmsprop", "r": 256, "batch_size": 1},
    ],
)
def test_so_they_do_of_other_steps(changes):
    workload = Workload(**{"batch_size": 2, "max_length": 256} | changes)
    assert_within_a_hundredth(skeleton("qwen3", num_hidden_layers=8), "qlora", workload)


@pytest.mark.parametrize("family", [*OTHERS[:2], *long([(name,) for name in OTHERS[2:]])])
def test_so_they_do_of_families_that_only_transformers_knows(family):
    config = AutoConfig.for_model(family, **SIZES | {"num_hidden_layers": 24} | MORE.get(family, {}))
    with torch.device("meta"):
        model = auto_class(family).from_config(config)
    assert_within_a_hundredth(model, "lora", Workload(batch_size=2, max_length=256))


@pytest.mark.grid
@pytest.mark.parametrize(("family", "method", "device", "checkpointing", "size"), GRID)
def test_a_few_layers_tell_of_all_over_the_whole_grid(family, method, device, checkpointing, size):
    model = skeleton(family, num_hidden_layers=DEPTH.get(family, 12))
    workload = Workload(
        batch_size=size[0],
        max_length=size[1],
        device_type=device[0],
        dtype=device[1],
        gradient_checkpointing=checkpointing,
    )
    assert_within_a_hundredth(model, method, workload)


@pytest.mark.parametrize(
    ("cut", "numbers"),
    [
        (Cut(12, 0, 1), [[0, 1, 11], [0, 1, 10, 11]]),
        (Cut(13, 0, 2), [[0, 1, 2, 11, 12], [0, 1, 2, 9, 10, 11, 12]]),
        (Cut(12, 3, 1), [[0, 1, 2, 3, 4, 11], [0, 1, 2, 3, 4, 10, 11]]),
    ],
)
def test_whole_periods_are_left_out_of_the_middle(cut, numbers):
    assert [cut.kept(cut.smaller), cut.kept(cut.larger)] == numbers
    assert cut.larger + cut.periods_beyond * cut.period == cut.count


def test_targets_that_name_a_layer_are_traced_whole(tmp_path: Path):
    one, every = (_planned(tmp_path, f"{layer}self_attn.q_proj") for layer in (r"layers\.3\.", ""))
    assert every.trainable_parameters == 12 * one.trainable_parameters


def _planned(folder: Path, target: str):
    config = {"model_type": "llama", **SIZES, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return estimate(folder, "lora", Workload(batch_size=1, max_length=32, target_modules=f".*{target}"))


def test_a_trace_is_kept_until_something_changes(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = _planned(tmp_path, "q_proj")
    monkeypatch.setattr(extend, "traced", lambda *_: pytest.fail("traced again"))
    assert _planned(tmp_path, "q_proj") == first
    (kept,) = (tmp_path / "cache").rglob("traces/*.json")
    kept.write_text("{")
    with pytest.raises(pytest.fail.Exception):
        _planned(tmp_path, "q_proj")


def test_a_model_without_a_list_of_layers_is_traced_whole():
    model = skeleton("llama", num_hidden_layers=12)
    model.config.num_hidden_layers = 11
    assert cut_of(model) is None


def test_evaluations_hold_no_more_than_training():
    config = {"model_type": "llama", **SIZES, "tie_word_embeddings": False}
    steps = [Workload(batch_size=4, max_length=256, evaluation=is_one) for is_one in (True, False)]
    evaluation, training = (of_config(config, "lora", step).peak_bytes for step in steps)
    assert evaluation < training
