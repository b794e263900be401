"""The Trainer's callbacks: measure, log, check gradients, sample answers, stop."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rankwise.acceleration import give_back_freed_memory
from rankwise.adapters import adapter_parameters, has_adapter
from rankwise.compat.transformers import learning_rate_of
from rankwise.errors import RunError, one_line, warn
from rankwise.foreign import JsonObject
from rankwise.training import ranks
from rankwise.training.interrupt import Interrupt
from rankwise.training.meters import MemoryMeter, Progress, StepClock
from rankwise.training.metrics import MetricsFile
from rankwise.training.observer import Observer, StepInfo
from rankwise.training.preflight import GradientCheck
from rankwise.training.spine import EvaluationStopped, RunTrainer

# {the Trainer's name: ours} of logged figures.
LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "epoch": "epoch",
    "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy",
    "aux_loss": "aux_loss",
}
HOLES_GROWTH = 1.05


@contextlib.contextmanager
def trackers(trainer: RunTrainer) -> Iterator[None]:
    """A context in which a tracker that cannot start raises RunError (RW629), and one that fails later is removed with
    a warning (RW630).
    """
    names = {INTEGRATION_TO_CALLBACK[name]: name for name in trainer.args.report_to or ()}
    for callback in trainer.callback_handler.callbacks:
        if (name := names.get(type(callback))) is not None:
            for event in (event for event in dir(callback) if event.startswith("on_")):
                setattr(callback, event, partial(_guarded, callback, name, event, getattr(callback, event)))
    try:
        yield
    finally:
        # transformers leaves wandb's run open: its final output would follow the JSON of --json, and the next run would
        # be logged into it.
        if "wandb" in names.values() and (wandb := sys.modules.get("wandb")) is not None:
            wandb.finish()


def _guarded(
    callback: TrainerCallback, name: str, event: str, call: Callable[..., Any], *args: Any, **given: Any
) -> Any:
    try:
        return call(*args, **given)
    except Exception as error:
        # Trackers raise exceptions of their own libraries.
        reason = f"the tracker {name} failed: {one_line(error) or type(error).__name__}"
        if event == "on_train_begin":
            advice = "correct that, or leave the tracker out of --report-to, and continue with --resume"
            raise RunError("RW629", f"{reason}; {advice}.") from error
        warn("RW630", f"{reason}; the run continues without it.")
        for later in (later for later in dir(callback) if later.startswith("on_")):
            setattr(callback, later, lambda *_, **__: None)
        return None


class Watch(TrainerCallback):
    """Measures every step, writes ``metrics.jsonl`` and calls the observer."""

    def __init__(
        self,
        trainer: RunTrainer,
        metrics: MetricsFile | None,
        memory: MemoryMeter,
        observer: Observer,
        tick: Callable[[], None],
    ) -> None:
        self.trainer = trainer
        self.metrics = metrics
        self.memory = memory
        self.observer = observer
        # Called at every step; updates the wall time in the progress.
        self.tick = tick
        self.clock = StepClock(trainer.progress)
        # Learning rate of the step in progress.
        self.rate = 0.0
        # ``b_norm`` at the last logged step.
        self.b_norm: float | None = None
        self.best = math.inf
        # Seconds of each evaluation so far.
        self.evaluations: list[float] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        self.best = min((entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry), default=math.inf)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.clock.start()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: object, control: object, **_: object) -> None:
        self.rate = learning_rate_of(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.clock.stop()
        self.tick()
        self.trainer.progress.steps += 1
        self.trainer.progress.loss_sum += self.trainer.step_loss
        self.trainer.progress.peak_memory_bytes = self.memory.peak()
        # The first and the last step are always logged, so that every curve has two ends.
        is_end = state.global_step in (1, state.max_steps)
        if is_end or state.global_step % state.logging_steps == 0:
            self.b_norm = b_norm(self.trainer.model)
        self.observer.step(self._info(state))
        if is_end:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        logs: JsonObject = more["logs"]
        # Every checkpoint holds this history, of which only evaluations are read; metrics.jsonl has all lines.
        history = state.log_history
        if len(history) > 1 and "eval_loss" not in history[-2]:
            del history[-2]
        if self.metrics is None:
            return
        if "eval_loss" in logs:
            self.metrics.append({"step": state.global_step, **_evaluation(logs, self.trainer.logged)})
        elif "loss" in logs:
            self.metrics.append({"step": state.global_step, **self._values(logs)})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        loss = more["metrics"]["eval_loss"]
        self.evaluations.append(more["metrics"].get("eval_runtime", 0.0))
        self.observer.evaluation(state.global_step, loss, loss < self.best)
        self.best = min(self.best, loss)

    def _values(self, logs: JsonObject) -> JsonObject:
        values = {ours: logs[theirs] for theirs, ours in {**LOGGED, **self.trainer.logged}.items() if theirs in logs}
        progress = self.trainer.progress
        values |= {
            "tokens_per_second": round(self.clock.tokens_per_second, 1),
            "tokens": progress.tokens,
            "train_seconds": round(progress.train_seconds, 3),
            "peak_memory_bytes": progress.peak_memory_bytes,
        }
        return values if self.b_norm is None else {**values, "b_norm": self.b_norm}

    def _info(self, state: TrainerState) -> StepInfo:
        return StepInfo(
            step=state.global_step,
            total=state.max_steps,
            loss=self.trainer.step_loss,
            tokens_per_second=self.clock.tokens_per_second,
            memory_bytes=self.memory.now(),
            peak_memory_bytes=self.memory.peak(),
            grad_norm=self.trainer.last_grad_norm,
            learning_rate=self.rate,
            b_norm=self.b_norm,
            seconds_left=self.clock.seconds_left(state.max_steps - state.global_step) + self._evaluating_left(state),
            figures=self.trainer.step_figures,
        )

    def _evaluating_left(self, state: TrainerState) -> float:
        """The seconds of the evaluations to come, the one of this step among them where it is due."""
        if not self.evaluations:
            return 0.0
        due = math.ceil(state.max_steps / state.eval_steps) - (state.global_step - 1) // state.eval_steps
        return due * statistics.fmean(self.evaluations)


class CheckGradients(TrainerCallback):
    """Runs ``GradientCheck`` until every adapter tensor has passed it. A resumed run checks those that have not."""

    def __init__(self, check: GradientCheck, progress: Progress) -> None:
        self.check = check
        self.progress = progress

    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not self.check.done:
            self.check.look(state.global_step + 1)
            self.progress.unchecked = list(self.check.waiting)

    def on_train_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.check.end(state.global_step)


class StopOnInterrupt(TrainerCallback):
    """After an interrupt in any process, saves at the end of the step, or stops the evaluation."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if ranks.agreed(self.interrupt.requested):
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_prediction_step(self, args: TrainingArguments, state: object, control: object, **_: object) -> None:
        if ranks.agreed(self.interrupt.requested):
            raise EvaluationStopped


class GiveBackHoles(TrainerCallback):
    """On a CPU, returns free heap pages to the operating system when steps have made the process larger.

    Batches of varying size leave holes between used blocks, and the next step allocates new memory beside them. Since
    returning pages costs page faults in the next step, it is done only where the size at the end of a step exceeds the
    largest size right after an earlier return: holes raise the former, larger batches also the latter.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self.usual_bytes = 0
        # No step has ended yet.
        self.is_new = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        size = self.now()
        if self.is_new:
            self.usual_bytes, self.is_new = max(self.usual_bytes, size), False
        elif size > HOLES_GROWTH * self.usual_bytes:
            give_back_freed_memory()
            self.is_new = True


class EarlyStopping(TrainerCallback):
    """Stops after ``patience`` evaluations in a row without a lower loss, according to the Trainer's log history."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since_best = len(losses) - 1 - min(range(len(losses)), key=losses.__getitem__)
        if state.global_step > 0 and since_best >= self.patience:
            control.should_training_stop = True


class Sample(TrainerCallback):
    """Generates the model's answer to one fixed prompt at every evaluation."""

    def __init__(self, answer: Callable[[], str], observer: Observer, metrics: MetricsFile | None) -> None:
        self.answer = answer
        self.observer = observer
        self.metrics = metrics

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        text = self.answer()
        if self.metrics is not None:
            self.metrics.append({"step": state.global_step, "sample": text})
        self.observer.sample(state.global_step, text)


@torch.no_grad()
def b_norm(model: nn.Module) -> float | None:
    """The 2-norm of all B matrices of the active adapter together; None without an adapter."""
    if not has_adapter(model):
        return None
    parameters = adapter_parameters(model).items()
    found = [value.float() for key, value in parameters if key.endswith((".lora_B.weight", ".lora_embedding_B"))]
    return torch.nn.utils.get_total_norm(found).item() if found else None


def _evaluation(logs: JsonObject, logged: Mapping[str, str]) -> JsonObject:
    names = {"eval_loss": "eval_loss", "eval_mean_token_accuracy": "eval_token_accuracy", "eval_runtime": "seconds"}
    names |= {f"eval_{theirs}": f"eval_{ours}" for theirs, ours in logged.items()}
    return {ours: logs[theirs] for theirs, ours in names.items() if theirs in logs} | {"epoch": logs.get("epoch", 0.0)}
