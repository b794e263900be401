"""Local data for tasks of lm-evaluation-harness: rows in the set's own form.

The prompts are the harness' own: a task is its YAML file with the data's location replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.data.files import kind_of, read_file
from rankwise.data.formats import BadRow
from rankwise.errors import DataError
from rankwise.foreign import JsonObject

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
Doc = JsonObject


def read_docs(task: str, data: str) -> tuple[list[Doc], str]:
    """Rows of ``data`` as the harness' task expects them, and the sha256 of the file.

    Raises DataError (RW251) for rows that are not the set's.
    """
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
