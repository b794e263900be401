"""Labels as answers: which there are, and how well answers agree with them. Imports no torch.

n rows, of which c are answered rightly; t_k rows have label k, and p_k are answered by it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rankwise.foreign import JsonObject, parse_json

# transformers' names in ``config.problem_type``.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE: Problem = "single_label_classification"
SEVERAL: Problem = "multi_label_classification"
NUMBER: Problem = "regression"
# A row's label: a name or a number, or the names of several labels.
Target = str | float | tuple[str, ...]
# Names of what ``measures`` returns.
MEASURES = ("accuracy", "f1", "mcc", "pearson", "accuracy_of_commonest_label", "labels_answered")


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels in the order of a head's outputs, and what an answer is: one of them, several, or a number."""

    names: tuple[str, ...]
    problem: Problem = SINGLE

    def number(self, target: Target) -> Any:
        """The target as the loss takes it: a position; 0 or 1 for each label; a number. Raises ValueError."""
        if self.problem == NUMBER:
            if isinstance(target, tuple):
                raise ValueError("a list")
            return float(target)
        if self.problem == SEVERAL:
            given = set(target) if isinstance(target, tuple) else {str(target)}
            if not given <= set(self.names):
                raise ValueError("an unknown label")
            return [float(name in given) for name in self.names]
        return self.names.index(str(target))

    def words(self, answer: Any) -> Any:
        """An answer of ``measures`` as people read it: a name, a list of names, a number."""
        if self.problem == NUMBER:
            return answer
        if self.problem == SEVERAL:
            return [name for name, is_given in zip(self.names, answer) if is_given]
        return self.names[answer]

    def to_json(self) -> JsonObject:
        return {"names": list(self.names), "problem": self.problem}


def labels_of_head(names: Mapping[Any, Any], problem: Any) -> Labels:
    """The labels of a config's ``id2label`` and ``problem_type``, which may be None."""
    ordered = tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))
    return Labels(ordered, problem or (SINGLE if len(ordered) > 1 else NUMBER))


def read_labels(text: str) -> Labels:
    """The labels of a JSON text as ``to_json`` makes it. Raises ValueError."""
    found = parse_json(text)
    if not isinstance(found, dict) or not found.get("names") or found.get("problem") not in (SINGLE, SEVERAL, NUMBER):
        raise ValueError("expected the names of labels and their problem_type")
    return Labels(tuple(map(str, found["names"])), found["problem"])


def measures(targets: Sequence[Any], answers: Sequence[Any], problem: Problem) -> dict[str, float]:
    """How well answers agree with targets, both in the form of ``Labels.number``.

    One label: accuracy, F1 (2 TP / (2 TP + FP + FN), the mean over labels) and Matthews' correlation; several: the
    share of rows with all labels right, and F1 of all decisions; numbers: Pearson's correlation. Of a constant: 0.
    ``accuracy_of_commonest_label``: the accuracy of always the commonest answer to these rows.
    """
    if problem == NUMBER:
        return {"pearson": pearson(targets, answers)}
    right = sum(one == other for one, other in zip(targets, answers)) / len(targets)
    if problem == SEVERAL:
        pairs = Counter((bool(a), bool(b)) for one, other in zip(targets, answers) for a, b in zip(one, other))
        both, wrong = pairs[True, True], pairs[True, False] + pairs[False, True]
        f1 = 2 * both / max(2 * both + wrong, 1)
        most = Counter(map(tuple, targets)).most_common(1)[0][1] / len(targets)
        answered = float(len(set(map(tuple, answers))))
        return {"accuracy": right, "f1": f1, "accuracy_of_commonest_label": most, "labels_answered": answered}
    t, p = Counter(targets), Counter(answers)
    c = Counter(one for one, other in zip(targets, answers) if one == other)
    scores = [2 * c[kind] / (t[kind] + p[kind]) for kind in {*t, *p}]
    found = {"accuracy": right, "f1": math.fsum(scores) / len(scores), "mcc": matthews(t, p, c.total())}
    return {
        **found,
        "accuracy_of_commonest_label": max(t.values()) / len(targets),
        "labels_answered": float(len(set(answers))),
    }


def in_words(measured: Mapping[str, float | None], rows: int) -> str:
    """The figures of ``measures`` on so many rows; an accuracy beside that of always the commonest label, and whether
    it is clearly higher: by two standard errors of the latter."""
    figures = {name: value for name in MEASURES[:4] if (value := measured.get(name)) is not None}
    words = {name: f"{name} {value:.3f}" for name, value in figures.items()}
    if (most := measured.get("accuracy_of_commonest_label")) is not None:
        is_clear = figures["accuracy"] > most + 2 * math.sqrt(most * (1 - most) / rows)
        gain = "" if is_clear else "no clear gain over "
        words["accuracy"] += f" ({gain}{most:.3f} by always the commonest label)"
    return ", ".join(words.values())


def matthews(t: Counter[Any], p: Counter[Any], c: int) -> float:
    """(c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2))        Gorodkin 2004, R_K."""
    n = t.total()
    spread = (n**2 - sum(count**2 for count in p.values())) * (n**2 - sum(count**2 for count in t.values()))
    return (c * n - sum(p[kind] * t[kind] for kind in t)) / math.sqrt(spread) if spread else 0.0


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 if it is not defined, of a constant or of one pair."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return 0.0
