"""The eight commonsense sets with written answers, as LLM-Adapters (Hu et al. 2023) and DoRA (2024) measure them.

The data are that project's rows: ``instruction``, ``input``, ``output``, ``answer``. The first answer word in what the
model writes counts: ``true``, ``solution2``, ``answer3``, ``ending1``, ``option2``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rankwise.data import BadRow, kind_of, read_file, rows_from_records
from rankwise.errors import DataError
from rankwise.evaluation import Decoding, Engine, Example, Question, Task, Tell, text_sha256, write_answers
from rankwise.foreign import Fields, JsonObject
from rankwise_article.scores import warn_of_empty

# Names of the sets in the LLM-Adapters repository, where they differ from the tasks' names.
FOLDERS = {"siqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
WORDS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "siqa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "arc_easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "arc_challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
# LLM-Adapters reads five words from the answers of every set with such words.
READ = dict.fromkeys(("siqa", "openbookqa"), WORDS["arc_easy"])
# LLM-Adapters' template is indented, and adapters trained with it expect these blanks.
INDENT = " " * 16


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Rows of one set, and the hash of their file."""

    source: str
    sha256: str
    rows: Sequence[Fields]


def instructions_in(task: str, data: str) -> Instructions | None:
    """The LLM-Adapters rows in ``data`` (a file, or a folder with ``test.json``, also below the set's name).

    None if ``data`` is something else. Raises DataError (RW251) for rows that lack a field.
    """
    path = _file_in(task, Path(data).expanduser())
    if path is None or kind_of(path) is None:
        return None
    content = read_file(path)
    first = next((record for _, record in content.records if not isinstance(record, BadRow)), {})
    if not {"instruction", "answer"} <= set(first):
        return None
    rows = []
    for line, record in content.records:
        if isinstance(record, BadRow) or not (
            isinstance(record.get("instruction"), str) and record.get("answer") in WORDS[task]
        ):
            raise DataError(
                "RW251",
                f"{path}, {content.counted_in} {line}: expected text in `instruction`, and in `answer` one of "
                f"{', '.join(WORDS[task])}.",
            )
        rows.append(record)
    return Instructions(str(path), content.sha256, rows)


def _file_in(task: str, path: Path) -> Path | None:
    if path.is_dir():
        places = (path, path / FOLDERS.get(task, task))
        return next((place / "test.json" for place in places if (place / "test.json").is_file()), None)
    return path if path.is_file() else None


class Commonsense(Task):
    """Generated answers. ``prompt_style``: ``llm-adapters`` is that project's template, ``trained`` training's."""

    primary = "accuracy"
    packages = ("rankwise-article",)
    higher_is_better = {"accuracy": True}  # noqa: RUF012  read-only

    def __init__(
        self, name: str, data: Instructions, *, limit: int | None, prompt_style: str, decoding: JsonObject
    ) -> None:
        self.name, self.data, self.prompt_style, self.decoding = name, data, prompt_style, decoding
        self.rows = data.rows[:limit]

    def describe(self) -> JsonObject:
        return {"protocol": "generative", "prompt_style": self.prompt_style, **self.decoding}

    @property
    def data_sha256(self) -> str:
        return self.data.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        texts, ids, stops = self._prompts(engine)
        decoding = Decoding(stop_ids=engine.stop_ids(stops), **self.decoding)
        clusters = _clusters(self.rows)
        questions = [
            Question(_unique_id(row, number), row_ids, text, (row["answer"],), cluster)
            for number, (row, text, row_ids, cluster) in enumerate(zip(self.rows, texts, ids, clusters))
        ]
        return write_answers(engine, questions, decoding, folder, tell, task=self.name, finish=self._finish)

    def _prompts(self, engine: Engine) -> tuple[list[str], list[tuple[int, ...]], set[int]]:
        """Prompts as texts and as ids, and the tokens that end an answer in their style."""
        if self.prompt_style == "llm-adapters":
            texts = [adapters_prompt(row["instruction"], row.get("input") or "") for row in self.rows]
            return texts, [engine.text_ids(text) for text in texts], set()
        rows = rows_from_records(list(enumerate(self.rows, 1)), self.data.source, sha256=self.data.sha256)
        encoder = engine.encoder(rows)
        return [row.prompt for row in rows], engine.prompt_ids(encoder, rows.items), encoder.stop_ids()

    def _finish(self, question: Question, text: str) -> Example:
        right = extract_answer(self.name, text) == (question.references or ("",))[0]
        scores = {"accuracy": float(right)}
        return Example(
            id=question.id,
            prompt=question.prompt,
            prediction=text.strip(),
            scores=scores,
            references=question.references,
            cluster=question.cluster,
        )

    def notes(self, examples: Sequence[Example]) -> list[str]:
        notes = warn_of_empty(self.name, examples)
        unread = sum(not extract_answer(self.name, example.prediction) for example in examples)
        if unread:
            notes.append(f"{unread:,} of {len(examples):,} answers hold none of {', '.join(WORDS[self.name])}")
        return notes


def extract_answer(task: str, text: str) -> str:
    """The first answer word in ``text``, in lower case like the data; empty if there is none."""
    found = re.search("|".join(READ.get(task, WORDS[task])), text)
    return found.group() if found else ""


def adapters_prompt(instruction: str, context: str = "") -> str:
    """Alpaca's prompt exactly as LLM-Adapters writes it, including its blanks."""
    given = ", paired with an input that provides further context" if context else ""
    # LLM-Adapters' template has a blank after this sentence only if there is no context.
    opening = (
        f"Below is an instruction that describes a task{given}. "
        f"Write a response that appropriately completes the request.{'' if context else ' '}"
    )
    sections = [("Instruction", instruction), *([("Input", context)] if context else []), ("Response", "")]
    return "\n\n".join([opening, *(f"{INDENT}### {title}:\n{INDENT}{text}" for title, text in sections)])


def _unique_id(row: Fields, number: int) -> str:
    content = json.dumps([row["instruction"], row.get("input"), row["answer"]], ensure_ascii=True)
    return f"{number}-{text_sha256(content)}"


def _clusters(rows: Sequence[Fields]) -> list[str | None]:
    """Clusters of questions that occur more than once with other choices."""
    stems = [re.split(r"\n\n", row["instruction"])[0] for row in rows]
    counts = Counter(stems)
    if len(counts) == len(stems):
        return [None] * len(stems)
    return [text_sha256(stem) for stem in stems]
