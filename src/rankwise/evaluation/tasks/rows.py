r"""Tasks on rows of data: their loss, the rewards of preferences, and answers that are labels.

Loss: the mean over trained tokens, the trainer's own evaluation to the last bit.

    loss = sum_rows sum_trained -log p(token) / number of trained tokens,      perplexity = exp(loss)

Rewards: how far a run has moved its model towards each answer, away from its own base.

    r(y) = beta (log p(y | x) - log p_base(y | x))
    pairs             margin: mean of r(chosen) - r(rejected);        accuracy: share of pairs where that is above 0
    marked answers    margin: mean r of good - mean r of bad ones;    accuracy: share of good with r > 0, bad with r < 0

Labels: how well answers agree with the rows' own. One label: accuracy, F1, Matthews' correlation; several: accuracy,
F1; numbers: Pearson's correlation; and the loss of training. Accuracy, loss and rewards are means over examples; the
others are of all rows together. torch is imported when a task runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.data import Rows, encode_preferences
from rankwise.data.objectives import ANSWER_IDS, encode_labelled
from rankwise.data.rows import Row
from rankwise.errors import DataError, warn
from rankwise.evaluation.record import Example, text_sha256
from rankwise.evaluation.tasks.base import (
    Mean,
    Summary,
    Task,
    Tell,
    answer_in_batches,
    clusters_of,
    mean_of,
    paired_difference,
)
from rankwise.foreign import JsonObject
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Labels, in_words, measures
from rankwise.reports.numbers import shortened

if TYPE_CHECKING:
    from rankwise.acceleration.scoring import Scorer, Target
    from rankwise.evaluation.engine import Engine

# Of a text in the record.
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
    return Example(
        id=str(number),
        prompt=shortened(asked, SHOWN_CHARACTERS),
        prediction="",
        scores=scores,
        references=references,
        cluster=clusters.get(asked),
    )


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


# --- rewards of preferences ---


# A row of encoded preferences.
Encoded = Mapping[str, Any]
# Number of rows between two writes to disk.
PREFERENCES_AT_ONCE, LABELS_AT_ONCE = 16, 64


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
        batches = [range(start, len(rows))[:PREFERENCES_AT_ONCE] for start in range(0, len(rows), PREFERENCES_AT_ONCE)]
        with engine.as_in_training() as scorer:

            def answer(batch: Sequence[int]) -> list[Example]:
                rewards = self._rewards(engine, scorer, [rows[number] for number in batch])
                return [
                    Example(
                        id=str(number),
                        prompt=engine.decode(rows[number]["prompt_ids"]),
                        prediction="",
                        scores=_scores(of_row, rows[number].get("label"), labels),
                        references=[engine.decode(ids) for ids in _answers(rows[number])[:1]],
                        cluster=prompts[number] if repeated else None,
                    )
                    for number, of_row in zip(batch, rewards, strict=True)
                ]

            return answer_in_batches([str(number) for number in range(len(rows))], batches, answer, folder, tell)

    def _rewards(self, engine: Engine, scorer: Scorer, rows: Sequence[Encoded]) -> list[list[float]]:
        """The rewards of each row's answers."""
        from rankwise.adapters.switch import reference_at_work

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
    from rankwise.acceleration.scoring import trained_target

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


# --- labels ---


# Number of rows of a batch.
BATCH = 16
MEASURED = {SINGLE: ("accuracy", "f1", "mcc"), SEVERAL: ("accuracy", "f1"), NUMBER: ("pearson",)}


class LabelAnswers(Task):
    """``rows`` with labels, all of them among ``labels``. Texts are cut at ``max_length`` tokens."""

    name = "labels"

    def __init__(self, rows: Rows, labels: Labels, *, max_length: int) -> None:
        self.rows, self.labels, self.max_length = rows, labels, max_length
        self.primary = MEASURED[labels.problem][0]
        self.higher_is_better = {**dict.fromkeys(MEASURED[labels.problem], True), "loss": False}

    def describe(self) -> JsonObject:
        return {"max_length": self.max_length, "labels": self.labels.to_json(), "rows": len(self.rows)}

    @property
    def data_sha256(self) -> str:
        return self.rows.sha256

    def run(self, engine: Engine, folder: Path, tell: Tell) -> list[Example]:
        import torch

        from rankwise.acceleration.loss import chosen, logits_of, losses
        from rankwise.models.load import table_rows

        limit = min(self.max_length, table_rows(engine.model) or self.max_length)
        table = encode_labelled(self.rows, engine.tokenizer, self.labels, max_length=limit, name="eval").dataset
        texts = ["\n".join(filter(None, (row.text, row.completion))) for row in self.rows]
        repeated, is_number = len(set(texts)) < len(texts), self.labels.problem == NUMBER
        batches = [range(start, len(table))[:LABELS_AT_ONCE] for start in range(0, len(table), LABELS_AT_ONCE)]

        def answer(batch: Sequence[int]) -> list[Example]:
            rows = [table[number] for number in batch]
            logits = logits_of(engine.model, rows, pad=engine.pad, size=BATCH, autocast=engine.autocast)
            answers = chosen(logits, self.labels.problem)
            each = losses(logits, torch.tensor([row["label"] for row in rows]), self.labels.problem).tolist()
            return [
                Example(
                    id=str(number),
                    prompt=shortened(texts[number], SHOWN_CHARACTERS),
                    prediction=self._words(said),
                    scores={"loss": loss} if is_number else {"accuracy": float(said == row["label"]), "loss": loss},
                    references=[self._words(row["label"])],
                    cluster=text_sha256(texts[number]) if repeated else None,
                    details={"answer": said, "label": row["label"]},
                )
                for number, row, said, loss in zip(batch, rows, answers, each, strict=True)
            ]

        return answer_in_batches([str(number) for number in range(len(table))], batches, answer, folder, tell)

    def _words(self, answer: Any) -> str:
        words = self.labels.words(answer)
        if isinstance(words, list):
            return ", ".join(words) or "none"
        return f"{words:.4g}" if isinstance(words, float) else str(words)

    def summarize(self, examples: Sequence[Example]) -> Summary:
        targets, answers = ([example.details[name] for example in examples] for name in ("label", "answer"))
        found = measures(targets, answers, self.labels.problem)
        means = {name: mean_of([example.scores[name] for example in examples]) for name in examples[0].scores}
        metrics = {**{name: found[name] for name in MEASURED[self.labels.problem]}, "loss": means["loss"].value}
        errors = {name: means[name].standard_error if name in means else None for name in metrics}
        return Summary(metrics, errors, [in_words(found, len(examples))])
