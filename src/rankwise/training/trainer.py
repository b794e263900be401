"""trl's SFTTrainer with rankwise's adapters and a loss that is correct for every output head.

``RankwiseTrainer`` overrides the loss, since trl's fused head would bypass an adapted output head, and the evaluation,
whose loss is a mean over tokens and which does not change the random states. What all objectives share is in spine.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_trainer import SFTTrainer

from rankwise.acceleration import LossOptions, fused_head
from rankwise.acceleration.scoring import Score, Scorer, loss_scorer
from rankwise.adapters.low_rank import BATCH
from rankwise.compat.torch import is_unit
from rankwise.compat.transformers import pair_with_next_labels
from rankwise.compat.trl import metrics_of
from rankwise.errors import warn
from rankwise.training import ranks
from rankwise.training.batches import KEY, Batch, Counting, Items, Samples, counted
from rankwise.training.loss import (
    LossParts,
    evaluation_targets,
    fused_head_is_right,
    loss_from_logits,
)
from rankwise.training.sharding import roots_gathered
from rankwise.training.shares import masked, why_masks_differ, widened
from rankwise.training.spine import RunTrainer
from rankwise.training.state import undisturbed_random_states


class RankwiseTrainer(RunTrainer, SFTTrainer):
    """Trains on demonstrations.

    ``label_smoothing`` acts on the training loss only, so that evaluation losses are comparable between runs.
    """

    def __init__(self, *, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing
        # Kept between evaluations: it tests once whether the model can score several rows concatenated.
        self._scorer: Scorer | None = None
        self.data_collator = Counting(self.data_collator, self.model.config.get_text_config().vocab_size)
        # Whatever the model's forward accepts, every loss here is divided by the trained tokens of the whole
        # accumulated batch, and position i is scored on label i + 1.
        self.model_accepts_loss_kwargs = True
        pair_with_next_labels(self)
        # The chunked loss of rankwise.acceleration, which computes two products with the head in a step.
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
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> Any:
        found = inputs.pop(KEY, None) or counted(inputs)
        BATCH.rows_before = found.rows_before
        training = self.model.training
        smoothing = self.label_smoothing if training else 0.0
        if return_outputs or (self.fused_head and smoothing == 0):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        elif self._takes_own_loss():
            loss = self._own_loss(model, inputs, num_items_in_batch, smoothing, found.scored)
        else:
            loss = self._loss_from_logits(model, inputs, num_items_in_batch, smoothing)
        if training:
            self.step_tokens += found.tokens
            self.step_examples += found.examples
        return loss

    def _takes_own_loss(self) -> bool:
        if self.own_loss and fused_head(self.model) is None:
            self.own_loss = False
            warn(
                "RW520",
                "the output head got a hook, or the model another loss, since training began; from now on the loss is "
                "computed from the model's own logits, which takes more memory.",
            )
        return self.own_loss

    def _own_loss(self, model: nn.Module, inputs: Batch, num_items: Items, smoothing: float, scored: Tensor) -> Tensor:
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

    def _loss_from_logits(self, model: nn.Module, inputs: Batch, num_items: Items, smoothing: float) -> Tensor:
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return self._with_aux_loss(loss_from_logits(model, inputs, num_items, smoothing), num_items)

    def _with_aux_loss(self, parts: LossParts, num_items: Items) -> Tensor:
        self._note(parts)
        loss = parts.loss
        if num_items is not None and self.args.average_tokens_across_devices:
            # ``num_items`` counts the tokens of all processes, and DDP averages their gradients.
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

    # --- evaluation ---

    def evaluation_loop(
        self,
        dataloader: DataLoader[Batch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over the trained tokens of ``dataloader``'s rows, as ``rankwise evaluate`` computes it.

        The Trainer's own evaluation averages over batches, and in 16 bits its batches round differently.
        """
        rows: Dataset = dataloader.dataset
        self.start_evaluation()
        with undisturbed_random_states(), roots_gathered(self.model):
            own = self._row_scores(rows)
        everyone = list(itertools.chain.from_iterable(ranks.gathered(own)))
        count = sum(tokens for _, tokens, _ in everyone) or 1
        metrics_of(self, "eval")["mean_token_accuracy"].append(sum(hits for _, _, hits in everyone) / count)
        # The sum is exact, so it does not depend on the distribution of rows over processes.
        loss = -math.fsum(total for total, _, _ in everyone) / count
        return EvalLoopOutput(np.empty(0), None, {f"{metric_key_prefix}_loss": loss}, len(rows))

    def _row_scores(self, rows: Dataset) -> list[tuple[float, int, float]]:
        """(log-probability, scored tokens, scored tokens that were the most likely ones) of each row."""
        targets = evaluation_targets(rows)
        scores: dict[int, Score] = {}
        scorer = self._loss_scorer()
        batches = scorer.plan(targets)
        # Several processes take the batches in turn, in lockstep, so that all of them can stop at the same batch.
        for start in range(0, len(batches), ranks.count()):
            turn = start + ranks.rank()
            if turn < len(batches):
                scores |= scorer.score_batch(batches[turn], targets)
            elif is_unit(self.model):
                # A sharded model needs every process in each forward pass, also one without a batch left.
                scorer.score_batch(batches[start], targets)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return [(score.total, len(score.tokens), score.hits) for score in scores.values()]

    def _loss_scorer(self) -> Scorer:
        if self._scorer is None:
            precision = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            # 16-bit weights compute in their own dtype, without autocast.
            autocast = precision if self.model.dtype == torch.float32 else None
            self._scorer = loss_scorer(self.model, autocast=autocast)
        return self._scorer

    # --- the rows of one of several processes ---

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Samples:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shares_masks:
            everyone = ranks.gathered([tuple(batch["input_ids"].shape) for batch in samples])
            samples = [self._placed(batch, shapes) for batch, *shapes in zip(samples, *everyone)]
        return samples, items

    def _placed(self, batch: Batch, shapes: list[tuple[int, int]]) -> Batch:
        """The batch with the number of tokens in processes of lower rank; padded rows get the length that they would
        have in one process."""
        if not self.padding_free:
            longest = max(length for _, length in shapes)
            shapes = [(rows, longest) for rows, _ in shapes]
            batch = widened(batch, longest, int(self.processing_class.pad_token_id or 0))  # type: ignore[union-attr]
        before = sum(rows * length for rows, length in shapes[: ranks.rank()])
        return {**batch, KEY: dataclasses.replace(batch[KEY], rows_before=before)}

    def why_masks_differ(self) -> str | None:
        if self.neftune_noise_alpha is not None:
            return "NEFTune draws its noise from the same generator"
        return why_masks_differ(self.model)

    def without_rows(self, batch: Batch) -> Batch:
        return masked(batch)
