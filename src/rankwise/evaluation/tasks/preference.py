r"""Rewards of preferences: how far a run has moved its model towards each answer, away from its own base.

    r(y) = beta (log p(y | x) - log p_base(y | x))
    pairs             margin: mean of r(chosen) - r(rejected);        accuracy: share of pairs where that is above 0
    marked answers    margin: mean r of good - mean r of bad ones;    accuracy: share of good with r > 0, bad with r < 0

Each example has a score of its own, whose mean over examples is the figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.acceleration.scoring import Scorer, Target, trained_target
from rankwise.adapters.switch import reference_at_work
from rankwise.data import Rows, encode_preferences
from rankwise.data.objectives import ANSWER_IDS
from rankwise.errors import DataError
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.record import Example, text_sha256
from rankwise.evaluation.tasks.base import Task, Tell, answer_in_batches
from rankwise.foreign import JsonObject

# A row of encoded preferences.
Encoded = Mapping[str, Any]
# Number of rows between two writes to disk.
ROWS_AT_ONCE = 16


class Preference(Task):
    """``rows`` are pairs or marked answers, encoded as for training and cut at ``max_length`` tokens.

    Raises DataError (RW627) for marked answers that are all good or all bad.
    """

    name = "preference"
    primary = "reward_accuracy"
    higher_is_better = {"reward_accuracy": True, "reward_margin": True}  # noqa: RUF012  read-only

    def __init__(self, rows: Rows, *, max_length: int, beta: float) -> None:
        self.rows, self.max_length, self.beta = rows, max_length, beta
        if all(row.rejected is None for row in rows) and len({row.label for row in rows}) < 2:
            raise DataError(
                "RW627",
                f"all {len(rows)} answers of {rows.source} are marked alike, so there is no margin between good and "
                "bad ones to evaluate; give evaluation data with both.",
            )

    def describe(self) -> JsonObject:
        return {
            "max_length": self.max_length,
            "beta": self.beta,
            "format": self.rows.format,
            "rows": len(self.rows),
        }

    @property
    def data_sha256(self) -> str:
        return self.rows.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        limit = min(self.max_length, engine.max_length)
        found = encode_preferences(
            self.rows, engine.tokenizer, max_length=limit, chat_template=engine.template, name="eval"
        )
        rows: list[Encoded] = found.dataset.to_list()
        prompts = [text_sha256(str(row["prompt_ids"])) for row in rows]
        repeated = len(set(prompts)) < len(prompts)
        labels = Counter(row.get("label") for row in rows)
        batches = [range(start, len(rows))[:ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
        with engine.as_in_training() as scorer:

            def answer(batch: Sequence[int]) -> list[Example]:
                rewards = self._rewards(engine, scorer, [rows[number] for number in batch])
                return [
                    Example(
                        str(number),
                        engine.decode(rows[number]["prompt_ids"]),
                        "",
                        _scores(of_row, rows[number].get("label"), labels),
                        [engine.decode(ids) for ids in _answers(rows[number])[:1]],
                        prompts[number] if repeated else None,
                    )
                    for number, of_row in zip(batch, rewards, strict=True)
                ]

            return answer_in_batches([str(number) for number in range(len(rows))], batches, answer, folder, tell)

    def _rewards(self, engine: Engine, scorer: Scorer, rows: Sequence[Encoded]) -> list[list[float]]:
        """The rewards of each row's answers."""
        targets = [target for row in rows for target in _targets(row)]
        trained = _log_probs(scorer, targets)
        with reference_at_work(engine.model):
            base = _log_probs(scorer, targets)
        rewards = [self.beta * (ours - before) for ours, before in zip(trained, base, strict=True)]
        sides = len(targets) // len(rows)
        return [rewards[start : start + sides] for start in range(0, len(rewards), sides)]


def _answers(row: Encoded) -> list[list[int]]:
    return [row[name] for name in ANSWER_IDS if name in row]


def _targets(row: Encoded) -> list[Target]:
    prompt = row["prompt_ids"]
    found = []
    for answer in _answers(row):
        target = trained_target([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        assert target is not None, "every answer has a prompt"
        found.append(target)
    return found


def _log_probs(scorer: Scorer, targets: Sequence[Target]) -> list[float]:
    found = {number: score.total for scores in scorer.score(targets) for number, score in scores.items()}
    return [found[number] for number in range(len(targets))]


def _scores(rewards: Sequence[float], label: bool | None, labels: Counter[bool | None]) -> dict[str, float]:
    """The scores of a pair, or of an answer with a label. ``labels`` counts the answers of each label, so that the mean
    of the margins is the mean reward of the good ones minus that of the bad ones.
    """
    if label is None:
        margin = rewards[0] - rewards[1]
        return {"reward_accuracy": float(margin > 0), "reward_margin": margin}
    signed = rewards[0] if label else -rewards[0]
    return {"reward_accuracy": float(signed > 0), "reward_margin": signed * labels.total() / labels[label]}
