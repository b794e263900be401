"""Plan a run before it starts: report the predicted peak, refuse what cannot fit, and advise after out of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rankwise.disk import read_speed
from rankwise.errors import InputError, RunError, warn
from rankwise.foreign import Fields
from rankwise.methods import method_of
from rankwise.models.prepared import MappedFiles
from rankwise.models.source import ModelSource
from rankwise.options import option_words
from rankwise.planning.advice import (
    LADDER,
    Advisor,
    Change,
    Verdict,
    disk_words,
    mapped_weights,
    peak_words,
    rounded_words,
    verdict_of,
    with_rounded,
)
from rankwise.planning.extend import Traces
from rankwise.planning.facts import ModelFacts, read_model
from rankwise.planning.hardware import Hardware, cpu_hardware, shared, this_machine
from rankwise.planning.memory import CPU_LOADED_BYTES, Estimator, MemoryEstimate, over_file, over_stored
from rankwise.planning.real_steps import comparable
from rankwise.planning.speed import micro_batch_seconds, nominal_pace, pace_of
from rankwise.planning.workload import BatchShape, Workload, of_batch, workload_of
from rankwise.reports.numbers import byte_size, plural

# The smallest possible step. A run for which even this does not fit is refused before the weights are read.
SMALLEST = {"batch_size": 1, "max_length": 16, "trained_share": 1.0}
# Terms that are in memory before the first step.
RESIDENT = ("weights_4bit", "weights", "adapters")
# After memory ran out against the plan's prediction, a change counts as fitting below this share of the plan.
AFTER_FAILURE = 0.85


@dataclasses.dataclass
class _Run:
    """A run that can be planned, with its largest step so far."""

    hardware: Hardware
    workload: Workload
    facts: ModelFacts
    estimate: Estimator


class MemoryGuard:
    """Predicts a run's peak memory and refuses a run that cannot fit. Implements ``training.session.Foresight``.

    ``settings`` are the settings of ``rankwise train``, by name. ``say`` prints a line. ``own_memory`` returns the
    bytes that the process takes now, counted as a CPU run counts its peak. ``sharers``: the run's processes on this
    machine, which share a CPU's memory; each has its own GPU.

    ``before_loading`` and ``before_training`` raise RunError (RW562) if the run cannot fit; with ``ignore`` they warn
    instead (RW563). They also warn if the memory cannot be predicted (RW564).
    """

    def __init__(
        self,
        settings: Fields,
        say: Callable[[str], None],
        own_memory: Callable[[], int],
        *,
        ignore: bool,
        sharers: int = 1,
    ) -> None:
        self.settings, self.say, self.own_memory, self.ignore = settings, say, own_memory, ignore
        self.sharers = sharers
        self.predicted: MemoryEstimate | None = None
        self._run: _Run | None = None

    def before_loading(self, source: ModelSource) -> None:
        method = self.settings["method"]
        if method_of(method).is_guest:
            warn("RW564", f"there is no memory plan for {method}; the run starts without a prediction.")
            return
        machine = this_machine(self.settings["device"]) if self.settings["device"] != "cpu" else cpu_hardware()
        hardware = shared(machine, self.sharers)
        remote, labels = self.settings["trust_remote_code"], 0 if source.labels is None else len(source.labels.names)
        try:
            workload = workload_of({**self.settings, "labels": labels}, hardware)
            model = read_model(source, labels=labels, trust_remote_code=remote)
            self._run = _Run(
                hardware,
                workload,
                model.facts,
                over_file(model, over_stored(model.facts.stored, Traces(model, self.say))),
            )
            smallest = self.ask(dataclasses.replace(workload, **SMALLEST))  # type: ignore[arg-type]
        except InputError as error:
            warn("RW564", f"the memory of this run cannot be predicted, and it starts without that: {error.message}")
            self._run = None
            return
        if self._verdict(self._run, smallest) == "too big":
            self._refuse(self._run, smallest, "even one row of 16 tokens")

    def before_training(
        self, batch: BatchShape, evaluation: BatchShape | None, mapped: MappedFiles
    ) -> tuple[int, int] | None:
        """The bytes of the predicted peak and of its idle process, for the larger of the largest micro-batch and the
        largest evaluation batch (None without evaluations). The meter adds the weights in ``mapped`` files to the
        process's memory, and does not see a GPU's idle process."""
        run = self._run
        if run is None:
            return None
        works = [of_batch(run.workload, batch)]
        if evaluation is not None:
            # An evaluation of rewards generates one answer to each prompt.
            written = evaluation.rows if run.workload.written else 0
            other = dataclasses.replace(run.workload, evaluation=True, written=written, prompts=written)
            works.append(of_batch(other, evaluation))
        run.workload = max(works, key=lambda work: self.ask(work).peak_bytes)
        predicted = self.ask(run.workload)
        if run.hardware.device_type == "cpu":
            predicted = self.with_loaded(predicted, mapped)
        self.predicted = predicted
        # The weights are loaded by now, so the memory that was free before loading is the measure.
        verdict = self._verdict(run, predicted, mapped.bytes)
        self.say(self._sentence(run, predicted, verdict))
        if verdict == "from disk":
            weights = mapped_weights(predicted, run.hardware.device_type)
            self.say(
                f"the base's {byte_size(weights)} are mapped and read again from the disk in each step: "
                f"{disk_words(weights, read_speed(mapped.versions))}; "
                f"{byte_size(predicted.peak_bytes - weights)} must stay in memory"
            )
        if verdict == "too big":
            self._refuse(run, predicted, f"a batch of {_in_words(run.workload)}")
        if run.hardware.device_type == "cpu":
            return predicted.peak_bytes, predicted.idle_bytes
        return comparable(predicted), 0

    def keeps_rounded(self, more_bytes: int) -> bool:
        run, predicted = self._run, self.predicted
        if run is None or predicted is None:
            return False
        larger = with_rounded(predicted, more_bytes)
        fits = self._verdict(run, larger) == "fits"
        if fits:
            self.predicted = larger
        self.say(rounded_words(larger, more_bytes, fits=fits))
        return fits

    def with_loaded(self, predicted: MemoryEstimate, mapped: MappedFiles) -> MemoryEstimate:
        """The prediction with what loading has left beside the model, in place of the plan's median: a tokenizer, many
        rows, the heap of a preparation."""
        from rankwise.acceleration import give_back_freed_memory

        give_back_freed_memory()
        known = predicted.idle_bytes + CPU_LOADED_BYTES + sum(predicted.breakdown[term] for term in RESIDENT)
        # It has left no less than nothing.
        more = max(self.own_memory() + mapped.bytes - known, -CPU_LOADED_BYTES)
        breakdown = {**predicted.breakdown, "overhead": predicted.breakdown["overhead"] + more}
        return dataclasses.replace(predicted, peak_bytes=predicted.peak_bytes + more, breakdown=breakdown)

    def advice(self) -> str | None:
        """After the memory ran out: the changes that would fit, in words; None where none is known."""
        if self._run is None:
            return None
        limit = self._run.hardware.memory_bytes
        if self.predicted is not None:
            limit = min(limit, round(AFTER_FAILURE * self.predicted.peak_bytes))
        return self._cheapest(self._run, limit)

    def ask(self, workload: Workload) -> MemoryEstimate:
        """The estimate of the run's method."""
        assert self._run is not None
        return self._run.estimate(self.settings["method"], workload)

    def _sentence(self, run: _Run, predicted: MemoryEstimate, verdict: str) -> str:
        """The prediction in words, its peak first, which the run compares with its measured peak at the end."""
        counted = "" if run.workload.fast else ", of PyTorch's own step"
        if run.hardware.device_type != "cpu":
            counted += f", of which torch's allocator sees {byte_size(comparable(predicted))}"
        return (
            f"predicted peak {peak_words(predicted)}{counted}, for {_in_words(run.workload)}; "
            f"there are {self._memory(run)}: {verdict}"
        )

    def _verdict(self, run: _Run, estimate: MemoryEstimate, mapped_bytes: int | None = None) -> Verdict:
        """``mapped_bytes``: None before the model is loaded, when all that can be mapped is taken to be."""
        most = mapped_weights(estimate, run.hardware.device_type) if self.settings["mmap"] else 0
        mapped = most if mapped_bytes is None else min(most, mapped_bytes)
        return verdict_of(estimate, run.hardware.memory_bytes, mapped)

    def _memory(self, run: _Run) -> str:
        return byte_size(run.hardware.memory_bytes) + (" for each process" if self.sharers > 1 else "")

    def _refuse(self, run: _Run, estimate: MemoryEstimate, what: str) -> None:
        there = f"{what} takes {byte_size(estimate.peak_bytes)} and there are {self._memory(run)}"
        if self.ignore:
            warn("RW563", f"by the plan this run cannot fit: {there}; it starts because of --ignore-plan.")
            return
        changes = self._cheapest(run, run.hardware.memory_bytes)
        advice = f"what would fit: {changes}" if changes else "no change of settings makes it fit"
        raise RunError("RW562", f"this run cannot fit: {there}; {advice}. --ignore-plan trains all the same.")

    def _cheapest(self, run: _Run, memory_bytes: int) -> str | None:
        pace = pace_of(run.hardware, run.workload.dtype) or nominal_pace(run.workload.dtype)

        def seconds(estimate: MemoryEstimate, workload: Workload) -> float:
            return micro_batch_seconds(estimate, run.facts, workload, pace)

        advisor = Advisor(run.estimate, seconds, memory_bytes)
        asked = self.settings["method"], run.workload, self.settings["gradient_accumulation"]
        changes = [change for change in advisor.singles(*asked) if change.verdict == "fits"]
        if not changes:
            change = advisor.climbed(*asked, LADDER)
            changes = [change] if change is not None else []
        return "; ".join(f"({index}) {_described(change)}" for index, change in enumerate(changes, 1)) or None


def _in_words(workload: Workload) -> str:
    # KTO takes some in every step.
    where = " without a backward pass, as in an evaluation" if workload.evaluation else ""
    return f"{plural(workload.sequences, 'row')} of {workload.max_length:,} tokens{where}"


def _described(change: Change) -> str:
    """``--batch-size 4 --gradient-accumulation 2: 12.1 GB, +2 % time``."""
    options = " ".join(word for name, value in change.settings.items() for word in option_words(name, value))
    return f"{options}: {byte_size(change.estimate.peak_bytes)}, {change.time_words}"
