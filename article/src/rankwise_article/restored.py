"""LLM-Adapters' rows of the commonsense sets, turned back into the sets' own rows, which lm-evaluation-harness asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from rankwise.errors import DataError
from rankwise.foreign import Fields, JsonObject
from rankwise_article.commonsense import Instructions, instructions_in

LETTERS = "ABCDE"
Doc = JsonObject


def original_data(task: str, data: str | None, folder: Path) -> str | None:
    """``data``, or a file in ``folder`` with LLM-Adapters' rows turned back into those of the set.

    Raises DataError: RW251 for rows that are not the set's, RA252 where LLM-Adapters' rows have lost what is needed.
    """
    found = None if data is None else instructions_in(task, data)
    if found is None:
        return data
    docs = [restored(task, row, found, line) for line, row in enumerate(found.rows, 1)]
    path = folder / f"{found.sha256[:12]}.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return str(path)


def restored(task: str, row: Fields, source: Instructions, line: int) -> Doc:
    if task not in RESTORERS:
        lost = "the passages" if task == "boolq" else "the capitals of the original"
        raise DataError(
            "RA252",
            f"{source.source} is LLM-Adapters' {task}, which has lost {lost}; give the original set for "
            "--set protocol=loglikelihood, or use --set protocol=generative.",
        )
    try:
        return RESTORERS[task](row["instruction"], int(row["answer"][-1]) - 1)
    except (ValueError, IndexError) as error:
        raise DataError("RW251", f"{source.source}, row {line}: {error}.") from None


def _choices(instruction: str, opening: str, word: str, between: str = " ") -> tuple[str, list[str]]:
    """The question and the texts of the choices in an instruction of LLM-Adapters, blanks as they are."""
    body, end, _ = instruction.rpartition("\n\nAnswer format:")
    question, start, rest = body.removeprefix(f"{opening} ").partition(f"\n\n{word}1: ")
    if not end or not start or not body.startswith(opening):
        raise ValueError(f"expected {opening!r}, a question and {word}1, found {instruction[:60]!r}")
    texts, number = [], 2
    while f"{between}{word}{number}: " in rest:
        text, _, rest = rest.partition(f"{between}{word}{number}: ")
        texts.append(text)
        number += 1
    return question, [*texts, rest]


def _arc(instruction: str, answer: int) -> Doc:
    question, texts = _choices(instruction, "Please choose the correct answer to the question:", "Answer")
    labels = list(LETTERS[: len(texts)])
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": labels[answer]}


def _openbookqa(instruction: str, answer: int) -> Doc:
    doc = _arc(instruction, answer)
    return {"question_stem": doc.pop("question"), **doc}


def _siqa(instruction: str, answer: int) -> Doc:
    text, choices = _choices(instruction, "Please choose the correct answer to the question:", "Answer")
    # The harness joins "context question", so it does not matter where the two are split.
    context, _, question = text.partition(" ")
    named = dict(zip(("answerA", "answerB", "answerC"), choices))
    return {"context": context, "question": question, **named, "label": str(answer + 1)}


def _piqa(instruction: str, answer: int) -> Doc:
    goal, texts = _choices(instruction, "Please choose the correct solution to the question:", "Solution", "\n\n")
    return {"goal": goal, "sol1": texts[0], "sol2": texts[1], "label": answer}


def _winogrande(instruction: str, answer: int) -> Doc:
    opening = "Please choose the correct answer to fill in the blank to complete the given sentence:"
    sentence, texts = _choices(instruction, opening, "Option")
    return {"sentence": sentence, "option1": texts[0], "option2": texts[1], "answer": str(answer + 1)}


RESTORERS: Mapping[str, Callable[[str, int], Doc]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "siqa": _siqa,
    "piqa": _piqa,
    "winogrande": _winogrande,
}
