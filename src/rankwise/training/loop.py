"""The training loop: micro-batches, a step, schedule, log, evaluate, save, stop. The step itself is in step.py.

All processes run the same steps on their own parts of each micro-batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from rankwise.compat.torch import is_sharded
from rankwise.errors import ModelError
from rankwise.records import write_json
from rankwise.training import ranks
from rankwise.training.batches import Batch, means_of, own_parts, without_rows
from rankwise.training.checkpoints import FOLDER, Checkpoint, remove_old, save_checkpoint
from rankwise.training.optimizers import make_schedule, set_rates
from rankwise.training.parts import Pace
from rankwise.training.products import end_eight_bits
from rankwise.training.states import (
    load_state,
    random_states,
    reading_state,
    save_state,
    seed_all,
    set_random_states,
    undisturbed_random_states,
)
from rankwise.training.step import Objective, TrainingStep, mixed, targets_of
from rankwise.training.watch import Diverged, EvaluationStopped, Progress, StepSums, Watch
from rankwise.training.weights import (
    checkpoint_bytes,
    load_weights,
    save_weights,
    sharded_state,
    whole,
    whole_state,
    whole_weights,
)

PROGRESS_FILE = "progress.json"


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Trains the parameters of ``model`` that require gradients, and writes checkpoints into ``folder``."""

    model: PreTrainedModel
    objective: Objective
    # With its length and its intervals.
    pace: Pace
    # Called when the parameters have their final form, shards or not.
    make_optimizer: Callable[[], Optimizer]
    progress: Progress
    folder: Path
    # Makes a context for each step, such as one that offloads activations.
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext
    # The dtype of mixed precision; None if everything computes in the dtype of the weights.
    autocast: torch.dtype | None = None
    max_grad_norm: float = 1.0
    evaluates_first: bool = False
    # The steps after which products are no longer in 8 bits; None: they stay as they are.
    eight_bit_steps: int | None = None

    def __post_init__(self) -> None:
        self.micro_batches = len(self.objective.order(0))
        self.steps_an_epoch = max(1, math.ceil(self.micro_batches / self.pace.gradient_accumulation))
        self.stopping = False
        self.progress.total_steps, self.progress.eval_steps = self.pace.total_steps, self.pace.eval_steps

    def fit(self, watch: Watch, checkpoint: Checkpoint | None = None) -> None:
        """Train to the last step, or until the user or early stopping asks to stop.

        Raises Diverged for a loss or gradients that are not finite.
        """
        model, objective, pace, progress = self.model, self.objective, self.pace, self.progress
        # Every process draws its own dropout masks.
        seed_all((pace.seed + ranks.rank()) % 2**32)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ranks.same_values([parameter for parameter in trained if not is_sharded(parameter)])
        self.optimizer = optimizer = self.make_optimizer()
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        usual = float(optimizer.defaults["lr"])
        factor = make_schedule(pace.lr_scheduler_type, usual, pace.warmup_steps, pace.total_steps)
        self.step = TrainingStep(
            model=model,
            objective=objective,
            optimizer=optimizer,
            trained=trained,
            autocast=self.autocast,
            max_grad_norm=self.max_grad_norm,
            processes=ranks.count(),
            around=self.around_step,
        )
        self.scaler = self.step.scaler
        states = None if checkpoint is None else self._load(checkpoint)
        if states is not None:
            set_random_states(states)
        self.saved = None if checkpoint is None else checkpoint.step
        model.zero_grad()
        # The nodes that add up gradients. autograd would make them anew in each step, between activations.
        self.ends = [get_gradient_edge(parameter) for parameter in trained]
        if self.evaluates_first and self._evaluate(watch) and progress.steps:
            self.saved = None
            self.save(watch)
        logged, in_eight_bits = StepSums(), self.eight_bit_steps
        for epoch in itertools.count(progress.steps // self.steps_an_epoch):
            if self.stopping or progress.steps >= pace.total_steps:
                return
            for batches in self._steps(epoch, states):
                watch.clock.start()
                if in_eight_bits is not None and progress.steps >= in_eight_bits:
                    end_eight_bits(model)
                    in_eight_bits = None
                batches = self.step.prepared(batches, progress.steps)
                step, norm = self.step.gradients(batches, targets_of(batches))
                # The only wait for the device in a step.
                step.read(whole(norm))
                self._check(step)
                watch.check_gradients()
                rates = [rate * factor(progress.steps - progress.skipped) for rate in highest]
                step.rate = rates[0]
                set_rates(optimizer, rates)
                self.step.update()
                # The scaler skips a step whose gradients overflowed float16, and lowers its scale.
                progress.skipped += not math.isfinite(step.norm)
                progress.take(step.loss, step.tokens, step.examples)
                logged.take(step)
                is_last = progress.steps >= pace.total_steps
                is_logged = is_last or progress.steps == 1 or progress.steps % (pace.logging_steps or 1) == 0
                asked, ended = watch.end_step(step, means_of(step.figures), is_logged=is_logged)
                if is_logged:
                    now = {"learning_rate": step.rate, "grad_norm": step.norm, "epoch": self._epochs()}
                    watch.log({"loss": logged.loss, **now, **means_of(logged.figures)})
                    logged = StepSums()
                self.stopping = is_end = is_last or ended
                self.stopping |= asked
                is_best = False
                if pace.eval_steps and not asked and (is_end or progress.steps % pace.eval_steps == 0):
                    is_best = self._evaluate(watch)
                if pace.save_steps and (self.stopping or is_best or progress.steps % pace.save_steps == 0):
                    self.save(watch)
                if self.stopping:
                    return
            states = None

    def _steps(self, epoch: int, states: Any) -> Iterator[list[Batch]]:
        """The micro-batches of this process, step by step, from the present step to the end of the epoch."""
        taken = (self.progress.steps - epoch * self.steps_an_epoch) * self.pace.gradient_accumulation
        order = self.objective.order(epoch)[taken:]
        parts = [ranks.share(rows) for rows in order]
        loader = DataLoader(
            self.objective.rows,
            # If an epoch ends with fewer rows than processes, those without take part with the first row.
            batch_sampler=[own or rows[:1] for own, rows in zip(parts, order)],
            collate_fn=self.objective.collate,
            pin_memory=self.model.device.type == "cuda",
            # A loader draws a number when it starts, which is not to be one of the dropout masks'.
            generator=torch.Generator(),
        )
        if states is not None:
            set_random_states(states)
        batches = zip(loader, parts)
        while step := list(itertools.islice(batches, self.pace.gradient_accumulation)):
            yield [batch if own else without_rows(batch) for batch, own in step]

    def _check(self, step: StepSums) -> None:
        number, is_scaled = self.progress.steps + 1, self.scaler.is_enabled()
        other = ", or train with --dtype bfloat16 or float32" if is_scaled else ""
        if not math.isfinite(step.loss):
            raise Diverged("RW530", f"the loss is {step.loss} at step {number}; lower --learning-rate{other}.")
        # A loss scale that can still fall makes up for an overflow of float16.
        if not math.isfinite(step.norm) and not (is_scaled and self.scaler.get_scale() >= 1):
            raise Diverged(
                "RW530",
                f"the gradient norm is {step.norm} at step {number}, so that step was not taken; lower --learning-rate "
                f"or --max-grad-norm{other}.",
            )

    def _epochs(self) -> float:
        """The passes over the data so far."""
        epoch, steps = divmod(self.progress.steps, self.steps_an_epoch)
        return epoch + min(1.0, steps * self.pace.gradient_accumulation / self.micro_batches)

    # --- evaluation ---

    def _evaluate(self, watch: Watch) -> bool:
        """Evaluate, and return whether no earlier evaluation had a lower loss; that before the first step does not
        count."""
        progress, patience = self.progress, self.pace.early_stopping
        started = time.perf_counter()
        try:
            found = self.measure(watch.pause)
        except EvaluationStopped:
            self.stopping = True
            return False
        loss, seconds = found["eval_loss"], round(time.perf_counter() - started, 4)
        self.stopping |= watch.evaluation({**found, "seconds": seconds, "epoch": self._epochs()}, seconds)
        is_best = progress.evaluated(loss)
        if progress.steps and patience is not None and progress.evaluations_since_lowest >= patience:
            self.stopping = True
        return is_best

    def measure(self, pause: Callable[[], None]) -> dict[str, float]:
        """``Objective.evaluate``. Raises Diverged (RW530) if the steps so far led to NaN."""
        self.model.eval()
        try:
            with torch.no_grad(), undisturbed_random_states(), mixed(self.model, self.autocast):
                return self.objective.evaluate(self.model, pause)
        except ModelError as error:
            if error.code != "RW323" or not self.progress.steps:
                raise
            text = f"after step {self.progress.steps} the model computes NaN or infinity; lower --learning-rate."
            raise Diverged("RW530", text) from None

    # --- checkpoints ---

    def save(self, watch: Watch) -> None:
        """Write a checkpoint, of which the newest and the best are kept. Every process must call this."""
        progress = self.progress
        if self.saved == progress.steps:
            return
        # Each process has its own random states and its own peak memory.
        states = ranks.gathered(random_states())
        progress.peak_memory_bytes = max(ranks.gathered(progress.peak_memory_bytes))
        weights, optimizer = whole_weights(self.model), whole_state(self.optimizer)

        def write(folder: Path) -> None:
            save_weights(self.model, folder, weights)
            save_state(folder, "optimizer", optimizer)
            if self.scaler.is_enabled():
                save_state(folder, "scaler", self.scaler.state_dict())
            for rank, state in enumerate(states):
                save_state(folder, f"random-{rank}", state)
            write_json(folder / PROGRESS_FILE, dataclasses.asdict(progress))

        if ranks.is_writer():
            save_checkpoint(self.folder, progress.steps, write, checkpoint_bytes(self.model))
            remove_old(self.folder, self.pace.save_total_limit, progress.steps, progress.best_step)
        self.saved = progress.steps
        ranks.barrier()
        self.stopping |= watch.saved(self.folder / FOLDER / f"step-{progress.steps}")

    def _load(self, checkpoint: Checkpoint) -> Any:
        """Load everything but the progress, which was read before. Returns the random states."""
        folder = checkpoint.path
        load_weights(self.model, folder)
        with reading_state(folder, "training"):
            self.optimizer.load_state_dict(sharded_state(load_state(folder, "optimizer"), self.optimizer))
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(load_state(folder, "scaler"))
        return load_state(folder, f"random-{ranks.rank()}")


def coming_batches(objective: Objective, pace: Pace) -> Iterator[list[int]]:
    """The row numbers of this process's micro-batches, from the first step to the last."""
    accumulation = pace.gradient_accumulation
    left = pace.total_steps * accumulation
    for epoch in itertools.count():
        order = objective.order(epoch)[:left]
        yield from own_parts(order)
        left -= max(1, math.ceil(len(order) / accumulation)) * accumulation
        if left <= 0:
            return
