"""The learning rate of a run: the given one, the default, or the best of short runs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig

from rankwise.constants import IGNORED
from rankwise.default_rate import default_rate
from rankwise.disk import remove_strays
from rankwise.errors import ConfigError, RunError
from rankwise.foreign import Fields, checked, read_json
from rankwise.records import RateSearch, RateTrial, RunRecord, write_json
from rankwise.reports.numbers import plural
from rankwise.reports.numbers import rate as spelled
from rankwise.training.loop import Loop
from rankwise.training.parts import Pace
from rankwise.training.setup import Data
from rankwise.training.watch import Diverged, MemoryMeter, Observer, Watch

# A given rate this many times the default is told, since it is likely a slip.
FAR_ABOVE = 100
# One in KEPT rates of a round goes on to the next.
KEPT = 3
# Steps of all short runs together, as a share of the run's.
USUAL_BUDGET = 0.25
# The largest number of held-out rows, and their largest share of all rows.
MOST_ROWS, SHARE = 64, 0.1
LEAST_ROWS = 4


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
            loss = loss_after(loop_of(rate, short, training), held)
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


def loss_after(loop: Loop, rows: Dataset) -> float | None:
    """Train, and return the loss on ``rows``; None if the run diverges. Nothing is written."""
    loop.pace = dataclasses.replace(loop.pace, save_steps=None)
    try:
        loop.fit(Watch(model=loop.model, progress=loop.progress, memory=MemoryMeter(loop.model.device.type)))
        loop.objective.eval_rows = rows
        loss = loop.measure(lambda: None)["eval_loss"]
    except Diverged:
        loss = math.nan
    return loss if math.isfinite(loss) else None
