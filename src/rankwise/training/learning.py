"""The parts of a run that follow from its settings: what is learned, the loop with its options, the learning rate."""

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
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.adapters import has_adapter
from rankwise.adapters.folder import labels_of
from rankwise.config import TrainSettings, default_rate, logging_steps_of
from rankwise.constants import IGNORED
from rankwise.data import Rows, encode_preferences
from rankwise.data.encoding import RowEncoder
from rankwise.data.formats import Format
from rankwise.data.objectives import (
    encode_labelled,
    encode_prompts,
    formats_of,
    label_counts,
    labels_in,
    unpaired,
)
from rankwise.disk import remove_strays
from rankwise.errors import ConfigError, RunError, some_of
from rankwise.foreign import checked, read_json
from rankwise.labels import Labels
from rankwise.models.load import table_rows
from rankwise.objectives import GENERATIONS, MAX_COMPLETION_LENGTH, OBJECTIVES
from rankwise.records import RateSearch, RateTrial, load_record, write_json
from rankwise.reports.numbers import plural
from rankwise.reports.numbers import rate as spelled
from rankwise.training import ranks
from rankwise.training.batches import packed
from rankwise.training.loop import Loop, Options
from rankwise.training.objectives import Classification, Demonstrations, Preferences, Scoring, layout_of
from rankwise.training.optimizers import make_optimizer
from rankwise.training.setup import Data, LoadedBase, Texts, check_positions, encode_data
from rankwise.training.step import Computing, Objective, around_step
from rankwise.training.watch import Diverged, MemoryMeter, Observer, Progress, Watch

# Default interval of checkpoints, and the shortest of evaluations, as a share of the run.
TENTH = 0.1
# An evaluation is at most this share of the run's time in all, where a row costs half of what it costs in training: its
# forward pass only.
EVALUATING, ROW_COST = 0.2, 0.5
# One in KEPT rates of a round goes on to the next.
KEPT = 3
# Steps of all short runs together, as a share of the run's.
USUAL_BUDGET = 0.25
# The largest number of held-out rows, and their largest share of all rows.
MOST_ROWS, SHARE = 64, 0.1
LEAST_ROWS = 4
Encode = Callable[[TrainSettings, PreTrainedTokenizerBase, Texts], Data]


@dataclasses.dataclass(frozen=True)
class Learning:
    """The parts of a run that depend on its objective."""

    # Encodes rows to token ids.
    encode: Encode
    # (settings, data, base, whether rows may be laid end to end) -> the objective.
    objective: Callable[[TrainSettings, Data, LoadedBase, bool], Objective]
    # The labels of the training rows, where the objective answers with labels.
    labels_of: Callable[[TrainSettings, Rows], Labels] | None = None
    # The data formats of the objective; None for those of demonstrations.
    formats: Collection[Format] | None = None
    # Whether the rows have labels.
    has_labels: bool = True


def learning_of(given: TrainSettings) -> Learning:
    """The parts of the run's objective. Raises ConfigError for a reward that cannot be had."""
    if given.objective == "sft":
        return Learning(encode_data, _demonstrations)
    if given.objective == "classify":
        return Learning(_encode_labelled, _classification, _labels, formats=formats_of("classify"), has_labels=False)
    if given.objective == "grpo":
        return _of_rewards(given)
    return Learning(_encode_preferences, _preferences, formats=formats_of(given.objective))


def _of_batches(given: TrainSettings, base: LoadedBase) -> dict[str, int]:
    """The padding token, the rows of a micro-batch of all processes, and the seed of their order."""
    pad = int(base.tokenizer.pad_token_id or 0)
    return {"pad": pad, "size": given.batch_size * ranks.count(), "seed": given.seed}


def _demonstrations(given: TrainSettings, data: Data, base: LoadedBase, flat: bool) -> Demonstrations:
    rows = data.train.dataset
    return Demonstrations(
        base.model,
        packed(rows, given.max_length, given.seed) if given.packing else rows,
        data.evaluation and data.evaluation.dataset,
        **_of_batches(given, base),
        flat=flat or given.packing,
        label_smoothing=given.label_smoothing,
    )


def _encode_preferences(given: TrainSettings, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
    if OBJECTIVES[given.objective].rows == "mark":
        eval_rows = None if texts.eval_rows is None else unpaired(texts.eval_rows)
        texts = dataclasses.replace(texts, rows=unpaired(texts.rows), eval_rows=eval_rows)
    return encode_data(given, tokenizer, texts, encode_preferences)


def _preferences(given: TrainSettings, data: Data, base: LoadedBase, flat: bool) -> Preferences:
    return Preferences(
        Scoring(base.model, layout_of(given.objective, flat=flat)),
        data.train.dataset,
        data.evaluation and data.evaluation.dataset,
        **_of_batches(given, base),
        loss_type=given.loss_type or OBJECTIVES[given.objective].losses[0],
        beta=given.beta or OBJECTIVES[given.objective].beta,
        max_length=min(given.max_length, table_rows(base.model) or given.max_length),
        label_smoothing=given.label_smoothing,
        desirable_weight=given.desirable_weight or 1.0,
        undesirable_weight=given.undesirable_weight or 1.0,
    )


def _labels(given: TrainSettings, rows: Rows) -> Labels:
    """The labels of the rows. Raises ConfigError (RW764) if the adapter to continue answers with others."""
    labels = labels_in(rows)
    trained = None if given.adapter is None else labels_of(given.adapter)
    if given.adapter is not None and trained != labels:
        has = "writes text" if trained is None else f"answers with {some_of(trained.names)} ({trained.problem})"
        raise ConfigError(
            "RW764",
            f"--adapter {given.adapter} {has}, and the labels of {rows.source} are {some_of(labels.names)} "
            f"({labels.problem}); give data with its labels, or leave --adapter out.",
        )
    return labels


def _encode_labelled(given: TrainSettings, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
    labels = labels_in(texts.rows)
    encode = functools.partial(
        encode_labelled,
        tokenizer=tokenizer,
        labels=labels,
        max_length=given.max_length,
        skip_bad_rows=given.skip_bad_rows,
    )
    evaluation = None if texts.eval_rows is None else encode(texts.eval_rows, name="eval")
    notes = {"labels": {**labels.to_json(), "counts": label_counts(texts.rows, labels)}}
    return Data(encode(texts.rows), evaluation, texts, notes)


def _classification(given: TrainSettings, data: Data, base: LoadedBase, flat: bool) -> Classification:
    return Classification(
        data.train.dataset,
        data.evaluation and data.evaluation.dataset,
        labels_in(data.texts.rows),
        **_of_batches(given, base),
    )


def _of_rewards(given: TrainSettings) -> Learning:
    from rankwise.training.grpo import read_rewards

    rewards, longest = read_rewards(given.reward or ()), given.max_completion_length or MAX_COMPLETION_LENGTH

    def encode(given: TrainSettings, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
        data = encode_data(given, tokenizer, texts, functools.partial(encode_prompts, room=longest))
        hashes = [reward.sha256 for reward in rewards if reward.sha256 is not None]
        notes = {"rewards_sha256": hashlib.sha256(" ".join(hashes).encode()).hexdigest()} if hashes else {}
        return dataclasses.replace(data, notes=notes)

    objective = functools.partial(_rewarded_answers, rewards=rewards, longest=longest)
    return Learning(encode, objective, formats=formats_of("grpo", **given.columns), has_labels=False)


def _rewarded_answers(
    given: TrainSettings, data: Data, base: LoadedBase, flat: bool, *, rewards: Sequence[Any], longest: int
) -> Objective:
    """Raises ConfigError (RW775) for prompts that do not fill a step."""
    from rankwise.acceleration.generation import stop_ids_of
    from rankwise.training.grpo import RewardedAnswers

    model, tokenizer, prompts = base.model, base.tokenizer, data.train.dataset
    check_positions(model, [prompts], longest)
    size, group = given.batch_size * ranks.count(), given.num_generations or GENERATIONS
    asked = size * given.gradient_accumulation // group
    if asked > len(prompts):
        raise ConfigError("RW775", f"a step takes {asked} prompts and there are {len(prompts)}; lower --batch-size.")
    return RewardedAnswers(
        Scoring(model, layout_of(given.objective, flat=flat), temperature=given.temperature or 1.0),
        prompts,
        data.evaluation and data.evaluation.dataset,
        pad=int(tokenizer.pad_token_id or 0),
        decode=functools.partial(tokenizer.batch_decode, skip_special_tokens=True),
        rewards=rewards,
        weights=given.reward_weights or (1.0,) * len(rewards),
        stop_ids=stop_ids_of(model, tokenizer, RowEncoder(data.texts.rows, tokenizer, data.texts.template).stop_ids()),
        size=size,
        asked=asked,
        group=group,
        longest=longest,
        seed=given.seed,
        loss_type=given.loss_type or OBJECTIVES[given.objective].losses[0],
        beta=given.beta or 0.0,
    )


def make_loop(
    given: TrainSettings,
    data: Data,
    *,
    learning: Learning,
    base: LoadedBase,
    computing: Computing,
    flat: bool,
    progress: Callable[[], Progress] = Progress,
    is_evaluated: bool = False,
) -> Loop:
    """A run's loop. ``flat``: rows may be laid end to end; ``is_evaluated``: a resumed run needs no evaluation at its
    start."""
    objective = learning.objective(given, data, base, flat)
    micro_batches = len(objective.order(0))
    total = given.max_steps or math.ceil(given.epochs * max(1, math.ceil(micro_batches / given.gradient_accumulation)))
    evaluates = data.evaluation is not None
    eval_steps = given.eval_steps or math.ceil(total * TENTH)
    # Early stopping counts evaluations, which then come at every tenth, whatever they cost.
    if data.evaluation is not None and not (given.eval_steps or given.early_stopping):
        rows = given.batch_size * given.gradient_accumulation * ranks.count()
        eval_steps = evaluation_steps_of(total, rows, len(data.evaluation.dataset))
    options = Options(
        total_steps=total,
        accumulation=given.gradient_accumulation,
        schedule=given.lr_scheduler_type,
        warmup_steps=given.warmup_steps,
        max_grad_norm=given.max_grad_norm,
        seed=given.seed,
        logging_steps=given.logging_steps or logging_steps_of(total),
        eval_steps=eval_steps if evaluates else None,
        save_steps=given.save_steps or given.eval_steps or math.ceil(total * TENTH),
        evaluates_first=evaluates and not is_evaluated,
        early_stopping=given.early_stopping,
        autocast=base.autocast,
        checkpoint_limit=given.save_total_limit,
    )
    optimizer = functools.partial(
        make_optimizer,
        given.optimizer,
        base.model,
        rate=given.rate,
        weight_decay=given.weight_decay,
        loraplus_ratio=given.loraplus_ratio if has_adapter(base.model) else None,
    )
    around = functools.partial(around_step, base.model, computing)
    return Loop(base.model, objective, options, optimizer, progress(), given.output, around)


def evaluation_steps_of(steps: int, rows: int, eval_rows: int) -> int:
    """The default of ``eval_steps`` for ``steps`` steps of ``rows`` rows, from what evaluations and steps cost: as many
    evaluations as fit into their share of the run, but one before the first step, one after the last, and at most ten
    more than the first. Counted in rows, not in seconds, so that a run evaluates at the same steps on every machine.
    """
    affordable = int(steps * rows * EVALUATING / (1 - EVALUATING) / (eval_rows * ROW_COST))
    return math.ceil(steps / min(10, max(1, affordable - 1)))


# --- the learning rate ---


def with_rate(given: TrainSettings, found: RateSearch) -> TrainSettings:
    return given.model_copy(update={"learning_rate": found["chosen"], "budget": None})


def with_default_rate(given: TrainSettings, model: PreTrainedModel, observer: Observer) -> TrainSettings:
    """The settings with the default rate of this model, or with the three rates around it to search among."""
    if given.learning_rate not in (None, "auto"):
        return given
    config = model.config.get_text_config()
    usual = default_rate(model.config.model_type, getattr(config, "hidden_size", 0), given.model_dump())
    if given.searches:
        return given.model_copy(update={"learning_rate": f"auto:{','.join(map(repr, usual.around))}"})
    observer.note(f"learning rate {usual}")
    return given.model_copy(update={"learning_rate": usual.rate})


def with_found_rate(given: TrainSettings) -> TrainSettings:
    """The settings of a resumed run with the run's own rate, if it is its default or was searched for. Raises
    RunError (RW507) for a different search.
    """
    record = load_record(given.output)
    found = record.rate_search
    if given.learning_rate is None:
        return given.model_copy(update={"learning_rate": record.settings["learning_rate"]})
    if found is None or not given.searches:
        return given
    before = sorted({trial["learning_rate"] for trial in found["trials"]}), found["budget"]
    if before != (list(given.searched_rates) or before[0], given.budget):
        raise RunError(
            "RW507",
            f"the run in {given.output} tried the rates {', '.join(map(spelled, before[0]))} with --budget "
            f"{before[1] or USUAL_BUDGET:g}, and a different search is asked for; resume without --learning-rate and "
            "--budget.",
        )
    return with_rate(given, found)


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


def _tried_before(path: Path, given: TrainSettings, inputs: Sequence[object]) -> _Tried:
    """The short runs of the same search in ``path``, if there are any."""
    remove_strays(path.parent, [path.name])
    settings = given.model_dump(mode="json", exclude={"output", "overwrite", "ignore_plan"})
    key = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        if (found := checked(_Tried, read_json(path))).key == key:
            return found
    return _Tried(key)


def search(
    given: TrainSettings,
    data: Data,
    model: nn.Module,
    steps: int,
    loop_of: Callable[[TrainSettings, Data], Loop],
    observer: Observer,
    inputs: Sequence[object],
) -> RateSearch:
    """Search the best rate for a run of ``steps`` by short runs. The model's weights are restored.

    Each short run is noted in a file as it ends, so that the same command continues a search that was stopped.
    ``inputs``: what the losses depend on in addition to the settings, as JSON.

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943). Round k trains each of the n_k remaining rates
    from the same start for  floor(B / (K n_k))  steps, where B is the budget in steps and K the number of rounds, and
    keeps the best third,  n_{k+1} = ceil(n_k / 3),  until one rate is left. Each short run has a complete schedule with
    warm-up and decay, since high rates look worse than they are in a run that is cut off before its decay.

    A rate is judged by the loss on training rows that are held out from the short runs. Evaluation data are not used.
    The run itself starts from the same weights as the short runs, and trains on all rows.

    Raises ConfigError: RW175 for too few rows to hold some out, RW176 if every rate diverges.
    """
    training, held = kept_apart(data)
    path = search_file(given.output)
    noted = _tried_before(path, given, inputs)
    known = {(trial["learning_rate"], trial["steps"]): trial for trial in noted.trials}
    started = time.monotonic() - noted.seconds
    left: Sequence[float] = given.searched_rates
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = {parameter: parameter.detach().to("cpu", copy=True) for parameter in trained}
    trials: list[RateTrial] = []
    for count, length in rounds(len(left), round(steps * (given.budget or USUAL_BUDGET))):
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
            loss = _loss_after(loop_of(_short_run(given, rate, length, length / steps), training), held)
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
        rates = ", ".join(map(spelled, given.searched_rates))
        raise ConfigError(
            "RW176",
            f"the loss is not finite at any rate of {rates}; give lower ones, as --learning-rate auto:RATE,RATE.",
        )
    seconds = round(time.monotonic() - started, 3)
    return {"chosen": left[0], "rows": len(held), "seconds": seconds, "trials": trials, "budget": given.budget}


def _short_run(given: TrainSettings, rate: float, length: int, share: float) -> TrainSettings:
    """The settings of a run at ``rate`` with ``length`` steps, a ``share`` of the whole run's."""
    changes = {
        "learning_rate": rate,
        "max_steps": length,
        "warmup_steps": round(given.warmup_steps * min(1.0, share)),
        "report_to": (),
    }
    return given.model_copy(update=changes)


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
    loop.options = dataclasses.replace(loop.options, save_steps=None)
    try:
        loop.fit(Watch(loop.model, loop.progress, MemoryMeter(loop.model.device.type)))
        loop.objective.eval_rows = rows
        loss = loop.measure(lambda: None)["eval_loss"]
    except Diverged:
        loss = math.nan
    return loss if math.isfinite(loss) else None
