"""The result of ``rankwise plan``: a row for each method, the recommendation, and useful changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from rankwise.default_rate import DefaultRate, default_rate
from rankwise.disk import read_speed
from rankwise.errors import ConfigError, ModelError, QuantizationError
from rankwise.foreign import JsonObject
from rankwise.methods import method_of
from rankwise.models.source import ModelSource
from rankwise.planning.advice import (
    MOST_TOKENS,
    Advisor,
    Change,
    Recommendation,
    Verdict,
    Wish,
    largest_batch,
    longest_row,
    mapped_weights,
    recommend,
    verdict_of,
)
from rankwise.planning.extend import Traces
from rankwise.planning.facts import read_model, source_or_shape
from rankwise.planning.hardware import Hardware, begin_idle_process, choose_hardware, shared
from rankwise.planning.memory import MemoryEstimate, over_file, over_stored
from rankwise.planning.speed import (
    Pace,
    expert_bytes,
    hiding_bandwidth,
    micro_batch_seconds,
    nominal_pace,
    pace_of,
    tokens_per_second,
)
from rankwise.planning.workload import SHARED, PlanSettings, Workload, check_device, of_batch, run_tokens, workload_for
from rankwise.reports.numbers import byte_size

# Options that every saved plan holds, given or not.
DECIDED = (
    *("r", "target_modules", "batch_size", "gradient_accumulation", "max_length", "gradient_checkpointing"),
    *("activation_offloading", "optimizer"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method at the given settings, in bytes and seconds."""

    estimate: MemoryEstimate
    verdict: Verdict
    # The part of the peak that is weights in mapped files, which the system may drop and read again.
    mapped_bytes: int
    # Memory minus peak; negative where the run does not fit.
    spare_bytes: int
    # Largest number of rows of ``max_length`` that fit; 0 where not one does.
    max_batch_size: int
    # Where not one row fits: the longest single row that does.
    longest_row_tokens: int | None
    tokens_per_second: float | None
    # None where the step does not fit, too. Seconds of the whole run, where its length is known.
    seconds: float | None
    # Bytes that each of several devices sends in an optimizer step, and the bandwidth that hides this traffic.
    network_bytes: int
    network_bytes_per_second: float | None

    def to_json(self) -> JsonObject:
        own = self.estimate
        return {
            "peak_bytes": own.peak_bytes,
            "idle_bytes": own.idle_bytes,
            "training_bytes": own.training_bytes,
            "mapped_bytes": self.mapped_bytes,
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
            "phase": own.phase,
            "notes": list(own.notes),
        }


@dataclasses.dataclass(frozen=True)
class Unplanned:
    """A method that cannot be planned: the model or the settings do not support it, or its step cannot be traced."""

    method: str
    code: str
    message: str

    def to_json(self) -> JsonObject:
        return {"fits": None, "verdict": None, "failure": {"code": self.code, "message": self.message}}


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    # Bytes a second of the disk that holds the weights, measured where a run would read them again in each step.
    disk_bytes_per_second: float | None
    # Why the hub did not give the model's config, where its built-in shape was planned.
    unreached: str | None = None
    # The number of rows of --data; None where every row is taken to be full.
    counted_rows: int | None = None

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
            "disk_bytes_per_second": self.disk_bytes_per_second,
            "built_in_shape": self.unreached is not None,
            "counted_rows": self.counted_rows,
        }


def make_plan(settings: PlanSettings, say: Callable[[str], None] = lambda _: None) -> Plan:
    """The plan for these options. ``say`` is called with a line about each trace that takes longer than a second.

    Raises ConfigError: RW116 an optimizer that cannot run there, RW130 and RW132 impossible settings, RW140 a size,
    RW141 a GPU, RW103 no model; ModelError and QuantizationError as ``estimate`` does, where every
    method fails so.
    """
    methods = settings.methods
    if settings.model is None:
        raise ConfigError("RW103", "--model is missing; give a hub id, a folder, a .gguf file, or demo.")
    hardware = shared(choose_hardware(settings.gpu, settings.memory), settings.devices)
    check_device(settings.optimizer, hardware.device_type, hardware.name)
    workload, tokens = workload_for(settings, hardware), run_tokens(settings)
    if hardware.device_type == "cpu":
        begin_idle_process()
    source, unreached = source_or_shape(
        settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    counted = None
    if settings.data is not None:
        from rankwise.planning.counted import count

        counted = count(settings, source, workload)
        workload = of_batch(dataclasses.replace(workload, labels=counted.labels), counted.largest)
        tokens = counted.tokens
    made = _Planner(settings, source, hardware, methods, workload, tokens, say).plan()
    return dataclasses.replace(made, unreached=unreached, counted_rows=None if counted is None else counted.rows)


class _Planner:
    def __init__(
        self,
        settings: PlanSettings,
        source: ModelSource,
        hardware: Hardware,
        methods: Sequence[str],
        work: Workload,
        tokens: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.source, self.hardware, self.methods = settings, source, hardware, methods
        self.workload, self.tokens = work, tokens
        self.model = read_model(source, trust_remote_code=settings.trust_remote_code, labels=work.labels)
        self.facts = self.model.facts
        self._check_length()
        stored = self.facts.stored
        # Stored bitsandbytes weights have the sizes of the rows of qlora and qdora.
        traces = Traces(self.model, say, warns=True)
        self.estimate = over_file(self.model, over_stored(None if stored and stored.four_bit else stored, traces))

    @functools.cached_property
    def pace(self) -> Pace | None:
        return pace_of(self.hardware, self.workload.dtype)

    def plan(self) -> Plan:
        rows, unplanned = self._rows()
        methods = [row.estimate.method for row in rows]
        accumulation = self.settings.gradient_accumulation
        refused = {item.method for item in unplanned}
        advisor = Advisor(self.estimate, self._seconds, self.hardware.memory_bytes, refused)
        wish = Wish(self.settings.goal, self._given(methods), accumulation, is_mixture=self.facts.experts > 0)
        recommendation = recommend(advisor, methods, self.workload, wish)
        if recommendation.method is not None:
            chosen, times = recommendation.workload, recommendation.settings["gradient_accumulation"]
            pace, seconds = self._time(recommendation.estimate, chosen, times)
            recommendation = dataclasses.replace(recommendation, tokens_per_second=pace, seconds=seconds)
        from_disk = any(row.verdict == "from disk" for row in rows)
        path = self.source.path
        assert path is not None
        files = [path] if self.source.is_gguf else path.glob("*.safetensors")
        subject = recommendation.method or recommendation.estimate.method
        of_subject = {**dict(self.settings), "method": subject}
        return Plan(
            model=self.source.name,
            hardware=self.hardware,
            workload=self.workload,
            accumulation=accumulation,
            rows=tuple(rows),
            unplanned=tuple(unplanned),
            recommendation=recommendation,
            changes=tuple(advisor.singles(subject, self.workload, accumulation)),
            changes_of=subject,
            pace_basis=None if self.pace is None else self.pace.basis,
            run_tokens=self.tokens,
            rate=default_rate(self.model.family, self.facts.width, of_subject) if self.facts.width else None,
            disk_bytes_per_second=read_speed(files) if from_disk else None,
        )

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
        """
        rows, errors = [], []
        for method in self.methods:
            try:
                rows.append(self._row(method))
            except (ConfigError, ModelError, QuantizationError) as error:
                errors.append((method, error))
        if not rows:
            raise errors[0][1]
        return rows, [Unplanned(method, error.code, error.message) for method, error in errors]

    def _row(self, method: str) -> MethodRow:
        memory, own = self.hardware.memory_bytes, self.estimate(method, self.workload)
        accumulation = self.settings.gradient_accumulation
        most = self.facts.position_rows or MOST_TOKENS
        mapped = mapped_weights(own, self.hardware.device_type)
        rows, single = largest_batch(self.estimate, method, self.workload, memory), None
        if not rows:
            one = dataclasses.replace(self.workload, batch_size=1)
            single = longest_row(self.estimate, method, one, memory, most=most)
        verdict = verdict_of(own, memory, mapped)
        pace, seconds = (None, None) if verdict == "too big" else self._time(own, self.workload, accumulation)
        return MethodRow(
            estimate=dataclasses.replace(own, notes=(*own.notes, *self._notes(method))),
            verdict=verdict,
            mapped_bytes=mapped,
            spare_bytes=memory - own.peak_bytes,
            max_batch_size=rows,
            longest_row_tokens=single,
            tokens_per_second=pace,
            seconds=seconds,
            network_bytes=own.network.of_step(accumulation),
            network_bytes_per_second=hiding_bandwidth(own, self.facts, self.workload, self.pace, accumulation),
        )

    def _notes(self, method: str) -> Iterator[str]:
        if self.facts.stored is not None:
            yield self.facts.stored.note(self.workload.device_type)
        if read := expert_bytes(method, self.facts, self.workload):
            yield f"a pass of {self.workload.tokens:,} tokens reads {byte_size(read)} of experts"

    def _time(self, own: MemoryEstimate, work: Workload, accumulation: int) -> tuple[float | None, float | None]:
        """(tokens of a second, seconds of the whole run), None where unknown. Shorter rows are fewer tokens."""
        pace = tokens_per_second(own, self.facts, work, self.pace, accumulation)
        tokens = self.tokens
        return pace, tokens * work.max_length / self.workload.max_length / pace if pace and tokens else None

    def _seconds(self, own: MemoryEstimate, workload: Workload) -> float:
        return micro_batch_seconds(own, self.facts, workload, self.pace or nominal_pace(workload.dtype))

    def _given(self, methods: Sequence[str]) -> JsonObject:
        """The settings that the user gave and those in DECIDED, as options of ``rankwise train``."""
        decided = {*DECIDED, *(("double_quant",) if any(method_of(name).four_bits for name in methods) else ())}
        named = [name for name in SHARED if name in self.settings.model_fields_set or name in decided]
        given = {name: getattr(self.settings, name) for name in named}
        return {"model": self.settings.model} | given
