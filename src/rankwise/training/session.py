"""The part of a run that writes: train, stop or finish, and complete the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.compat.torch import is_unit
from rankwise.data import Rows
from rankwise.disk import coded_errors, remove_strays
from rankwise.errors import Interrupted, RunError, warn
from rankwise.foreign import JsonObject
from rankwise.models.mapped import MappedFiles
from rankwise.records import RUN_FILE, RunRecord, load_record, read_metrics, write_skipped_rows
from rankwise.training import finish, output, ranks
from rankwise.training.checkpoints import Checkpoint, remove_unfinished
from rankwise.training.interrupt import Interrupt, interrupts
from rankwise.training.loop import Loop
from rankwise.training.meters import MemoryMeter
from rankwise.training.metrics import MetricsFile, evaluated_rewards, evaluations
from rankwise.training.observer import Observer
from rankwise.training.old_run import OWN_FILES, clear_run
from rankwise.training.preflight import GradientCheck
from rankwise.training.rate_search import notes_of
from rankwise.training.sharding import whole_weights
from rankwise.training.trackers import Trackers
from rankwise.training.watch import Watch
from rankwise.training.weights import weights_digest


class Retention(Protocol):
    """Measures a run on what must stay. The command line connects the two, as it does with the memory plan.

    Models come with the run's own operators, and with the dtype of mixed precision.
    """

    # Written into the run's folder.
    files: Sequence[str]

    @property
    def rows(self) -> Rows:
        """Read at the first use. Raises DataError as the readers do."""

    def before(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None, *, resumes: bool
    ) -> None:
        """Called before the first step. A run that ``resumes`` keeps what was measured then."""

    def after(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None
    ) -> JsonObject:
        """Called with the weights that are kept. Returns the record's entry."""


@dataclasses.dataclass
class Session:
    """A checked run, ready to start."""

    folder: Path
    mode: output.Mode
    loop: Loop
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint | None
    record: RunRecord
    observer: Observer
    # Returns the model's answer to the sample prompt.
    answer: Callable[[], str] | None
    # Input for the comparison of logits after reloading.
    probe: dict[str, Tensor]
    trackers: Sequence[str] = ()
    retention: Retention | None = None
    # None in processes that do not write.
    metrics: MetricsFile | None = None

    def carry_out(self, started: float, told: list[dict[str, str]]) -> RunRecord:
        """Train to the end and write the results. Also after a failure, the record holds how the run ended.

        Raises Interrupted: RW540 saved and stopped, RW541 stopped at once, RW542 stopped before the first step;
        RunError during training, and where a file cannot be written: RW551, for weights RW513 and RW514.
        """
        self.started = started - self.loop.progress.wall_seconds
        if self.record.rate_search is not None:
            self.started += self.record.rate_search["seconds"]
        self.record.warnings = told
        self.record.device["loss"] = self.loop.objective.in_words
        # Every process must have looked for an old run before the writer starts the new one.
        ranks.barrier()
        if ranks.is_writer():
            with coded_errors(self.folder, "and give the same command again"):
                self._open_folder()
        try:
            with coded_errors(self.folder, "and continue with --resume"):
                ranks.check_same_file(self.folder / RUN_FILE)
                self._carry_out()
        except Interrupted:
            self._close_early("interrupted")
            raise
        except KeyboardInterrupt:
            self._close_early("interrupted")
            raise Interrupted(
                "RW541", f"stopped at once; --resume continues {self.folder} from its last checkpoint, if it has one."
            ) from None
        except BaseException:
            self._close_early("failed")
            raise
        return self.record

    def foreseen(self, told: list[dict[str, str]]) -> RunRecord:
        """The record with which the run would begin, and its number of steps. Nothing is written."""
        return dataclasses.replace(self.record, warnings=told, status="dry run", steps=self.loop.options.total_steps)

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.mode == "overwrite":
            clear_run(self.folder)
        if self.mode == "resume":
            before = load_record(self.folder)
            self.record.files, self.record.rate_search = before.files, before.rate_search
        remove_strays(self.folder, {RUN_FILE, *OWN_FILES})
        try:
            self.record.save(self.folder)
        except BaseException:
            self._take_back()
            raise
        if self.record.rate_search is not None:
            notes_of(self.folder).unlink(missing_ok=True)

    def _take_back(self) -> None:
        """Where the disk failed after the record had its name: remove that of a new run, which would keep the same
        command from starting it; else say that the run failed.
        """
        with contextlib.suppress(OSError, RunError):
            if self.mode == "new":
                (self.folder / RUN_FILE).unlink(missing_ok=True)
            elif load_record(self.folder).status == "running":
                self.record.status = "failed"
                self.record.save(self.folder)

    def _carry_out(self) -> None:
        step = self.checkpoint.step if self.checkpoint else None
        if ranks.is_writer():
            write_skipped_rows(self.folder, self.record.data)
            remove_unfinished(self.folder)
            self.metrics = MetricsFile(self.folder, resume_step=step)
        computed = self.loop.options.autocast if self.loop.model.dtype == torch.float32 else None
        if self.retention is not None:
            self.observer.phase("Measuring what must stay")
            self._announce([*self.retention.files])
            self.retention.before(self.loop.model, self.tokenizer, computed, resumes=self.checkpoint is not None)
        stopped = self._train()
        if stopped is not None:
            raise stopped
        if ranks.count() > 1:
            ranks.check_alike({"the sha256 of the trained weights": weights_digest(self.loop.model)})
        # All processes restore the same step, since a sharded model needs every process.
        losses = ranks.gathered(evaluations(self.folder) if ranks.is_writer() else {})[0]
        progress = self.loop.progress
        kept = finish.choose_kept(losses, progress.steps, progress.best_step, of_rewards=self.of_rewards)
        finish.restore_kept(self.loop.model, self.folder, kept, progress.steps)
        if self.retention is not None:
            self.record.retained = self.retention.after(self.loop.model, self.tokenizer, computed)
        gathered = whole_weights(self.loop.model)
        if ranks.is_writer():
            self._finish(losses.get(0), kept, gathered)
        ranks.barrier()
        if ranks.is_writer() or is_unit(self.loop.model):
            finish.prove_reload(self.loop.model, self.folder, self.probe)
        if ranks.is_writer():
            self._write_results()

    def _write_results(self) -> None:
        self._complete_record("finished")
        finish.write_plot(self.folder, self.record)
        finish.write_card(self.loop.model, self.folder, self.record)
        # Last, so that a folder with a finished record is complete.
        self.record.save(self.folder)

    def _train(self) -> Interrupted | None:
        """Train. Returns the interruption if the user asked to stop, else None."""
        loop, progress = self.loop, self.loop.progress
        interrupt = Interrupt(self.observer.phase)
        files = MappedFiles(loop.model)
        meter = MemoryMeter(loop.model.device.type, progress.peak_memory_bytes, files.bytes)
        names = self.trackers if ranks.is_writer() else ()
        trackers = Trackers(names, self.folder, self.record.settings, self.record.predicted_peak_memory_bytes)
        with meter as memory, interrupts(interrupt), trackers:
            at = "" if self.checkpoint is None else f", resuming from step {self.checkpoint.step}"
            self.observer.phase(f"Training{at}")
            watch = self._watch(memory, interrupt, trackers, files)
            try:
                loop.fit(watch, self.checkpoint)
            except BaseException:
                # Where another process ended, the launcher's signal is on its way, and must not hide this error.
                ranks.end_alone()
                raise
            watch.end()
        progress.peak_memory_bytes = max(ranks.gathered(progress.peak_memory_bytes))
        # Only the writing process knows the metrics.
        is_last = progress.steps >= loop.options.total_steps
        is_done = is_last and ranks.gathered(ranks.is_writer() and self._is_evaluated())[0]
        if not ranks.agreed(interrupt.requested) or is_done:
            return None
        if progress.steps == 0:
            return Interrupted("RW542", f"stopped before the first step; {self.folder} holds nothing to resume yet.")
        return Interrupted(
            "RW540",
            f"stopped after step {progress.steps} of {loop.options.total_steps} and saved it; continue with `rankwise "
            f"train --resume --output {self.folder}`.",
        )

    def _watch(self, memory: MemoryMeter, interrupt: Interrupt, trackers: Trackers, files: MappedFiles) -> Watch:
        loop = self.loop
        answers = ranks.is_writer() or is_unit(loop.model)
        return Watch(
            loop.model,
            loop.progress,
            memory,
            loop.options.total_steps,
            loop.options.eval_steps,
            loop.objective.shown,
            self.observer,
            self.metrics,
            trackers,
            tick=self._tick,
            interrupt=interrupt,
            check=GradientCheck(
                loop.model,
                overflow_is_normal=loop.options.autocast == torch.float16,
                silence_is_normal=loop.objective.silence_is_normal,
                waiting=loop.progress.unchecked,
            ),
            answer=self.answer if answers else None,
            files=files,
        )

    def _is_evaluated(self) -> bool:
        return self.loop.objective.eval_rows is None or self.loop.progress.steps in evaluations(self.folder)

    @property
    def of_rewards(self) -> bool:
        """Whether the evaluation loss is the negative mean reward."""
        return self.record.objective == "grpo"

    def _tick(self) -> None:
        self.loop.progress.wall_seconds = time.monotonic() - self.started

    def _finish(
        self, initial_eval_loss: float | None, kept: finish.KeptStep, gathered: dict[str, Tensor] | None
    ) -> None:
        self.observer.phase("Saving")
        progress, record = self.loop.progress, self.record
        finish.write_final(self.loop.model, self.tokenizer, self.folder, self._announce, gathered)
        record.initial_eval_loss, record.eval_loss = initial_eval_loss, kept.eval_loss
        record.eval_rewards = evaluated_rewards(self.folder, kept.step)
        record.steps, record.kept_step, record.kept_because = progress.steps, kept.step, kept.because
        finish.warn_of_one_label(record.eval_rewards)
        finish.warn_if_worse(record.initial_eval_loss, kept, of_rewards=self.of_rewards)
        if kept.eval_loss is None and not self.of_rewards:
            finish.warn_if_risen([line["loss"] for line in read_metrics(self.folder) if line.get("loss") is not None])
        if progress.steps < (total := self.loop.options.total_steps):
            warn("RW527", f"stopped early after step {progress.steps} of {total}: no better evaluation.")

    def _announce(self, files: list[str]) -> None:
        self.record.files = sorted({*self.record.files, *files})
        self.record.save(self.folder)

    def _close_early(self, status: str) -> None:
        """Write the record and the plot of a run that did not finish, as far as the disk permits."""
        ranks.end_alone()
        if not ranks.is_writer():
            return
        self._complete_record(status)
        for write in (self.record.save, lambda folder: finish.write_plot(folder, self.record)):
            # The first error is the one to raise, and often the cause of these.
            with contextlib.suppress(OSError):
                write(self.folder)

    def _complete_record(self, status: str) -> None:
        """Complete the record up to the point that the run reached."""
        self._tick()
        record, progress = self.record, self.loop.progress
        record.status = status
        record.train_loss = progress.mean_loss
        record.tokens_per_second = progress.tokens_per_second
        record.examples_per_second = progress.examples_per_second
        record.peak_memory_bytes = progress.peak_memory_bytes or None
        record.wall_seconds = progress.wall_seconds
        record.steps = progress.steps
