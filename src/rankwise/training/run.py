"""``train``: the one place where settings become plain arguments.

Order matters: everything is read and checked before anything is written, the old run included.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.config import LoraConfig, TrainSettings
from rankwise.errors import Interrupted, RankwiseError, RankwiseWarning, RunError, warn
from rankwise.models import resolve_model
from rankwise.records import RunRecord, load_record, write_text
from rankwise.training import callbacks, finish, output, preflight, setup
from rankwise.training.arguments import check_combinations, check_names, sft_arguments
from rankwise.training.checkpoints import Checkpoint, newest_valid, remove_unfinished
from rankwise.training.interrupt import Interrupt, interrupts
from rankwise.training.meters import MemoryMeter, Progress
from rankwise.training.metrics import MetricsFile, evaluations, mean_train_loss
from rankwise.training.observer import Observer, SilentObserver
from rankwise.training.provenance import device_record, versions
from rankwise.training.trainer import PROGRESS_FILE, TRAINER_STATE_FILE, RankwiseTrainer


def train(settings: TrainSettings, observer: Observer | None = None) -> RunRecord:
    """Fine-tune as ``settings`` say and leave a run folder (DESIGN 5) in ``settings.output``.

    Raises InputError before anything is written when settings, data, model or output folder are at fault, RunError
    during training (not-finite loss, no gradient, full disk; the last checkpoint stays), and Interrupted after
    Ctrl-C or SIGTERM, when the step has been saved and ``resume=True`` continues it.
    """
    started = time.monotonic()
    told: list[dict[str, str]] = []
    with _told_warnings(observer, told):
        run = _Run(settings, observer or SilentObserver(), told, started)
        if run.mode == "resume" and run.is_finished():
            return load_record(settings.output)
        run.prepare()
        return run.carry_out()


class _Run:
    """The state that the phases of one run share."""

    def __init__(
        self, settings: TrainSettings, observer: Observer, told: list[dict[str, str]], started: float
    ) -> None:
        self.settings, self.observer, self.told, self.started = settings, observer, told, started
        self.folder: Path = settings.output
        self.described = settings.model_dump(mode="json")
        self.mode = output.check_output(self.folder, resume=settings.resume, overwrite=settings.overwrite)
        self._check_settings()
        self.checkpoint: Checkpoint | None = None
        self.progress = Progress()

    # --- before anything is written ---

    def _check_settings(self) -> None:
        given = self.settings
        check_names(given.optimizer, given.lr_scheduler_type)
        needs_eval = {
            "--early-stopping": given.early_stopping,
            "--eval-steps": given.eval_steps,
            "--eval-limit": given.eval_limit,
            "--sample-prompt": given.sample_prompt,
        }
        check_combinations(
            eval_data=given.eval_data is not None,
            needs_eval=needs_eval,
            schedule=given.lr_scheduler_type,
            tensorboard=given.tensorboard,
        )
        self.lora = _lora_config(given)
        if self.mode == "resume":
            output.check_same_run(self.folder, self.described)

    def is_finished(self) -> bool:
        """Whether the run to resume is done, and no longer one is asked for."""
        record = load_record(self.folder)
        if record.status != "finished" or self.described["max_steps"] != record.settings.get("max_steps"):
            return False
        if self.described["epochs"] != record.settings.get("epochs"):
            return False
        warn("RW509", f"the run in {self.folder} is finished ({record.steps} steps); there is nothing to resume.")
        return True

    def prepare(self) -> None:
        """Read, load and check everything."""
        given = self.settings
        source = {"trust_remote_code": given.trust_remote_code, "revision": given.revision}
        self.observer.phase("Reading data")
        rows, eval_rows, template = setup.read_data(
            train=given.data,
            evaluation=given.eval_data,
            eval_limit=given.eval_limit,
            columns={"prompt_column": given.prompt_column, "completion_column": given.completion_column},
            chat_template=given.chat_template,
        )
        self.observer.phase("Loading the model")
        self.loaded = setup.load_for_training(
            given.model, method=given.method, dtype=given.dtype, device=given.device, **source
        )
        self.observer.phase("Encoding data")
        self.data = setup.encode_data(
            rows, eval_rows, self.loaded.tokenizer, max_length=given.max_length, template=template
        )
        self.base_model = self._describe_base()
        self.hashes = {**self.data.hashes, "base_model": self.base_model["sha256"]}
        if self.mode == "resume":
            output.check_same_inputs(self.folder, self.hashes)
        self.trainable = setup.attach(self.loaded.model, given.method, self.lora, given.seed)
        self._check_before_training()
        self.trainer = self._trainer()

    def _check_before_training(self) -> None:
        report, rows = self.data.train.report, self.data.rows
        preflight.check_labels(
            tokens=report.tokens,
            trained_tokens=report.trained_tokens,
            stop_rows=report.stop_token_rows,
            whole_texts=rows.kind == "text",
            source=rows.source,
        )
        preflight.check_trainable(self.loaded.model, self.settings.method)
        preflight.check_disk(self.loaded.model, self.folder, self.settings.save_total_limit + 1)
        if self.mode == "resume":
            self.checkpoint = self._checkpoint_to_resume()

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        found = newest_valid(self.folder, lambda error: warn(error.code, f"{error.message} An older one is used."))
        if found is None:
            warn("RW510", f"the run in {self.folder} has no checkpoint yet; it starts again from step 0.")
            return None
        self.progress = Progress(**json.loads((found.path / PROGRESS_FILE).read_text(encoding="utf-8")))
        return found

    def _trainer(self) -> RankwiseTrainer:
        given, loaded = self.settings, self.loaded
        arguments = sft_arguments(
            self.folder,
            device_type=loaded.device.type,
            precision=loaded.precision,
            batch_size=given.batch_size,
            gradient_accumulation=given.gradient_accumulation,
            max_steps=given.max_steps,
            epochs=given.epochs,
            learning_rate=given.learning_rate,
            schedule=given.lr_scheduler_type,
            warmup_steps=given.warmup_steps,
            weight_decay=given.weight_decay,
            max_grad_norm=given.max_grad_norm,
            optimizer=given.optimizer,
            seed=given.seed,
            packing=given.packing,
            max_length=given.max_length,
            gradient_checkpointing=given.gradient_checkpointing,
            evaluate=self.data.evaluation is not None,
            eval_steps=given.eval_steps,
            eval_on_start=self.data.evaluation is not None and self._evaluation_is_due(),
            save_steps=given.save_steps,
            logging_steps=given.logging_steps,
            tensorboard=given.tensorboard,
        )
        return RankwiseTrainer(
            model=loaded.model,
            args=arguments,
            processing_class=loaded.tokenizer,
            train_dataset=self.data.train.dataset,
            eval_dataset=self.data.evaluation.dataset if self.data.evaluation else None,
            label_smoothing=given.label_smoothing,
            save_total_limit=given.save_total_limit,
            progress=self.progress,
        )
