"""Local data for tasks of lm-evaluation-harness: rows in the set's own form, or LLM-Adapters rows converted to it.

The prompts are the harness' own: a task is its YAML file with the data's location replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise.data.files import kind_of, read_file
from rankwise.data.formats import BadRow
from rankwise.errors import DataError
from rankwise.evaluation.tasks.commonsense import Instructions, instructions_in
from rankwise.foreign import Fields, JsonObject

# Names of the sets in the harness, where they differ from the tasks' names.
HARNESS_NAMES = {"siqa": "social_iqa"}
YAML_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "siqa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
COLUMNS = {
    "boolq": ("passage", "question", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "siqa": ("context", "question", "answerA", "answerB", "answerC", "label"),
    "hellaswag": ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
LETTERS = "ABCDE"
Doc = JsonObject


def read_docs(task: str, data: str) -> tuple[list[Doc], str]:
    """Rows of ``data`` as the harness' task expects them, and the sha256 of the file.

    Raises DataError: RW251 for rows that are not the set's, RW252 where LLM-Adapters' rows have lost what is needed.
    """
    adapters = instructions_in(task, data) if task in YAML_FILES else None
    if adapters is not None:
        return [_restored(task, row, adapters, line) for line, row in enumerate(adapters.rows, 1)], adapters.sha256
    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if kind_of(file) and task in file.name.lower())
        if len(found) != 1:
            raise DataError("RW251", f"{path} holds {len(found)} data files named after {task}; give one file.")
        path = found[0]
    content = read_file(path)
    bad = next((line for line, record in content.records if isinstance(record, BadRow)), None)
    if bad is not None or not content.records:
        raise DataError(
            "RW251", f"{path}, {content.counted_in} {bad or 1}: expected one row of {task}, as JSON, CSV or parquet."
        )
    docs = [dict(record) for _, record in content.records if not isinstance(record, BadRow)]
    for (line, _), doc in zip(content.records, docs):
        try:
            json.dumps(doc)
        except TypeError as error:
            raise DataError(
                "RW251", f"{path}, {content.counted_in} {line}: {error}, and {task} takes text and numbers."
            ) from None
        missing = [name for name in COLUMNS.get(task, ()) if name not in doc]
        if missing:
            raise DataError(
                "RW251",
                f"{path}, {content.counted_in} {line}: a row of {task} needs {', '.join(COLUMNS[task])}, and "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
            )
    return docs, content.sha256


def write_task(folder: Path, task: str, yaml_file: Path, docs: Mapping[str, Sequence[Doc]] | None) -> Path:
    """A YAML file in ``folder`` that is ``yaml_file`` with ``docs`` for its data (by split), or with its own."""
    content: JsonObject = {"include": str(yaml_file), "task": HARNESS_NAMES.get(task, task)}
    if docs is not None:
        files = {}
        for split, rows in docs.items():
            files[split] = str(folder / f"{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        content |= {
            "custom_dataset": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache"), "keep_in_memory": True},
            "training_split": "train" if "train" in docs else None,
            "fewshot_split": "train" if "train" in docs else None,
            "validation_split": "validation",
            "test_split": None,
        }
    if task in YAML_FILES and task != "winogrande":
        # Some of the harness's eight tasks lack length-normalised accuracy. WinoGrande's choices share a continuation.
        names = ("acc", "acc_norm")
        content["metric_list"] = [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]
    path = folder / "task.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def _restored(task: str, row: Fields, source: Instructions, line: int) -> Doc:
    if task not in RESTORERS:
        lost = "the passages" if task == "boolq" else "the capitals of the original"
        raise DataError(
            "RW252",
            f"{source.source} is LLM-Adapters' {task}, which has lost {lost}; give the original set for "
            "--protocol loglikelihood, or use --protocol generative.",
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
