"""``rankwise train --retain D``: the loss on the retained rows, of the base and of the weights that a run keeps.

The retained rows show abilities to keep; or they are questions of a task of lm-evaluation-harness. Of a question
whose choices c have the log-likelihoods z_c, and r is the right one:

    loss = -log( exp(z_r) / sum_c exp(z_c) ),      accuracy: whether z_r is the largest
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rankwise.data import Rows, limited, read_rows
from rankwise.data.readers import EVAL_ROWS
from rankwise.errors import ConfigError
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.record import (
    EXAMPLES_FILE,
    IDENTITY_FILE,
    RESULT_FILE,
    Example,
    load_result,
    open_folder,
    read_examples,
)
from rankwise.evaluation.run import answer_task
from rankwise.evaluation.tasks.base import Task, Tell
from rankwise.evaluation.tasks.harness import HarnessTask
from rankwise.evaluation.tasks.names import retained_from
from rankwise.evaluation.tasks.rows import Perplexity
from rankwise.foreign import JsonObject
from rankwise.reports.comparison import RETAINED, Retained

Part = Literal["base", "kept"]
PARTS: tuple[Part, ...] = ("base", "kept")


class RetainedQuestions(Task):
    """Questions with choices of lm-evaluation-harness, the first ``limit`` of each of its tasks; 0: all."""

    name, primary = RETAINED, "loss"
    higher_is_better = {"loss": False, "accuracy": True}  # noqa: RUF012  read-only

    def __init__(self, task: str, data: str | None, limit: int) -> None:
        self.task = HarnessTask(task, data=data, fewshot_data=None, num_fewshot=None, limit=limit or None)
        if not self.task.has_right_choices:
            raise ConfigError(
                "RW112",
                f"--retain {task}: only tasks with choices of which one is right have a loss; measure this one with "
                f"--task {task}.",
            )

    def describe(self) -> JsonObject:
        return {"questions_of": self.task.name, **self.task.describe()}

    @property
    def data_sha256(self) -> str:
        return self.task.data_sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        return [self._scored(example) for example in self.task.run(engine, folder, tell)]

    def _scored(self, example: Example) -> Example:
        z, r = np.array(example.details["log_likelihoods"]), example.details["right"]
        scores = {"loss": float(np.logaddexp.reduce(z) - z[r]), "accuracy": float(z.argmax() == r)}
        return dataclasses.replace(example, scores=scores)


def retained_task(source: str, *, max_length: int, eval_limit: int | None) -> Perplexity | RetainedQuestions:
    """The loss on what --retain names: a task's questions, or rows, whose columns have the usual names.

    Raises as the readers do, and ConfigError (RW112) for a task without choices.
    """
    name, data = retained_from(source)
    if name is not None:
        return RetainedQuestions(name, data, EVAL_ROWS if eval_limit is None else eval_limit)
    return Perplexity(limited(read_rows(source, split="validation"), eval_limit), max_length=max_length, name=RETAINED)


def described(task: Perplexity | RetainedQuestions) -> JsonObject:
    """What was measured, for records. ``unit``: what a loss is of."""
    if isinstance(task, Perplexity):
        return {"source": task.rows.source, "sha256": task.data_sha256, "rows": len(task.rows), "unit": "token"}
    return {"source": task.task.name, "sha256": task.data_sha256, "rows": task.task.questions, "unit": "question"}


@dataclasses.dataclass(kw_only=True)
class RetainedRows:
    """What --retain names, with the settings of its run. Implements ``training.session.Retention``.

    The losses, one by one, lie in ``DIR/retained/base`` and ``DIR/retained/kept``; a resumed run keeps the base's.
    """

    retain: str
    retain_margin: float
    max_length: int
    eval_limit: int | None
    model: str
    output: Path

    def __post_init__(self) -> None:
        names = (IDENTITY_FILE, EXAMPLES_FILE, RESULT_FILE)
        self.files: Sequence[str] = [f"{RETAINED}/{part}/{name}" for part in PARTS for name in names]

    @functools.cached_property
    def task(self) -> Perplexity | RetainedQuestions:
        return retained_task(self.retain, max_length=self.max_length, eval_limit=self.eval_limit)

    @property
    def rows(self) -> Rows | None:
        return self.task.rows if isinstance(self.task, Perplexity) else None

    def before(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None, *, resumes: bool
    ) -> None:
        """Measure the base; of a run that ``resumes``, check that it was measured on these rows.

        Raises RunError: RW570 for other rows, RW571 for a missing or broken result.
        """
        if resumes:
            open_folder(self._folder("base"), self._identity, overwrite=False)
            load_result(self._folder("base"))
        else:
            self._measure("base", Engine(model=model, tokenizer=tokenizer, trained_fast=False, autocast=autocast))

    def after(self, model: Any, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None) -> JsonObject:
        """Measure the weights that are kept. Returns the entry of the record: the losses, their paired difference
        with its 95 % interval over rows or questions, the margin and the verdict.
        """
        kept = self._measure("kept", Engine(model=model, tokenizer=tokenizer, trained_fast=False, autocast=autocast))
        base = list(read_examples(self._folder("base") / EXAMPLES_FILE))
        before, after = (self.task.summarize(examples).metrics["loss"] for examples in (base, kept))
        change = self.task.difference(kept, base)["loss"]
        margin, interval = self.retain_margin * before, change.interval
        verdict: Retained = "cannot tell"
        if interval is not None and (interval[1] < margin or interval[0] > 0):
            verdict = "kept" if interval[1] < margin else "lost"
        found: JsonObject = {**described(self.task), "rows": len(base), "base": before, "loss": after}
        found |= {"difference": change.value, "margin": margin, "verdict": verdict}
        return {**found, "interval": None if interval is None else list(interval)}

    def _measure(self, part: Part, engine: Engine) -> list[Example]:
        engine.model.eval()
        place = open_folder(self._folder(part), self._identity, overwrite=True)
        return answer_task(self.task, engine, place, model=self.model, adapter=None)[1]

    def _folder(self, part: Part) -> Path:
        return self.output / RETAINED / part

    @property
    def _identity(self) -> JsonObject:
        return {"task": RETAINED, "data_sha256": self.task.data_sha256, "task_settings": self.task.describe()}
