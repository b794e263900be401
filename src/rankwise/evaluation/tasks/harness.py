"""Tasks of lm-evaluation-harness, by name. Prompts, filters and metrics are the harness's; `EngineLM` answers.

Local data for tasks of lm-evaluation-harness: rows in the set's own form.

The prompts are the harness' own: a task is its YAML file with the data's location replaced.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.compat import lm_eval
from rankwise.data.files import kind_of, read_file
from rankwise.data.formats import BadRow
from rankwise.data.rows import content_sha256
from rankwise.errors import ConfigError, DataError, one_line, some_of
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.record import Example, Responses, text_sha256
from rankwise.evaluation.tasks.base import Mean, Summary, Task, Tell, clusters_of, difference_of_means, mean_of
from rankwise.evaluation.tasks.names import harness_folder, unknown_task
from rankwise.foreign import Fields, JsonObject

# A field that several questions share names their source text: the first of these that does.
SOURCE_FIELDS = ("passage", "context", "article", "paragraph", "story", "background", "goal", "ctx")
PRIMARY = ("acc_norm", "acc", "exact_match", "f1", "bleu", "word_perplexity")
SHOWN_CHARACTERS = 2000
SAME = 1e-9
# simple_evaluate's: the same worked examples as by its command line.
FEWSHOT_SEED = 1234


class HarnessTask(Task):
    """``data`` replaces the hub's data; with ``num_fewshot`` None the task's own number of examples is used."""

    higher_is_better: dict[str, bool]

    def __init__(
        self,
        name: str,
        *,
        data: str | None,
        fewshot_data: str | None,
        num_fewshot: int | None,
        limit: int | None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.num_fewshot = num_fewshot
        if fewshot_data is not None and data is None:
            raise ConfigError(
                "RW112",
                f"--task {name} --fewshot-data needs --data too: with the hub's questions go the hub's own examples.",
            )
        self._fewshot_sha256: str | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="rankwise-")
        self.tasks, self.groups, self._hash = self._load(data, fewshot_data)
        self._check_examples(data, fewshot_data)
        self._figures = self._place_of_figures()
        self.higher_is_better = {}
        self.primary = "acc"
        self._aggregates: dict[str, float] = {}

    def _load(self, data: str | None, fewshot_data: str | None) -> tuple[dict[str, Any], dict[str, Any], str]:
        folder = Path(self._folder.name)
        # The harness's file of one of the eight commonsense sets.
        yaml_file = harness_folder() / "tasks" / YAML_FILES.get(self.name, "-")
        if not yaml_file.is_file():
            spec = HARNESS_NAMES.get(self.name, self.name) if data is None else self.name
            files = lm_eval.task_files()
            if spec not in files:
                raise unknown_task(self.name, files)
            if data is None:
                return self._built(spec)
            if files[spec] is None:
                raise self._several()
            yaml_file = Path(str(files[spec]))
        docs = None
        sha256 = None
        if data is not None:
            rows, sha256 = read_docs(self.name, data)
            docs = {"validation": rows}
            if fewshot_data is not None:
                docs["train"], self._fewshot_sha256 = read_docs(self.name, fewshot_data)
        path = write_task(folder, self.name, yaml_file, docs)
        tasks, groups, found = self._built(str(path), folder)
        if not tasks:
            raise self._several()
        if data is not None and not all(map(lm_eval.reads_json, tasks.values())):
            raise ConfigError("RW112", f"--task {self.name} reads its data by code of its own; leave --data out.")
        return tasks, groups, sha256 or found

    def _several(self) -> ConfigError:
        text = f"--task {self.name} is a group of several tasks, and --data holds those of one; give the tasks by name."
        return ConfigError("RW112", text)

    def _built(self, spec: str, folder: Path | None = None) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Tasks, groups, and the hash of their questions. Any error of the harness is raised as DataError (RW251)."""
        try:
            tasks, groups = lm_eval.built(spec, folder)
            documents = [dict(doc) for task in tasks.values() for doc in itertools.islice(task.eval_docs, self.limit)]
        except Exception as error:
            raise DataError(
                "RW251",
                f"lm-evaluation-harness cannot build the task {self.name} ({one_line(error)}); check the network, or "
                "give its data with --data F.",
            ) from error
        return tasks, groups, content_sha256(documents)

    def describe(self) -> JsonObject:
        versions = {name: str(task.VERSION) for name, task in self.tasks.items()}
        shots = {name: self._shots(task) for name, task in self.tasks.items()}
        kind = {str(task.OUTPUT_TYPE) for task in self.tasks.values()}
        protocol = "generative" if kind == {"generate_until"} else "loglikelihood"
        found = {"protocol": protocol, "harness_tasks": versions, "num_fewshot": shots}
        return found | ({} if self._fewshot_sha256 is None else {"fewshot_sha256": self._fewshot_sha256})

    def _shots(self, task: Any) -> int:
        return int(lm_eval.own_shots(task) or 0) if self.num_fewshot is None else self.num_fewshot

    def _check_examples(self, data: str | None, fewshot_data: str | None) -> None:
        """Raise ConfigError (RW112) if worked examples would not be shown, or would be the questions themselves."""
        # The harness never overrides a task that says 0.
        without = [name for name, task in self.tasks.items() if lm_eval.own_shots(task) == 0]
        if self.num_fewshot and without:
            raise ConfigError(
                "RW112",
                f"--num-fewshot {self.num_fewshot} has no effect on {some_of(without, 3)}: lm-evaluation-harness shows "
                "no worked examples there; leave it out, or give other tasks by name.",
            )
        shots = {name: self._shots(task) for name, task in self.tasks.items()}
        if fewshot_data is not None and not any(shots.values()):
            raise ConfigError(
                "RW112",
                f"--task {self.name} --fewshot-data needs --num-fewshot N: the task by itself shows no examples.",
            )
        borrowed = [shots[name] for name, task in self.tasks.items() if shots[name] and not lm_eval.has_examples(task)]
        if data is not None and fewshot_data is None and borrowed:
            raise ConfigError(
                "RW112",
                f"--task {self.name} with --data shows {borrowed[0]} worked examples; give --fewshot-data F to take "
                "them from, or --num-fewshot 0.",
            )

    def _place_of_figures(self) -> str:
        """The name that holds the figures of all tasks. Raises ConfigError (RW154) if there is none."""
        name, parts = lm_eval.place_of_figures(self.tasks, self.groups)
        if name is None:
            raise ConfigError(
                "RW154",
                f"{self.name} is a group of {len(parts)} tasks and has no figure of its own; give the tasks by name: "
                f"{some_of(parts, 8)}.",
            )
        return name

    @property
    def data_sha256(self) -> str:
        return self._hash

    @property
    def questions(self) -> int:
        return sum(len(docs) for _, docs in self._docs())

    @property
    def has_right_choices(self) -> bool:
        """Whether each question has choices of which one is right."""
        return all(lm_eval.right_choice(task, doc) is not None for task, docs in self._docs() for doc in docs)

    def _docs(self) -> list[tuple[Any, list[Any]]]:
        return [(task, list(itertools.islice(task.eval_docs, self.limit))) for task in self.tasks.values()]

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        from rankwise.evaluation.harness_model import EngineLM

        model = EngineLM(engine, Responses(folder), tell)
        for task in self.tasks.values():
            lm_eval.show_examples(task, self._shots(task), FEWSHOT_SEED)
        results = lm_eval.evaluated(model, self.tasks, self.groups, self.limit)
        self._note(results)
        samples = {name: results["samples"][name] for name in self.tasks}
        return [example for name, rows in samples.items() for example in self._examples(name, rows)]

    def _note(self, results: Fields) -> None:
        """Keep the aggregates of the requested task: a group's own, else the single task's."""
        found = results["results"][self._figures]
        self._aggregates = {
            _metric_name(key): float(value)
            for key, value in found.items()
            if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
        }
        for known in results.get("higher_is_better", {}).values():
            for metric in self._aggregates:
                better = known.get(metric.partition(",")[0])
                if better is not None:
                    self.higher_is_better[metric] = bool(better)
        first = [name for kind in PRIMARY for name in self._aggregates if name.partition(",")[0] == kind]
        self.primary = next(iter([*first, *self._aggregates]), "acc")

    def _examples(self, task: str, samples: Sequence[Fields]) -> list[Example]:
        by_doc: dict[int, list[Fields]] = {}
        for sample in samples:
            by_doc.setdefault(int(sample["doc_id"]), []).append(sample)
        clusters = _sources([rows[0]["doc"] for rows in by_doc.values()])
        start = f"{task}-" if len(self.tasks) > 1 else ""
        return [
            _example(f"{start}{doc_id}", rows, cluster, self.tasks[task])
            for (doc_id, rows), cluster in zip(by_doc.items(), clusters)
        ]

    def summarize(self, examples: Sequence[Example]) -> Summary:
        errors: dict[str, float | None] = {}
        for name, value in self._aggregates.items():
            mean = self._mean(name, value, examples)
            errors[name] = None if mean is None else mean.standard_error
        return Summary(self._aggregates, errors)

    def _mean(self, name: str, value: float, examples: Sequence[Example]) -> Mean | None:
        """The mean over examples, if the harness' figure is one."""
        if not all(name in example.scores for example in examples):
            return None
        mean = mean_of([e.scores[name] for e in examples], clusters_of([e.cluster for e in examples]))
        return mean if abs(mean.value - value) < SAME else None

    def difference(self, a: Sequence[Example], b: Sequence[Example]) -> dict[str, Mean]:
        names = [name for name in a[0].scores if all(name in e.scores for e in (*a, *b))] if a else []
        return difference_of_means(a, b, names)


def _example(name: str, rows: Sequence[Fields], cluster: str | None, task: Any) -> Example:
    """One document; a task with several filters has a row for each."""
    first = rows[0]
    scores = {}
    for row in rows:
        for metric in row["metrics"]:
            value = row.get(metric)
            if isinstance(value, int | float):
                scores[_metric_name(f"{metric},{row['filter']}")] = float(value)
    responses = [
        response[0] if isinstance(response, list | tuple) and response else response for response in first["resps"]
    ]
    details: JsonObject = {}
    if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
        details["log_likelihoods"] = [float(response[0]) for response in responses]
        texts = [str(argument[-1] if not task.multiple_input else argument[0]) for argument in first["arguments"]]
        best = max(range(len(texts)), key=lambda index: details["log_likelihoods"][index])
        prediction = texts[best]
        if (right := lm_eval.right_choice(task, first["doc"])) is not None:
            details["right"] = right
    else:
        prediction = str(responses[0]) if responses else ""
    prompt = str(first["arguments"][0][0])[-SHOWN_CHARACTERS:]
    return Example(
        id=name,
        prompt=prompt,
        prediction=prediction,
        scores=scores,
        references=[str(first["target"])],
        cluster=cluster,
        details=details,
    )


def _sources(docs: Sequence[Fields]) -> list[str | None]:
    for field in SOURCE_FIELDS:
        texts = [doc.get(field) for doc in docs]
        if all(isinstance(text, str) and text for text in texts) and max(Counter(texts).values()) > 1:
            return [text_sha256(str(text)) for text in texts]
    return [None] * len(docs)


def _metric_name(key: str) -> str:
    """``acc,none`` is acc; other filters stay in the name."""
    return key.removesuffix(",none")


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
