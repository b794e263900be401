"""The result of ``rankwise plan``: a row for each method, the recommendation, and useful changes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Sequence

from rankwise.config import FOUR_BITS
from rankwise.default_rate import DefaultRate, default_rate
from rankwise.errors import ConfigError, ModelError, QuantizationError, RankwiseError
from rankwise.foreign import Fields, JsonObject
from rankwise.models.source import ModelSource, fetch_model
from rankwise.planning.calibration import measured_pace
from rankwise.planning.changes import Advisor, Change, reachable
from rankwise.planning.estimate import estimate, estimator_of
from rankwise.planning.facts import read_model
from rankwise.planning.fitting import (
    MOST_TOKENS,
    Estimator,
    Interpolating,
    Remembering,
    Verdict,
    fits,
    largest_batch,
    longest_row,
    verdict_of,
)
from rankwise.planning.hardware import Hardware, choose_hardware, shared
from rankwise.planning.optimizers import check_device
from rankwise.planning.over_stored import over_stored
from rankwise.planning.recommend import PASSES, Recommendation, Wish, recommend
from rankwise.planning.settings import SHARED, PlanSettings
from rankwise.planning.speed import (
    Pace,
    assumed_pace,
    hiding_bandwidth,
    micro_batch_seconds,
    nominal_pace,
    tokens_per_second,
)
from rankwise.planning.terms import TOO_SLOW, MemoryEstimate
from rankwise.planning.workload import DeviceType, Workload, sides_of, written_of
from rankwise.reports.numbers import byte_size

# Options that every saved plan holds, given or not.
DECIDED = (
    *("r", "target_modules", "batch_size", "gradient_accumulation", "max_length", "gradient_checkpointing"),
    *("activation_offloading", "optimizer"),
)
# Time limits of the dry run of one among several methods: the first try, and a second after all others.
EXACT_SECONDS = (60.0, 900.0)


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One method at the given settings, in bytes and seconds."""

    estimate: MemoryEstimate
    verdict: Verdict
    # Memory minus peak; negative where the run does not fit.
    spare_bytes: int
    # Largest number of rows of ``max_length`` that fit; 0 where not one does.
    max_batch_size: int
    # Longest row that fits at the given batch size.
    longest_row_tokens: int
    tokens_per_second: float | None
    # Seconds of the whole run, where its length is known.
    seconds: float | None
    # Bytes that each of several devices sends in an optimizer step, and the bandwidth that hides this traffic.
    network_bytes: int
    network_bytes_per_second: float | None

    def to_json(self) -> JsonObject:
        own = self.estimate
        return {
            "peak_bytes": own.peak_bytes,
            "error": own.error,
            "breakdown": own.breakdown,
            "trainable_parameters": own.trainable_parameters,
            "total_parameters": own.total_parameters,
            "fits": self.verdict != "too big",
            "verdict": self.verdict,
            "spare_bytes": self.spare_bytes,
            "max_batch_size": self.max_batch_size,
            "longest_row_tokens": self.longest_row_tokens,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "network_bytes": self.network_bytes,
            "network_bytes_per_second": self.network_bytes_per_second,
            "exact": own.exact,
            "phase": own.phase,
            "notes": list(own.notes),
        }


@dataclasses.dataclass(frozen=True)
class Unplanned:
    """A method that cannot be planned: the model or the settings do not support it, or its dry run fails."""

    method: str
    code: str
    message: str

    def to_json(self) -> JsonObject:
        return {"fits": None, "verdict": None, "failure": {"code": self.code, "message": self.message}}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What ``rankwise plan`` prints."""

    model: str
    hardware: Hardware
    workload: Workload
    accumulation: int
    # At least one row.
    rows: tuple[MethodRow, ...]
    unplanned: tuple[Unplanned, ...]
    recommendation: Recommendation
    # Changes of the recommended method (or of the first) at the given settings.
    changes: tuple[Change, ...]
    changes_of: str
    # Source of the speeds; None where no figure is known.
    pace_basis: str | None
    run_tokens: int | None
    # The default of ``--learning-rate`` for the recommended method; None where the config gives no width.
    rate: DefaultRate | None

    def to_json(self) -> JsonObject:
        return {
            "model": self.model,
            "hardware": self.hardware.to_json(),
            "workload": {**dataclasses.asdict(self.workload), "gradient_accumulation": self.accumulation},
            "methods": {
                **{row.estimate.method: row.to_json() for row in self.rows},
                **{item.method: item.to_json() for item in self.unplanned},
            },
            "recommendation": self.recommendation.to_json(),
            "changes": {"method": self.changes_of, "steps": [change.to_json() for change in self.changes]},
            "pace": self.pace_basis,
            "run_tokens": self.run_tokens,
            "learning_rate": self.rate and {"rate": self.rate.rate, "reason": self.rate.reason},
        }


def make_plan(settings: PlanSettings, say: Callable[[str], None] = lambda _: None) -> Plan:
    """The plan for these options. ``say`` is called with a line about each dry run.

    Raises ConfigError: RW116 an optimizer that cannot run there, RW130 to RW132 impossible settings, RW140 a size,
    RW141 a card, RW131 a method, RW143 no model; ModelError and QuantizationError as ``estimate`` does, where every
    method fails so.
    """
    methods = settings.methods
    if settings.model is None:
        raise ConfigError("RW143", "--model is missing; give a hub id, a folder, a .gguf file, or demo.")
    hardware = shared(choose_hardware(settings.gpu, settings.memory), settings.devices)
    check_device(settings.optimizer, hardware.device_type, hardware.name)
    workload = workload_for(settings, hardware)
    source = fetch_model(
        settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code, weights=False
    )
    return _Planner(settings, source, hardware, methods, workload, say).plan()


def workload_for(settings: PlanSettings, hardware: Hardware) -> Workload:
    """The step to estimate. Raises ConfigError as ``PlanSettings.check_options`` and ``Workload`` do."""
    settings.check_options()
    return workload_of(dict(settings), hardware)


def workload_of(settings: Fields, hardware: Hardware) -> Workload:
    """One step with these options of ``train`` or ``plan``, with all rows at full length; for several processes, the
    step of one. The dtype is the one that ``--dtype auto`` gives on the device."""
    kind: DeviceType = "cuda" if hardware.device_type == "cuda" else "cpu"
    devices, objective = settings.get("devices") or 1, settings["objective"]
    answers = settings["batch_size"] * settings["gradient_accumulation"]
    fields = {name: settings[name] for name in Workload.__dataclass_fields__ if name in settings} | {
        "devices": devices,
        "strategy": (settings.get("strategy") or "ddp") if devices > 1 else "single",
        "dtype": hardware.dtype if settings["dtype"] == "auto" else settings["dtype"],
        "device_type": kind,
        "sides": sides_of(objective),
        **written_of(objective, answers, settings.get("num_generations"), kind),
    }
    return on_device(Workload(**fields), hardware)


def on_device(workload: Workload, hardware: Hardware) -> Workload:
    """The workload without operators that do not run on the device. An Apple GPU runs plain PyTorch, counted as on a
    CPU, whose memory it shares; a GPU of this machine without Triton runs the model's own gated MLPs. A card has flash
    attention where it has bfloat16.
    """
    if hardware.device_type == "mps":
        return dataclasses.replace(workload, fast=False)
    if hardware.device_type != "cuda":
        return workload
    triton = hardware.kind != "machine" or importlib.util.find_spec("triton") is not None
    return dataclasses.replace(workload, triton=triton, flash=hardware.has_bfloat16 is not False)


def is_slowed(fast: bool, hardware: Hardware) -> bool:
    """Whether only ``--no-fast`` prevents the fused operators."""
    return not fast and hardware.device_type != "mps"


def pace_of(hardware: Hardware, dtype: str) -> Callable[[str], Pace | None]:
    """A function from a method to one process's pace: measured on this machine, or else a share of the data sheet."""

    def pace(method: str) -> Pace | None:
        whole = measured_pace(hardware, method, dtype) or assumed_pace(hardware, dtype)
        return None if whole is None else whole.divided(hardware.sharers)

    return pace


def ratio_pace_of(hardware: Hardware, methods: Sequence[str], dtype: str) -> Callable[[str], Pace]:
    """A function from a method to its pace, for ratios of time between these methods and those that advice may suggest.

    All paces are measured or all are assumed, since the ratio of a measured and an assumed pace is meaningless.
    """
    measured = {method: measured_pace(hardware, method, dtype) for method in reachable(methods)}
    assumed = assumed_pace(hardware, dtype) or nominal_pace(dtype)
    known = {method: pace for method, pace in measured.items() if pace is not None}
    return known.__getitem__ if len(known) == len(measured) else lambda method: assumed


def is_late(error: RankwiseError) -> bool:
    """Whether a dry run stopped because of its time limit."""
    return error.code == TOO_SLOW


class _Planner:
    def __init__(
        self,
        settings: PlanSettings,
        source: ModelSource,
        hardware: Hardware,
        methods: Sequence[str],
        work: Workload,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.source, self.hardware, self.methods = settings, source, hardware, methods
        self.workload, self.say = work, say if settings.exact else lambda _: None
        self.deadline = math.inf
        self.model = read_model(source, trust_remote_code=settings.trust_remote_code)
        self.facts = self.model.facts
        self._check_length()
        # Without the closed form, each setting other than batch and length costs two dry runs or more.
        self.is_slow = settings.exact and self.model.shape is None
        self.estimate = Remembering(self._estimator())
        self.pace, self.ratio_pace = pace_of(hardware, work.dtype), ratio_pace_of(hardware, methods, work.dtype)
        asked_slow = is_slowed(settings.fast, hardware)
        self.advisor = Advisor(self.estimate, self._seconds, hardware.memory_bytes, asked_slow=asked_slow)

    def plan(self) -> Plan:
        rows, unplanned = self._rows()
        self.methods = [row.estimate.method for row in rows]
        accumulation = self.settings.gradient_accumulation
        passes = PASSES[:1] if self.is_slow else PASSES
        if self.is_slow:
            self.say("dry runs of other settings ...")
        wish = Wish(self.settings.goal, self._given(), accumulation, is_mixture=self.facts.experts > 0)
        recommendation = recommend(self.advisor, self.methods, self.workload, wish, passes)
        subject = recommendation.method or recommendation.estimate.method
        cheap = PASSES[0] if self.is_slow else None
        refused = {item.method for item in unplanned}
        changes = self.advisor.singles(subject, self.workload, accumulation, cheap, refused)
        return Plan(
            model=self.source.name,
            hardware=self.hardware,
            workload=self.workload,
            accumulation=accumulation,
            rows=tuple(rows),
            unplanned=tuple(unplanned),
            recommendation=recommendation,
            changes=tuple(changes),
            changes_of=subject,
            pace_basis=self._pace_basis(),
            run_tokens=run_tokens(self.settings),
            rate=self._rate(subject) if self.facts.width else None,
        )

    def _rate(self, method: str) -> DefaultRate:
        return default_rate(self.model.family, self.facts.width, {**dict(self.settings), "method": method})

    def _check_length(self) -> None:
        """Raise ConfigError (RW130) for rows that are longer than the model's positions."""
        most, asked = self.facts.position_rows, self.workload.max_length
        if most is not None and asked > most:
            raise ConfigError(
                "RW130",
                f"--max-length is {asked:,}, and {self.source.name} has learned positions for {most:,} tokens; give "
                f"--max-length {most} or less.",
            )

    def _rows(self) -> tuple[list[MethodRow], list[Unplanned]]:
        """(a row for each method that can be planned, the other methods with their reasons). Where every method fails,
        the first error is raised.

        With --exact a method that exceeds its time limit is tried again after the others.
        """
        rows: dict[str, MethodRow] = {}
        errors: dict[str, ConfigError | ModelError | QuantizationError] = {}
        left = list(self.methods)
        for seconds in EXACT_SECONDS if self.settings.exact and len(left) > 1 else (math.inf,):
            for method in left:
                self.deadline = time.monotonic() + seconds
                errors.pop(method, None)
                try:
                    rows[method] = self._planned(method)
                except (ConfigError, ModelError, QuantizationError) as error:
                    errors[method] = error
                    self.say(
                        f"{method}: {error.code} after {seconds:.0f} s" if is_late(error) else f"{method}: {error}"
                    )
            left = [method for method in self.methods if method in errors and is_late(errors[method])]
        self.deadline = math.inf
        failed = [(method, errors[method]) for method in self.methods if method in errors]
        if not rows:
            raise failed[0][1]
        unplanned = [Unplanned(method, error.code, error.message) for method, error in failed]
        return [rows[method] for method in self.methods if method in rows], unplanned

    def _planned(self, method: str) -> MethodRow:
        """The row of one method; with --exact by its dry run."""
        if not self.settings.exact:
            return self._row(method)
        self.say(f"dry run of {method} ...")
        started = time.monotonic()
        self.estimate.anchor(method, self.workload, self._dry_run(method, self.workload))
        row = self._row(method)
        took = time.monotonic() - started
        self.say(f"{method}: {byte_size(row.estimate.peak_bytes)}, {row.verdict} ({took:.1f} s)")
        return row

    def _estimator(self) -> Estimator:
        """The closed form; with --exact, for an architecture that it does not know, lines through dry runs."""
        if self.is_slow:
            return Interpolating(self._dry_run)
        self.model.known_shape()
        stored = self.facts.stored
        # Stored bitsandbytes weights have the sizes of the rows of qlora and qdora.
        return over_stored(stored if stored is not None and stored.bits else None, estimator_of(self.model))

    def _dry_run(self, method: str, workload: Workload) -> MemoryEstimate:
        return estimate(self.model, method, workload, exact=True, deadline=self.deadline)

    def _row(self, method: str) -> MethodRow:
        memory, own = self.hardware.memory_bytes, self.estimate(method, self.workload)
        pace = tokens_per_second(own, self.facts, self.workload, self.pace(method))
        tokens, accumulation = run_tokens(self.settings), self.settings.gradient_accumulation
        is_within = fits(own, memory)
        most = self.facts.position_rows or MOST_TOKENS
        stored = self.facts.stored
        return MethodRow(
            estimate=own if stored is None else dataclasses.replace(own, notes=(*own.notes, stored.note)),
            verdict=verdict_of(own, memory),
            spare_bytes=memory - own.peak_bytes,
            max_batch_size=largest_batch(self.estimate, method, self.workload, memory),
            longest_row_tokens=longest_row(self.estimate, method, self._narrow(is_within), memory, most=most),
            tokens_per_second=pace,
            seconds=tokens / pace if pace and tokens else None,
            network_bytes=own.network.of_step(accumulation),
            network_bytes_per_second=hiding_bandwidth(own, self.facts, self.workload, self.pace(method), accumulation),
        )

    def _narrow(self, is_within: bool) -> Workload:
        """The workload with the given batch where it fits, else with one row, for which the longest row is searched."""
        return self.workload if is_within else dataclasses.replace(self.workload, batch_size=1)

    def _seconds(self, own: MemoryEstimate, workload: Workload) -> float:
        return micro_batch_seconds(own, self.facts, workload, self.ratio_pace(own.method))

    def _pace_basis(self) -> str | None:
        """The sources of the rows' speeds, by method where they differ."""
        found: dict[str, list[str]] = {}
        for method in self.methods:
            pace = self.pace(method)
            if pace is not None:
                found.setdefault(pace.basis, []).append(method)
        if len(found) < 2:
            return next(iter(found), None)
        return "; ".join(f"{', '.join(methods)}: {basis}" for basis, methods in found.items())

    def _given(self) -> JsonObject:
        """The settings that the user gave and those in DECIDED, as options of ``rankwise train``."""
        decided = {*DECIDED, *(("double_quant",) if set(self.methods) & set(FOUR_BITS) else ())}
        named = [name for name in SHARED if name in self.settings.model_fields_set or name in decided]
        given = {name: getattr(self.settings, name) for name in named}
        return {"model": self.settings.model} | given


def run_tokens(settings: PlanSettings) -> int | None:
    """The tokens of the whole run with rows of full length; None where neither its steps nor its rows are known."""
    step_rows = settings.batch_size * settings.gradient_accumulation * settings.devices
    if settings.max_steps is not None:
        return settings.max_steps * step_rows * settings.max_length
    if settings.rows is not None:
        return math.ceil(settings.rows * settings.epochs) * settings.max_length
    return None
