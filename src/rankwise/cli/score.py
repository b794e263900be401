"""``rankwise score``: score existing texts, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.errors import ConfigError, warn
from rankwise.evaluation.score_settings import ScoreSettings
from rankwise.options import flag
from rankwise.reports.numbers import plural

NEEDED = {
    "e2e": ("predictions", "references"),
    "gsm8k": ("predictions", "references"),
    "vicuna": ("ratings", "reference_answers"),
}
LABEL_WIDTH = 18


def run(settings: ScoreSettings, output: Output) -> Document:
    check_options(settings)
    return SCORERS[settings.what](settings, output)


def check_options(settings: ScoreSettings) -> None:
    """Check the files of a benchmark. Raises ConfigError (RW155) for missing ones and for those of another
    benchmark.
    """
    needed = NEEDED[settings.what]
    missing = [name for name in needed if not getattr(settings, name)]
    strange = [name for name in ScoreSettings.model_fields if name not in (*needed, "what") and getattr(settings, name)]
    problems = [f"{_flags(missing)} missing"] * bool(missing) + [f"{_flags(strange)} not used by it"] * bool(strange)
    if problems:
        both = _flags(needed).removesuffix(" are")
        raise ConfigError("RW155", f"score {settings.what} takes {both}; {', and '.join(problems)}.")


def _flags(names: Sequence[str]) -> str:
    flags = " and ".join(flag(name) for name in names)
    return f"{flags} {'is' if len(names) == 1 else 'are'}"


def _path(path: Path | None) -> Path:
    """A path that ``check_options`` has found to be given."""
    assert path is not None
    return path


def _e2e(settings: ScoreSettings, output: Output) -> Document:
    from rankwise.evaluation.metrics.e2e import METRICS, ON_JAVA, score_e2e
    from rankwise.evaluation.metrics.e2e_files import read_e2e

    predictions, references = read_e2e(_path(settings.predictions), _path(settings.references))
    with output.waiting("scoring"):
        scores = score_e2e(predictions, references)
    if scores.missing:
        warn("RW236", f"{', '.join(ON_JAVA)} are left out: {scores.missing}.")
    document = scores.to_json()
    total = sum(map(len, references))
    _line(output, "predictions", f"{plural(scores.count, 'text')} against {plural(total, 'reference')}")
    for name in METRICS:
        _line(output, name, "not computed" if document[name] is None else f"{document[name]:.4f}")
    return document


def _gsm8k(settings: ScoreSettings, output: Output) -> Document:
    from rankwise.evaluation.metrics.gsm8k import read_gsm8k, score_gsm8k

    scores = score_gsm8k(*read_gsm8k(_path(settings.predictions), _path(settings.references)))
    _line(output, "correct", f"{scores.correct:,} of {scores.total:,}  ({scores.correct / scores.total:.2%})")
    if scores.unanswered:
        _line(output, "without a number", f"{scores.unanswered:,}")
    return scores.to_json()


def _vicuna(settings: ScoreSettings, output: Output) -> Document:
    from rankwise.evaluation.metrics.vicuna import read_vicuna, relative_score, warn_of_failed

    score = relative_score(*read_vicuna(settings.ratings or (), _path(settings.reference_answers)))
    warn_of_failed(score)
    document = score.to_json()
    _line(output, "ratings", f"{score.count:,} used, {score.failed:,} failed")
    for name in ("reference_first", "system_first", "mean"):
        value = document[name]
        text = (
            "none: no rating, or none but 0 for the reference" if value is None else f"{value:.2f} % of the reference"
        )
        _line(output, name.replace("_", " "), text)
    return document


def _line(output: Output, label: str, text: str) -> None:
    output.line(f"{label:<{LABEL_WIDTH}}{text}")


SCORERS: Mapping[str, Callable[[ScoreSettings, Output], Document]] = {
    "e2e": _e2e,
    "gsm8k": _gsm8k,
    "vicuna": _vicuna,
}
VERB = Verb(
    name="score",
    settings=ScoreSettings,
    run=run,
    summary="Score texts that you have already: E2E, GSM8K, or a judge's Vicuna ratings. Runs no model.",
    examples=(
        "rankwise score e2e --predictions out.tsv --references testset_w_refs.csv",
        "rankwise score gsm8k --predictions out.jsonl --references test.jsonl --json",
        "rankwise score vicuna --ratings a.jsonl --ratings b.jsonl \\",
        "    --reference-answers answers.jsonl",
    ),
)
