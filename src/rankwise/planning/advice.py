"""Which method and which settings: a ladder of five steps that make a run smaller, and the reasons as a table.

    checkpointing    time only
    half the batch   time only, again and again; the rows of a step stay the same
    8-bit states     on a CUDA GPU
    four bits        another method, over a base in 4 bits
    shorter rows     half the length, again and again: rows beyond it are cut

Largest batches and longest rows lie on the line between two steps, since a peak grows almost linearly.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Literal

from rankwise.foreign import Fields, JsonObject
from rankwise.methods import METHODS, method_of
from rankwise.options import ALL_LINEAR
from rankwise.planning.memory import Estimator, MemoryEstimate
from rankwise.planning.workload import Workload
from rankwise.reports.numbers import byte_size
from rankwise.serving import refusing, served

Verdict = Literal["fits", "tight", "from disk", "too big"]
Evidence = Literal["published", "mixed", "computed", "tried"]
# (estimate, workload) -> seconds of one micro-batch; only ratios are used.
Seconds = Callable[[MemoryEstimate, Workload], float]

FOUR_BIT_SETTINGS = ("quant_type", "block_size", "double_quant")
PAGED = "paged_adamw_8bit"
# Share of the memory that a change must save to be shown.
WORTHWHILE = 0.02
MOST_ROWS, MOST_TOKENS = 4096, 1 << 20
SHORTEST_ROW, ROW_UNIT = 256, 64
# Terms that grow with the tokens of a step.
PER_TOKEN = ("activations", "logits", "transient")
# By how much of its peak a step may differ from the line through a smaller one.
STRAIGHT = 0.03


def order_for(goal: str) -> list[str]:
    """The order in which methods are tried. Full fine-tuning is recommended only where no other method was given."""
    return sorted(METHODS, key=lambda name: (METHODS[name].trains_all, goal == "quality" and METHODS[name].four_bits))


# --- whether a run fits ---

# Assumed of a solid-state disk whose speed is not measured.
DISK_BYTES_PER_SECOND = 1e9


def disk_words(mapped_bytes: int, bytes_per_second: float | None) -> str:
    """``7.8 s at 1 GB/s (measured)``: to read mapped weights that do not fit, in the forward and the backward pass."""
    speed = bytes_per_second or DISK_BYTES_PER_SECOND
    how = "measured" if bytes_per_second else "assumed"
    return f"{2 * mapped_bytes / speed:.1f} s at {speed / 1e9:.2g} GB/s ({how})"


def peak_words(estimate: MemoryEstimate) -> str:
    """``932 MB (idle process 360 MB, training 572 MB ±14 %)``."""
    idle, training = byte_size(estimate.idle_bytes), byte_size(estimate.training_bytes)
    return f"{byte_size(estimate.peak_bytes)} (idle process {idle}, training {training} ±{100 * estimate.error:.0f} %)"


def mapped_weights(estimate: MemoryEstimate, device_type: str) -> int:
    """The bytes of frozen weights that a CPU maps from files, which the system may drop and read again."""
    is_mapped = device_type == "cpu" and not method_of(estimate.method).trains_all
    return estimate.breakdown["weights"] + estimate.breakdown["weights_4bit"] if is_mapped else 0


def verdict_of(estimate: MemoryEstimate, memory_bytes: int, mapped_bytes: int = 0) -> Verdict:
    """``fits`` if the peak plus its expected error fits, ``tight`` if only the peak fits, ``from disk`` if it fits
    without its ``mapped_bytes`` only, else ``too big``."""
    if estimate.peak_bytes > memory_bytes:
        return "from disk" if estimate.peak_bytes - mapped_bytes <= memory_bytes else "too big"
    return "fits" if estimate.most_bytes <= memory_bytes else "tight"


def with_rounded(estimate: MemoryEstimate, more_bytes: int) -> MemoryEstimate:
    """The estimate with integers of the frozen weights kept beside them, which no file maps."""
    breakdown = {**estimate.breakdown, "overhead": estimate.breakdown["overhead"] + more_bytes}
    return dataclasses.replace(estimate, peak_bytes=estimate.peak_bytes + more_bytes, breakdown=breakdown)


def rounded_words(estimate: MemoryEstimate, more_bytes: int, *, fits: bool) -> str:
    """Whether weights of 8-bit products are rounded once; the estimate counts the bytes that this takes."""
    if fits:
        return (
            f"8-bit weights are rounded once and kept: {byte_size(more_bytes)} more, a peak of {peak_words(estimate)}"
        )
    return f"8-bit weights are rounded in every pass: there is no room to keep them ({byte_size(more_bytes)})"


def largest_batch(estimate: Estimator, method: str, workload: Workload, memory_bytes: int) -> int:
    """The largest micro-batch whose peak is within the memory; 0 where one row is too large."""
    return _largest(estimate, method, workload, memory_bytes, name="batch_size", unit=1, most=MOST_ROWS)


def longest_row(
    estimate: Estimator, method: str, workload: Workload, memory_bytes: int, *, most: int = MOST_TOKENS
) -> int:
    """The longest row, in whole ``ROW_UNIT`` tokens up to ``most``, that fits at this batch size; 0 where none does."""
    return _largest(estimate, method, workload, memory_bytes, name="max_length", unit=ROW_UNIT, most=most)


def _largest(
    estimate: Estimator, method: str, workload: Workload, memory_bytes: int, *, name: str, unit: int, most: int
) -> int:
    """The largest multiple of ``unit`` of a field that fits, on the line between two steps of which one fits: steps
    between which the peak grows as the smaller one's tensors do, or else neighbours.

    The steps are as large as the asked one, halved and doubled again and again, so that the next plan finds them on
    disk, however much memory is free then. A peak is a maximum of lines, and so never above the line between two.
    """
    asked = max(1, min(most, getattr(workload, name)) // unit)
    halved = [asked >> times for times in reversed(range(1, asked.bit_length()))]
    doubled = [asked << times for times in range((most // unit // asked).bit_length())]
    sizes = halved + doubled
    # Places in ``sizes``: the largest that fits, the smallest that does not, and the one to try.
    low, high, at = -1, len(sizes), sizes.index(asked)
    peaks: dict[int, int] = {}
    slopes: dict[int, float] = {}
    while high - low > 1:
        changed: dict[str, Any] = {name: sizes[at] * unit}
        found = estimate(method, dataclasses.replace(workload, **changed))
        peaks[at], spare = found.peak_bytes, memory_bytes - found.peak_bytes
        slopes[at] = max(1, sum(found.breakdown[term] for term in PER_TOKEN)) / sizes[at]
        if fits := spare >= 0:
            low = at
        else:
            high = at
        if low in peaks and high in peaks:
            expected = peaks[low] + slopes[low] * (sizes[high] - sizes[low])
            if abs(expected - peaks[high]) <= STRAIGHT * peaks[high]:
                break
        last_to_fit = bisect.bisect_right(sizes, sizes[at] + spare / slopes[at]) - 1
        at = min(high - 1, max(low + 1, last_to_fit + 1 if fits else last_to_fit))
    if low < 0 or high == len(sizes):
        return sizes[low] * unit if low >= 0 else 0
    share = (memory_bytes - peaks[low]) / (peaks[high] - peaks[low])
    return math.floor(sizes[low] + share * (sizes[high] - sizes[low])) * unit


# --- the ladder ---


@dataclasses.dataclass(frozen=True)
class Rung:
    """A step of the ladder: changed options of ``rankwise train``, with ``method`` among them."""

    name: str
    label: str
    settings: Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Steps of the ladder together, with their cost and the memory that they save."""

    steps: tuple[Rung, ...]
    method: str
    workload: Workload
    estimate: MemoryEstimate
    # Negative where the change takes more memory.
    saved_bytes: int
    # Ratio of the times for the same rows.
    time_factor: float
    verdict: Verdict

    @property
    def time_words(self) -> str:
        """``+9 % time``."""
        return f"{round((self.time_factor - 1) * 100):+d} % time"

    @property
    def label(self) -> str:
        return " and ".join(step.label for step in self.steps)

    @property
    def settings(self) -> JsonObject:
        return {name: value for step in self.steps for name, value in step.settings.items()}

    def to_json(self) -> JsonObject:
        return {
            "change": self.label,
            "settings": self.settings,
            "peak_bytes": self.estimate.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "time_factor": self.time_factor,
            "verdict": self.verdict,
        }


def ladder(method: str, workload: Workload, accumulation: int) -> Iterator[Rung]:
    """Every step that makes this run smaller, least invasive first. Those of one name replace each other."""
    if not workload.gradient_checkpointing:
        yield Rung("checkpointing", "gradient checkpointing", {"gradient_checkpointing": True})
    rows, times = workload.batch_size, accumulation
    while rows > 1:
        # An odd batch becomes single rows.
        rows, times = (rows // 2, times * 2) if rows % 2 == 0 else (1, times * rows)
        label = f"batch {workload.batch_size} -> {rows}"
        yield Rung("batch", label, {"batch_size": rows, "gradient_accumulation": times})
    if workload.device_type == "cuda" and workload.optimizer in ("adamw_torch", "adamw_torch_fused"):
        yield Rung("optimizer", f"optimizer {PAGED}", {"optimizer": PAGED})
    if (other := method_of(method).lighter) is not None:
        yield Rung("method", f"{method} -> {other}", {"method": other})
    length = workload.max_length
    while length > SHORTEST_ROW:
        length //= 2
        yield Rung("length", f"max-length {workload.max_length:,} -> {length:,}", {"max_length": length})


class Advisor:
    """Prices the ladder's steps for a run (``method`` at ``workload`` with ``accumulation``) against ``memory_bytes``.

    ``refused``: methods that cannot be planned.
    """

    def __init__(self, estimate: Estimator, seconds: Seconds, memory_bytes: int, refused: Container[str] = ()) -> None:
        self.estimate, self.seconds, self.memory_bytes, self.refused = estimate, seconds, memory_bytes, refused

    def price(self, steps: Sequence[Rung], method: str, workload: Workload) -> Change:
        before = self.estimate(method, workload)
        settings: JsonObject = {}
        for step in steps:
            settings.update(step.settings)
        fields = {name: value for name, value in settings.items() if name in Workload.__dataclass_fields__}
        if settings.get("gradient_accumulation", 1) > 1:
            fields["accumulates"] = True
        changed_method, changed = settings.get("method", method), dataclasses.replace(workload, **fields)
        after = self.estimate(changed_method, changed)
        row_seconds = [
            self.seconds(own, work) / work.batch_size for own, work in ((before, workload), (after, changed))
        ]
        return Change(
            steps=tuple(steps),
            method=changed_method,
            workload=changed,
            estimate=after,
            saved_bytes=before.peak_bytes - after.peak_bytes,
            time_factor=row_seconds[1] / row_seconds[0],
            verdict=verdict_of(after, self.memory_bytes),
        )

    def singles(self, method: str, workload: Workload, accumulation: int) -> list[Change]:
        """Each step alone that saves something worth showing; of halved batches and lengths the first."""
        firsts: dict[str, Rung] = {}
        for step in self._steps(method, workload, accumulation):
            firsts.setdefault(step.name, step)
        changes = [self.price([step], method, workload) for step in firsts.values()]
        return [change for change in changes if change.saved_bytes > WORTHWHILE * self.memory_bytes]

    def climbed(
        self, method: str, workload: Workload, accumulation: int, names: Container[str], verdict: str = "fits"
    ) -> Change | None:
        """The run with the fewest steps of the ladder, from its foot on, that has this verdict; None without any.

        ``names``: the steps that may be taken.
        """
        steps = [step for step in self._steps(method, workload, accumulation) if step.name in names]
        taken: dict[str, Rung] = {}
        for step in (None, *steps):
            if step is not None:
                taken[step.name] = step
            change = self.price(tuple(taken.values()), method, workload)
            if change.verdict in (verdict, "fits"):
                return change
        return None

    def smallest(self, method: str, workload: Workload, accumulation: int, names: Container[str]) -> Change:
        """The run with each of these steps as far as it goes."""
        last = {step.name: step for step in self._steps(method, workload, accumulation) if step.name in names}
        return self.price(tuple(last.values()), method, workload)

    def _steps(self, method: str, workload: Workload, accumulation: int) -> Iterator[Rung]:
        for step in ladder(method, workload, accumulation):
            if step.settings.get("method") is None or step.settings["method"] not in self.refused:
                yield step


# --- the recommendation ---

# The steps that are allowed in each pass. Every method is tried before the next pass, in which four bits are another
# method.
PASSES: tuple[frozenset[str], ...] = (
    frozenset({"batch", "checkpointing"}),
    frozenset({"batch", "checkpointing", "optimizer", "length"}),
)
LADDER = PASSES[-1] | {"method"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """``settings`` are the options of ``rankwise train`` that differ from the defaults or were given."""

    # None where nothing fits.
    method: str | None
    settings: JsonObject
    # The estimate of the recommended run, or of the smallest one where nothing fits.
    estimate: MemoryEstimate
    workload: Workload
    time_factor: float
    reasons: tuple[Rule, ...]
    # Where nothing fits: the memory that the smallest run lacks.
    missing_bytes: int = 0
    # Whether the run fits only without its expected error, and no smaller run fits with it.
    is_tight: bool = False
    # None where unknown; of the whole run also where its length is.
    tokens_per_second: float | None = None
    seconds: float | None = None

    @property
    def serving(self) -> tuple[str, ...]:
        return () if self.method is None else served(self.method, dataclasses.asdict(self.workload))

    def to_json(self) -> JsonObject:
        return {
            "method": self.method,
            "settings": self.settings,
            "peak_bytes": self.estimate.peak_bytes,
            "idle_bytes": self.estimate.idle_bytes,
            "error": self.estimate.error,
            "reasons": [rule.to_json() for rule in self.reasons],
            "serving": list(self.serving),
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "missing_bytes": self.missing_bytes,
            "tight": self.is_tight,
        }


@dataclasses.dataclass(frozen=True)
class Wish:
    """The user's wishes other than the step. ``given``: the settings to return, to which changes are added."""

    goal: str
    given: Fields
    accumulation: int = 1
    # The model has experts.
    is_mixture: bool = False


def recommend(advisor: Advisor, methods: Sequence[str], workload: Workload, wish: Wish) -> Recommendation:
    """The first method in the goal's order that fits, with the fewest changes. Where none fits with its expected error,
    the first that fits without it.
    """
    accumulation = wish.accumulation
    order = [method for method in order_for(wish.goal) if method in methods]
    gentle: dict[str, bool] = {}
    for names in PASSES:
        for method in order:
            change = advisor.climbed(method, workload, accumulation, names)
            gentle.setdefault(method, change is not None)
            if change is not None:
                return _explained(change, method, gentle, wish)
    runs = {method: advisor.smallest(method, workload, accumulation, PASSES[-1]) for method in order}
    tight = next((method for method in order if runs[method].verdict == "tight"), None)
    if tight is not None:
        change = advisor.climbed(tight, workload, accumulation, PASSES[-1], "tight") or runs[tight]
        return _explained(change, tight, gentle, wish)
    smallest = min(runs.values(), key=lambda run: run.estimate.peak_bytes)
    missing = max(0, smallest.estimate.peak_bytes - advisor.memory_bytes)
    own, work, time = smallest.estimate, smallest.workload, smallest.time_factor
    return Recommendation(
        method=None, settings={}, estimate=own, workload=work, time_factor=time, reasons=(), missing_bytes=missing
    )


def _explained(change: Change, method: str, fits: Mapping[str, bool], wish: Wish) -> Recommendation:
    settings = {**wish.given, **change.settings, "method": method}
    if not method_of(method).four_bits:
        settings = {name: value for name, value in settings.items() if name not in FOUR_BIT_SETTINGS}
    situation = Situation(
        method=method,
        goal=wish.goal,
        fits=dict(fits),
        settings=settings,
        changed=frozenset(change.settings),
        is_mixture=wish.is_mixture,
    )
    return Recommendation(
        method=method,
        settings=settings,
        estimate=change.estimate,
        workload=change.workload,
        time_factor=change.time_factor,
        reasons=tuple(rule for rule in RULES if rule.when(situation)),
        is_tight=change.verdict == "tight",
    )


# --- the reasons ---
#
# Every rule has a condition, a reason and a source, and says where the evidence is mixed. "published" rests on the
# source alone, "mixed" means that sources disagree, "computed" follows from the plan's own figures, "tried" comes from
# experiments.

LORA_PAPER = "LoRA, Hu et al. 2021, arXiv 2106.09685"
QLORA_PAPER = "QLoRA, Dettmers et al. 2023, arXiv 2305.14314"
DORA_PAPER = "DoRA, Liu et al. 2024, arXiv 2402.09353"
CHECKPOINTING_PAPER = "Chen et al. 2016, arXiv 1604.06174"
LOW_RANK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    # Whether the model has experts, which "all-linear" does not reach.
    is_mixture: bool = False

    @property
    def leaves_experts(self) -> bool:
        """Whether "all-linear" leaves out experts of this model."""
        return (
            self.is_mixture
            and not method_of(self.method).trains_all
            and self.settings.get("target_modules") == ALL_LINEAR
            and not self.settings.get("target_parameters")
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of advice."""

    name: str
    # When the rule applies.
    when: Callable[[Situation], bool]
    reason: str
    source: str
    evidence: Evidence

    def to_json(self) -> dict[str, str]:
        return {
            "rule": self.name,
            "reason": self.reason,
            "source": self.source,
            "evidence": self.evidence,
        }


def _sixteen_bits_do_not_fit(situation: Situation) -> bool:
    row = method_of(situation.method)
    # A kind has the name of its dense method.
    return row.four_bits and situation.fits.get(row.kind or "") is False


RULES: tuple[Rule, ...] = (
    Rule(
        "lora-simple",
        lambda s: s.method == "lora" and s.goal == "speed",
        "the fewest operations a token: no weights to dequantize, no norms; no latency once merged",
        f"{LORA_PAPER}, section 4; DoRA was 26 % slower in PEFT's own suite (Llama-3.2-3B, L40S)",
        "published",
    ),
    Rule(
        "lora-quality",
        lambda s: s.method == "lora" and s.goal == "quality",
        "no comparison here found DoRA better (a model of 135M parameters); `rankwise compare` tells on your data",
        "rankwise, docs/variants.md",
        "tried",
    ),
    Rule(
        "lora-memory",
        lambda s: s.method == "lora" and s.fits.get("lora") is True,
        "the unquantized base fits, so nothing is gained by rounding it to 4 bits",
        "this plan",
        "computed",
    ),
    Rule(
        "lora-serving",
        lambda s: s.method in ("lora", "qlora") and s.goal == "serving",
        f"{refusing('dora')} serve plain LoRA adapters and reject DoRA's; DoRA has to be exported with an error, or "
        "merged",
        f"{refusing('dora')}, November 2026",
        "tried",
    ),
    Rule(
        "qlora-needed",
        lambda s: s.method == "qlora" and _sixteen_bits_do_not_fit(s),
        "the unquantized base does not fit with any batch or checkpointing; NF4 takes little more than 4 bits a weight",
        f"this plan; that 4-bit training reaches 16-bit LoRA's results: {QLORA_PAPER}, section 4",
        "published",
    ),
    Rule(
        "qlora-all-linear",
        lambda s: method_of(s.method).four_bits and s.settings.get("target_modules") == ALL_LINEAR and not s.is_mixture,
        "with adapters on the attention alone QLoRA stays behind 16-bit fine-tuning; on all linear layers it does not",
        f"{QLORA_PAPER}, section 4 and figure 2",
        "published",
    ),
    Rule(
        "experts-left-out",
        lambda s: s.leaves_experts,
        "adapters on all linear layers reach no stacked expert, where most of a mixture's parameters are; RW422 says "
        "how many, and which --target-parameters adapts them; `rankwise compare` tells on your data whether that pays",
        "transformers 5 keeps a layer's experts in one parameter",
        "computed",
    ),
    Rule(
        "double-quant",
        lambda s: method_of(s.method).four_bits and s.settings.get("double_quant") is True,
        "double quantization saves 0.373 bits a parameter",
        f"{QLORA_PAPER}, section 3",
        "computed",
    ),
    Rule(
        "dora-quality",
        lambda s: method_of(s.method).kind == "dora" and s.settings.get("r", 16) <= LOW_RANK,
        "the paper's gain over LoRA is largest at low ranks (LLaMA-7B, eight commonsense sets)",
        f"{DORA_PAPER}, section 5.5",
        "mixed",
    ),
    Rule(
        "dora-gap",
        lambda s: method_of(s.method).kind == "dora",
        "mixed evidence: 78.4 against LoRA's 74.7 on average in the paper (76.3 in its authors' own repository), but "
        "46.9 against 47.8 % on GSM8K in PEFT's suite; `rankwise compare` tells on your data",
        f"{DORA_PAPER}, table 1; NVlabs/DoRA README; PEFT's method comparison (Llama-3.2-3B)",
        "mixed",
    ),
    Rule(
        "qdora-both",
        lambda s: s.method == "qdora" and _sixteen_bits_do_not_fit(s),
        "the unquantized base does not fit, and DoRA was asked for; few measurements of the two together are published",
        f"this plan; {DORA_PAPER}, section 6 (Orca-Math, one run a model)",
        "mixed",
    ),
    Rule(
        "full",
        lambda s: method_of(s.method).trains_all,
        "nothing restricts what can be learnt; on E2E with GPT-2 Medium it was no better than LoRA (BLEU 68.2 against "
        "70.4)",
        f"{LORA_PAPER}, table 3",
        "mixed",
    ),
    Rule(
        "accumulation",
        lambda s: "gradient_accumulation" in s.changed,
        "gradients add up over the micro-batches, so the step sees the same rows in less memory",
        "the gradient of a sum is the sum of the gradients",
        "computed",
    ),
    Rule(
        "checkpointing",
        lambda s: "gradient_checkpointing" in s.changed,
        "one more forward pass for activations of one layer at a time; the gradients stay the same",
        CHECKPOINTING_PAPER,
        "published",
    ),
    Rule(
        "paged",
        lambda s: "optimizer" in s.changed and s.settings["optimizer"] == PAGED,
        "8-bit states take a quarter of 32-bit ones, and pages of them leave the GPU when it is full",
        f"{QLORA_PAPER}, section 3 (paged optimizers)",
        "published",
    ),
    Rule(
        "shorter",
        lambda s: "max_length" in s.changed,
        "nothing smaller keeps the length: rows beyond it are cut, counted and reported by `rankwise preview`",
        "this plan",
        "computed",
    ),
)
