"""The interface of a task, and what most tasks share: texts generated for prompts, and standard errors of means.

Miller, "Adding Error Bars to Evals", arXiv 2411.00640. A score is a weighted mean ``m = sum w_i s_i / sum w_i`` (w = 1
for accuracy, w = tokens for a loss). With ``r_i = w_i (s_i - m)`` and clusters c of questions that share a source text,

    SE(m)^2  =  G / (G - 1)  *  sum_c (sum_{i in c} r_i)^2  /  (sum w)^2

which for w = 1 and clusters of one question is the usual sd / sqrt(n). The 95 % interval is the mean plus and minus
t SE, with t the 97.5 % quantile of Student's distribution with G - 1 degrees of freedom. A paired difference is the
mean of ``s_i(a) - s_i(b)`` on the same questions, with the same formula.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from rankwise.errors import warn
from rankwise.evaluation.record import Example, Journal, TaskResult
from rankwise.foreign import JsonObject

if TYPE_CHECKING:
    from rankwise.acceleration.generation import Decoding, Prompt
    from rankwise.evaluation.engine import Engine

# Reports progress: (questions done, questions in all).
Tell = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a task over its examples."""

    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float | None]
    notes: Sequence[str] = ()


class Task(ABC):
    """A set of questions and a way of scoring them. Subclasses are final."""

    name: str
    primary: str
    higher_is_better: Mapping[str, bool]
    # Distributions whose versions the record names, besides those that every task uses.
    packages: Sequence[str] = ()

    @abstractmethod
    def describe(self) -> JsonObject:
        """What the answers depend on besides model and data. It is written to the record."""

    def extra_settings(self) -> JsonObject:
        """What the figures depend on and the answers do not, such as a judge."""
        return {}

    def is_final(self, result: TaskResult) -> bool:
        """Whether ``result``, made with these settings, is final, so that the task need not run again."""
        return True

    @property
    @abstractmethod
    def data_sha256(self) -> str | None:
        """Hash of the questions' source."""

    @abstractmethod
    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        """All examples, in the order of the data. Each batch is written to ``folder`` when it is finished."""

    def with_scores(self, examples: Sequence[Example]) -> Sequence[Example]:
        """``examples`` with scores that need the whole set. Most tasks score each answer at once."""
        return examples

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """What a reader should know of the answers."""
        return []

    def summarize(self, examples: Sequence[Example]) -> Summary:
        """Metrics and their standard errors. For most tasks each metric is the mean of the examples' scores."""
        clusters = clusters_of([example.cluster for example in examples])
        means = {
            name: mean_of([example.scores[name] for example in examples], clusters) for name in self.higher_is_better
        }
        return Summary(
            {name: mean.value for name, mean in means.items()},
            {name: mean.standard_error for name, mean in means.items()},
            self.notes(examples),
        )

    def difference(self, a: Sequence[Example], b: Sequence[Example]) -> dict[str, Mean]:
        """``a - b`` on the same questions, for each metric that has an interval."""
        return difference_of_means(a, b, list(self.higher_is_better))


def answer_in_batches(
    ids: Sequence[str],
    batches: Sequence[Sequence[int]],
    answer: Callable[[Sequence[int]], Sequence[Example]],
    folder: Path,
    tell: Tell,
) -> list[Example]:
    """Examples for ``ids``, batch by batch. Each batch is on disk before the next begins.

    A batch with a missing example is answered as a whole, so that an answer never depends on an interruption.
    """
    journal = Journal(folder)
    tell(sum(name in journal.done for name in ids), len(ids))
    for batch in batches:
        if all(ids[index] in journal.done for index in batch):
            continue
        journal.append(answer(batch))
        tell(sum(name in journal.done for name in ids), len(ids))
    return [journal.done[name] for name in ids]


def difference_of_means(a: Sequence[Example], b: Sequence[Example], names: Sequence[str]) -> dict[str, Mean]:
    clusters = clusters_of([example.cluster for example in a])
    return {
        name: paired_difference([x.scores[name] for x in a], [x.scores[name] for x in b], clusters) for name in names
    }


# Number of last tokens in which a stop string is searched.
STOP_WINDOW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, as token ids and as text."""

    id: str
    ids: tuple[int, ...]
    prompt: str
    references: tuple[str, ...] | None = None
    cluster: str | None = None


def write_answers(
    engine: Engine,
    questions: Sequence[Question],
    decoding: Decoding,
    folder: Path,
    tell: Tell,
    *,
    task: str,
    finish: Callable[[Question, str], Example],
) -> list[Example]:
    """Answer ``questions``; return what ``finish`` makes of each question and answer, in the order of the questions."""
    longest = max((len(question.ids) for question in questions), default=0)
    decoding = with_room(decoding, engine.max_length, longest, task)
    # The tasks' own module is read without torch.
    from rankwise.acceleration.generation import Prompt

    prompts = fitting(engine, [Prompt(question.ids) for question in questions], decoding, task)
    write = writer(engine, prompts, decoding)

    def answer(batch: Sequence[int]) -> list[Example]:
        return [
            dataclasses.replace(finish(questions[index], text), is_cut=is_cut)
            for index, (text, is_cut) in zip(batch, write(batch))
        ]

    ids = [question.id for question in questions]
    return answer_in_batches(ids, engine.batches(prompts, decoding), answer, folder, tell)


def writer(
    engine: Engine, prompts: Sequence[Prompt], decoding: Decoding
) -> Callable[[Sequence[int]], list[tuple[str, bool]]]:
    """A function from a batch of indices into ``prompts`` to their answers, each with whether the limit of tokens ended
    it.
    """
    generator = engine.generator(decoding)

    def ends(ids: list[int]) -> bool:
        tail = engine.decode(ids[-STOP_WINDOW_TOKENS:])
        return any(stop in tail for stop in decoding.stop_strings)

    def write(batch: Sequence[int]) -> list[tuple[str, bool]]:
        generator.share(prompts)
        answers = generator.answers([prompts[index] for index in batch], ends if decoding.stop_strings else None)
        texts = [engine.decode(ids) for ids in answers]
        whole = [before_stops(text, decoding.stop_strings) for text in texts]
        return [
            (shown, len(ids) >= decoding.max_new_tokens and shown == text)
            for shown, text, ids in zip(whole, texts, answers)
        ]

    return write


def before_stops(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` up to the first stop string."""
    ends = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def with_room(decoding: Decoding, positions: int, longest: int, task: str) -> Decoding:
    """``decoding`` with ``max_new_tokens`` cut to what the longest prompt leaves, but to no less than half of all
    positions. Warns (RW256) if it is cut. ``positions``: the model's context length in tokens.
    """
    room = max(1, positions // 2, positions - longest)
    if longest + decoding.max_new_tokens <= positions or decoding.max_new_tokens <= room:
        return decoding
    warn(
        "RW256",
        f"{task}: the model sees {positions:,} tokens, prompt and answer together, so answers end at {room:,} tokens "
        f"instead of {decoding.max_new_tokens:,}; take a model with a longer context for whole ones.",
    )
    return dataclasses.replace(decoding, max_new_tokens=room)


def fitting(engine: Engine, prompts: Sequence[Prompt], decoding: Decoding, task: str) -> list[Prompt]:
    """Prompts that leave room for the answer. Longer ones lose their beginning, with a warning (RW254)."""
    room = max(1, engine.max_length - decoding.max_new_tokens)
    cut = sum(len(prompt.ids) > room for prompt in prompts)
    if cut:
        warn(
            "RW254",
            f"{task}: {cut:,} of {len(prompts):,} prompts are longer than the {room:,} tokens that the model has for "
            "them; they lose their beginning.",
        )
    return [dataclasses.replace(prompt, ids=prompt.ids[-room:]) for prompt in prompts]


# --- standard errors of means ---


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, its standard error (None with fewer than two clusters), and the number of its independent clusters."""

    value: float
    standard_error: float | None
    clusters: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        if self.standard_error is None or self.clusters < 2:
            return None
        reach = float(special.stdtrit(self.clusters - 1, 0.975)) * self.standard_error
        return self.value - reach, self.value + reach


def mean_of(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, weights: Sequence[float] | None = None
) -> Mean:
    """The weighted mean of (n,) scores with its clustered standard error; NaN for no score."""
    s = np.asarray(scores, dtype=np.float64)
    w = np.ones_like(s) if weights is None else np.asarray(weights, dtype=np.float64)
    total = float(w.sum())
    if total == 0:
        return Mean(math.nan, None, 0)
    value = float((w * s).sum() / total)
    residuals = w * (s - value)
    index = (
        np.arange(len(s)) if clusters is None else np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    )
    sums = np.bincount(index, weights=residuals)
    groups = len(sums)
    if groups < 2:
        return Mean(value, None, groups)
    variance = groups / (groups - 1) * float((sums**2).sum()) / total**2
    return Mean(value, math.sqrt(variance), groups)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
) -> Mean:
    """Mean of ``a - b`` over the same questions in the same order."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return mean_of(difference.tolist(), clusters, weights)


def clusters_of(names: Sequence[str | None]) -> list[str] | None:
    """Cluster names for ``mean_of``; None if every question is a cluster of its own."""
    if all(name is None for name in names):
        return None
    return [f"question {index}" if name is None else f"cluster {name}" for index, name in enumerate(names)]
