r"""Loss on rows of any data: the mean over trained tokens, the trainer's own evaluation to the last bit.

loss = sum_rows sum_trained -log p(token) / number of trained tokens,      perplexity = exp(loss)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.data import Rows
from rankwise.data.rows import Row
from rankwise.errors import DataError, warn
from rankwise.evaluation.errors_of_means import Mean, clusters_of, mean_of, paired_difference
from rankwise.evaluation.record import Example, text_sha256
from rankwise.evaluation.tasks.base import Summary, Task, Tell, answer_in_batches
from rankwise.foreign import JsonObject
from rankwise.reports.numbers import shortened

if TYPE_CHECKING:
    from rankwise.acceleration.scoring import Target
    from rankwise.evaluation.engine import Engine

SHOWN_CHARACTERS = 500


class Perplexity(Task):
    """``rows`` are read by ``rankwise.data`` and encoded as for training, cut at ``max_length`` tokens.

    ``name``: also that of the results' folder.
    """

    primary = "loss"
    higher_is_better = {"loss": False, "perplexity": False}  # noqa: RUF012  read-only

    def __init__(self, rows: Rows, *, max_length: int, name: str = "perplexity") -> None:
        self.name = name
        self.rows = rows
        self.max_length = max_length

    def describe(self) -> JsonObject:
        return {"max_length": self.max_length, "format": self.rows.format, "rows": len(self.rows)}

    @property
    def data_sha256(self) -> str:
        return self.rows.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        from rankwise.acceleration.scoring import members_of

        targets = self._targets(engine)
        numbers = list(targets)
        ids = [str(number) for number in numbers]
        chosen = list(targets.values())
        clusters = _clusters(self.rows)
        with engine.as_in_training() as scorer:
            plan = {members_of(rows): rows for rows in scorer.plan(chosen)}

            def answer(batch: Sequence[int]) -> list[Example]:
                scores = scorer.score_batch(plan[tuple(batch)], chosen)
                return [_example(self.rows[numbers[i]], numbers[i], clusters, scores[i].tokens) for i in batch]

            return answer_in_batches(ids, list(plan), answer, folder, tell)

    def _targets(self, engine: Engine) -> dict[int, Target]:
        """The target of each row, by its index. Rows with nothing to score are left out and counted (RW216)."""
        from rankwise.acceleration.scoring import trained_target

        encoder = engine.encoder(self.rows)
        limit = min(self.max_length, engine.max_length)
        targets, cut = {}, 0
        for number, row in enumerate(encoder.encode(self.rows.items)):
            ids, trained = row.ids[:limit], row.trained[:limit]
            cut += row.length > limit
            target = trained_target(ids, trained)
            if target is not None:
                targets[number] = target
        self._complain(cut, len(self.rows) - len(targets), limit)
        return targets

    def _complain(self, cut: int, dropped: int, limit: int) -> None:
        source, total = self.rows.source, len(self.rows)
        if dropped == total:
            raise DataError(
                "RW214", f"none of the {total} rows of {source} has a token to score within {limit} tokens."
            )
        if cut:
            warn("RW215", f"{cut} of {total} rows of {source} were cut at {limit} tokens and lost their end.")
        if dropped:
            warn(
                "RW216", f"{dropped} of {total} rows of {source} were left out: nothing to score within {limit} tokens."
            )

    def summarize(self, examples: Sequence[Example]) -> Summary:
        clusters, losses, tokens = _columns(examples)
        loss = mean_of(losses, clusters, tokens)
        perplexity = math.exp(loss.value) if loss.value < 700 else math.inf
        # Delta method: d exp(x) = exp(x) dx.
        error = None if loss.standard_error is None else perplexity * loss.standard_error
        errors = {"loss": loss.standard_error, "perplexity": error}
        return Summary({"loss": loss.value, "perplexity": perplexity}, errors)

    def difference(self, a: Sequence[Example], b: Sequence[Example]) -> dict[str, Mean]:
        clusters, losses, tokens = _columns(a)
        return {"loss": paired_difference(losses, _columns(b)[1], clusters, tokens)}


def _columns(examples: Sequence[Example]) -> tuple[list[str] | None, list[float], list[float]]:
    clusters = clusters_of([example.cluster for example in examples])
    return clusters, [e.scores["loss"] for e in examples], [e.scores["tokens"] for e in examples]


def _example(row: Row, number: int, clusters: dict[str, str], log_p: Sequence[float]) -> Example:
    asked, said = _texts(row)
    scores = {"loss": -math.fsum(log_p) / len(log_p), "tokens": len(log_p)}
    references = [shortened(said, SHOWN_CHARACTERS)] if said else None
    return Example(str(number), shortened(asked, SHOWN_CHARACTERS), "", scores, references, clusters.get(asked))


def _texts(row: Row) -> tuple[str, str]:
    """The texts of the prompt and of the scored part."""
    if row.kind == "prompt":
        return row.prompt, row.completion
    if row.kind == "text":
        return "", row.text
    contents = [str(message.get("content") or "") for message in row.messages]
    return "\n".join(contents[:-1]), contents[-1]


def _clusters(rows: Rows) -> dict[str, str]:
    """Cluster names for prompts that occur more than once: their completions are not independent."""
    seen: dict[str, int] = {}
    for row in rows:
        asked = _texts(row)[0]
        seen[asked] = seen.get(asked, 0) + 1
    repeated = any(count > 1 for asked, count in seen.items() if asked)
    if not repeated:
        return {}
    return {asked: text_sha256(asked) for asked in seen if asked}
