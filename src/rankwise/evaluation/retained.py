"""``rankwise train --retain D``: the loss on rows that must stay, of the base and of the weights that a run keeps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from rankwise.config import TrainSettings
from rankwise.data import Rows, limited, read_rows
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
from rankwise.evaluation.tasks.perplexity import Perplexity
from rankwise.foreign import JsonObject
from rankwise.reports.comparison import RETAINED, Retained

Part = Literal["base", "kept"]
PARTS: tuple[Part, ...] = ("base", "kept")


def retained_task(source: str, *, max_length: int, eval_limit: int | None) -> Perplexity:
    """The loss on the rows of --retain, whose columns have the usual names. Raises DataError as the readers do."""
    return Perplexity(limited(read_rows(source, split="validation"), eval_limit), max_length=max_length, name=RETAINED)


class RetainedRows:
    """The rows of --retain. Implements ``training.session.Retention``.

    The losses of each row lie in ``DIR/retained/base`` and ``DIR/retained/kept``; a resumed run keeps the base's.
    """

    def __init__(self, given: TrainSettings, source: str) -> None:
        self.given, self.source = given, source
        names = (IDENTITY_FILE, EXAMPLES_FILE, RESULT_FILE)
        self.files: Sequence[str] = [f"{RETAINED}/{part}/{name}" for part in PARTS for name in names]

    @functools.cached_property
    def task(self) -> Perplexity:
        return retained_task(self.source, max_length=self.given.max_length, eval_limit=self.given.eval_limit)

    @property
    def rows(self) -> Rows:
        return self.task.rows

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
            self._measure("base", Engine(model, tokenizer, trained_fast=False, autocast=autocast))

    def after(self, model: Any, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None) -> JsonObject:
        """Measure the weights that are kept. Returns the entry of the record: losses in nats per token, the paired
        difference with its 95 % interval over rows, the margin and the verdict.
        """
        kept = self._measure("kept", Engine(model, tokenizer, trained_fast=False, autocast=autocast))
        base = list(read_examples(self._folder("base") / EXAMPLES_FILE))
        before, after = (self.task.summarize(examples).metrics["loss"] for examples in (base, kept))
        change = self.task.difference(kept, base)["loss"]
        margin, interval = self.given.retain_margin * before, change.interval
        verdict: Retained = "cannot tell"
        if interval is not None and (interval[1] < margin or interval[0] > 0):
            verdict = "kept" if interval[1] < margin else "lost"
        rows = {"source": self.rows.source, "sha256": self.rows.sha256, "rows": len(base)}
        figures = {"base": before, "loss": after, "difference": change.value, "margin": margin, "verdict": verdict}
        return {**rows, **figures, "interval": None if interval is None else list(interval)}

    def _measure(self, part: Part, engine: Engine) -> list[Example]:
        engine.model.eval()
        place = open_folder(self._folder(part), self._identity, overwrite=True)
        return answer_task(self.task, engine, place, model=self.given.model, adapter=None)[1]

    def _folder(self, part: Part) -> Path:
        return self.given.output / RETAINED / part

    @property
    def _identity(self) -> JsonObject:
        return {"task": RETAINED, "data_sha256": self.task.data_sha256, "task_settings": self.task.describe()}
