"""Operations of a step, and seconds from them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.models.folder import read_config
from rankwise.models.gguf_file import GgufHeader, GgufTensor
from rankwise.models.source import ModelSource
from rankwise.ops.cpu import products
from rankwise.planning import Workload, speed
from rankwise.planning.facts import facts_of, read_model
from rankwise.planning.hardware import cpu_hardware
from rankwise.planning.speed import (
    BESIDE_PRODUCTS,
    DEQUANTIZE_SHARE,
    OPTIMIZER_SECONDS,
    RUN_SHARES,
    STEP_SHARE,
    Pace,
    device_seconds,
    eight_bits_share,
    expert_bytes,
    flops_per_token,
    launch_seconds,
    measured_flops,
    micro_batch_seconds,
    offloaded_bytes,
    pace_of,
    step_seconds,
    weight_traffic_bytes,
)
from toy_memory import toy_estimate

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "model_type": "llama",
}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PARAMETERS_7B = 6_738_415_616
SHORT = Workload(max_length=2, batch_size=1)


def test_full_fine_tuning_costs_six_operations_a_weight():
    """6 N D (Kaplan et al. 2020), N without the embedding table."""
    facts = facts_of(LLAMA_7B)
    N = PARAMETERS_7B - 32000 * 4096
    assert flops_per_token("full", facts, PARAMETERS_7B, PARAMETERS_7B, SHORT) == pytest.approx(6 * N, rel=1e-3)


def test_frozen_weights_cost_four_and_checkpointing_two_more():
    facts = facts_of(LLAMA_7B)
    N = PARAMETERS_7B - 32000 * 4096
    plain = flops_per_token("lora", facts, PARAMETERS_7B, 0, SHORT)
    again = flops_per_token("lora", facts, PARAMETERS_7B, 0, dataclasses.replace(SHORT, gradient_checkpointing=True))
    assert plain == pytest.approx(4 * N, rel=1e-3)
    assert again - plain == pytest.approx(2 * (N - 32000 * 4096), rel=1e-3)


def test_only_the_experts_that_a_token_visits_count():
    """Mixtral 8x7B: 46.7B parameters, 12.9B a token (its paper's figures)."""
    mixtral = {**LLAMA_7B, "model_type": "mixtral", "intermediate_size": 14336}
    mixtral |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    active = facts_of(mixtral).matrix_parameters(46_702_792_704) + 32000 * 4096
    assert active == pytest.approx(12.9e9, rel=0.01)


def test_dense_weights_are_read_once_a_pass_and_made_before():
    """Read packed, written in 16 bits at half the bandwidth, read again; the head is dense, the embedding not read."""
    facts = facts_of(LLAMA_7B)
    read, head = PARAMETERS_7B - 32000 * 4096, 32000 * 4096
    assert weight_traffic_bytes("lora", facts, PARAMETERS_7B, SHORT) == 2 * 2 * read
    packed = weight_traffic_bytes("qlora", facts, PARAMETERS_7B, SHORT)
    assert packed == pytest.approx(2 * (2 * read + (0.53 + 2) * (read - head) / DEQUANTIZE_SHARE))
    again = dataclasses.replace(SHORT, gradient_checkpointing=True)
    assert weight_traffic_bytes("qlora", facts, PARAMETERS_7B, again) == pytest.approx(1.5 * packed)


def test_seconds_add_operations_and_traffic():
    facts, work = facts_of(LLAMA_7B), dataclasses.replace(SHORT, device_type="cpu", products="bfloat16")
    estimate = toy_estimate("lora", work)
    fast = micro_batch_seconds(estimate, facts, work, Pace(1e12, None, ""))
    both = micro_batch_seconds(estimate, facts, work, Pace(1e12, 1e12, ""))
    assert both - fast == pytest.approx(weight_traffic_bytes("lora", facts, estimate.total_parameters, work) / 1e12)
    twice = dataclasses.replace(work, batch_size=2)
    launching = launch_seconds("lora", facts, work)
    assert micro_batch_seconds(estimate, facts, twice, Pace(1e12, None, "")) == pytest.approx(2 * fast - launching)


def test_a_step_of_a_processor_has_its_optimizer():
    facts, work, pace = facts_of(LLAMA_7B), dataclasses.replace(SHORT, device_type="cpu"), Pace(1e12, None, "")
    own = toy_estimate("lora", work)
    updating = OPTIMIZER_SECONDS * own.trainable_parameters
    micro = micro_batch_seconds(own, facts, work, pace)
    assert step_seconds(own, facts, work, pace, 4) == pytest.approx(4 * micro + updating)


@pytest.mark.parametrize("method", RUN_SHARES)
def test_methods_differ_as_in_measured_whole_runs(method):
    """QLoRA takes longer than LoRA."""
    rows = json.loads((RESULTS / "end_to_end_avx512_bf16.json").read_text())["rows"]
    seconds = {row["method"]: row["ours"]["train_seconds"] for row in rows}
    assert RUN_SHARES[method] == pytest.approx(seconds["lora"] / seconds[method], abs=0.005)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, 0.4),
        ({"products": "int8", "objective": "grpo"}, 0.4),
        ({}, 1.0),
        ({"objective": "grpo"}, None),
        ({"products": "bfloat16"}, None),
        ({"device_type": "cuda"}, None),
    ],
)
def test_products_in_8_bits_take_their_measured_part(given, part, monkeypatch):
    """Beside what a step takes besides; ``part`` None: not even measured."""
    asked = []
    monkeypatch.setattr(speed, "measured_integers", lambda dtype: asked.append(dtype) or part)
    work = dataclasses.replace(SHORT, **{"device_type": "cpu"} | given)
    share = 1 if part is None else (part + BESIDE_PRODUCTS) / (1 + BESIDE_PRODUCTS)
    assert eight_bits_share("lora", work) == pytest.approx(share)
    assert bool(asked) == (part is not None)
    facts, pace, own = facts_of(LLAMA_7B), Pace(1e12, None, ""), toy_estimate("lora", work)
    usual = device_seconds(own, facts, dataclasses.replace(work, products="bfloat16"), pace)
    assert device_seconds(own, facts, work, pace) == pytest.approx(share * usual)


def test_no_micro_batch_of_a_card_is_faster_than_its_launches():
    facts, pace = facts_of(LLAMA_7B), Pace(1e18, 1e18, "")
    short = micro_batch_seconds(toy_estimate("lora", SHORT), facts, SHORT, pace)
    assert short == launch_seconds("lora", facts, SHORT) == pytest.approx(32 * 69 * 15e-6)
    again = dataclasses.replace(SHORT, gradient_checkpointing=True)
    assert launch_seconds("lora", facts, again) == pytest.approx(32 * (26 + 69) * 15e-6)
    # As `benchmarks/gpu_paper.py` counts them; tests/test_gpu_benchmarks.py compares.
    assert launch_seconds("qlora", facts, SHORT) == pytest.approx(32 * 83 * 15e-6)
    assert launch_seconds("qdora", facts, again) == pytest.approx(32 * (40 + 92) * 15e-6)


def test_offloaded_bytes_go_over_and_come_back():
    """Of each layer its input with checkpointing, else 34 s b h bytes (Korthikanti et al. 2022)."""
    facts, plain = facts_of(LLAMA_7B), Workload(batch_size=3, max_length=100)
    again = dataclasses.replace(plain, gradient_checkpointing=True)
    assert offloaded_bytes(facts, plain) == 2 * 34 * 300 * 4096 * 32
    assert offloaded_bytes(facts, again) == 2 * 2 * 300 * 4096 * 32


def test_a_processor_is_measured_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = dataclasses.replace(cpu_hardware(), sharers=2)
    measured = measured_flops(machine, "float32")
    assert 1e8 < measured < 1e13
    monkeypatch.delitem(sys.modules, "torch")
    assert measured_flops(machine, "float32") == measured
    assert pace_of(machine, "float32").flops_per_second == STEP_SHARE * measured / 2


def test_threads_that_wait_for_each_other_are_not_measured():
    """Nothing is computed on several threads, and what the thread waits for is not its time."""
    threads, seen = torch.get_num_threads(), set()

    def call():
        seen.add(torch.get_num_threads())
        time.sleep(0.01)
        sum(range(20_000))

    torch.set_num_threads(2)
    assert 0 < products.seconds_alone(call, 0.005) < 0.01
    assert (seen, torch.get_num_threads()) == ({1}, 2)
    torch.set_num_threads(threads)


def test_a_mixture_takes_the_longer_of_arithmetic_and_memory(monkeypatch):
    """Arithmetic is that of the experts that a token visits, however many there are. Two tokens read 1 - (3 / 4)^2 of
    the experts, many tokens all."""
    config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "tie_word_embeddings": False}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
    facts, one = facts_of({**config, "num_experts": 8}), 2 * 3 * 64 * 32
    work = Workload(device_type="cpu", batch_size=1, max_length=2, dtype="bfloat16", products="bfloat16")
    assert expert_bytes("lora", facts, work) == pytest.approx(2 * 8 * one * 7 / 16)
    work = dataclasses.replace(work, max_length=512)
    assert expert_bytes("lora", facts, work) == pytest.approx(2 * 8 * one)
    assert expert_bytes("qlora", facts, work) == pytest.approx(speed.PACKED_BYTES * 8 * one)
    assert expert_bytes("lora", facts_of({**config, "num_experts": 0}), work) == 0
    own, pace = toy_estimate("lora", work), Pace(1e12, None, "as given")
    more = dataclasses.replace(own, total_parameters=own.total_parameters + 120 * one)
    for bandwidth, times in ((1e18, 1), (1e3, 16)):
        monkeypatch.setattr(speed, "memory_bandwidth", lambda bandwidth=bandwidth: bandwidth)
        few = device_seconds(own, facts, work, pace)
        many = device_seconds(more, facts_of({**config, "num_experts": 128}), work, pace)
        assert many == pytest.approx(times * few, rel=1e-3)
    assert few == pytest.approx(2 * 2 * 8 * one / 1e3)


@pytest.mark.parametrize(
    ("side", "method", "products"),
    [("ours", "lora", "bfloat16"), ("ours, 8 bits", "lora", "int8"), ("ours, NF4, 8 bits", "qlora", "int8")],
)
def test_a_mixture_is_planned_as_it_was_measured(side, method, products, monkeypatch):
    """Two layers of Qwen3-30B-A3B's shape, adapters on attention and experts, by the products of that processor: 274
    GFLOP/s on two threads, 0.28 of their time in 8 bits. The plan's is up to 1.6 times a quiet machine's."""
    measured = json.loads((RESULTS / "mixtures_avx512_bf16.json").read_text())
    width, expert, vocabulary = 2048, 3 * 2048 * 768, measured["vocabulary"]
    facts = facts_of(
        {"hidden_size": width, "num_hidden_layers": 2, "vocab_size": vocabulary, "tie_word_embeddings": False}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    )
    attention = 2 * width * 4096 + 2 * width * 512
    work = Workload(device_type="cpu", batch_size=2, max_length=256, products=products, target_parameters=["experts"])
    own = dataclasses.replace(
        toy_estimate(method, work),
        total_parameters=2 * (vocabulary * width + attention + 128 * expert),
        trainable_parameters=2 * 128 * 16 * (width + 1536 + 768 + width),
    )
    monkeypatch.setattr(speed, "measured_integers", lambda dtype: 0.28)
    monkeypatch.setattr(speed, "memory_bandwidth", lambda: measured["floor"]["bytes_a_second"])
    planned = step_seconds(own, facts, work, Pace(STEP_SHARE * 274e9, None, ""), 1)
    rows = [row for row in measured["sides"] if row["side"] == side and row["adapted"] == "attention and experts"]
    assert 1.0 < planned / statistics.median(rows[0]["seconds"]) < 1.6


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("deepseek_v3", {"first_k_dense_replace": 2, "n_shared_experts": 1}),
        ("llama4_text", {"interleave_moe_layer_step": 2}),
        ("exaone_moe", {"mlp_layer_types": ["dense", "sparse", "dense", "dense", "sparse", "sparse"]}),
    ],
)
def test_dense_layers_of_a_mixture_have_no_idle_experts(family, options, tmp_path):
    config = AutoConfig.for_model(family, num_hidden_layers=6, **options)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mixed = sum(name.endswith(".experts") for name, _ in model.named_modules())
    saved = read_config(tmp_path)
    found, all_mixed = facts_of(saved), facts_of({**saved, "mlp_layer_types": ["sparse"] * 6})
    assert mixed < 6
    assert 6 * found.idle_expert_parameters == mixed * all_mixed.idle_expert_parameters > 0


def test_a_mixture_of_experts_in_a_gguf_file_has_idle_ones(monkeypatch):
    """By the stacked tensors."""
    tensors = {"token_embd.weight": (64, 100), "output.weight": (64, 100), "blk.0.attn_q.weight": (64, 64)}
    tensors["blk.0.ffn_up_exps.weight"] = (64, 32, 8)
    header = GgufHeader(
        {"general.architecture": "dbrx", "dbrx.expert_count": 8, "dbrx.expert_used_count": 2, "dbrx.block_count": 1},
        {name: GgufTensor(shape, 0, 0, 0) for name, shape in tensors.items()},
    )
    monkeypatch.setattr("rankwise.planning.facts.read_gguf_header", lambda path: header)
    facts = read_model(ModelSource(kind="gguf", name="m.gguf", path=Path("m.gguf"), base_model="m.gguf")).facts
    assert (facts.idle_expert_parameters, facts.vocabulary, facts.head_is_tied) == (64 * 32 * 6, 100, False)
