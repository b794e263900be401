"""Which method when, as a table. Every rule has a condition, a reason and a source, and says where the evidence is
mixed.

``evidence``: "published" rests on the source alone, "mixed" means that sources disagree, "computed" follows from the
plan's own figures, "tried" comes from experiments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from rankwise.config import DORA, FOUR_BITS
from rankwise.foreign import JsonObject
from rankwise.options import ALL_LINEAR
from rankwise.serving import refusing

Evidence = Literal["published", "mixed", "computed", "tried"]

LORA_PAPER = "LoRA, Hu et al. 2021, arXiv 2106.09685"
QLORA_PAPER = "QLoRA, Dettmers et al. 2023, arXiv 2305.14314"
DORA_PAPER = "DoRA, Liu et al. 2024, arXiv 2402.09353"
CHECKPOINTING_PAPER = "Chen et al. 2016, arXiv 1604.06174"
LOW_RANK = 8
PAGED = "paged_adamw_8bit"
HOSTED = "adamw_offload"


@dataclasses.dataclass(frozen=True)
class Situation:
    """A recommendation and the facts that explain it."""

    method: str
    goal: str
    # {planned method: whether it fits with some settings that do not change its result}.
    fits: dict[str, bool]
    # The recommended settings, by the names of ``rankwise train``.
    settings: JsonObject
    # Names among them that differ from what was asked for.
    changed: frozenset[str]
    # Micro-batches a step, as asked for.
    accumulation: int = 1
    # Whether the model has experts, which "all-linear" does not reach.
    is_mixture: bool = False

    @property
    def leaves_experts(self) -> bool:
        """Whether "all-linear" leaves out experts of this model."""
        return (
            self.is_mixture
            and self.method != "full"
            and self.settings.get("target_modules") == ALL_LINEAR
            and not self.settings.get("target_parameters")
        )

    @property
    def accumulation_grew(self) -> int:
        """1 for more and smaller micro-batches than asked for, -1 for fewer and larger ones, else 0."""
        now = self.settings.get("gradient_accumulation", self.accumulation)
        return (now > self.accumulation) - (now < self.accumulation)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of advice."""

    name: str
    # When the rule applies, as text.
    scenario: str
    # The same condition as a function.
    when: Callable[[Situation], bool]
    reason: str
    source: str
    evidence: Evidence

    def to_json(self) -> dict[str, str]:
        return {
            "rule": self.name,
            "scenario": self.scenario,
            "reason": self.reason,
            "source": self.source,
            "evidence": self.evidence,
        }


def _sixteen_bits_do_not_fit(situation: Situation) -> bool:
    wide = {"qlora": "lora", "qdora": "dora"}.get(situation.method)
    return wide is not None and situation.fits.get(wide) is False


RULES: tuple[Rule, ...] = (
    Rule(
        "lora-simple",
        "LoRA: the fastest and simplest",
        lambda s: s.method == "lora" and s.goal == "speed",
        "the fewest operations a token: no weights to dequantize, no norms; no latency once merged",
        f"{LORA_PAPER}, section 4; DoRA was 26 % slower in PEFT's own suite (Llama-3.2-3B, L40S)",
        "published",
    ),
    Rule(
        "lora-memory",
        "LoRA: memory is no problem",
        lambda s: s.method == "lora" and s.fits.get("lora") is True,
        "the unquantized base fits, so nothing is gained by rounding it to 4 bits",
        "this plan",
        "computed",
    ),
    Rule(
        "lora-serving",
        "LoRA: many adapters served over one base",
        lambda s: s.method in ("lora", "qlora") and s.goal == "serving",
        f"{refusing('dora')} serve plain LoRA adapters and reject DoRA's; DoRA has to be exported with an error, or "
        "merged",
        f"{refusing('dora')}, November 2026",
        "tried",
    ),
    Rule(
        "qlora-needed",
        "QLoRA: the model does not fit otherwise",
        lambda s: s.method == "qlora" and _sixteen_bits_do_not_fit(s),
        "the unquantized base does not fit with any batch or checkpointing; NF4 takes little more than 4 bits a weight",
        f"this plan; that 4-bit training reaches 16-bit LoRA's results: {QLORA_PAPER}, section 4",
        "published",
    ),
    Rule(
        "qlora-all-linear",
        "QLoRA: adapters on all linear layers",
        lambda s: s.method in FOUR_BITS and s.settings.get("target_modules") == ALL_LINEAR and not s.is_mixture,
        "with adapters on the attention alone QLoRA stays behind 16-bit fine-tuning; on all linear layers it does not",
        f"{QLORA_PAPER}, section 4 and figure 2",
        "published",
    ),
    Rule(
        "experts-left-out",
        "A mixture: the experts too",
        lambda s: s.leaves_experts,
        "adapters on all linear layers reach no stacked expert, where most of a mixture's parameters are; RW422 says "
        "how many, and which --target-parameters adapts them; `rankwise compare` tells on your data whether that pays",
        "transformers 5 keeps a layer's experts in one parameter",
        "computed",
    ),
    Rule(
        "double-quant",
        "QLoRA: scales in 8 bits",
        lambda s: s.method in FOUR_BITS and s.settings.get("double_quant") is True,
        "double quantization saves 0.373 bits a parameter",
        f"{QLORA_PAPER}, section 3",
        "computed",
    ),
    Rule(
        "dora-quality",
        "DoRA: quality at a low rank",
        lambda s: s.method in DORA and s.settings.get("r", 16) <= LOW_RANK,
        "the paper's gain over LoRA is largest at low ranks (LLaMA-7B, eight commonsense sets)",
        f"{DORA_PAPER}, section 5.5",
        "mixed",
    ),
    Rule(
        "dora-gap",
        "DoRA: closing LoRA's gap to full fine-tuning",
        lambda s: s.method in DORA,
        "mixed evidence: 78.4 against LoRA's 74.7 on average in the paper (76.3 in its authors' own repository), but "
        "46.9 against 47.8 % on GSM8K in PEFT's suite; `rankwise compare` tells on your data",
        f"{DORA_PAPER}, table 1; NVlabs/DoRA README; PEFT's method comparison (Llama-3.2-3B)",
        "mixed",
    ),
    Rule(
        "qdora-both",
        "QDoRA: DoRA where only 4 bits fit",
        lambda s: s.method == "qdora" and _sixteen_bits_do_not_fit(s),
        "the unquantized base does not fit, and DoRA was asked for; few measurements of the two together are published",
        f"this plan; {DORA_PAPER}, section 6 (Orca-Math, one run a model)",
        "mixed",
    ),
    Rule(
        "full",
        "Full fine-tuning: an adapter is not enough",
        lambda s: s.method == "full",
        "nothing restricts what can be learnt; on E2E with GPT-2 Medium it was no better than LoRA (BLEU 68.2 against "
        "70.4)",
        f"{LORA_PAPER}, table 3",
        "mixed",
    ),
    Rule(
        "accumulation",
        "Smaller micro-batches, the same rows a step",
        lambda s: s.accumulation_grew > 0,
        "gradients add up over the micro-batches, so the step sees the same rows in less memory",
        "the gradient of a sum is the sum of the gradients",
        "computed",
    ),
    Rule(
        "larger-batches",
        "Larger micro-batches, the same rows a step",
        lambda s: s.accumulation_grew < 0,
        "there is room for more rows at once, and the weights are read once for each micro-batch: fewer of them take "
        "no longer",
        "this plan",
        "computed",
    ),
    Rule(
        "checkpointing",
        "Recompute activations",
        lambda s: "gradient_checkpointing" in s.changed,
        "one more forward pass for activations of one layer at a time; the gradients stay the same",
        CHECKPOINTING_PAPER,
        "published",
    ),
    Rule(
        "offloading",
        "Activations wait in the host's memory",
        lambda s: "activation_offloading" in s.changed,
        "saved activations leave the card until the backward pass; it costs their way over the bus",
        "PCI-SIG's figures for PCIe 4.0 and the bytes of this plan",
        "computed",
    ),
    Rule(
        "paged",
        "Optimizer states that can leave the card",
        lambda s: "optimizer" in s.changed and s.settings["optimizer"] == PAGED,
        "8-bit states take a quarter of 32-bit ones, and pages of them leave the card when it is full",
        f"{QLORA_PAPER}, section 3 (paged optimizers)",
        "published",
    ),
    Rule(
        "hosted",
        "Optimizer states in the host's memory",
        lambda s: "optimizer" in s.changed and s.settings["optimizer"] == HOSTED,
        "AdamW's moments stay in the host's memory at full precision and its step runs there: the same update, for "
        "gradients that go over and weights that come back at every step; that time is not counted",
        "rankwise.training.memory_savers; the bytes of this plan",
        "computed",
    ),
    Rule(
        "shorter",
        "Shorter rows",
        lambda s: "max_length" in s.changed,
        "nothing smaller keeps the length: rows beyond it are cut, counted and reported by `rankwise preview`",
        "this plan",
        "computed",
    ),
    Rule(
        "lower-rank",
        "A lower rank",
        lambda s: "r" in s.changed,
        "with adapters on all linear layers the rank hardly changed results there",
        f"{QLORA_PAPER}, appendix A.2 (r from 8 to 256); {LORA_PAPER}, section 7.2",
        "published",
    ),
)


def reasons(situation: Situation) -> Iterator[Rule]:
    """The rules that apply, in the order of the table."""
    return (rule for rule in RULES if rule.when(situation))
