"""Operations of a step, and seconds from them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from rankwise.models.gguf_file import GgufHeader, GgufTensor
from rankwise.models.source import ModelSource
from rankwise.planning import Workload, speed
from rankwise.planning.facts import facts_of, read_model
from rankwise.planning.hardware import cpu_hardware
from rankwise.planning.speed import (
    AVX_VNNI_SHARE,
    DEQUANTIZE_SHARE,
    EIGHT_BITS_SHARE,
    OPTIMIZER_SECONDS,
    RUN_SHARES,
    STEP_SHARE,
    Pace,
    device_seconds,
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
    ("objective", "dtype", "flags", "share"),
    [
        ("sft", "bfloat16", {"avx512_bf16"}, EIGHT_BITS_SHARE),
        ("grpo", "bfloat16", {"avx512_bf16"}, 1),
        ("sft", "float32", {"avx512_bf16", "avx_vnni"}, 1),
        ("sft", "bfloat16", {"avx512_bf16", "amx_bf16"}, 1),
        ("sft", "float32", {"avx_vnni"}, AVX_VNNI_SHARE),
        ("sft", "float32", {"avx2"}, 1),
    ],
)
def test_products_in_8_bits_are_known(objective, dtype, flags, share, monkeypatch):
    monkeypatch.setattr(speed, "cpu_flags", lambda: flags)
    auto = dataclasses.replace(SHORT, device_type="cpu", objective=objective, dtype=dtype)
    both = dataclasses.replace(auto, products="bfloat16"), auto
    facts, pace = facts_of(LLAMA_7B), Pace(1e12, None, "")
    usual, found = (device_seconds(toy_estimate("lora", work), facts, work, pace) for work in both)
    assert found == pytest.approx(share * usual)


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


def test_a_processor_reads_the_experts_that_a_token_visits(monkeypatch):
    """Two tokens visit 1 - (3 / 4)^2 of them, many tokens all; where memory is slow, it decides."""
    config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "tie_word_embeddings": False}
    facts = facts_of({**config, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32})
    stacked = 2 * 8 * 3 * 64 * 32
    work = Workload(device_type="cpu", batch_size=1, max_length=2, dtype="bfloat16")
    assert expert_bytes("lora", facts, work) == pytest.approx(2 * stacked * 7 / 16)
    work = dataclasses.replace(work, max_length=512)
    assert expert_bytes("lora", facts, work) == pytest.approx(2 * stacked)
    assert expert_bytes("qlora", facts, work) == pytest.approx(speed.PACKED_BYTES * stacked)
    assert expert_bytes("lora", facts_of(config), work) == 0
    own, fast = toy_estimate("lora", work), Pace(1e18, None, "as given")
    monkeypatch.setattr(speed, "memory_bandwidth", lambda: 1e3)
    assert device_seconds(own, facts, work, fast) == pytest.approx(2 * 2 * stacked / 1e3)


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
