"""The part of a run that writes: train, stop or finish, and complete the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankwise.compat.torch import is_unit
from rankwise.disk import coded_errors, remove_strays
from rankwise.errors import Interrupted, RunError, warn
from rankwise.records import RUN_FILE, RunRecord, load_record, read_metrics, write_skipped_rows
from rankwise.training import callbacks, finish, output, ranks
from rankwise.training.checkpoints import Checkpoint, remove_unfinished
from rankwise.training.interrupt import Interrupt, interrupts
from rankwise.training.meters import MemoryMeter, mapped_bytes
from rankwise.training.metrics import MetricsFile, evaluated_rewards, evaluations
from rankwise.training.observer import Observer
from rankwise.training.old_run import OWN_FILES, clear_run
from rankwise.training.preflight import GradientCheck
from rankwise.training.rate_search import notes_of
from rankwise.training.sharding import whole_weights
from rankwise.training.spine import RunTrainer
from rankwise.training.weights import weights_digest


@dataclasses.dataclass(frozen=True)
class Extras:
    """Parts that only some runs have."""

    early_stopping: int | None
    # Returns the model's answer to the sample prompt.
    answer: Callable[[], str] | None
    # Input for the comparison of logits after reloading.
    probe: dict[str, Tensor]


@dataclasses.dataclass
class Session:
    """A checked run, ready to start."""

    folder: Path
    mode: output.Mode
    trainer: RunTrainer
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint | None
    record: RunRecord
    extras: Extras
    observer: Observer
    # None in processes that do not write.
    metrics: MetricsFile | None = None

    def carry_out(self, started: float, told: list[dict[str, str]]) -> RunRecord:
        """Train to the end and write the results. Also after a failure, the record holds how the run ended.

        Raises Interrupted: RW540 saved and stopped, RW541 stopped at once, RW542 stopped before the first step;
        RunError during training, and where a file cannot be written: RW551, for weights RW513 and RW514.
        """
        self.started = started - self.trainer.progress.wall_seconds
        if self.record.rate_search is not None:
            self.started += self.record.rate_search["seconds"]
        self.record.warnings = told
        self.record.device["loss"] = self.trainer.loss_in_words
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
        return dataclasses.replace(self.record, warnings=told, status="dry run", steps=self.trainer.total_steps)

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
        stopped = self._train()
        if stopped is not None:
            raise stopped
        if ranks.count() > 1:
            ranks.check_alike({"the sha256 of the trained weights": weights_digest(self.trainer.model)})
        # All processes restore the same step, since a sharded model needs every process.
        losses = ranks.gathered(evaluations(self.folder) if ranks.is_writer() else {})[0]
        state = self.trainer.state
        kept = finish.choose_kept(losses, state.global_step, state.best_global_step, of_rewards=self.of_rewards)
        finish.restore_kept(self.trainer.model, self.folder, kept, state.global_step)
        gathered = whole_weights(self.trainer.model)
        if ranks.is_writer():
            self._finish(losses.get(0), kept, gathered)
        ranks.barrier()
        if ranks.is_writer() or is_unit(self.trainer.model):
            finish.prove_reload(self.trainer.model, self.folder, self.extras.probe)
        if ranks.is_writer():
            self._write_results()

    def _write_results(self) -> None:
        self._complete_record("finished")
        finish.write_plot(self.folder, self.record)
        finish.write_card(self.trainer.model, self.folder, self.record)
        # Last, so that a folder with a finished record is complete.
        self.record.save(self.folder)

    def _train(self) -> Interrupted | None:
        """Train. Returns the interruption if the user asked to stop, else None."""
        device_type = self.trainer.args.device.type
        interrupt = Interrupt(self.observer.phase)
        meter = MemoryMeter(device_type, self.trainer.progress.peak_memory_bytes, mapped_bytes(self.trainer.model))
        with meter as memory, interrupts(interrupt), callbacks.trackers(self.trainer):
            self._add_callbacks(memory, interrupt)
            if self.checkpoint is None:
                self.observer.phase("Training")
                self.trainer.train()
            else:
                self.observer.phase(f"Training, resuming from step {self.checkpoint.step}")
                self.trainer.resume(self.checkpoint)
        state = self.trainer.state
        self.trainer.progress.peak_memory_bytes = max(ranks.gathered(self.trainer.progress.peak_memory_bytes))
        # Only the writing process knows the metrics.
        is_done = state.global_step >= state.max_steps and ranks.gathered(ranks.is_writer() and self._is_evaluated())[0]
        if not ranks.agreed(interrupt.requested) or is_done:
            return None
        if state.global_step == 0:
            return Interrupted("RW542", f"stopped before the first step; {self.folder} holds nothing to resume yet.")
        return Interrupted(
            "RW540",
            f"stopped after step {state.global_step} of {state.max_steps} and saved it; continue with `rankwise train "
            f"--resume --output {self.folder}`.",
        )

    def _add_callbacks(self, memory: MemoryMeter, interrupt: Interrupt) -> None:
        trainer = self.trainer
        check = GradientCheck(
            trainer.model,
            overflow_is_normal=trainer.args.fp16,
            silence_is_normal=trainer.silence_is_normal,
            waiting=trainer.progress.unchecked,
        )
        trainer.add_callback(callbacks.Watch(trainer, self.metrics, memory, self.observer, self._tick))
        trainer.add_callback(callbacks.CheckGradients(check, trainer.progress))
        if self.extras.answer is not None and (ranks.is_writer() or is_unit(trainer.model)):
            trainer.add_callback(callbacks.Sample(self.extras.answer, self.observer, self.metrics))
        if self.extras.early_stopping is not None:
            trainer.add_callback(callbacks.EarlyStopping(self.extras.early_stopping))
        trainer.add_callback(callbacks.StopOnInterrupt(interrupt))
        if memory.device_type == "cpu":
            trainer.add_callback(callbacks.GiveBackHoles(memory.now))

    def _is_evaluated(self) -> bool:
        return self.trainer.eval_dataset is None or self.trainer.state.global_step in evaluations(self.folder)

    @property
    def of_rewards(self) -> bool:
        """Whether the evaluation loss is the negative mean reward."""
        return self.record.objective == "grpo"

    def _tick(self) -> None:
        self.trainer.progress.wall_seconds = time.monotonic() - self.started

    def _finish(
        self, initial_eval_loss: float | None, kept: finish.KeptStep, gathered: dict[str, Tensor] | None
    ) -> None:
        self.observer.phase("Saving")
        state, record = self.trainer.state, self.record
        finish.write_final(self.trainer.model, self.tokenizer, self.folder, self._announce, gathered)
        record.initial_eval_loss, record.eval_loss = initial_eval_loss, kept.eval_loss
        record.eval_rewards = evaluated_rewards(self.folder, kept.step)
        record.steps, record.kept_step, record.kept_because = state.global_step, kept.step, kept.because
        finish.warn_if_worse(record.initial_eval_loss, kept, of_rewards=self.of_rewards)
        if kept.eval_loss is None and not self.of_rewards:
            finish.warn_if_risen([line["loss"] for line in read_metrics(self.folder) if line.get("loss") is not None])
        if state.global_step < state.max_steps:
            warn("RW527", f"stopped early after step {state.global_step} of {state.max_steps}: no better evaluation.")

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
        record, progress = self.record, self.trainer.progress
        record.status = status
        record.train_loss = progress.mean_loss
        record.tokens_per_second = progress.tokens_per_second
        record.examples_per_second = progress.examples_per_second
        record.peak_memory_bytes = progress.peak_memory_bytes or None
        record.wall_seconds = progress.wall_seconds
        record.steps = self.trainer.state.global_step
