"""``--learning-rate auto``: before the run itself, find its rate by short runs at the rates of a grid.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943). Round k trains each of the n_k remaining rates from
the same start for  floor(B / (K n_k))  steps, where B is the budget in steps and K the number of rounds, and keeps the
best third,  n_{k+1} = ceil(n_k / 3),  until one rate is left. Each short run has a complete schedule with warm-up and
decay, since high rates look worse than they are in a run that is cut off before its decay.

A rate is judged by the loss on training rows that are held out from the short runs. Evaluation data are not used. The
run itself starts from the same weights as the short runs, and trains on all rows.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
import time
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from rankwise.config import TrainSettings
from rankwise.constants import IGNORED
from rankwise.default_rate import default_rate
from rankwise.errors import ConfigError, RunError
from rankwise.records import RateSearch, RateTrial, load_record
from rankwise.reports.numbers import plural
from rankwise.reports.numbers import rate as spelled
from rankwise.training.loop import Loop
from rankwise.training.observer import Observer
from rankwise.training.setup import Data
from rankwise.training.watch import Diverged, MemoryMeter, Watch

# One in KEPT rates of a round goes on to the next.
KEPT = 3
# Steps of all short runs together, as a share of the run's.
USUAL_BUDGET = 0.25
# The largest number of held-out rows, and their largest share of all rows.
MOST_ROWS, SHARE = 64, 0.1
LEAST_ROWS = 4


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


def search(
    given: TrainSettings,
    data: Data,
    model: nn.Module,
    steps: int,
    loop_of: Callable[[TrainSettings, Data], Loop],
    observer: Observer,
) -> RateSearch:
    """Search the best rate for a run of ``steps``. The model's weights are restored.

    Raises ConfigError: RW175 for too few rows to hold some out, RW176 if every rate diverges.
    """
    training, held = kept_apart(data)
    started = time.monotonic()
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
            loss = _loss_after(loop_of(_short_run(given, rate, length, length / steps), training), held)
            tried.append({"learning_rate": rate, "steps": length, "loss": loss})
            with torch.no_grad():
                for parameter, value in start.items():
                    parameter.copy_(value)
                    parameter.grad = None
            gc.collect()
        trials += tried
        scored = sorted((trial["loss"], trial["learning_rate"]) for trial in tried if trial["loss"] is not None)
        left = [rate for _, rate in scored]
    if not left:
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
        loop.model.eval()
        loop.objective.eval_rows = rows
        with torch.no_grad(), loop.autocast():
            loss = loop.objective.evaluate(loop.model, lambda: None)["eval_loss"]
    except Diverged:
        loss = math.nan
    return loss if math.isfinite(loss) else None
