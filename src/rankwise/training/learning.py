"""What a run learns and how it is made, and the loop with its options."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.acceleration.layouts import Layout
from rankwise.adapters import has_adapter
from rankwise.config import logging_steps_of
from rankwise.data import encode_preferences
from rankwise.data.encoding import RowEncoder
from rankwise.data.objectives import encode_labelled, encode_prompts, label_counts, unpaired
from rankwise.errors import ConfigError
from rankwise.models.load import table_rows
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.training import ranks
from rankwise.training.batches import packed
from rankwise.training.loop import Loop
from rankwise.training.objectives import Classification, Demonstrations, Preferences, Scoring
from rankwise.training.optimizers import make_optimizer
from rankwise.training.parts import Learned, Pace, Reading, Updates
from rankwise.training.setup import Data, LoadedBase, Texts, check_positions, encode_data
from rankwise.training.step import Computing, Objective, around_step
from rankwise.training.watch import Progress

# Default interval of checkpoints, and the shortest of evaluations, as a share of the run.
TENTH = 0.1
# An evaluation is at most this share of the run's time in all, where a row costs half of what it costs in training: its
# forward pass only.
EVALUATING, ROW_COST = 0.2, 0.5


@dataclasses.dataclass(frozen=True)
class Learning:
    """How an objective gets its rows, and how it is made from them."""

    encode: Callable[[Reading, PreTrainedTokenizerBase, Texts], Data]
    objective: Callable[[LoadedBase, Data, Pace, Layout], Objective]


def _of_batches(base: LoadedBase, pace: Pace) -> dict[str, Any]:
    """The padding token, the rows of a micro-batch of all processes, and the seed of their order."""
    pad = int(base.tokenizer.pad_token_id or 0)
    return {"pad": pad, "size": pace.batch_size * ranks.count(), "seed": pace.seed}


def _demonstrations(learned: Learned) -> Learning:
    def objective(base: LoadedBase, data: Data, pace: Pace, layout: Layout) -> Demonstrations:
        rows = data.train.dataset
        return Demonstrations(
            model=base.model,
            rows=packed(rows, data.max_length, pace.seed) if learned.packing else rows,
            eval_rows=data.evaluation and data.evaluation.dataset,
            **_of_batches(base, pace),
            layout=layout,
            label_smoothing=learned.label_smoothing,
        )

    return Learning(encode_data, objective)


def _preferences(learned: Learned) -> Learning:
    def encode(reading: Reading, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
        if OBJECTIVES[learned.objective].rows == "mark":
            eval_rows = None if texts.eval_rows is None else unpaired(texts.eval_rows)
            texts = dataclasses.replace(texts, rows=unpaired(texts.rows), eval_rows=eval_rows)
        return encode_data(reading, tokenizer, texts, encode_preferences)

    def objective(base: LoadedBase, data: Data, pace: Pace, layout: Layout) -> Preferences:
        return Preferences(
            scoring=Scoring(base.model, layout),
            rows=data.train.dataset,
            eval_rows=data.evaluation and data.evaluation.dataset,
            **_of_batches(base, pace),
            loss_type=learned.loss_type,
            beta=learned.beta,
            max_length=min(data.max_length, table_rows(base.model) or data.max_length),
            label_smoothing=learned.label_smoothing,
            desirable_weight=learned.desirable_weight,
            undesirable_weight=learned.undesirable_weight,
        )

    return Learning(encode, objective)


def _labels(learned: Learned) -> Learning:
    def encode(reading: Reading, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
        labels = texts.labels
        assert labels is not None, "read with the rows"
        data = encode_data(reading, tokenizer, texts, functools.partial(encode_labelled, labels=labels))
        notes = {"labels": {**labels.to_json(), "counts": label_counts(texts.rows, labels)}}
        return dataclasses.replace(data, notes=notes)

    def objective(base: LoadedBase, data: Data, pace: Pace, layout: Layout) -> Classification:
        evaluation = data.evaluation and data.evaluation.dataset
        assert data.texts.labels is not None, "read with the rows"
        return Classification(
            rows=data.train.dataset, eval_rows=evaluation, labels=data.texts.labels, **_of_batches(base, pace)
        )

    return Learning(encode, objective)


def _rewards(learned: Learned) -> Learning:
    """Raises ConfigError for a reward that cannot be had; making the objective, RW775 for prompts that do not fill a
    step."""
    from rankwise.training.grpo import RewardedAnswers, read_rewards

    rewards, longest = read_rewards(learned.reward), learned.max_completion_length

    def encode(reading: Reading, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
        data = encode_data(reading, tokenizer, texts, functools.partial(encode_prompts, room=longest))
        hashes = [reward.sha256 for reward in rewards if reward.sha256 is not None]
        notes = {"rewards_sha256": hashlib.sha256(" ".join(hashes).encode()).hexdigest()} if hashes else {}
        return dataclasses.replace(data, notes=notes)

    def objective(base: LoadedBase, data: Data, pace: Pace, layout: Layout) -> Objective:
        from rankwise.acceleration.generation import stop_ids_of

        model, tokenizer, prompts = base.model, base.tokenizer, data.train.dataset
        check_positions(model, [prompts], longest)
        of_batches, group = _of_batches(base, pace), learned.num_generations
        asked = of_batches["size"] * pace.gradient_accumulation // group
        if asked > len(prompts):
            raise ConfigError(
                "RW775", f"a step takes {asked} prompts and there are {len(prompts)}; lower --batch-size."
            )
        encoder = RowEncoder(data.texts.rows, tokenizer, data.texts.template)
        return RewardedAnswers(
            scoring=Scoring(model, layout, temperature=learned.temperature),
            rows=prompts,
            eval_rows=data.evaluation and data.evaluation.dataset,
            **of_batches,
            decode=functools.partial(tokenizer.batch_decode, skip_special_tokens=True),
            rewards=rewards,
            weights=learned.reward_weights,
            stop_ids=stop_ids_of(model, tokenizer, encoder.stop_ids()),
            asked=asked,
            group=group,
            longest=longest,
            loss_type=learned.loss_type,
            beta=learned.beta,
        )

    return Learning(encode, objective)


# {objective: how it is made}.
LEARNING: Mapping[ObjectiveName, Callable[[Learned], Learning]] = {
    "sft": _demonstrations,
    "dpo": _preferences,
    "kto": _preferences,
    "grpo": _rewards,
    "classify": _labels,
}


# --- the loop ---


def paced(objective: Objective, pace: Pace) -> Pace:
    """The pace with its length in steps and the intervals that follow from it."""
    steps_an_epoch = max(1, math.ceil(len(objective.order(0)) / pace.gradient_accumulation))
    total = pace.max_steps or math.ceil(pace.epochs * steps_an_epoch)
    tenth, eval_steps = math.ceil(total * TENTH), None
    if objective.eval_rows is not None:
        rows = pace.batch_size * pace.gradient_accumulation * ranks.count()
        # Early stopping counts evaluations, which then come at every tenth, whatever they cost.
        usual = tenth if pace.early_stopping else evaluation_steps_of(total, rows, len(objective.eval_rows))
        eval_steps = pace.eval_steps or usual
    return dataclasses.replace(
        pace,
        max_steps=total,
        eval_steps=eval_steps,
        save_steps=pace.save_steps or pace.eval_steps or tenth,
        logging_steps=pace.logging_steps or logging_steps_of(total),
    )


def make_loop(
    objective: Objective,
    pace: Pace,
    updates: Updates,
    base: LoadedBase,
    computing: Computing,
    folder: Path,
    *,
    progress: Progress,
    is_evaluated: bool = False,
    eight_bit_steps: int | None = None,
) -> Loop:
    """A run's loop. ``is_evaluated``: a resumed run needs no evaluation at its start."""
    optimizer = functools.partial(
        make_optimizer,
        updates.optimizer,
        base.model,
        rate=updates.rate,
        weight_decay=updates.weight_decay,
        loraplus_ratio=updates.loraplus_ratio if has_adapter(base.model) else None,
    )
    return Loop(
        model=base.model,
        objective=objective,
        pace=pace,
        make_optimizer=optimizer,
        progress=progress,
        folder=folder,
        around_step=functools.partial(around_step, base.model, computing),
        autocast=base.autocast,
        max_grad_norm=updates.max_grad_norm,
        evaluates_first=pace.eval_steps is not None and not is_evaluated,
        eight_bit_steps=eight_bit_steps,
    )


def evaluation_steps_of(steps: int, rows: int, eval_rows: int) -> int:
    """The default of ``eval_steps`` for ``steps`` steps of ``rows`` rows, from what evaluations and steps cost: as many
    evaluations as fit into their share of the run, but one before the first step, one after the last, and at most ten
    more than the first. Counted in rows, not in seconds, so that a run evaluates at the same steps on every machine.
    """
    affordable = int(steps * rows * EVALUATING / (1 - EVALUATING) / (eval_rows * ROW_COST))
    return math.ceil(steps / min(10, max(1, affordable - 1)))
