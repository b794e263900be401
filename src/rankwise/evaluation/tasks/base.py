"""The interface of a task, and what most tasks share: generating texts for prompts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import warn
from rankwise.evaluation.errors_of_means import Mean, clusters_of, mean_of, paired_difference
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
