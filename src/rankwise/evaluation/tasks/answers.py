"""Generate texts for prompts: what the generating tasks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rankwise.acceleration.generation import Decoding, Prompt
from rankwise.errors import warn
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.record import Example
from rankwise.evaluation.tasks.base import Tell, answer_in_batches

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
    positions. Warns (RW256) where it is cut. ``positions``: the model's context length in tokens.
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
