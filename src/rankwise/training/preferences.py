"""Training on preferences: pairs of answers (DPO), and answers marked good or bad (KTO), without a second model.

The reference is the model itself, with its adapter disabled or with a frozen copy of the adapter with which training
began. Its log-probabilities are computed first, before the step's graph exists. All log-probabilities come from the
accelerated model, at the positions of answers only; the losses are in losses.py.

B rows of a micro-batch, L positions.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.acceleration.loss import Layout, TokenScores, accept_scores, asked_of, scores_of_logits
from rankwise.adapters.switch import reference_at_work
from rankwise.constants import IGNORED
from rankwise.data.objectives import ANSWER_IDS
from rankwise.training import ranks
from rankwise.training.foresight import MicroBatch, largest, own_parts
from rankwise.training.loop import (
    KEY,
    Batch,
    Counted,
    Figures,
    Loss,
    Row,
    in_order,
    on_device,
    shuffled,
    without_rows,
)
from rankwise.training.losses import MARKED_LOSSES, PAIR_LOSSES, Pairs
from rankwise.training.sft import pad_right, router_coefficient

# The columns of KTO's mismatched answers (answers to a different prompt of the batch).
MISMATCHED = ("KL_completion_ids",)


class Scoring:
    """Log-probabilities of the answers of a batch, by the model as it trains and by its reference."""

    def __init__(self, model: PreTrainedModel, layout: Layout, *, temperature: float = 1.0) -> None:
        self.model, self.layout, self.temperature = model, layout, temperature
        for name, module in model.named_modules():
            # As in trl, dropout of the base is disabled; the adapter's dropout is the user's choice.
            if isinstance(module, nn.Dropout) and not name.endswith("lora_dropout"):
                module.p = 0.0
        self.is_own = accept_scores(model, layout)

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of a pair is computed once for both answers."""
        return self.is_own and asked_of(self.model).layout == "pairs"

    @property
    def in_words(self) -> str:
        if not self.is_own:
            return "log-probabilities from whole logits"
        asked, words = asked_of(self.model), "own log-probabilities, in chunks"
        if asked.apart:
            return f"{words}; a prompt is computed for each of its answers: {asked.apart}"
        return f"{words}, of prompts shared by both answers" if self.shares_prompts else words

    def scores(self, batch: Batch, prefix: str = "", *, want_stats: bool = False) -> TokenScores:
        """The scores of the answers' tokens; those whose names begin with ``prefix``."""
        ids, answers = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
        labels = ids.masked_fill(answers == 0, IGNORED)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": batch[f"{prefix}attention_mask"]}
        # Balancing is the concern of the pass that trains.
        if want_stats and router_coefficient(self.model):
            given["output_router_logits"] = True
        given |= {"temperature": self.temperature, "want_stats": want_stats}
        if self.is_own:
            return self.model(**given, labels=labels, use_cache=False, fused_lm_head=True)
        return scores_of_logits(self.model, "padded" if self.layout == "padded" else "flat", labels, **given)

    @torch.no_grad()
    def reference(self, batch: Batch, prefix: str = "") -> Tensor:
        """log p_ref of each token (B, L - 1), 0 outside of answers."""
        with reference_at_work(self.model):
            return self.scores(batch, prefix).log_probs

    def balance(self, scores: TokenScores) -> Tensor | None:
        """The balancing loss of a model's experts times its coefficient."""
        coefficient = router_coefficient(self.model)
        return coefficient * scores.aux_loss if coefficient and scores.aux_loss is not None else None

    def figures(self, batch: Batch, scores: TokenScores) -> dict[str, Any]:
        assert scores.entropy is not None, "asked for"
        answers = batch["completion_mask"][:, 1:]
        figures: dict[str, Any] = {"entropy": ((scores.entropy * answers).sum(), answers.sum())}
        if scores.aux_loss is not None and router_coefficient(self.model):
            figures["aux_loss"] = scores.aux_loss.detach(), 1
        return figures


@dataclasses.dataclass
class Preferences:
    """The objectives dpo and kto. ``size``: rows of a micro-batch of all processes."""

    scoring: Scoring
    rows: Dataset
    eval_rows: Dataset | None
    pad: int
    size: int
    seed: int
    loss_type: str
    beta: float
    # Rows were cut when they were encoded, but KTO pairs prompts with the answers of others.
    max_length: int
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    shown: ClassVar[Mapping[str, str]] = {"reward_margin": "margin", "reward_accuracy": "accuracy", "kl": "KL"}
    silence_is_normal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.is_paired = self.loss_type in PAIR_LOSSES
        if self.loss_type == "kto":
            self.rows, self.eval_rows = (rows and mismatched(rows, self.size) for rows in (self.rows, self.eval_rows))

    @property
    def in_words(self) -> str:
        return self.scoring.in_words

    def order(self, epoch: int) -> list[list[int]]:
        if self.is_paired:
            return shuffled(len(self.rows), self.size, self.seed + epoch)
        # As in trl: neighbours in a batch, whose answers are compared, are neighbours in the data.
        return in_order(len(self.rows), self.size)

    def collate(self, rows: Sequence[Row]) -> Batch:
        if self.is_paired:
            sides = ("chosen_ids", "rejected_ids")
            batch = self._laid_out([(row["prompt_ids"], row[side]) for side in sides for row in rows])
        else:
            batch = self._laid_out([(row["prompt_ids"], row["completion_ids"]) for row in rows])
            if "KL_completion_ids" in rows[0]:
                others = self._laid_out([(row["prompt_ids"], row["KL_completion_ids"]) for row in rows])
                batch |= {f"KL_{name}": value for name, value in others.items()}
            batch["label"] = torch.tensor([row["label"] for row in rows])
        return {**batch, KEY: Counted(len(rows), int(batch["attention_mask"].sum()), len(rows))}

    def _laid_out(self, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
        cut = [(prompt[: self.max_length], answer[: max(0, self.max_length - len(prompt))]) for prompt, answer in rows]
        return answered(cut, self.pad)

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        return self._pair_loss(batch) if self.is_paired else self._marked_loss(batch)

    def _pair_loss(self, batch: Batch) -> Loss:
        reference = self.scoring.reference(batch).sum(1)
        scores = self.scoring.scores(batch, want_stats=True)
        log_p = scores.log_probs.sum(1)
        chosen, rejected = (log_p - reference).chunk(2)
        lengths = batch["completion_mask"].sum(1).chunk(2)
        losses = PAIR_LOSSES[self.loss_type](Pairs(chosen, rejected, *lengths), self.beta, self.label_smoothing)
        # The batch's better answers come first.
        is_good = torch.arange(len(log_p), device=log_p.device) < len(chosen)
        better = (chosen > rejected).float().sum()
        figures = self._figures(batch, scores, log_p, log_p - reference, is_good)
        return Loss(losses.sum(), self.scoring.balance(scores), {**figures, "reward_accuracy": (better, len(chosen))})

    def _marked_loss(self, batch: Batch) -> Loss:
        reference, is_good = self.scoring.reference(batch).sum(1), batch["label"]
        z = self._z(batch) if self.loss_type == "kto" else reference.new_zeros(())
        scores = self.scoring.scores(batch, want_stats=True)
        log_p = scores.log_probs.sum(1)
        losses = MARKED_LOSSES[self.loss_type](log_p - reference, is_good, z, self.beta)
        weights = torch.where(is_good, self.desirable_weight, self.undesirable_weight)
        figures = self._figures(batch, scores, log_p, log_p - reference, is_good)
        # Weighed by rows, so that the mean is one over rows.
        figures["kl"] = z * len(log_p), len(log_p)
        return Loss((weights * losses).sum(), self.scoring.balance(scores), figures)

    @torch.no_grad()
    def _z(self, batch: Batch) -> Tensor:
        """The estimate of the KL divergence from the reference: max(0, mean r) of mismatched answers, over the rows of
        all processes."""
        reference = self.scoring.reference(batch, "KL_").sum(1)
        own = (self.scoring.scores(batch, "KL_").log_probs.sum(1) - reference).mean()
        if ranks.count() > 1:
            rows = batch[KEY].examples
            total, count = ranks.summed([float(own) * rows, rows])
            own = own.new_tensor(total / max(count, 1))
        return own.clamp(min=0)

    def _figures(self, batch: Batch, scores: TokenScores, log_p: Tensor, r: Tensor, is_good: Tensor) -> dict[str, Any]:
        figures = self.scoring.figures(batch, scores)
        for side, kept in (("chosen", is_good), ("rejected", ~is_good)):
            # Products, since a mask as an index waits for the device.
            figures[f"reward_{side}"] = (self.beta * r.detach() * kept).sum(), kept.sum()
            figures[f"log_prob_{side}"] = (log_p.detach() * kept).sum(), kept.sum()
        return figures

    def means(self, figures: dict[str, float]) -> dict[str, float]:
        sides = [figures.get(f"reward_{side}") for side in ("chosen", "rejected")]
        if sides[0] is None or sides[1] is None:
            return figures
        return {**figures, "reward_margin": sides[0] - sides[1]}

    # --- evaluation ---

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """Means over rows; figures of good (bad) answers are means over the good (bad) answers."""
        assert self.eval_rows is not None
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for places in in_order(len(self.eval_rows), self.size):
            own = ranks.share(places)
            rows = self.eval_rows[own or places[:1]]
            batch = self.collate([dict(zip(rows, row)) for row in zip(*rows.values())])
            found = self.loss(model, on_device(batch if own else without_rows(batch), model.device))
            figures: Figures = {"loss": (found.sum, len(own)), **found.figures}
            values = [float(value) * bool(own) for pair in figures.values() for value in pair]
            totals = iter(ranks.summed(values))
            for name in figures:
                sums[name] = [before + next(totals) for before in sums[name]]
            pause()
        sums.pop("entropy")
        means = self.means({name: total / weight for name, (total, weight) in sums.items() if weight})
        return {"eval_loss": means.pop("loss"), **{f"eval_{name}": value for name, value in means.items()}}

    # --- the memory plan ---

    def largest_batch(self, batches: Iterable[list[int]]) -> MicroBatch:
        scoring = self.scoring
        return largest(self.rows, batches, flat=scoring.layout != "padded", shared=scoring.shares_prompts)

    def largest_evaluation(self) -> MicroBatch | None:
        """Of evaluations, and of the mismatched answers that KTO scores in each step."""
        flat, shared, found = self.scoring.layout != "padded", self.scoring.shares_prompts, []
        for rows, answers in ((self.rows, MISMATCHED), (self.eval_rows, MISMATCHED), (self.eval_rows, ANSWER_IDS)):
            if rows is not None and not {*answers}.isdisjoint(rows.column_names):
                batches = own_parts(in_order(len(rows), self.size))
                found.append(largest(rows, batches, flat=flat, shared=shared, answers=answers))
        return max(found, key=lambda batch: batch.rows * batch.tokens, default=None)


def answered(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Prompts and answers (B, L), padded on the right, and which positions are answers."""
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in rows]
    answers = [(torch.arange(len(row)) >= len(prompt)).long() for row, (prompt, _) in zip(ids, rows)]
    return {
        "input_ids": pad_right(ids, pad),
        "attention_mask": pad_right([torch.ones_like(row) for row in ids], 0),
        "completion_mask": pad_right(answers, 0),
    }


def mismatched(rows: Dataset, size: int) -> Dataset:
    """The rows with the answers by which z is estimated: as in trl, those of the row before, of ``size`` at a time."""

    def shifted(part: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        answers = part["completion_ids"]
        return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

    return rows.map(shifted, batched=True, batch_size=size, keep_in_memory=True)
