"""What is learned from given answers: demonstrations (SFT), labels, pairs of answers (DPO), marked answers (KTO).

Of demonstrations, each token of an answer is predicted from the tokens before it. A head on the model's last hidden
states answers a text with one label, several, or a number.

Preferences need no second model. The reference is the model itself, with its adapter disabled or with a frozen copy of
the adapter with which training began. A run computes its log-probabilities before the first step and keeps them
(reference.py); where none are kept, each step computes its own, before its graph exists. All log-probabilities come
from the accelerated model, at the positions of answers only; the losses are in losses.py.

B rows of a micro-batch, L positions, P positions that are trained on, C labels.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.acceleration import LossOptions, fused_head
from rankwise.acceleration.attention import with_mask
from rankwise.acceleration.generation import Decoding, Generator, Prompt, stop_ids_of
from rankwise.acceleration.layouts import Answered, Layout, answered, padded
from rankwise.acceleration.log_probs import TokenScores, token_scores
from rankwise.acceleration.loss import chosen, cross_entropy, losses
from rankwise.acceleration.scoring import Score, Scorer, Target, loss_scorer, members_of, trained_target
from rankwise.adapters.switch import reference_at_work
from rankwise.compat.torch import is_fake, is_unit
from rankwise.constants import IGNORED
from rankwise.data.objectives import ANSWER_IDS
from rankwise.labels import SINGLE, Labels, measures
from rankwise.models.load import answer_room
from rankwise.ops.checks import check_targets
from rankwise.ops.linear_cross_entropy import LossSums
from rankwise.records import keep_json, kept_json
from rankwise.training import ranks
from rankwise.training.batches import (
    KEY,
    ROWS_AT_ONCE,
    Batch,
    Counted,
    Figures,
    MicroBatch,
    Row,
    in_order,
    laid_out,
    largest,
    means_of,
    on_device,
    own_parts,
    shuffled,
    without_rows,
)
from rankwise.training.losses import MARKED_LOSSES, PAIR_LOSSES, Pairs
from rankwise.training.reference import Pair, Reference, key_of
from rankwise.training.step import Loss
from rankwise.training.weights import roots_gathered

# The columns of KTO's mismatched answers (answers to a different prompt of the batch).
MISMATCHED = ("KL_completion_ids",)
# Prompts that are answered after training, by the model and by its reference, and most tokens of an answer.
ANSWERED, ANSWER_TOKENS = 8, 32


@dataclasses.dataclass(kw_only=True)
class Demonstrations:
    """The objective sft. ``layout``: that of a micro-batch's rows.

    ``label_smoothing`` acts on the training loss only, so that evaluation losses are comparable between runs.
    """

    model: PreTrainedModel
    rows: Dataset
    eval_rows: Dataset | None
    pad: int
    # Rows of a micro-batch of all processes.
    size: int
    seed: int
    layout: Layout = "padded"
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
        batch, found = laid_out(rows, self.pad, self.layout)
        checked = batch["labels"].flatten() if found.wanted is None else found.wanted
        check_targets(checked, self.vocabulary, IGNORED)
        return {**batch, KEY: found}

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches

    # --- loss ---

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        found: Counted = batch[KEY]
        assert found.scored is not None, "counted by collate"
        given = with_mask({name: value for name, value in batch.items() if name != KEY} | {"use_cache": False})
        coefficient = router_coefficient(model)
        if coefficient:
            given["output_router_logits"] = True
        if self.own_loss:
            asked: dict[str, Any] = {"label_smoothing": self.label_smoothing, "want_stats": True}
            options = LossOptions(**asked, scored=found.scored, targets=found.wanted)
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
        return largest(self.rows, batches, self.layout)

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
    return LossSums(*cross_entropy(logits[chosen].float(), inputs["labels"][:, 1:][trained], label_smoothing)), outputs


# --- labels ---


@dataclasses.dataclass(kw_only=True)
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
        batch: Batch = padded(rows, {"input_ids": self.pad, "token_type_ids": 0})
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
        return largest(self.rows, batches, "padded")

    def largest_evaluation(self) -> MicroBatch | None:
        rows = self.eval_rows
        return None if rows is None else largest(rows, own_parts(in_order(len(rows), self.size)), "padded")


# --- preferences ---


class Scoring:
    """Log-probabilities of the answers of a batch, by the model as it trains and by its reference."""

    def __init__(self, model: PreTrainedModel, layout: Layout, *, temperature: float = 1.0) -> None:
        self.model, self.layout, self.temperature = model, layout, temperature
        for name, module in model.named_modules():
            # As in trl, dropout of the base is disabled; the adapter's dropout is the user's choice.
            if isinstance(module, nn.Dropout) and not name.endswith("lora_dropout"):
                module.p = 0.0
        self.in_chunks = fused_head(model) is not None

    @property
    def in_words(self) -> str:
        if not self.in_chunks:
            return "log-probabilities from whole logits"
        return "own log-probabilities, in chunks"

    def scores(self, answers: Answered, *, want_stats: bool = False) -> TokenScores:
        """The scores of the answers' tokens."""
        # Balancing is the concern of the pass that trains.
        more = {"output_router_logits": True} if want_stats and router_coefficient(self.model) else {}
        return token_scores(
            self.model,
            answers,
            in_chunks=self.in_chunks,
            temperature=self.temperature,
            want_stats=want_stats,
            **more,
        )

    @torch.no_grad()
    def reference(self, answers: Answered) -> Tensor:
        """log p_ref of each token (B, L - 1), 0 outside of answers."""
        with reference_at_work(self.model):
            return self.scores(answers).log_probs

    def balance(self, scores: TokenScores) -> Tensor | None:
        """The balancing loss of a model's experts times its coefficient."""
        coefficient = router_coefficient(self.model)
        return coefficient * scores.aux_loss if coefficient and scores.aux_loss is not None else None

    def figures(self, answers: Answered, scores: TokenScores) -> dict[str, Any]:
        assert scores.entropy is not None, "asked for"
        mask = answers.mask[:, 1:]
        figures: dict[str, Any] = {"entropy": ((scores.entropy * mask).sum(), mask.sum())}
        if scores.aux_loss is not None and router_coefficient(self.model):
            figures["aux_loss"] = scores.aux_loss.detach(), 1
        return figures


@dataclasses.dataclass(kw_only=True)
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
    # The reference's log-probabilities of all answers; None: each batch computes its own.
    kept: Reference | None = None

    shown: ClassVar[Mapping[str, str]] = {"reward_margin": "margin", "reward_accuracy": "accuracy", "kl": "KL"}

    def __post_init__(self) -> None:
        self.is_paired = self.loss_type in PAIR_LOSSES
        # Flat once its margin is met.
        self.silence_is_normal = self.loss_type == "hinge"
        if self.loss_type == "kto":
            # A memory plan has no rows.
            if len(self.rows):
                self.rows = mismatched(self.rows, self.size)
            if self.eval_rows is not None:
                self.eval_rows = mismatched(self.eval_rows, self.size)

    @property
    def in_words(self) -> str:
        return self.scoring.in_words

    def order(self, epoch: int) -> list[list[int]]:
        if self.is_paired:
            return shuffled(len(self.rows), self.size, self.seed + epoch)
        # As in trl: neighbours in a batch, whose answers are compared, are neighbours in the data.
        return in_order(len(self.rows), self.size)

    def collate(self, rows: Sequence[Row]) -> Batch:
        return self._collated(rows, trains=True)

    def _collated(self, rows: Sequence[Row], *, trains: bool) -> Batch:
        batch: Batch = {}
        for name, pairs in self._pairs(rows).items():
            batch[name] = answered(pairs, self.pad, self.scoring.layout)
            if self.kept is not None:
                batch[f"reference of {name}"] = self.kept.of(pairs, trains=trains)
        if not self.is_paired:
            batch["label"] = torch.tensor([row["label"] for row in rows])
        return {**batch, KEY: Counted(len(rows), batch["answers"].tokens, len(rows))}

    def _pairs(self, rows: Sequence[Row]) -> dict[str, list[Pair]]:
        """Prompts with their answers, those of pairs with all better answers first, and with mismatched answers."""
        columns = {"answers": ANSWER_IDS[:2] if self.is_paired else ANSWER_IDS[2:], "mismatched": MISMATCHED}
        return {
            name: [self._cut(row["prompt_ids"], row[column]) for column in of for row in rows]
            for name, of in columns.items()
            if of[0] in rows[0]
        }

    def _cut(self, prompt: list[int], answer: list[int]) -> Pair:
        return prompt[: self.max_length], answer[: max(0, self.max_length - len(prompt))]

    def unknown(self, kept: Reference, rows: Dataset, numbers: Sequence[int], *, trains: bool) -> list[int]:
        """Those of the rows with an answer that ``kept`` does not know."""
        found = []
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            part = numbers[start : start + ROWS_AT_ONCE]
            for number, row in zip(part, _records(rows, [*part])):
                if not all(kept.knows(pairs, trains=trains) for pairs in self._pairs([row]).values()):
                    found.append(number)
        return found

    @torch.no_grad()
    def keep(self, kept: Reference, rows: Dataset, numbers: Sequence[int], *, trains: bool) -> Iterator[None]:
        """Give ``kept`` the answers of these rows, a micro-batch at each turn. All processes take part."""
        for start in range(0, len(numbers), self.size):
            places = [*numbers[start : start + self.size]]
            found: dict[bytes, float] = {}
            for pairs in self._pairs(_records(rows, ranks.share(places) or places[:1])).values():
                answers = answered(pairs, self.pad, self.scoring.layout).to(self.scoring.model.device)
                log_p = self.scoring.reference(answers).sum(1).tolist()
                found |= zip((kept.digest(pair, trains=trains) for pair in pairs), log_p)
            for part in ranks.gathered(found):
                kept.values.update(part)
            yield

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        return self._pair_loss(batch) if self.is_paired else self._marked_loss(batch)

    def _pair_loss(self, batch: Batch) -> Loss:
        answers: Answered = batch["answers"]
        reference = self._reference(batch, "answers")
        scores = self.scoring.scores(answers, want_stats=True)
        log_p = scores.log_probs.sum(1)
        chosen, rejected = (log_p - reference).chunk(2)
        lengths = answers.mask.sum(1).chunk(2)
        losses = PAIR_LOSSES[self.loss_type](Pairs(chosen, rejected, *lengths), self.beta, self.label_smoothing)
        # The batch's better answers come first.
        is_good = torch.arange(len(log_p), device=log_p.device) < len(chosen)
        better = (chosen > rejected).float().sum()
        figures = self._figures(answers, scores, log_p, log_p - reference, is_good)
        return Loss(losses.sum(), self.scoring.balance(scores), {**figures, "reward_accuracy": (better, len(chosen))})

    def _marked_loss(self, batch: Batch) -> Loss:
        answers: Answered = batch["answers"]
        reference, is_good = self._reference(batch, "answers"), batch["label"]
        z = self._z(batch) if self.loss_type == "kto" else reference.new_zeros(())
        scores = self.scoring.scores(answers, want_stats=True)
        log_p = scores.log_probs.sum(1)
        losses = MARKED_LOSSES[self.loss_type](log_p - reference, is_good, z, self.beta)
        weights = torch.where(is_good, self.desirable_weight, self.undesirable_weight)
        figures = self._figures(answers, scores, log_p, log_p - reference, is_good)
        # Weighed by rows, so that the mean is one over rows.
        figures["kl"] = z * len(log_p), len(log_p)
        return Loss((weights * losses).sum(), self.scoring.balance(scores), figures)

    def _reference(self, batch: Batch, name: str) -> Tensor:
        """log p_ref of each answer (B,)."""
        known: Tensor | None = batch.get(f"reference of {name}")
        return self.scoring.reference(batch[name]).sum(1) if known is None else known

    @torch.no_grad()
    def _z(self, batch: Batch) -> Tensor:
        """The estimate of the KL divergence from the reference: max(0, mean r) of mismatched answers, over the rows of
        all processes."""
        reference = self._reference(batch, "mismatched")
        own = (self.scoring.scores(batch["mismatched"]).log_probs.sum(1) - reference).mean()
        # A plan's tensors have no values.
        if ranks.count() > 1 and not is_fake(own):
            rows = batch[KEY].examples
            total, count = ranks.summed([float(own) * rows, rows])
            own = own.new_tensor(total / max(count, 1))
        return own.clamp(min=0)

    def _figures(
        self, answers: Answered, scores: TokenScores, log_p: Tensor, r: Tensor, is_good: Tensor
    ) -> dict[str, Any]:
        figures = self.scoring.figures(answers, scores)
        for side, kept in (("chosen", is_good), ("rejected", ~is_good)):
            # Products, since a mask as an index waits for the device.
            figures[f"reward_{side}"] = (self.beta * r.detach() * kept).sum(), kept.sum()
            figures[f"log_prob_{side}"] = (log_p.detach() * kept).sum(), kept.sum()
        return figures

    # --- evaluation ---

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """Means over rows; figures of good (bad) answers are means over the good (bad) answers."""
        assert self.eval_rows is not None
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for places in in_order(len(self.eval_rows), self.size):
            own = ranks.share(places)
            batch = self._collated(_records(self.eval_rows, own or places[:1]), trains=False)
            found = self.loss(model, on_device(batch if own else without_rows(batch), model.device))
            figures: Figures = {"loss": (found.sum, len(own)), **found.figures}
            values = [float(value) * bool(own) for pair in figures.values() for value in pair]
            totals = iter(ranks.summed(values))
            for name in figures:
                sums[name] = [before + next(totals) for before in sums[name]]
            pause()
        sums.pop("entropy")
        means = means_of(sums)
        return {"eval_loss": means.pop("loss"), **{f"eval_{name}": value for name, value in means.items()}}

    def changed_answers(self, tokenizer: PreTrainedTokenizerBase, key: str, folder: Path) -> dict[str, int]:
        """How many of the first prompts, of the evaluation if there is one, the model answers otherwise than its
        reference, both greedily: {"asked", "changed"}. Losses may fall without that. The answers of the reference, by
        its ``key``, are kept in ``folder``."""
        model: Any = self.scoring.model.eval()
        rows = self.rows if self.eval_rows is None else self.eval_rows
        found = dict.fromkeys(map(tuple, rows[: 2 * ANSWERED]["prompt_ids"]))
        prompts = [Prompt(ids) for ids in itertools.islice(found, ANSWERED)]
        room = answer_room(model, max(len(prompt.ids) for prompt in prompts), ANSWER_TOKENS)
        generator = Generator(
            model, Decoding(max_new_tokens=room, stop_ids=stop_ids_of(model, tokenizer)), pad=self.pad
        )
        after = generator.answers(prompts)
        file = folder / f"{key_of(key, [prompt.ids for prompt in prompts], room)[:32]}.json"
        if (known := kept_json(file)) is None:
            with reference_at_work(model):
                known = {"answers": generator.answers(prompts)}
            keep_json(file, known)
        return {"asked": len(prompts), "changed": sum(one != other for one, other in zip(known["answers"], after))}

    # --- the memory plan ---

    def largest_batch(self, batches: Iterable[list[int]]) -> MicroBatch:
        return self._largest(self.rows, list(batches))

    def largest_evaluation(self) -> MicroBatch | None:
        rows = self.eval_rows
        return None if rows is None else self._largest(rows, [*own_parts(in_order(len(rows), self.size))])

    def _largest(self, rows: Dataset, batches: list[list[int]]) -> MicroBatch:
        """Of the answers, and of the mismatched ones that KTO scores beside them."""
        layout, found = self.scoring.layout, []
        for answers in (ANSWER_IDS, MISMATCHED):
            if not {*answers}.isdisjoint(rows.column_names):
                found.append(largest(rows, batches, layout, answers=answers))
        return max(found, key=lambda batch: batch.rows * batch.tokens)


def _records(rows: Dataset, numbers: list[int]) -> list[Row]:
    columns = rows[numbers]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def mismatched(rows: Dataset, size: int) -> Dataset:
    """The rows with the answers by which z is estimated: as in trl, those of the row before, of ``size`` at a time."""

    def shifted(part: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        answers = part["completion_ids"]
        return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

    return rows.map(shifted, batched=True, batch_size=size, keep_in_memory=True)
