"""The part of a run that writes: train, stop or finish, and complete the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.adapters import has_adapter
from rankwise.adapters.folder import CONFIG_FILE
from rankwise.compat.system import flush, rename
from rankwise.compat.torch import is_unit
from rankwise.data import Rows
from rankwise.disk import coded_errors, flush_tree, follow_umask, refuse_links, remove_strays
from rankwise.errors import Interrupted, warn
from rankwise.foreign import JsonObject
from rankwise.methods import guest_of
from rankwise.models.prepared import MappedFiles, mapped_files
from rankwise.models.source import ModelSource
from rankwise.objectives import OBJECTIVES
from rankwise.records import RUN_FILE, RunRecord, load_record, read_metrics, write_skipped_rows, write_text
from rankwise.reports.model_card import model_card
from rankwise.reports.numbers import plural
from rankwise.reports.plots import loss_svg
from rankwise.training import checkpoints, ranks
from rankwise.training.batches import MicroBatch
from rankwise.training.checkpoints import (
    FOLDER,
    OWN_FILES,
    Checkpoint,
    check_checkpoint,
    clear_run,
    remove_unfinished,
    temporary_folder,
)
from rankwise.training.loop import Loop, coming_batches
from rankwise.training.objectives import Preferences
from rankwise.training.ranks import Interrupt, interrupts
from rankwise.training.rate_search import search_file
from rankwise.training.reference import FILE as REFERENCE_FILE
from rankwise.training.reference import Reference, read_values, write_values
from rankwise.training.states import undisturbed_random_states
from rankwise.training.step import mixed
from rankwise.training.trackers import Trackers
from rankwise.training.watch import (
    Callbacks,
    EvaluationStopped,
    GradientCheck,
    MemoryMeter,
    Observer,
    Watch,
    begin_metrics,
    evaluated_rewards,
    evaluations,
)
from rankwise.training.weights import check_written, load_weights, save_weights, weights_digest, whole_weights

PLOT_FILE = "loss.svg"
CARD_FILE = "README.md"
# A rise of the training loss by this factor is more than the difference between batches.
FAR_ABOVE = 1.5


class Foresight(Protocol):
    """A memory plan that is asked before a run starts. Both methods may raise to refuse the run."""

    def before_loading(self, source: ModelSource) -> None:
        """Called before the model is loaded."""

    def before_training(
        self, batch: MicroBatch, evaluation: MicroBatch | None, mapped: MappedFiles
    ) -> tuple[int, int] | None:
        """Called when everything is loaded and encoded, with the largest micro-batches of training and of evaluation,
        and the files from which weights are mapped.

        Returns the bytes of the expected peak, as the run's ``MemoryMeter`` measures it, and of the idle process in it.
        """

    def keeps_rounded(self, more_bytes: int) -> bool:
        """Called after it: whether rounded weights may be kept, which take so many bytes more than that peak."""


class Retention(Protocol):
    """Measures a run on the retained rows. The command line connects the two, as it does with the memory plan.

    Models come with the run's own operators, and with the dtype of mixed precision.
    """

    # Written into the run's folder.
    files: Sequence[str]

    @property
    def rows(self) -> Rows | None:
        """Rows, or None for a task's questions; read at the first use. Raises DataError as the readers do."""

    def before(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None, *, resumes: bool
    ) -> None:
        """Called before the first step. A run that ``resumes`` keeps what was measured then."""

    def after(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None
    ) -> JsonObject:
        """Called with the weights that are kept. Returns the record's entry."""


@dataclasses.dataclass(kw_only=True)
class Session:
    """A checked run, ready to start."""

    folder: Path
    mode: checkpoints.Mode
    loop: Loop
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint | None
    record: RunRecord
    observer: Observer
    trackers: Sequence[str] = ()
    retention: Retention | None = None
    # Of preferences, and the folder in which other runs over the same base find it.
    reference: Reference | None = None
    shared: Path | None = None
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)

    def carry_out(self, started: float, told: list[dict[str, str]]) -> RunRecord:
        """Train to the end and write the results. Also after a failure, the record holds how the run ended.

        Raises Interrupted: RW540 saved and stopped, RW541 stopped at once, RW542 stopped before the first step;
        RunError during training, RW551 if a file cannot be written, RW513 if there is no space for a checkpoint.
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
            if self.callbacks.raised is not None:
                # An OSError of a callback says nothing about the run's folder.
                raise self.callbacks.raised from None
            raise
        return self.record

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.mode == "overwrite":
            clear_run(self.folder)
        if self.mode == "resume":
            before = load_record(self.folder)
            self.record.files, self.record.rate_search = before.files, before.rate_search
            self.record.asked = before.asked
        remove_strays(self.folder, {RUN_FILE, *OWN_FILES})
        self.record.save(self.folder)
        search_file(self.folder).unlink(missing_ok=True)

    def _carry_out(self) -> None:
        step = self.checkpoint.step if self.checkpoint else None
        if ranks.is_writer():
            write_skipped_rows(self.folder, self.record.data)
            remove_unfinished(self.folder)
            begin_metrics(self.folder, step)
        computed = self.loop.autocast if self.loop.model.dtype == torch.float32 else None
        if self.retention is not None:
            self.observer.phase("Measuring the retained rows")
            self._announce([*self.retention.files])
            self.retention.before(self.loop.model, self.tokenizer, computed, resumes=self.checkpoint is not None)
        self._train()
        if ranks.count() > 1:
            ranks.check_alike({"the sha256 of the trained weights": weights_digest(self.loop.model)})
        # All processes restore the same step, since a sharded model needs every process.
        losses = ranks.gathered(evaluations(self.folder) if ranks.is_writer() else {})[0]
        progress = self.loop.progress
        kept = choose_kept(losses, progress.steps, progress.best_step, of_rewards=self.of_rewards)
        restore_kept(self.loop.model, self.folder, kept, progress.steps)
        if self.retention is not None:
            self.record.retained = self.retention.after(self.loop.model, self.tokenizer, computed)
        gathered = whole_weights(self.loop.model)
        if ranks.is_writer():
            self._finish(losses.get(0), kept, gathered)
            objective, reference = self.loop.objective, self.reference
            if isinstance(objective, Preferences) and reference and self.shared and not is_unit(self.loop.model):
                with mixed(self.loop.model, self.loop.autocast):
                    self.record.answers = objective.changed_answers(self.tokenizer, reference.key, self.shared)
            self._complete_record("finished")
            write_plot(self.folder, self.record)
            write_card(self.loop.model, self.folder, self.record)
            # Last, so that a folder with a finished record is complete.
            self.record.save(self.folder)
        ranks.barrier()

    def _train(self) -> None:
        """Train. Raises Interrupted (RW540, RW542) if the user asked to stop."""
        loop, progress = self.loop, self.loop.progress
        interrupt = Interrupt(self.observer.phase)
        files = mapped_files(loop.model)
        self.record.mapped_bytes = max(ranks.gathered(files.bytes)) or None
        meter = MemoryMeter(loop.model.device.type, progress.peak_memory_bytes, files.bytes)
        names = self.trackers if ranks.is_writer() else ()
        trackers = Trackers(names, self.folder, self.record.settings, self.record.predicted_peak_memory_bytes)
        with meter as memory, interrupts(interrupt), trackers:
            at = "" if self.checkpoint is None else f", resuming from step {self.checkpoint.step}"
            self.observer.phase(f"Training{at}")
            watch = Watch(
                model=loop.model,
                progress=progress,
                memory=memory,
                shown=loop.objective.shown,
                observer=self.observer,
                folder=self.folder if ranks.is_writer() else None,
                tracker=trackers,
                tick=self._tick,
                interrupt=interrupt,
                check=GradientCheck(
                    loop.model,
                    overflow_is_normal=loop.autocast == torch.float16,
                    silence_is_normal=loop.objective.silence_is_normal,
                ),
                files=files,
                callbacks=self.callbacks,
                tokenizer=self.tokenizer,
            )
            try:
                if self.keep_reference(watch.pause):
                    loop.fit(watch, self.checkpoint)
            except BaseException:
                # If another process ended, the launcher's signal is on its way, and must not hide this error.
                ranks.end_alone()
                raise
        progress.peak_memory_bytes = max(ranks.gathered(progress.peak_memory_bytes))
        # Only the writing process knows the metrics.
        is_last = progress.steps >= loop.pace.total_steps
        is_evaluated = loop.objective.eval_rows is None or progress.steps in evaluations(self.folder)
        is_done = is_last and ranks.gathered(is_evaluated)[0]
        asked, _ = watch.wishes()
        if self.callbacks.raised is not None:
            raise self.callbacks.raised
        if not asked or is_done:
            return
        if progress.steps == 0:
            raise Interrupted("RW542", f"stopped before the first step; {self.folder} holds nothing to resume yet.")
        raise Interrupted(
            "RW540",
            f"stopped after step {progress.steps} of {loop.pace.total_steps} and saved it; continue with `rankwise "
            f"train --resume --output {self.folder}`, in Python with resume=True.",
        )

    def keep_reference(self, pause: Callable[[], None]) -> bool:
        """Compute what is not known of the reference. Returns False if the user asked to stop."""
        loop, objective, kept = self.loop, self.loop.objective, self.reference
        if kept is None or self.shared is None:
            return True
        assert isinstance(objective, Preferences), "only these have a reference to keep"
        own, shared = self.folder / REFERENCE_FILE, self.shared / f"{kept.key[:32]}.safetensors"
        # Own values come first, so that a resumed run has the bits of an undisturbed one.
        kept.values = ranks.gathered(self._known(shared) | self._known(own) if ranks.is_writer() else {})[0]
        coming = ranks.gathered({*itertools.chain.from_iterable(coming_batches(objective, loop.pace))})
        parts = [(objective.rows, sorted(set[int]().union(*coming)), True)]
        if objective.eval_rows is not None and loop.pace.eval_steps is not None:
            parts.append((objective.eval_rows, [*range(len(objective.eval_rows))], False))
        new = [objective.unknown(kept, rows, numbers, trains=trains) for rows, numbers, trains in parts]
        count, stops = sum(map(len, new)), False
        if count:
            self.observer.phase(f"Computing the reference of {plural(count, 'row')}, once")
        try:
            with undisturbed_random_states(), mixed(loop.model, loop.autocast):
                for (rows, _, trains), numbers in zip(parts, new):
                    loop.model.train(trains)
                    for _ in objective.keep(kept, rows, numbers, trains=trains):
                        pause()
        except EvaluationStopped:
            stops = True
        if ranks.is_writer() and (count or self.checkpoint is None):
            write_values(own, kept.key, kept.values)
            # Where they cannot be shared, the next run computes them again.
            with contextlib.suppress(OSError):
                write_values(shared, kept.key, kept.values | self._known(shared))
        objective.kept = kept
        return not stops

    def _known(self, file: Path) -> dict[bytes, float]:
        """The values in a file of the reference."""
        assert self.reference is not None, "asked by the caller"
        try:
            return read_values(file, self.reference.key)
        except ValueError as error:
            self.observer.note(f"{file} is damaged ({error}), so the reference is computed again")
            return {}

    @property
    def of_rewards(self) -> bool:
        """Whether the evaluation loss is the negative mean reward."""
        return OBJECTIVES[self.record.objective].of_rewards

    def _tick(self) -> None:
        self.loop.progress.wall_seconds = time.monotonic() - self.started

    def _finish(self, initial_eval_loss: float | None, kept: KeptStep, gathered: dict[str, Tensor] | None) -> None:
        self.observer.phase("Saving")
        progress, record = self.loop.progress, self.record
        write_final(self.loop.model, self.tokenizer, self.folder, self._announce, gathered)
        record.initial_eval_loss, record.eval_loss = initial_eval_loss, kept.eval_loss
        record.eval_rewards = evaluated_rewards(self.folder, kept.step)
        record.steps, record.kept_step, record.kept_because = progress.steps, kept.step, kept.because
        warn_of_one_label(record.eval_rewards)
        warn_if_worse(record.initial_eval_loss, kept, of_rewards=self.of_rewards)
        if kept.eval_loss is None and not self.of_rewards:
            warn_if_risen([line["loss"] for line in read_metrics(self.folder) if line.get("loss") is not None])
        if progress.steps < (total := self.loop.pace.total_steps):
            why = "a callback ended the run" if self.callbacks.ended else "no better evaluation"
            warn("RW527", f"stopped early after step {progress.steps} of {total}: {why}.")

    def _announce(self, files: list[str]) -> None:
        self.record.files = sorted({*self.record.files, *files})
        self.record.save(self.folder)

    def _close_early(self, status: str) -> None:
        """Write the record and the plot of a run that did not finish, as far as the disk permits."""
        ranks.end_alone()
        if not ranks.is_writer():
            return
        self._complete_record(status)
        for write in (self.record.save, lambda folder: write_plot(folder, self.record)):
            # The first error is the one to raise, and often the cause of these.
            with contextlib.suppress(OSError):
                write(self.folder)

    def _complete_record(self, status: str) -> None:
        """Complete the record up to the point that the run reached."""
        self._tick()
        record, progress = self.record, self.loop.progress
        record.status = status
        record.train_loss = progress.mean_loss
        record.tokens_per_second = progress.per_second(progress.tokens)
        record.examples_per_second = progress.per_second(progress.examples)
        record.peak_memory_bytes = progress.peak_memory_bytes or None
        record.wall_seconds = progress.wall_seconds
        record.steps = progress.steps


@dataclasses.dataclass(frozen=True)
class KeptStep:
    """The step whose weights the run keeps."""

    step: int
    because: str
    eval_loss: float | None


def choose_kept(losses: Mapping[int, float], last_step: int, best_step: int | None, *, of_rewards: bool) -> KeptStep:
    """The step with the best evaluation loss if there is one, else the last. ``losses``: {step: evaluation loss}.

    ``of_rewards``: the losses are negative mean rewards, and are described as rewards.
    """
    if best_step is None or best_step not in losses:
        why = "no evaluation data" if not losses else "no evaluation gave a finite loss"
        return KeptStep(last_step, f"the last step ({why})", losses.get(last_step))
    counted = sum(1 for step in losses if step > 0)
    best = "highest reward" if of_rewards else "lowest loss"
    return KeptStep(best_step, f"{best} of {counted} evaluation{'' if counted == 1 else 's'}", losses[best_step])


def warn_if_worse(initial: float | None, kept: KeptStep, *, of_rewards: bool) -> None:
    """Warn (RW526) if no step was better than the model before training."""
    if initial is None or kept.eval_loss is None or kept.eval_loss < initial:
        return
    if of_rewards:
        what = f"reward never rose above that before training ({-initial:.4f}; best {-kept.eval_loss:.4f})"
    else:
        what = f"loss never fell below that before training ({initial:.4f}; best {kept.eval_loss:.4f})"
    warn(
        "RW526",
        f"the evaluation {what}; try a lower --learning-rate, or check that the evaluation data is of the same kind.",
    )


def warn_of_one_label(measured: Mapping[str, float | None]) -> None:
    """Warn (RW262) if a model of labels gives all evaluation rows the same one."""
    if measured.get("labels_answered") == 1:
        warn(
            "RW262",
            "the model answers every evaluation row with the same label; train longer or at another --learning-rate, "
            "and look at the number of rows of each label with `rankwise preview --objective classify`.",
        )


def warn_if_risen(losses: Sequence[float]) -> None:
    """Warn (RW526) if the logged training losses end far above the first, for a run without evaluations.

    Single batches differ, so all of the last quarter must lie above.
    """
    last = losses[-max(3, len(losses) // 4) :]
    if len(losses) > len(last) and min(last) > FAR_ABOVE * losses[0] > 0:
        warn(
            "RW526",
            f"the training loss ended far above its start ({losses[0]:.4f}; {min(last):.4f} or more in the last "
            f"{len(last)} logged steps); try a lower --learning-rate, and give --eval-data to keep the best step.",
        )


def restore_kept(model: nn.Module, output: Path, kept: KeptStep, last_step: int) -> None:
    """Load the kept step's weights into the model, if training continued after that step."""
    if kept.step == last_step:
        return
    checkpoint = Checkpoint(kept.step, output / FOLDER / f"step-{kept.step}")
    check_checkpoint(checkpoint)
    load_weights(model, checkpoint.path)


def write_final(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    announce: Callable[[list[str]], None],
    gathered: dict[str, Tensor] | None = None,
) -> None:
    """Write the final weights and the tokenizer into the run folder; ``gathered`` as for ``save_weights``.

    Each file appears whole or not at all, and only after ``announce`` was called with the names of all files. Raises
    RunError (RW551) as ``check_written``.
    """
    model.config.use_cache = True
    with temporary_folder(output, "final") as folder:
        save_weights(model, folder, gathered)
        check_written(model, folder)
        tokenizer.save_pretrained(folder)
        follow_umask(folder)
        flush_tree(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        announce(names)
        refuse_links(output, {name.split("/")[0] for name in names if "/" in name})
        for name in names:
            (output / name).parent.mkdir(exist_ok=True)
            rename(folder / name, output / name)
        flush(output)


def write_plot(output: Path, record: RunRecord) -> None:
    """Write ``loss.svg`` from ``metrics.jsonl``."""
    title = f"{record.settings.get('model', '')}, {record.method}"
    svg = loss_svg(list(read_metrics(output)), title=title, kept_step=record.kept_step, objective=record.objective)
    write_text(output / PLOT_FILE, svg)


def write_card(model: nn.Module, output: Path, record: RunRecord) -> None:
    """Write the model card ``README.md``. Methods of other distributions get none."""
    if guest_of(model) is not None:
        return
    config = json.loads((output / CONFIG_FILE).read_text(encoding="utf-8")) if has_adapter(model) else None
    write_text(output / CARD_FILE, model_card(record, config))
