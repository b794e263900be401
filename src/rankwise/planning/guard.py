"""Plan a run before it starts: report the predicted peak, refuse what cannot fit, and advise after out of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from rankwise.disk import read_speed
from rankwise.errors import InputError, RunError, warn
from rankwise.foreign import Fields
from rankwise.models.mapped import MappedFiles
from rankwise.models.source import ModelSource, fetch_model
from rankwise.options import option_words
from rankwise.planning.advice import LADDER, Advisor, Change, Verdict, disk_words, mapped_weights, verdict_of
from rankwise.planning.extend import Estimator, MemoryEstimate, Traces, over_stored
from rankwise.planning.hardware import Hardware, cpu_hardware, shared, this_machine
from rankwise.planning.real_steps import comparable
from rankwise.planning.speed import micro_batch_seconds, nominal_pace, pace_of, read_model
from rankwise.planning.workload import PLANNED, Workload, workload_of
from rankwise.reports.numbers import byte_size, plural

# The smallest possible step. A run for which even this does not fit is refused before the weights are read.
SMALLEST = {"batch_size": 1, "max_length": 16, "trained_share": 1.0}
# Terms that are in memory before the first step.
RESIDENT = ("weights_4bit", "weights", "adapters")
# Of what a first step takes for libraries (`extend.CPU_LIBRARY_BYTES`), loading has brought this much already: the
# median of 22 runs with adapters.
LOADED_LIBRARY_BYTES = 30 * 10**6
# After memory ran out against the plan's prediction, a change counts as fitting below this share of the plan.
AFTER_FAILURE = 0.85


class Rows(Protocol):
    """A micro-batch: rows, tokens of a row, and the share of the tokens with labels."""

    @property
    def rows(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def trained_share(self) -> float: ...


class MemoryGuard:
    """Predicts a run's peak memory and refuses a run that cannot fit. Implements ``training.foresight.Foresight``.

    ``settings`` are the settings of ``rankwise train``, by name. ``say`` prints a line. ``own_memory`` returns the
    bytes that the process takes now, counted as a CPU run counts its peak.

    ``before_loading`` and ``before_training`` raise RunError (RW562) if the run cannot fit; with ``ignore`` they warn
    instead (RW563). They also warn if the memory cannot be predicted (RW564). ``before_loading`` raises ModelError if
    the model's configuration cannot be fetched.
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
        # Number of the run's processes on this machine, which share a CPU's memory; each has its own GPU.
        self.sharers = sharers
        self.baseline_bytes = 0
        self.hardware: Hardware | None = None
        self.workload: Workload | None = None
        self.predicted: MemoryEstimate | None = None
        self._source: ModelSource | None = None
        self._estimate: Estimator | None = None

    def before_loading(self, labels: int = 0) -> None:
        method = self.settings["method"]
        if method not in PLANNED:
            warn("RW564", f"there is no memory plan for {method}; the run starts without a prediction.")
            return
        machine = this_machine() if self.settings["device"] != "cpu" else cpu_hardware()
        self.hardware = shared(machine, self.sharers)
        # The meter of a CPU run counts the memory that libraries have taken so far.
        self.baseline_bytes = self.own_memory() if self.hardware.device_type == "cpu" else 0
        self._fetched()
        try:
            self.workload = workload_of({**self.settings, "labels": labels}, self.hardware)
            smallest = self._ask(dataclasses.replace(self.workload, **SMALLEST))  # type: ignore[arg-type]
        except InputError as error:
            self._warn_of(error)
            self.workload = None
            return
        if self._verdict(smallest) == "too big":
            self._refuse(smallest, "even one row of 16 tokens")

    def before_training(self, batch: Rows, evaluation: Rows | None, mapped: MappedFiles) -> int | None:
        """The predicted peak in bytes, for the larger of the largest micro-batch and the largest evaluation batch (None
        without evaluations). The meter adds the weights in ``mapped`` files to the process's memory."""
        if self.workload is None or self.hardware is None:
            return None
        works = [_of_batch(self.workload, batch)]
        if evaluation is not None:
            # An evaluation of rewards generates one answer to each prompt.
            written = evaluation.rows if self.workload.written else 0
            other = dataclasses.replace(self.workload, evaluation=True, written=written, prompts=written)
            works.append(_of_batch(other, evaluation))
        self.workload = max(works, key=lambda work: self._ask(work).peak_bytes)
        self.predicted = self._ask(self.workload)
        if self.hardware.device_type == "cpu":
            # Loading leaves more than the model: tokenizer, data, and free heap, which the steps could use.
            from rankwise.acceleration import give_back_freed_memory

            give_back_freed_memory()
            resident = sum(self.predicted.breakdown[term] for term in RESIDENT)
            if self.settings["method"] != "full":
                resident += LOADED_LIBRARY_BYTES
            self.baseline_bytes = max(self.baseline_bytes, self.own_memory() + mapped.bytes - resident)
        # The weights are loaded by now, so the memory that was free before loading is the measure.
        verdict = self._verdict(self.predicted, mapped.bytes)
        peak = self.baseline_bytes + comparable(self.predicted, self.hardware.device_type)
        self.say(self._sentence(peak, verdict))
        if verdict == "from disk":
            weights = mapped_weights(self.predicted, self.hardware.device_type)
            self.say(
                f"the base's {byte_size(weights)} are mapped and read again from the disk in each step: "
                f"{disk_words(weights, read_speed(mapped.paths))}; {byte_size(peak - weights)} must stay in memory"
            )
        if verdict == "too big":
            self._refuse(self.predicted, f"a batch of {_in_words(self.workload)}")
        return peak

    def advice(self) -> str | None:
        """After the memory ran out: the changes that would fit, in words; None where none is known."""
        if self.workload is None or self.hardware is None:
            return None
        limit = self.hardware.memory_bytes
        if self.predicted is not None:
            limit = min(limit, round(AFTER_FAILURE * self.predicted.peak_bytes))
        return self._cheapest(limit)

    def _warn_of(self, error: InputError) -> None:
        warn("RW564", f"the memory of this run cannot be predicted, and the run starts without that: {error.message}")

    def _sentence(self, peak_bytes: int, verdict: str) -> str:
        """The prediction in words, ``peak_bytes`` first, which the run compares with its measured peak at the end."""
        assert self.predicted is not None
        assert self.workload is not None
        assert self.hardware is not None
        had, error = self.baseline_bytes, self.predicted.error * self.predicted.peak_bytes / peak_bytes
        own = f" ({byte_size(had)} that the process has, {byte_size(peak_bytes - had)} for the training)" if had else ""
        counted = "" if self.workload.fast else ", of PyTorch's own step"
        return (
            f"predicted peak {byte_size(peak_bytes)} ±{error:.0%}{own}{counted}, for "
            f"{_in_words(self.workload)}; there are {self._memory}: {verdict}"
        ).replace("%", " %")

    def _verdict(self, estimate: MemoryEstimate, mapped_bytes: int | None = None) -> Verdict:
        """``mapped_bytes``: None before the model is loaded, when all that can be mapped is taken to be."""
        assert self.hardware is not None
        most = mapped_weights(estimate, self.hardware.device_type) if self.settings["mmap"] else 0
        mapped = most if mapped_bytes is None else min(most, mapped_bytes)
        return verdict_of(estimate, self.hardware.memory_bytes, mapped)

    @property
    def _memory(self) -> str:
        assert self.hardware is not None
        return byte_size(self.hardware.memory_bytes) + (" for each process" if self.sharers > 1 else "")

    def _refuse(self, estimate: MemoryEstimate, what: str) -> None:
        assert self.hardware is not None
        there = f"{what} takes {byte_size(estimate.peak_bytes)} and there are {self._memory}"
        if self.ignore:
            warn("RW563", f"by the plan this run cannot fit: {there}; it starts because of --ignore-plan.")
            return
        changes = self._cheapest(self.hardware.memory_bytes)
        advice = f"what would fit: {changes}" if changes else "no change of settings makes it fit"
        raise RunError("RW562", f"this run cannot fit: {there}; {advice}. --ignore-plan trains all the same.")

    def _cheapest(self, memory_bytes: int) -> str | None:
        assert self.workload is not None
        assert self.hardware is not None
        advisor = Advisor(self._asker(), self._seconds, memory_bytes)
        run = self.settings["method"], self.workload, self.settings["gradient_accumulation"]
        changes = [change for change in advisor.singles(*run) if change.verdict == "fits"]
        if not changes:
            change = advisor.climbed(*run, LADDER)
            changes = [change] if change is not None else []
        return "; ".join(f"({index}) {_described(change)}" for index, change in enumerate(changes, 1)) or None

    def _ask(self, workload: Workload) -> MemoryEstimate:
        return self._asker()(self.settings["method"], workload)

    def _asker(self) -> Estimator:
        if self._estimate is None:
            assert self.workload is not None
            model = read_model(self._fetched(), labels=self.workload.labels)
            self.facts = model.facts
            self._estimate = over_stored(self.facts.stored, Traces(model, self.say))
        return self._estimate

    def _fetched(self) -> ModelSource:
        if self._source is None:
            given = {name: self.settings[name] for name in ("revision", "trust_remote_code")}
            self._source = fetch_model(self.settings["model"], **given, weights=False)
        return self._source

    def _seconds(self, estimate: MemoryEstimate, workload: Workload) -> float:
        assert self.hardware is not None
        pace = pace_of(self.hardware, workload.dtype) or nominal_pace(workload.dtype)
        return micro_batch_seconds(estimate, self.facts, workload, pace)


def _of_batch(workload: Workload, batch: Rows) -> Workload:
    trained = max(batch.trained_share, 1 / batch.tokens)
    return dataclasses.replace(
        workload,
        batch_size=batch.rows,
        max_length=max(2, batch.tokens),
        trained_share=trained,
    )


def _in_words(workload: Workload) -> str:
    # KTO takes some in every step.
    where = " without a backward pass, as in an evaluation" if workload.evaluation else ""
    return f"{plural(workload.sequences, 'row')} of {workload.max_length:,} tokens{where}"


def _described(change: Change) -> str:
    """``--batch-size 4 --gradient-accumulation 2: 12.1 GB, +2 % time``."""
    options = " ".join(word for name, value in change.settings.items() for word in option_words(name, value))
    return f"{options}: {byte_size(change.estimate.peak_bytes)}, {change.time_words}"
