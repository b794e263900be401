"""The five figures of the E2E NLG challenge, as its official scorer gives them (Dušek et al. 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rankwise.errors import DataError
from rankwise.foreign import JsonObject
from rankwise_article.bleu_nist import MtevalStatistics, mteval_statistics
from rankwise_article.java import meteor, missing_java, ptb_tokenize

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
ON_JAVA = ("METEOR", "ROUGE_L", "CIDEr")
DECIMALS = 4


@dataclasses.dataclass(frozen=True)
class E2eScores:
    """Scores of N predictions. BLEU, METEOR and ROUGE_L lie in [0, 1], CIDEr in [0, 10]; higher is better."""

    # {name in METRICS: unrounded score}; None if Java is missing.
    metrics: Mapping[str, float | None]
    # METEOR, ROUGE_L and CIDEr of each prediction; empty if Java is missing. ROUGE_L and CIDEr are their means.
    per_example: Mapping[str, tuple[float, ...]]
    # .bleu(rows) and .nist(rows) score any sample of the examples.
    statistics: MtevalStatistics
    count: int
    # Predictions without any text; they are scored.
    empty: int
    # Why there is no METEOR, ROUGE_L and CIDEr, and how to get them.
    missing: str | None = None

    def to_json(self) -> JsonObject:
        """The scores, rounded as the official scorer prints them."""
        return {**{name: rounded(self.metrics[name]) for name in METRICS}, "count": self.count}


def rounded(score: float | None) -> float | None:
    """Four decimals, rounded as C's printf does."""
    return None if score is None else float(f"{score:.{DECIMALS}f}")


def score_e2e(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> E2eScores:
    """Score N predictions, each against its references.

    Without Java or the extra ``eval``, METEOR, ROUGE_L and CIDEr are None and ``missing`` says why: all three are
    defined on the tokens of a Java program. Nothing else is put in their place.
    Raises DataError: RA232 different counts, RA239 nothing to score, RA233 a prediction without a reference,
    RA237 a Java program failed.
    """
    _check(predictions, references)
    statistics = mteval_statistics(predictions, references)
    scores: dict[str, float | None] = {"BLEU": statistics.bleu(), "NIST": statistics.nist()}
    missing = missing_java()
    per_example = {} if missing else _scores_on_java(predictions, references, scores)
    empty = sum(not text.strip() for text in predictions)
    metrics = {name: scores.get(name) for name in METRICS}
    return E2eScores(metrics, per_example, statistics, len(predictions), empty, missing)


def _scores_on_java(
    predictions: Sequence[str], references: Sequence[Sequence[str]], scores: dict[str, float | None]
) -> dict[str, tuple[float, ...]]:
    """Adds the corpus scores to ``scores`` and returns those of each example."""
    tokens = iter(ptb_tokenize([text for group in references for text in group]))
    refs = [[next(tokens) for _ in group] for group in references]
    texts = ptb_tokenize(predictions)
    scores["METEOR"], meteors = meteor(texts, refs)
    rouge, ciders = rouge_l_and_cider(texts, refs)
    scores["ROUGE_L"], scores["CIDEr"] = sum(rouge) / len(rouge), sum(ciders) / len(ciders)
    return {"METEOR": tuple(meteors), "ROUGE_L": tuple(rouge), "CIDEr": tuple(ciders)}


def rouge_l_and_cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[float], list[float]]:
    """ROUGE-L and CIDEr-D of each tokenized prediction by coco-caption, which is what the official scorer runs."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = {index: list(group) for index, group in enumerate(references)}
    res = {index: [text] for index, text in enumerate(predictions)}
    rouge = Rouge().compute_score(gts, res)[1].tolist()
    if not any(text.split() for group in references for text in group):
        # If no reference has a word, the scorer's table of document frequencies is empty, and the scorer would fail.
        return rouge, [0.0] * len(predictions)
    return rouge, Cider().compute_score(gts, res)[1].tolist()


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise DataError(
            "RA232", f"there are {len(predictions):,} predictions and {len(references):,} groups of references."
        )
    if not predictions:
        raise DataError("RA239", "there are no predictions to score; give a file with at least one.")
    bare = next((index for index, group in enumerate(references) if not any(text.strip() for text in group)), None)
    if bare is not None:
        raise DataError("RA233", f"prediction {bare + 1} has no reference; give at least one that is not empty.")
