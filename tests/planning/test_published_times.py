"""LoRA's and QLoRA's steps that others timed: what the plan says of a device, and what these steps' own hosts take,
give how much longer QLoRA took.

Their hosts launch other kernels than ours does: a layer's `Method.launches` have no place here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoConfig

import rankwise as rw
from rankwise.methods import METHODS
from rankwise.models.load import skeleton_of
from rankwise.planning import MemoryEstimate, Workload, speed
from rankwise.planning.facts import facts_of
from rankwise.planning.hardware import choose_hardware
from rankwise.planning.speed import assumed_pace, device_seconds, micro_batch_seconds

TOLERANCE, MEDIAN = 0.20, 0.05
"""Of the quotient QLoRA / LoRA, of every run and in the median of all."""
# What a peer's host takes for a layer and pass, whatever the layer's width; QLoRA's with seven dequantizations.
HOST_SECONDS = {"lora": 2.2e-3, "qlora": 2.58e-3}
# Of the bandwidth what bitsandbytes 0.41.1 reached; 1.4 to 2.1 times faster since (its pull request 1747).
OLD_SHARE = 0.18


def llama(hidden: int, mlp: int, layers: int, heads: int, vocabulary: int = 32000, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {"model_type": "llama", "num_attention_heads": heads, "tie_word_embeddings": False, **sizes, **more}


def qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    more = {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied, "model_type": "qwen3"}
    return llama(hidden, mlp, layers, heads, 151936, **more)


LLAMA_7B, LLAMA_13B = llama(4096, 11008, 32, 32), llama(5120, 13824, 40, 40)
LLAMA_3B = llama(3072, 8192, 28, 24, 128256, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
GEMMA_2B = llama(2048, 16384, 18, 8, 256000, num_key_value_heads=1, head_dim=256, model_type="gemma")
GEMMA_2B["tie_word_embeddings"] = True
QWEN3 = {
    "0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "4B": qwen3(2560, 9728, 36, 32, tied=True),
    "8B": qwen3(4096, 12288, 36, 32, tied=False),
    "14B": qwen3(5120, 17408, 40, 40, tied=False),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What was timed, and QLoRA's time over LoRA's."""

    name: str
    config: dict[str, Any]
    card: str
    workload: Workload
    quotient: float
    # Of the bandwidth what dequantization reaches.
    share: float = speed.DEQUANTIZE_SHARE

    @property
    def passes(self) -> int:
        """Over the layers, in a micro-batch."""
        return 3 if self.workload.gradient_checkpointing else 2


def lightning(name: str, config: dict[str, Any], quotient: float) -> Run:
    """Single rows of Alpaca (about 128 tokens with the prompt), r = 8 on queries and values, no checkpointing."""
    work = Workload(batch_size=1, max_length=128, r=8, target_modules=("q_proj", "v_proj"))
    return Run(name, config, "A100 40GB", work, quotient, OLD_SHARE)


def llama_factory(name: str, config: dict[str, Any], quotient: float) -> Run:
    """arXiv 2403.13372, section 5.1 and table 4: 512 tokens, r = 128 on all linear layers, checkpointing, Unsloth."""
    work = Workload(batch_size=1, max_length=512, r=128, gradient_checkpointing=True)
    return Run(name, config, "A100 40GB", work, quotient)


def unsloth(card: str, size: str, quotient: float) -> Run:
    """github.com/invergent-ai/surogate, docs/docs/reference/benchmarks.md: packed rows, Unsloth's checkpointing."""
    work = Workload(batch_size=2, max_length=2048, r=16, gradient_checkpointing=True)
    return Run(f"Qwen3 {size}, {card}", QWEN3[size], card, work, quotient)


TORCHTUNE = Workload(
    batch_size=2,
    max_length=4096,
    r=64,
    target_modules=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    gradient_checkpointing=True,
)
# Speeds in tokens a second are written LoRA / QLoRA, times the other way round.
RUNS = (
    # github.com/Lightning-AI/litgpt, tutorials/resource-tables.md (October 2023, bitsandbytes 0.41.1).
    lightning("litgpt 7B", LLAMA_7B, 3.68 / 2.36),
    lightning("litgpt 13B", LLAMA_13B, 6.38 / 3.19),
    # Raschka, "Finetuning LLMs with LoRA and QLoRA: Insights from Hundreds of Experiments" (Lightning, October 2023).
    lightning("Raschka 7B", LLAMA_7B, 10059.53 / 6685.75),
    llama_factory("LLaMA-Factory Gemma 2B", GEMMA_2B, 3521.05 / 3158.59),
    llama_factory("LLaMA-Factory 7B", LLAMA_7B, 1954.07 / 1579.16),
    llama_factory("LLaMA-Factory 13B", LLAMA_13B, 1468.19 / 973.53),
    # github.com/meta-pytorch/torchtune, README.md, "Optimization flags".
    Run("torchtune Llama 3.2 3B", LLAMA_3B, "A100 80GB SXM", TORCHTUNE, 8210 / 8035),
    unsloth("H100 SXM", "0.6B", 24.5 / 21),
    unsloth("H100 SXM", "1.7B", 23 / 20),
    unsloth("H100 SXM", "4B", 13.1 / 12.6),
    unsloth("H100 SXM", "8B", 9.1 / 8.6),
    unsloth("H100 SXM", "14B", 5.6 / 5.2),
    unsloth("H200", "0.6B", 21.7 / 18.3),
    unsloth("H200", "1.7B", 21.4 / 18.3),
    unsloth("H200", "4B", 12.8 / 12.1),
    unsloth("H200", "8B", 9.1 / 8.4),
    unsloth("B200", "0.6B", 19.1 / 17),
    unsloth("B200", "1.7B", 20.3 / 16.7),
    unsloth("B200", "4B", 14.8 / 13.1),
    unsloth("B200", "8B", 12.4 / 11.3),
    unsloth("RTX 5090", "0.6B", 22.1 / 19.1),
    unsloth("RTX 5090", "1.7B", 12.6 / 12),
    unsloth("RTX 5090", "4B", 6.1 / 6),
    unsloth("RTX 5090", "8B", 3.5 / 3.4),
)


@functools.cache
def parameters(config: str, r: int, targets: str, use_dora: bool) -> tuple[int, int]:
    """Those of the adapter and of the base."""
    model = skeleton_of(AutoConfig.for_model(**json.loads(config)))
    total = sum(parameter.numel() for parameter in model.parameters())
    chosen = targets if targets == "all-linear" else targets.split(",")
    added = rw.add_adapter(model, rw.LoraConfig(r=r, target_modules=chosen, use_dora=use_dora))
    return added.trainable_parameters, total


def counted(run: Run, method: str) -> MemoryEstimate:
    """What the plan's time reads of a trace."""
    targets = run.workload.target_modules
    chosen = targets if isinstance(targets, str) else ",".join(targets)
    trained, total = parameters(json.dumps(run.config), run.workload.r, chosen, "dora" in method)
    return MemoryEstimate(
        method=method, peak_bytes=0, breakdown={}, trainable_parameters=trained, total_parameters=total, error=0.0
    )


def predicted(run: Run) -> float:
    """The time of a peer's QLoRA over its LoRA."""
    found, pace, facts = {}, assumed_pace(choose_hardware(run.card, None), "bfloat16"), facts_of(run.config)
    assert pace is not None
    for method, host in HOST_SECONDS.items():
        with patch.object(speed, "DEQUANTIZE_SHARE", run.share):
            own = device_seconds(counted(run, method), facts, run.workload, pace)
        found[method] = max(own, facts.layers * run.passes * host)
    return found["qlora"] / found["lora"]


def ours(run: Run, method: str) -> float:
    """The time of our own step over that of our LoRA, as the plan has it."""
    pace, facts = assumed_pace(choose_hardware(run.card, None), "bfloat16"), facts_of(run.config)
    assert pace is not None
    four, wide = (micro_batch_seconds(counted(run, name), facts, run.workload, pace) for name in (method, "lora"))
    return four / wide


def test_qlora_takes_as_much_longer_as_was_timed():
    errors = {run.name: predicted(run) / run.quotient - 1 for run in RUNS}
    assert {name: error for name, error in errors.items() if abs(error) > TOLERANCE} == {}
    assert statistics.median(map(abs, errors.values())) < MEDIAN


def test_larger_batches_amortise_dequantization():
    run = Run("H100", LLAMA_7B, "H100 SXM", Workload(batch_size=1, max_length=1024), 0.0)
    quotients = []
    for rows in (1, 2, 4, 8, 16):
        work = dataclasses.replace(run.workload, batch_size=rows)
        quotients.append(ours(dataclasses.replace(run, workload=work), "qlora"))
    assert quotients == sorted(quotients, reverse=True)
    assert quotients[0] > 1.2
    assert 1.01 < quotients[-1] < 1.05


def test_dora_s_gain_costs_a_few_percent_and_more_where_launches_decide():
    """Norms from factors, once a step: unlike PEFT's, which are dense in each forward pass (26 % on an L40S)."""
    long = Run("H100", LLAMA_7B, "H100 SXM", Workload(batch_size=8, max_length=1024), 0.0)
    short = dataclasses.replace(long, workload=Workload(batch_size=1, max_length=64))
    assert 1.02 < ours(long, "dora") < 1.08
    assert ours(short, "dora") == pytest.approx(sum(METHODS["dora"].launches) / sum(METHODS["lora"].launches))
    assert ours(long, "qdora") > max(ours(long, "dora"), ours(long, "qlora"))
