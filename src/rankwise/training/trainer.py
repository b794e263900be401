"""trl's SFTTrainer with our adapters, our checkpoints and a loss that is correct for every head.

What is overridden, and why: saving and loading (the Trainer's own are pickles in folders that can be half-written);
the loss, where trl's fused head would bypass an adapted output head; evaluation (its loss is the mean over tokens and
it leaves the random states alone); telemetry and the model card (nothing leaves the machine, and the card is ours).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_trainer import SFTTrainer

from rankwise.acceleration import LossOptions, fused_head
from rankwise.acceleration.scoring import Score, Scorer, loss_scorer
from rankwise.compat.torch import set_last_rates
from rankwise.compat.transformers import pair_with_next_labels
from rankwise.compat.trl import metrics_of
from rankwise.config import logging_steps_of
from rankwise.errors import RunError, warn
from rankwise.records import write_json
from rankwise.training import ranks
from rankwise.training.batches import KEY, Counting, counted
from rankwise.training.checkpoints import Checkpoint, remove_old, save_checkpoint
from rankwise.training.loss import (
    LossParts,
    evaluation_targets,
    fused_head_is_right,
    loss_from_logits,
)
from rankwise.training.meters import Progress
from rankwise.training.sharding import average_gradients, is_sharded, roots_gathered
from rankwise.training.shares import Remainder, share_batches
from rankwise.training.state import (
    check_optimizer_state,
    check_random_states,
    load_state,
    random_states,
    reading_state,
    save_state,
    set_random_states,
    undisturbed_random_states,
)
from rankwise.training.weights import checkpoint_bytes, load_weights, save_weights

PROGRESS_FILE = "progress.json"
STATE_FILE = "trainer_state.json"
# The name under which the Trainer looks for it.


class EvaluationStopped(Exception):
    """The user asked to stop while an evaluation was running."""


class RankwiseTrainer(SFTTrainer):
    """Trains what requires a gradient in ``model`` and keeps whole checkpoints under ``args.output_dir``.

    ``save_total_limit`` newest checkpoints stay, the best by evaluation loss besides. ``label_smoothing`` acts on the
    training loss only: evaluation losses stay comparable between runs.
    """

    # transformers declares these optional; all are set while training.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        save_total_limit: int = 2,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing
        self.run_folder = Path(str(self.args.output_dir))
        self.checkpoint_limit = save_total_limit
        self.progress = progress or Progress()
        self.last_saved: int | None = None
        # Summed over the micro-batches of the last step.
        self.step_loss = 0.0
        # Of the step in progress, on the device; they are read once, before the optimizer steps.
        self._losses: list[Tensor] = []
        # Seen in the step in progress.
        self._tokens = self._examples = 0
        self.last_grad_norm: float | None = None
        self._scorer: Scorer | None = None
        # Of evaluations; whether the model can score several rows in one is found out once.
        self.remainder: Remainder | None = None
        # Of the last batch of an epoch, where several processes train.
        if ranks.rank():
            # Every process draws dropout masks of its own; those of the first are the masks of a run in one process.
            set_seed((self.args.seed + ranks.rank()) % 2**32)
        self.remove_callback(PrinterCallback)
        self.data_collator = Counting(self.data_collator, self.model.config.get_text_config().vocab_size)
        # Every loss here is normalised by the trained tokens of the whole accumulated batch, whatever the model's
        # forward accepts, and label i + 1 belongs to position i.
        self.model_accepts_loss_kwargs = True
        pair_with_next_labels(self)
        # Ours, in chunks, where the model was made fast (rankwise.acceleration): two products of the head a step.
        self.own_loss = fused_head(self.model) is not None
        # trl's fused head is a Triton kernel, computes the logits a third time and takes no label smoothing. Its
        # stand-in on a CPU scores masked positions too and took 1.8 times as long as a whole step of SmolLM2-135M.
        has_kernel = self.args.device.type == "cuda"
        self.fused_head = has_kernel and not self.own_loss and fused_head_is_right(self.model)
        if has_kernel and not self.fused_head and not self.own_loss:
            head = type(self.model.get_output_embeddings()).__name__
            warn(
                "RW520",
                f"the output head is a {head}, which trl's fused loss would bypass; the loss is computed from the "
                "model's own logits, which takes more memory.",
            )

    # --- loss ---

    @property
    def loss_in_words(self) -> str:
        if self.fused_head:
            return "fused head"
        return "own, in chunks" if self.own_loss else "own logits at trained positions"

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        found = inputs.pop(KEY, None) or counted(inputs)
        training = self.model.training
        smoothing = self.label_smoothing if training else 0.0
        if return_outputs or (self.fused_head and smoothing == 0):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        elif self._takes_own_loss():
            loss = self._own_loss(model, inputs, num_items_in_batch, smoothing, found.scored)
        else:
            loss = self._loss_from_logits(model, inputs, num_items_in_batch, smoothing)
        if training:
            self._tokens += found.tokens
            self._examples += found.examples
        return loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._losses.append(loss.detach())
        if is_sharded(self.model) and self.accelerator.sync_gradients:
            average_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        return loss

    def _takes_own_loss(self) -> bool:
        if self.own_loss and fused_head(self.model) is None:
            self.own_loss = False
            warn(
                "RW520",
                "the output head got a hook, or the model another loss, since training began; the loss is computed "
                "from the model's own logits from now on, which takes more memory.",
            )
        return self.own_loss

    def _own_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
        smoothing: float,
        scored: Tensor,
    ) -> Tensor:
        """The loss from chunks of logits at scored positions."""
        options = LossOptions(label_smoothing=smoothing, want_stats=True, scored=scored)
        routing = {"output_router_logits": True} if self.aux_loss_enabled else {}
        given = {**inputs, **routing, "use_cache": False}
        outputs = model(**given, num_items_in_batch=num_items, loss_options=options)
        sums, count = options.found[-1], max(1, len(scored))
        loss = sums.loss / (count if num_items is None else torch.as_tensor(num_items, device=sums.loss.device))
        assert sums.entropy is not None, "asked for"
        assert sums.correct is not None, "asked for"
        return self._with_aux_loss(
            LossParts(
                loss, sums.entropy / count, sums.correct / count, len(scored), getattr(outputs, "aux_loss", None)
            ),
            num_items,
        )

    def _loss_from_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, smoothing: float
    ) -> Tensor:
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return self._with_aux_loss(loss_from_logits(model, inputs, num_items, smoothing), num_items)

    def _with_aux_loss(self, parts: LossParts, num_items: Tensor | int | None) -> Tensor:
        self._note(parts)
        loss = parts.loss
        if num_items is not None and self.args.average_tokens_across_devices:
            # ``num_items`` counts all devices, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        if not self.aux_loss_enabled or parts.aux_loss is None:
            return loss
        steps = 1 if num_items is None else self.current_gradient_accumulation_steps
        return loss + self.router_aux_loss_coef * parts.aux_loss / steps

    def _note(self, parts: LossParts) -> None:
        metrics = metrics_of(self, "train" if self.model.training else "eval")
        entropy, accuracy = ranks.mean([parts.entropy, parts.accuracy], parts.positions)
        metrics["entropy"].append(entropy)
        metrics["mean_token_accuracy"].append(accuracy)
        if parts.aux_loss is not None and self.aux_loss_enabled:
            metrics["aux_loss"].append(parts.aux_loss.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # They stay on the device until a line is written.
        for values in metrics_of(self, "train" if self.model.training else "eval").values():
            values[:] = map(float, values)
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
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
        # An overflow of the scaled gradients: the scaler skips this step and lowers its scale.
        return value

    def _read_step(self, norm: Any) -> float:
        """The gradient norm; notes loss, tokens and examples of the step, over all processes.

        The one time in a step that the device is waited for. A loss that is not finite in one process is not in the sum
        either, so all end together.
        """
        device = self._losses[0].device
        *losses, value = torch.stack([*self._losses, torch.as_tensor(norm, device=device)]).tolist()
        loss, tokens, examples = ranks.summed([math.fsum(losses), self._tokens, self._examples])
        self._losses, self._tokens, self._examples = [], 0, 0
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

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss over the trained tokens of ``dataloader``'s rows, as ``rankwise evaluate`` computes it too.

        The Trainer's own averages over batches, and its batches round otherwise in 16 bits.
        """
        rows = dataloader.dataset
        targets = evaluation_targets(rows)
        # As the Trainer does; the next step sets both back.
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        scores: dict[int, Score] = {}
        with undisturbed_random_states(), roots_gathered(self.model):
            scorer = self._loss_scorer()
            batches = scorer.plan(targets)
            # Several processes take turns, and go on together, so that all can be stopped at the same batch.
            for start in range(0, len(batches), ranks.count()):
                turn = start + ranks.rank()
                if turn < len(batches):
                    scores |= scorer.score_batch(batches[turn], targets)
                elif is_sharded(self.model):
                    # The others gather each layer with this process's part.
                    scorer.score_batch(batches[start], targets)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        own = [(score.total, len(score.tokens), score.hits) for score in scores.values()]
        everyone = list(itertools.chain.from_iterable(ranks.gathered(own)))
        count = sum(tokens for _, tokens, _ in everyone) or 1
        metrics_of(self, "eval")["mean_token_accuracy"].append(sum(hits for _, _, hits in everyone) / count)
        # An exact sum: it does not depend on which process had which rows.
        loss = -math.fsum(total for total, _, _ in everyone) / count
        return EvalLoopOutput(np.empty(0), None, {f"{metric_key_prefix}_loss": loss}, len(rows))

    def _loss_scorer(self) -> Scorer:
        if self._scorer is None:
            precision = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            # Weights of 16 bits compute in their own dtype.
            autocast = precision if self.model.dtype == torch.float32 else None
            self._scorer = loss_scorer(self.model, autocast=autocast)
        return self._scorer

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            self.control.should_evaluate = False
            self.control.should_training_stop = True
            metrics_of(self, "eval").clear()
            return {"eval_loss": math.nan}
        if skip_scheduler and self.state.global_step > 0:
            # An evaluation that was due when the run was interrupted; it may name the best checkpoint.
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if self.last_saved == step:
            return
        # Each process draws random numbers of its own, and has a peak of its own.
        states = ranks.gathered(random_states())
        self.progress.peak_memory_bytes = max(ranks.gathered(self.progress.peak_memory_bytes))
        if ranks.is_writer():
            write = functools.partial(self._write_checkpoint, states=states)
            save_checkpoint(self.run_folder, step, write, checkpoint_bytes(self.model))
            remove_old(self.run_folder, self.checkpoint_limit, self.state.best_global_step)
        self.last_saved = step
        ranks.barrier()

    def _write_checkpoint(self, folder: Path, states: Sequence[dict[str, Any]]) -> None:
        self._save(str(folder))
        save_state(folder, "optimizer", self.optimizer.state_dict())
        save_state(folder, "scheduler", self.lr_scheduler.state_dict())
        if self.accelerator.scaler is not None:
            save_state(folder, "scaler", self.accelerator.scaler.state_dict())
        for rank, state in enumerate(states):
            save_state(folder, _random_file(rank), state)
        self.state.save_to_json(str(folder / STATE_FILE))
        write_json(folder / PROGRESS_FILE, self.progress.to_json())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_weights(self.model, Path(output_dir or self.run_folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            state = load_state(folder, "optimizer")
            with reading_state(folder, "optimizer"):
                check_optimizer_state(state, self.optimizer)
                self.optimizer.load_state_dict(state)
            self.lr_scheduler.load_state_dict(load_state(folder, "scheduler", like=self.lr_scheduler.state_dict()))
            self._follow_schedule()

    def _follow_schedule(self) -> None:
        """The learning rate of the next step, by this run's length: the checkpoint may be that of a shorter run."""
        scheduler = self.lr_scheduler
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
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
        """Train on from ``checkpoint`` until the run's last step."""
        self.last_saved = checkpoint.step
        self.train(resume_from_checkpoint=str(checkpoint.path))

    # --- the rows of one of several processes ---

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        if ranks.count() == 1:
            return loader
        split = self.args.per_device_train_batch_size, ranks.count(), ranks.rank()
        self.remainder = Remainder(len(loader.dataset), *split)
        return share_batches(loader, *split)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> Any:
        if self.remainder is not None and self.remainder.is_idle:
            epoch_iterator = map(self._masked_at_the_end, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args)

    def _masked_at_the_end(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self.remainder is not None
        return self.remainder.masked(batch) if self.accelerator.gradient_state.end_of_dataloader else batch

    # --- the loop ---

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        # A resumed state brings the old cadence with it; the settings of this run count.
        self.state.compute_steps(self.args, max_steps)
        if self.args.logging_steps < 1:
            self.state.logging_steps = logging_steps_of(max_steps)
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from the last step, or stopped while evaluating before the first: the Trainer would take one more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Nobody reads it, and counting parameters at every micro-batch takes time.
        return 0

    # --- nothing leaves the machine, and the model card is ours ---

    def _send_telemetry(self) -> None: ...

    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...


def _random_file(rank: int) -> str:
    """The name under which a checkpoint keeps the random states of a process."""
    return f"random-{rank}" if rank else "random"
