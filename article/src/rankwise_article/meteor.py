"""METEOR 1.5 (Denkowski and Lavie 2014): the original Java program, English, with ``-norm``."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.errors import DataError
from rankwise_article.java import METEOR_JAR, java_program

ARGUMENTS = ("Meteor", "-", "-", "-stdio", "-l", "en", "-norm")
# Far more than it needs: this only ends a program that hangs.
SECONDS = 1200
SECONDS_PER_TEXT = 2


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """The score of the corpus, from summed statistics, and the score of each tokenized prediction.

    Raises DataError (RA237) when Java fails.
    """
    seconds = SECONDS + SECONDS_PER_TEXT * len(predictions)
    with java_program("METEOR", METEOR_JAR, ARGUMENTS, seconds=seconds) as java:
        statistics = []
        for prediction, group in zip(predictions, references, strict=True):
            # coco-caption cleans the prediction alone.
            cleaned = prediction.replace("|||", "").replace("  ", " ")
            java.tell(f"SCORE ||| {' ||| '.join(group)} ||| {cleaned}")
            statistics.append(java.read_line().strip())
        java.tell(" ||| ".join(["EVAL", *statistics]))
        scores = [_number(java.read_line()) for _ in range(len(predictions) + 1)]
    return scores[-1], scores[:-1]


def _number(line: str) -> float:
    try:
        return float(line)
    except ValueError:
        raise DataError(
            "RA237", f"the Java program METEOR answered {line[:80]!r} where a score is expected; run it again."
        ) from None
