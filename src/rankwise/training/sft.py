"""Training on known answers: predict each token of an answer from the tokens before it, or a text's label.

A head on the model's last hidden states answers a text with one label, several, or a number.

B rows, L positions, T tokens of all rows laid end to end, P positions that are trained on, C labels.
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankwise.acceleration import LossOptions, fused_head
from rankwise.acceleration.loss import chosen, laid_out, losses, scored_positions
from rankwise.acceleration.scoring import Score, Scorer, Target, loss_scorer, members_of, trained_target
from rankwise.compat.torch import is_unit
from rankwise.constants import IGNORED
from rankwise.labels import SINGLE, Labels, measures
from rankwise.ops.checks import check_targets
from rankwise.ops.linear_cross_entropy import LossSums
from rankwise.training import ranks
from rankwise.training.foresight import MicroBatch, largest, own_parts
from rankwise.training.loop import KEY, Batch, Counted, Loss, Row, in_order, on_device, shuffled
from rankwise.training.losses import cross_entropy
from rankwise.training.weights import roots_gathered

# Rows that are packed together, as in trl.
PACKED_AT_ONCE = 1000


@dataclasses.dataclass
class Demonstrations:
    """The objective sft. ``flat``: the rows of a micro-batch are laid end to end, not padded.

    ``label_smoothing`` acts on the training loss only, so that evaluation losses are comparable between runs.
    """

    model: PreTrainedModel
    rows: Dataset
    eval_rows: Dataset | None
    pad: int
    # Rows of a micro-batch of all processes.
    size: int
    seed: int
    flat: bool = False
    label_smoothing: float = 0.0

    shown: ClassVar[Mapping[str, str]] = {}
    silence_is_normal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Kept between evaluations: it tests once whether the model can score several rows concatenated.
        self._scorer: Scorer | None = None
        self.vocabulary = self.model.config.get_text_config().vocab_size
        # The chunked loss of rankwise.acceleration, which computes two products with the head in a step.
        self.own_loss = fused_head(self.model) is not None

    @property
    def in_words(self) -> str:
        return "own, in chunks" if self.own_loss else "own logits at trained positions"

    def order(self, epoch: int) -> list[list[int]]:
        return shuffled(len(self.rows), self.size, self.seed + epoch)

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Raises QuantizationError (RW621) for a label that is not a token number."""
        batch = end_to_end(rows) if self.flat else padded(rows, self.pad)
        check_targets(batch["labels"].flatten(), self.vocabulary, IGNORED)
        return {**batch, KEY: counted(batch)}

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches

    # --- loss ---

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        found: Counted = batch[KEY]
        assert found.scored is not None, "counted by collate"
        given = {name: value for name, value in batch.items() if name != KEY} | {"use_cache": False}
        coefficient = router_coefficient(model)
        if coefficient:
            given["output_router_logits"] = True
        if self.own_loss:
            options = LossOptions(label_smoothing=self.label_smoothing, want_stats=True, scored=found.scored)
            outputs = model(**given, loss_options=options)
            sums = options.found[-1]
        else:
            sums, outputs = sums_of_logits(model, given, self.label_smoothing)
        assert sums.entropy is not None, "asked for"
        assert sums.correct is not None, "asked for"
        positions = len(found.scored)
        figures = {"entropy": (sums.entropy, positions), "token_accuracy": (sums.correct, positions)}
        aux = getattr(outputs, "aux_loss", None) if coefficient else None
        if aux is None:
            return Loss(sums.loss, figures=figures)
        return Loss(sums.loss, coefficient * aux, {**figures, "aux_loss": (aux.detach(), 1)})

    def means(self, figures: dict[str, float]) -> dict[str, float]:
        return figures

    # --- evaluation ---

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """The mean loss over the trained tokens of the evaluation's rows, as ``rankwise evaluate`` computes it."""
        assert self.eval_rows is not None
        with roots_gathered(model):
            own = self._row_scores(self.eval_rows, pause)
        everyone = list(itertools.chain.from_iterable(ranks.gathered(own)))
        count = sum(tokens for _, tokens, _ in everyone) or 1
        # The sum is exact, so it does not depend on the distribution of rows over processes.
        loss = -math.fsum(total for total, _, _ in everyone) / count
        return {"eval_loss": loss, "eval_token_accuracy": sum(hits for _, _, hits in everyone) / count}

    def _row_scores(self, rows: Dataset, pause: Callable[[], None]) -> list[tuple[float, int, float]]:
        """(log-probability, scored tokens, scored tokens that were the most likely ones) of each row."""
        targets = evaluation_targets(rows)
        scores: dict[int, Score] = {}
        if self._scorer is None:
            kind = self.model.device.type
            # 16-bit weights compute in their own dtype, without autocast.
            is_mixed = self.model.dtype == torch.float32 and torch.is_autocast_enabled(kind)
            self._scorer = loss_scorer(self.model, autocast=torch.get_autocast_dtype(kind) if is_mixed else None)
        batches = self._scorer.plan(targets)
        # Several processes take the batches in turn, in lockstep, so that all of them can stop at the same batch.
        for start in range(0, len(batches), ranks.count()):
            turn = start + ranks.rank()
            if turn < len(batches):
                scores |= self._scorer.score_batch(batches[turn], targets)
            elif is_unit(self.model):
                # A sharded model needs every process in each forward pass, also one without a batch left.
                self._scorer.score_batch(batches[start], targets)
            pause()
        return [(score.total, len(score.tokens), score.hits) for score in scores.values()]

    # --- the memory plan ---

    def largest_batch(self, batches: Iterable[list[int]]) -> MicroBatch:
        return largest(self.rows, batches, flat=self.flat)

    def largest_evaluation(self) -> MicroBatch | None:
        if self.eval_rows is None:
            return None
        targets = evaluation_targets(self.eval_rows)
        scorer = loss_scorer(self.model)
        scorer.packs = True
        batches = [(len(rows), max(row.length for row in rows), rows) for rows in scorer.batches(targets)]
        count, tokens, rows = max(batches, key=lambda batch: batch[0] * batch[1], default=(1, 1, []))
        asked = sum(len(targets[member].places) for member in members_of(rows))
        return MicroBatch(count, tokens, min(1.0, max(asked, 1) / (count * tokens)))


def evaluation_targets(dataset: Dataset) -> list[Target]:
    """The scored tokens of an evaluation's encoded rows. A row whose only trained token is its first has none."""
    trained = ([label != IGNORED for label in row] for row in dataset["labels"])
    return [target for target in map(trained_target, dataset["input_ids"], trained) if target is not None]


def router_coefficient(model: PreTrainedModel) -> float:
    """The factor of the balancing loss of a model's experts; 0 for a model without."""
    config = model.config.get_text_config()
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if hasattr(config, "output_router_logits") else 0.0


def sums_of_logits(model: PreTrainedModel, inputs: Batch, label_smoothing: float) -> tuple[LossSums, Any]:
    """The sums over trained positions, and the model's outputs, from one forward pass through the model's own head: at
    positions that any row trains on, where the model supports logits_to_keep.

    ``inputs`` holds labels (B, L), -100 where nothing is trained; position i is scored on label i + 1.
    """
    trained = inputs["labels"][:, 1:] != IGNORED
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    positions = trained.any(dim=0).nonzero().squeeze(1) if keeps else None
    given = {name: value for name, value in inputs.items() if name != "labels"}
    outputs = model(**given, **({} if positions is None else {"logits_to_keep": positions}))
    logits = outputs.logits[:, :-1] if positions is None else outputs.logits
    chosen = trained if positions is None else trained[:, positions]
    return cross_entropy(logits[chosen], inputs["labels"][:, 1:][trained], label_smoothing), outputs


# --- micro-batches ---


def padded(rows: Sequence[Row], pad: int) -> Batch:
    """Rows (B, L), padded on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_right(ids, pad),
        "labels": pad_right([torch.tensor(row["labels"]) for row in rows], IGNORED),
        "attention_mask": pad_right([torch.ones_like(row) for row in ids], 0),
    }


def pad_right(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def end_to_end(rows: Sequence[Row]) -> Batch:
    """Rows, or packed rows with their ``seq_lengths``, as one row (1, T) without padding, with the bounds between them
    for attention, and each token's row for short convolutions. No row's first token is trained on.
    """
    lengths = torch.tensor(list(itertools.chain.from_iterable(_lengths(row) for row in rows)))
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    labels = torch.tensor(list(itertools.chain.from_iterable(row["labels"] for row in rows)))
    labels[bounds[:-1].long()] = IGNORED
    longest = int(lengths.max())
    return {
        "input_ids": torch.tensor(list(itertools.chain.from_iterable(row["input_ids"] for row in rows)))[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)[None],
    }


def _lengths(row: Row) -> list[int]:
    return row["seq_lengths"] if "seq_lengths" in row else [len(row["input_ids"])]


def counted(batch: Batch) -> Counted:
    """The counts of a batch: rows (B, L) with an attention mask, or rows end to end (1, T)."""
    if "attention_mask" in batch:
        tokens, examples = int(batch["attention_mask"].sum()), len(batch["input_ids"])
    else:
        tokens, examples = batch["input_ids"].numel(), len(batch["cu_seq_lens_q"]) - 1
    scored = scored_positions(batch["labels"])
    return Counted(len(scored), tokens, examples, scored)


def packed(rows: Dataset, length: int, seed: int) -> Dataset:
    """Rows of at most ``length`` tokens that hold several of the shuffled ``rows`` each: the longest first, each into
    the fullest row into which it fits (best fit decreasing). ``seq_lengths`` holds the lengths within a row.
    """
    rows = rows.select_columns(["input_ids", "labels"]).shuffle(seed=seed)
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for start in range(0, len(rows), PACKED_AT_ONCE):
        part = rows[start : start + PACKED_AT_ONCE]
        for members in _bins([len(ids) for ids in part["input_ids"]], length):
            for name in ("input_ids", "labels"):
                made[name].append(list(itertools.chain.from_iterable(part[name][member] for member in members)))
            made["seq_lengths"].append([len(part["input_ids"][member]) for member in members])
    return Dataset.from_dict(made).shuffle(seed=seed)


def _bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of ``lengths`` in each bin. Of bins with as much left, the earliest is filled first."""
    bins: list[list[int]] = []
    # (what is left, since which turn, bin), in order.
    there: list[tuple[int, int, list[int]]] = []
    for turn, index in enumerate(np.argsort(-np.asarray(lengths), kind="stable").tolist()):
        place = bisect.bisect_left(there, (lengths[index],))
        left, _, chosen = there.pop(place) if place < len(there) else (capacity, 0, [])
        if not chosen:
            bins.append(chosen)
        chosen.append(index)
        if left > lengths[index]:
            bisect.insort(there, (left - lengths[index], turn, chosen))
    return bins


# --- labels ---


@dataclasses.dataclass
class Classification:
    """The objective classify. ``size``: rows of a micro-batch of all processes."""

    rows: Dataset
    eval_rows: Dataset | None
    labels: Labels
    pad: int
    size: int
    seed: int

    silence_is_normal: ClassVar[bool] = False
    in_words: ClassVar[str] = "of labels, from the head's logits"

    @property
    def shown(self) -> Mapping[str, str]:
        return {"accuracy": "accuracy"} if self.labels.problem == SINGLE else {}

    def order(self, epoch: int) -> list[list[int]]:
        return shuffled(len(self.rows), self.size, self.seed + epoch)

    def collate(self, rows: Sequence[Row]) -> Batch:
        batch: Batch = laid_out(rows, self.pad)
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        return {**batch, KEY: Counted(len(rows), int(batch["attention_mask"].sum()), len(rows))}

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        logits, each = self._answered(model, batch)
        if self.labels.problem != SINGLE:
            return Loss(each.sum())
        right = (logits.detach().argmax(-1) == batch["labels"]).sum()
        return Loss(each.sum(), figures={"accuracy": (right, len(each))})

    def _answered(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and losses (B,)."""
        inputs = {name: value for name, value in batch.items() if name not in (KEY, "labels")}
        logits = model(**inputs).logits.float()
        return logits, losses(logits, batch["labels"], self.labels.problem)

    def means(self, figures: dict[str, float]) -> dict[str, float]:
        return figures

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """The mean loss over rows, and how well all answers agree with the labels."""
        assert self.eval_rows is not None
        found: list[tuple[float, Any, Any]] = []
        for places in in_order(len(self.eval_rows), self.size):
            if own := ranks.share(places):
                rows = [self.eval_rows[place] for place in own]
                batch = on_device(self.collate(rows), model.device)
                logits, each = self._answered(model, batch)
                targets = [row["label"] for row in rows]
                found += zip(each.tolist(), targets, chosen(logits, self.labels.problem))
            pause()
        losses_of_all, targets_of_all, answers = zip(*itertools.chain.from_iterable(ranks.gathered(found)))
        agreement = measures(targets_of_all, answers, self.labels.problem)
        loss = sum(losses_of_all) / len(losses_of_all)
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in agreement.items()}}

    def largest_batch(self, batches: Iterable[list[int]]) -> MicroBatch:
        return largest(self.rows, batches, flat=False)

    def largest_evaluation(self) -> MicroBatch | None:
        rows = self.eval_rows
        return None if rows is None else largest(rows, own_parts(in_order(len(rows), self.size)), flat=False)
