"""What a run learns and how it is made, the loop with its options, and the search of the learning rate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rankwise.acceleration.layouts import Layout
from rankwise.adapters import has_adapter
from rankwise.config import default_rate, logging_steps_of
from rankwise.constants import IGNORED
from rankwise.data import encode_preferences
from rankwise.data.encoding import RowEncoder
from rankwise.data.objectives import (
    encode_labelled,
    encode_prompts,
    label_counts,
    unpaired,
)
from rankwise.disk import remove_strays
from rankwise.errors import ConfigError, RunError
from rankwise.foreign import Fields, checked, read_json
from rankwise.models.load import table_rows
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.records import RateSearch, RateTrial, RunRecord, write_json
from rankwise.reports.numbers import plural
from rankwise.reports.numbers import rate as spelled
from rankwise.training import ranks
from rankwise.training.batches import packed
from rankwise.training.loop import Loop
from rankwise.training.objectives import Classification, Demonstrations, Preferences, Scoring
from rankwise.training.optimizers import make_optimizer
from rankwise.training.parts import Learned, Pace, Reading, Updates
from rankwise.training.setup import Data, LoadedBase, Texts, check_positions, encode_data
from rankwise.training.step import Computing, Objective, around_step
from rankwise.training.watch import Diverged, MemoryMeter, Observer, Progress, Watch

# Default interval of checkpoints, and the shortest of evaluations, as a share of the run.
TENTH = 0.1
# An evaluation is at most this share of the run's time in all, where a row costs half of what it costs in training: its
# forward pass only.
EVALUATING, ROW_COST = 0.2, 0.5
# A given rate this many times the default is told, since it is likely a slip.
FAR_ABOVE = 100
# One in KEPT rates of a round goes on to the next.
KEPT = 3
# Steps of all short runs together, as a share of the run's.
USUAL_BUDGET = 0.25
# The largest number of held-out rows, and their largest share of all rows.
MOST_ROWS, SHARE = 64, 0.1
LEAST_ROWS = 4


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
    )


def evaluation_steps_of(steps: int, rows: int, eval_rows: int) -> int:
    """The default of ``eval_steps`` for ``steps`` steps of ``rows`` rows, from what evaluations and steps cost: as many
    evaluations as fit into their share of the run, but one before the first step, one after the last, and at most ten
    more than the first. Counted in rows, not in seconds, so that a run evaluates at the same steps on every machine.
    """
    affordable = int(steps * rows * EVALUATING / (1 - EVALUATING) / (eval_rows * ROW_COST))
    return math.ceil(steps / min(10, max(1, affordable - 1)))


# --- the learning rate ---


def rates_to_try(
    asked: float | str | None, listed: Sequence[float], config: PreTrainedConfig, settings: Fields, observer: Observer
) -> Sequence[float]:
    """The rate of the run, or several among which short runs search: those that ``auto`` ``listed``, or the default of
    a model with this config between its neighbours."""
    if listed and not isinstance(asked, float):
        return listed
    text = config.get_text_config()
    usual = default_rate(config.model_type, getattr(text, "hidden_size", 0), settings)
    if isinstance(asked, float):
        if asked > FAR_ABOVE * usual.rate:
            observer.note(f"learning rate {asked:g}, which is {asked / usual.rate:,.0f} times the default of {usual}")
        return (asked,)
    if asked is not None:
        return usual.around
    observer.note(f"learning rate {usual}")
    return (usual.rate,)


def rate_before(
    output: Path, record: RunRecord, asked: float | str | None, listed: Sequence[float], budget: float | None
) -> float | str | None:
    """What a resumed run takes for the rate that is asked: the run's own, if it is its default or was searched for.
    Raises RunError (RW507) for a different search.
    """
    found = record.rate_search
    if asked is None:
        return record.settings["learning_rate"]
    if found is None or not isinstance(asked, str):
        return asked
    before = sorted({trial["learning_rate"] for trial in found["trials"]}), found["budget"]
    if before != (list(listed) or before[0], budget):
        raise RunError(
            "RW507",
            f"the run in {output} tried the rates {', '.join(map(spelled, before[0]))} with --budget "
            f"{before[1] or USUAL_BUDGET:g}, and a different search is asked for; resume without --learning-rate and "
            "--budget.",
        )
    return found["chosen"]


def rounds(rates: int, budget: int) -> list[tuple[int, int]]:
    """[(number of rates, steps of each run)] by round. A run has at least two steps, since one may only warm up."""
    sizes = [rates]
    while sizes[-1] > KEPT:
        sizes.append(math.ceil(sizes[-1] / KEPT))
    return [(size, max(2, budget // (len(sizes) * size))) for size in sizes]


@dataclasses.dataclass
class _Tried:
    """The finished short runs of a search with this key."""

    key: str
    seconds: float = 0.0
    trials: list[RateTrial] = dataclasses.field(default_factory=list)


def search_file(output: Path) -> Path:
    """Where the finished short runs stand until the run's record holds them: beside the run's folder."""
    place = Path(os.path.realpath(output))
    return place.with_name(f".{place.name}.rankwise-search")


def _tried_before(path: Path, inputs: Sequence[object]) -> _Tried:
    """The short runs of the same search in ``path``, if there are any."""
    remove_strays(path.parent, [path.name])
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        if (found := checked(_Tried, read_json(path))).key == key:
            return found
    return _Tried(key)


def search(
    rates: Sequence[float],
    data: Data,
    model: nn.Module,
    loop_of: Callable[[float, Pace, Data], Loop],
    pace: Pace,
    *,
    steps: int,
    budget: float | None,
    output: Path,
    inputs: Sequence[object],
    observer: Observer,
) -> RateSearch:
    """Search the best of ``rates`` for a run of ``steps`` by short runs. The weights are restored.

    Each short run is noted in a file beside ``output`` as it ends, so that the same command continues a search that was
    stopped. ``budget``: steps of all short runs, as a share of the run's. ``inputs``: all that the losses depend on, as
    JSON.

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943). Round k trains each of the n_k remaining rates
    from the same start for  floor(B / (K n_k))  steps, where B is the budget in steps and K the number of rounds, and
    keeps the best third,  n_{k+1} = ceil(n_k / 3),  until one rate is left. Each short run has a complete schedule with
    warm-up and decay, since high rates look worse than they are in a run that is cut off before its decay.

    A rate is judged by the loss on training rows that are held out from the short runs. Evaluation data are not used.
    The run itself starts from the same weights as the short runs, and trains on all rows.

    Raises ConfigError: RW175 for too few rows to hold some out, RW176 if every rate diverges.
    """
    training, held = kept_apart(data)
    path = search_file(output)
    noted = _tried_before(path, inputs)
    known = {(trial["learning_rate"], trial["steps"]): trial for trial in noted.trials}
    started = time.monotonic() - noted.seconds
    left = rates
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = {parameter: parameter.detach().to("cpu", copy=True) for parameter in trained}
    trials: list[RateTrial] = []
    for count, length in rounds(len(left), round(steps * (budget or USUAL_BUDGET))):
        left = left[:count]
        if len(left) < 2:
            # All other rates diverged.
            break
        observer.phase(f"Trying {plural(len(left), 'learning rate')}, {plural(length, 'step')} each")
        tried: list[RateTrial] = []
        for rate in left:
            if (rate, length) in known:
                tried.append(known[rate, length])
                continue
            warmup = round(pace.warmup_steps * min(1.0, length / steps))
            short = dataclasses.replace(pace, max_steps=length, warmup_steps=warmup)
            loss = _loss_after(loop_of(rate, short, training), held)
            tried.append({"learning_rate": rate, "steps": length, "loss": loss})
            noted.trials.append(tried[-1])
            noted.seconds = time.monotonic() - started
            write_json(path, dataclasses.asdict(noted))
            with torch.no_grad():
                for parameter, value in start.items():
                    parameter.copy_(value)
                    parameter.grad = None
            gc.collect()
        trials += tried
        scored = sorted((trial["loss"], trial["learning_rate"]) for trial in tried if trial["loss"] is not None)
        left = [rate for _, rate in scored]
    if not left:
        path.unlink(missing_ok=True)
        raise ConfigError(
            "RW176",
            f"the loss is not finite at any rate of {', '.join(map(spelled, rates))}; give lower ones, as "
            "--learning-rate auto:RATE,RATE.",
        )
    seconds = round(time.monotonic() - started, 3)
    return {"chosen": left[0], "rows": len(held), "seconds": seconds, "trials": trials, "budget": budget}


def kept_apart(data: Data) -> tuple[Data, Dataset]:
    """The data without held-out training rows, and the held-out rows.

    No prompt is in both parts, and the split does not depend on the order of the rows.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(data.train.dataset):
        ids, labels = row["input_ids"], row["labels"]
        first = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        groups.setdefault(hashlib.sha256(str(ids[:first] or ids).encode()).hexdigest(), []).append(number)
    wanted = min(MOST_ROWS, int(SHARE * len(data.train.dataset)))
    held: list[int] = []
    for _, numbers in sorted(groups.items()):
        if len(held) + len(numbers) <= wanted:
            held += numbers
    if len(held) < LEAST_ROWS:
        raise ConfigError(
            "RW175",
            f"--learning-rate auto holds out a tenth of the rows, which are {len(held)} of "
            f"{len(data.train.dataset)} rows with {len(groups)} prompts here; give a rate, or more rows.",
        )
    apart = set(held)
    others = [number for number in range(len(data.train.dataset)) if number not in apart]
    train = dataclasses.replace(data.train, dataset=data.train.dataset.select(others))
    return dataclasses.replace(data, train=train, evaluation=None), data.train.dataset.select(sorted(held))


def _loss_after(loop: Loop, rows: Dataset) -> float | None:
    """Train, and return the loss on ``rows``; None if the run diverges. Nothing is written."""
    loop.pace = dataclasses.replace(loop.pace, save_steps=None)
    try:
        loop.fit(Watch(model=loop.model, progress=loop.progress, memory=MemoryMeter(loop.model.device.type)))
        loop.objective.eval_rows = rows
        loss = loop.measure(lambda: None)["eval_loss"]
    except Diverged:
        loss = math.nan
    return loss if math.isfinite(loss) else None
