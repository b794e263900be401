"""The common base of every objective's trainer: one host sync a step, checkpoints, resuming, the loop.

trl's trainers differ only in data and loss. A trainer class inherits from ``RunTrainer`` first and from one of trl's
second. ``RunTrainer`` overrides methods of transformers' Trainer: saving and loading (which would write pickles, in
folders that a kill leaves half-written), telemetry (nothing leaves the machine) and the model card (rankwise has one).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer, StateDict
from transformers import PreTrainedModel, PrinterCallback, set_seed

from rankwise.acceleration import move_once
from rankwise.acceleration.sharding import average_gradients
from rankwise.compat.torch import is_unit, set_last_rates
from rankwise.compat.trl import TrlTrainer, metrics_of
from rankwise.config import logging_steps_of
from rankwise.errors import RunError, warn
from rankwise.records import write_json
from rankwise.training import ranks
from rankwise.training.batches import Batch, Items, Samples
from rankwise.training.checkpoints import Checkpoint, remove_old, save_checkpoint
from rankwise.training.meters import Progress
from rankwise.training.sharding import sharded_state, whole, whole_state, whole_weights
from rankwise.training.shares import adapters_at_work, is_idle, share_batches
from rankwise.training.state import (
    RandomStates,
    check_optimizer_state,
    check_random_states,
    load_state,
    random_states,
    reading_state,
    save_state,
    set_random_states,
)
from rankwise.training.weights import checkpoint_bytes, load_weights, save_weights

PROGRESS_FILE = "progress.json"
# The file name of the Trainer's state in transformers.
STATE_FILE = "trainer_state.json"


class EvaluationStopped(Exception):
    """The user asked to stop while an evaluation was running."""


class RunTrainer(TrlTrainer):
    """Trains the parameters of ``model`` that require gradients, and writes checkpoints under ``args.output_dir``.

    The newest ``save_total_limit`` checkpoints are kept, and so is the one with the best evaluation loss. A subclass
    computes the loss, and adds the current step's tokens and examples to ``step_tokens`` and ``step_examples``.
    """

    # transformers declares these attributes optional; all are set while training.
    model: PreTrainedModel
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    train_dataset: Dataset
    eval_dataset: Dataset | None
    # {"train" or "eval": {name: values}}, created by trl's trainers.
    _metrics: Any
    # The context of a training step that offloads activations, where the option is set.
    maybe_activation_offload_context: Any
    # {trl's name: ours} of an objective's own figures: those written to metrics.jsonl, and those shown at each step.
    logged: Mapping[str, str] = {}
    shown: Mapping[str, str] = {}
    # Whether all gradients of a step may be zero.
    silence_is_normal = False

    def __init__(self, *, save_total_limit: int = 2, progress: Progress | None = None, **kwargs: Any) -> None:
        # Not all of trl's trainers pass this argument on.
        optimizer = kwargs.pop("optimizer_cls_and_kwargs", None)
        super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer
        if getattr(self.args, "activation_offloading", False):
            move_once(self.maybe_activation_offload_context)
        self.run_folder = Path(str(self.args.output_dir))
        self.checkpoint_limit = save_total_limit
        self.progress = progress or Progress()
        self.last_saved: int | None = None
        # The sum of the losses of the last step's micro-batches.
        self.step_loss = 0.0
        # Losses of the step in progress, on the device; they are read once, before the optimizer's step.
        self._losses: list[Tensor] = []
        self.step_tokens = self.step_examples = 0
        self.last_grad_norm: float | None = None
        self.shares_masks = ranks.count() > 1 and self._draws_one_mask()
        if ranks.rank() and not self.shares_masks:
            set_seed((self.args.seed + ranks.rank()) % 2**32)
        self.remove_callback(PrinterCallback)

    def _draws_one_mask(self) -> bool:
        """Whether the adapters have dropout and every process can draw its part of a single process's masks."""
        if not any(adapter.dropout for _, adapter in adapters_at_work(self.model)):
            return False
        reason = self.why_masks_differ()
        if reason is not None:
            warn(
                "RW784",
                f"the dropout masks of {ranks.count()} processes differ from those of one: {reason}; every process "
                "draws its own masks, from the seed and its rank.",
            )
        return reason is None

    def why_masks_differ(self) -> str | None:
        """Why dropout masks of one process cannot be divided among several, or None where they can."""
        return "masks are divided with --objective sft only"

    def start_evaluation(self) -> None:
        """Switch model and optimizer to evaluation mode, as the Trainer does; the next step switches both back."""
        self.model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()

    @property
    @abstractmethod
    def loss_in_words(self) -> str:
        """A description of how the loss is computed, for the record."""

    @property
    def step_figures(self) -> dict[str, float]:
        """Further figures of the last step, shown and logged with its loss."""
        metrics = metrics_of(self, "train")
        return {ours: float(metrics[theirs][-1]) for theirs, ours in self.shown.items() if metrics.get(theirs)}

    # --- a step ---

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Items = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss.detach())
        if is_unit(self.model) and self.accelerator.sync_gradients:
            average_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        return loss

    def get_train_dataloader(self) -> DataLoaderShard:
        return share_batches(super().get_train_dataloader())

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Samples:
        return super().get_batch_samples(self.with_idle_ends(epoch_iterator, self.train_dataset), num_batches, device)

    def with_idle_ends(self, batches: Iterable[Batch], rows: Sized) -> Iterator[Batch]:
        """The batches of this process. Where it gets none of an epoch's last ``rows``, the last is ``without_rows``."""
        idle = is_idle(len(rows), self.args.per_device_train_batch_size, ranks.count(), ranks.rank())
        for batch in batches:
            yield self.without_rows(batch) if idle and self.accelerator.gradient_state.end_of_dataloader else batch

    def without_rows(self, batch: Batch) -> Batch:
        """A batch with which a process takes part in a step without contributing to it."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # trl's figures stay on the device until a line is written.
        for values in metrics_of(self, "train" if self.model.training else "eval").values():
            values[:] = map(float, values)
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float:
        norm = whole(super()._get_grad_norm(model, grad_norm))
        scaler = self.accelerator.scaler
        value = self.last_grad_norm = self._read_step(norm)
        if math.isfinite(value):
            return value
        if scaler is None:
            raise RunError(
                "RW531",
                f"the gradient norm is {value} at step {self.state.global_step + 1}, so that step was "
                "not taken; lower --learning-rate or --max-grad-norm.",
            )
        if scaler.get_scale() < 1:
            raise RunError(
                "RW531",
                f"the gradients overflow float16 at step {self.state.global_step + 1} even at a loss scale below 1; "
                "lower --learning-rate, or train with --dtype float32.",
            )
        # The scaled gradients overflowed: the scaler skips this step and lowers its scale.
        return value

    def _read_step(self, norm: Tensor) -> float:
        """Record the step's loss, tokens and examples over all processes, and return the gradient norm.

        This is the only synchronisation with the device in a step. A loss that is not finite in one process makes the
        sum not finite, so that all processes raise RunError (RW530) together.
        """
        device = self._losses[0].device
        *losses, value = torch.stack([*self._losses, torch.as_tensor(norm, device=device)]).tolist()
        loss, tokens, examples = ranks.summed([math.fsum(losses), self.step_tokens, self.step_examples])
        self._losses, self.step_tokens, self.step_examples = [], 0, 0
        self.step_loss = loss / ranks.count()
        self.progress.tokens += int(tokens)
        self.progress.examples += int(examples)
        if not math.isfinite(self.step_loss):
            raise RunError(
                "RW530",
                f"the loss is {self.step_loss} at step {self.state.global_step + 1}; lower --learning-rate"
                + (", or train with --dtype bfloat16 or float32." if self.args.fp16 else "."),
            )
        return float(value)

    # --- evaluation ---

    def _evaluate(
        self, trial: object, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        # This evaluation was due when the run was interrupted. It may change the learning rate, and determine the best
        # checkpoint.
        was_due = skip_scheduler and self.state.global_step > 0
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not was_due)
        except EvaluationStopped:
            self.control.should_evaluate = False
            # The step may not be one that is saved.
            self.control.should_save = self.control.should_training_stop = True
            metrics_of(self, "eval").clear()
            return {"eval_loss": math.nan}
        if was_due:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        step = self.state.global_step
        if self.last_saved == step:
            return
        # Each process has its own random states and its own peak memory.
        states = ranks.gathered(random_states())
        self.progress.peak_memory_bytes = max(ranks.gathered(self.progress.peak_memory_bytes))
        weights, optimizer = whole_weights(self.model), whole_state(self.optimizer)
        if ranks.is_writer():
            write = functools.partial(self._write_checkpoint, states=states, weights=weights, optimizer=optimizer)
            save_checkpoint(self.run_folder, step, write, checkpoint_bytes(self.model))
            remove_old(self.run_folder, self.checkpoint_limit, step, self.state.best_global_step)
        self.last_saved = step
        ranks.barrier()

    def _write_checkpoint(
        self, folder: Path, states: Sequence[RandomStates], weights: dict[str, Tensor] | None, optimizer: StateDict
    ) -> None:
        self._save(str(folder), weights)
        save_state(folder, "optimizer", optimizer)
        save_state(folder, "scheduler", self.lr_scheduler.state_dict())
        if self.accelerator.scaler is not None:
            save_state(folder, "scaler", self.accelerator.scaler.state_dict())
        for rank, state in enumerate(states):
            save_state(folder, _random_file(rank), state)
        self.state.save_to_json(str(folder / STATE_FILE))
        write_json(folder / PROGRESS_FILE, dataclasses.asdict(self.progress))

    def _save(self, output_dir: str | None = None, state_dict: StateDict | None = None) -> None:
        save_weights(self.model, Path(output_dir or self.run_folder), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            state = load_state(folder, "optimizer")
            with reading_state(folder, "optimizer"):
                check_optimizer_state(state, self.optimizer)
                self.optimizer.load_state_dict(sharded_state(state, self.optimizer))
            self.lr_scheduler.load_state_dict(load_state(folder, "scheduler", like=self.lr_scheduler.state_dict()))
            self._follow_schedule()

    def _follow_schedule(self) -> None:
        """Set the next step's learning rate from this run's length, since the checkpoint may be of a shorter run."""
        scheduler = self.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
            set_last_rates(scheduler, rates)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler
            scaler.load_state_dict(load_state(Path(checkpoint), "scaler", like=scaler.state_dict()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            name = _random_file(ranks.rank())
            states = load_state(Path(checkpoint), name)
            with reading_state(Path(checkpoint), name):
                check_random_states(states)
                set_random_states(states)

    def _load_best_model(self) -> None:
        step = self.state.best_global_step
        if step is not None:
            load_weights(self.model, self.run_folder / "checkpoints" / f"step-{step}")

    def resume(self, checkpoint: Checkpoint) -> None:
        """Train from ``checkpoint`` to the run's last step."""
        self.last_saved = checkpoint.step
        self.train(resume_from_checkpoint=str(checkpoint.path))

    # --- the loop ---

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        # A resumed state holds the old logging and evaluation intervals; this run's settings replace them.
        self.state.compute_steps(self.args, max_steps)
        if self.args.logging_steps < 1:
            self.state.logging_steps = logging_steps_of(max_steps)
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # After a resume at the last step, or a stop during the first evaluation, the Trainer would take one more step.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: Batch) -> int:
        # The number is not used, and counting parameters at every micro-batch takes time.
        return 0

    # --- no telemetry and no upload; rankwise writes the model card ---

    def _send_telemetry(self) -> None: ...

    def create_model_card(self, *_: object, **__: object) -> None: ...


def _random_file(rank: int) -> str:
    """The file name of a process's random states in a checkpoint."""
    return f"random-{rank}" if rank else "random"
