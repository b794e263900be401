"""The five figures of the E2E NLG challenge, as its official scorer gives them (Dušek et al. 2018), and its files.

A table has the columns that its header names; its lines are stripped, empty ones skipped, quotes are those of CSV,
and characters that some systems broke (``Â£``, ``Ã©``) are repaired. A text file has one prediction a line, where an
empty line is an empty prediction; references are one a line, groups with an empty line between them, or lines
``context||reference``, as in LoRA's repository. Predictions may be JSON lines, as ``rankwise evaluate`` writes them.

METEOR 1.5 and the Penn Treebank tokenizer are the Java programs of ``pycocoevalcap``, called as coco-caption does.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rankwise.data import kind_of, read_text
from rankwise.errors import DataError, some_of, warn
from rankwise.foreign import JsonObject
from rankwise_article.bleu_nist import MtevalStatistics, mteval_statistics
from rankwise_article.scores import no_duplicates, read_records

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
ON_JAVA = ("METEOR", "ROUGE_L", "CIDEr")
DECIMALS = 4

TABLES = (".tsv", ".csv")
# Of a meaning representation and its reference, in LoRA's files.
BETWEEN = "||"
# Patterns for the beginning of a column's name.
CONTEXT_COLUMN = re.compile(r"mr|src|source|meaning|da|dial(ogue)?[_ .-]act", re.IGNORECASE)
PREDICTION_COLUMN = re.compile(r"out|ref|sys", re.IGNORECASE)
REFERENCE_COLUMN = re.compile(r"trg|tgt|target|ref|human", re.IGNORECASE)
REPAIRED = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))

PACKAGE = "pycocoevalcap"
TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
TOKENIZER = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
METEOR_JAR = "meteor/meteor-1.5.jar"
METEOR = ("Meteor", "-", "-", "-stdio", "-l", "en", "-norm")
# UTF-8 and a decimal point whatever the user's locale says; one collector thread is enough.
JAVA = ("java", "-Xmx2G", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-cp")
# The tokenizer writes brackets as -lrb- in lower case, so neither coco-caption nor this module drops them.
DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
# Characters that the tokenizer treats as line ends: each text must stay one line.
LINE_ENDS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")


@dataclasses.dataclass(frozen=True)
class E2eScores:
    """Scores of N predictions. BLEU, METEOR and ROUGE_L lie in [0, 1], CIDEr in [0, 10]; higher is better."""

    # {name in METRICS: unrounded score}; None if Java is missing.
    metrics: Mapping[str, float | None]
    # METEOR, ROUGE_L and CIDEr of each prediction; empty if Java is missing. ROUGE_L and CIDEr are their means.
    per_example: Mapping[str, Sequence[float]]
    # .bleu(rows) and .nist(rows) score any sample of the examples.
    statistics: MtevalStatistics
    # Why there is no METEOR, ROUGE_L and CIDEr, and how to get them.
    missing: str | None = None

    def to_json(self) -> JsonObject:
        """The scores, rounded as the official scorer prints them."""
        rounded = {n: None if value is None else float(f"{value:.{DECIMALS}f}") for n, value in self.metrics.items()}
        return {**rounded, "count": len(self.statistics.closest)}


def score_e2e(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> E2eScores:
    """Score N predictions, each against its references.

    Without Java or ``pycocoevalcap``, METEOR, ROUGE_L and CIDEr are None, and a warning (RA236) says why: all three are
    defined on the tokens of a Java program. Nothing else is put in their place.
    Raises DataError: RA233 a prediction without a reference, RA237 a Java program failed.
    """
    bare = [number for number, group in enumerate(references, 1) if not any(text.strip() for text in group)]
    if bare:
        raise DataError("RA233", f"prediction {bare[0]} has no reference; give at least one that is not empty.")
    statistics = mteval_statistics(predictions, references)
    scores: dict[str, float | None] = {"BLEU": statistics.bleu(), "NIST": statistics.nist()}
    missing = missing_java()
    if missing:
        warn("RA236", f"{', '.join(ON_JAVA)} are left out: {missing}.")
        return E2eScores({**scores, **dict.fromkeys(ON_JAVA)}, {}, statistics, missing)
    tokens = iter(ptb_tokenize([text for group in references for text in group]))
    refs = [[next(tokens) for _ in group] for group in references]
    texts = ptb_tokenize(predictions)
    scores["METEOR"], meteors = meteor(texts, refs)
    rouge, ciders = rouge_l_and_cider(texts, refs)
    scores["ROUGE_L"], scores["CIDEr"] = sum(rouge) / len(rouge), sum(ciders) / len(ciders)
    return E2eScores(scores, {"METEOR": meteors, "ROUGE_L": rouge, "CIDEr": ciders}, statistics)


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


def missing_java() -> str | None:
    """What METEOR and the tokenizer need that is missing here, and how to get it, as a clause; None if nothing is
    missing.
    """
    if not all(file_of(name).is_file() for name in (TOKENIZER_JAR, METEOR_JAR)):
        return f"{PACKAGE} is not installed; get it with `pip install pycocoevalcap`"
    if shutil.which("java") is None:
        return (
            "there is no `java` on the PATH; install a Java runtime, such as OpenJDK 17 (Debian: default-jre-headless)"
        )
    return None


def file_of(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else PACKAGE) / name


def _java(jar: str, arguments: Sequence[str], lines: Sequence[str], count: int) -> list[str]:
    """The ``count`` lines that a program writes for ``lines``. Raises DataError (RA237) when it fails."""
    done = subprocess.run(
        [*JAVA, str(file_of(jar)), *arguments],
        cwd=file_of(jar).parent,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    found = done.stdout.split("\n")[:-1]
    if done.returncode or len(found) != count:
        said = [line.strip() for line in done.stderr.splitlines() if "Exception" in line or "rror" in line]
        raise DataError(
            "RA237",
            f"the Java program {arguments[0]} gave {len(found):,} lines instead of {count:,} (exit code "
            f"{done.returncode}: {' '.join(said[:1])[:200] or 'it said nothing'}); run it again, with more free memory "
            "if that is what it lacks.",
        )
    return found


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """The tokens of each text, in lower case, without punctuation, joined by single spaces.

    The texts are given at once, in order, since the tokenizer looks across line ends. Raises DataError (RA237).
    """
    lines = _java(TOKENIZER_JAR, TOKENIZER, [LINE_ENDS.sub(" ", text) for text in texts], len(texts))
    return [" ".join(word for word in line.rstrip().split(" ") if word not in DROPPED) for line in lines]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR (Denkowski and Lavie 2014) of the corpus, from summed statistics, and of each tokenized prediction.

    Raises DataError (RA237).
    """
    # coco-caption cleans the predictions, and not the references.
    cleaned = [prediction.replace("|||", "").replace("  ", " ") for prediction in predictions]
    asked = [f"SCORE ||| {' ||| '.join(group)} ||| {text}" for group, text in zip(references, cleaned, strict=True)]
    java = subprocess.Popen(
        [*JAVA, str(file_of(METEOR_JAR)), *METEOR],
        cwd=file_of(METEOR_JAR).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    try:
        # Leaving the block ends the input, at which the program ends. It takes seconds to start: once for both parts.
        with java:
            statistics = [_answers(java, line, 1)[0] for line in asked]
            *scores, whole = map(float, _answers(java, " ||| ".join(["EVAL", *statistics]), len(asked) + 1))
    except (OSError, ValueError):
        raise DataError(
            "RA237", "the Java program METEOR stopped before its work was done; run it again, with more free memory."
        ) from None
    return whole, scores


def _answers(java: subprocess.Popen[str], line: str, count: int) -> list[str]:
    """The next ``count`` lines that the program writes, after it was given ``line``."""
    assert java.stdin is not None, "a pipe"
    assert java.stdout is not None, "a pipe"
    print(line, file=java.stdin, flush=True)
    return [java.stdout.readline().strip() for _ in range(count)]


def read_e2e(predictions: Path, references: Path) -> tuple[list[str], list[Sequence[str]]]:
    """N predictions and the references of each.

    Predictions with a meaning representation get the references of the same one; others are taken in order.
    Raises DataError: RA231 a table without the columns, RA238 bad JSON lines, RA232 different counts, RA233 no
    references for a prediction, RA234 a meaning representation twice, RA239 an empty file, and what reading raises.
    """
    given, known = _read_predictions(predictions), read_references(references)
    for path, items in ((predictions, given), (references, known)):
        if not items:
            raise DataError("RA239", f"{path} is empty; there is nothing to score.")
    texts = [text for _, text in given]
    empty = [str(number) for number, text in enumerate(texts, 1) if not text.strip()]
    if empty:
        warn(
            "RA235",
            f"{predictions}: {len(empty):,} of {len(texts):,} predictions are empty ({some_of(empty, 3)}); they are "
            "scored as they are.",
        )
    contexts = [context for context, _ in given if context is not None]
    no_duplicates(predictions, "meaning representation", contexts)
    missing = [context for context in contexts if context not in known]
    if missing:
        raise DataError(
            "RA233",
            f"{references} has no reference for {len(missing):,} of {len(texts):,} meaning representations of "
            f"{predictions}; the first is {missing[0][:80]!r}.",
        )
    if len(texts) != len(known):
        raise DataError(
            "RA232",
            f"{predictions} has {len(texts):,} predictions and {references} {len(known):,} groups of references; "
            "give one prediction of each.",
        )
    return texts, [known[context] for context in contexts or known]


def _read_predictions(path: Path) -> Sequence[tuple[str | None, str]]:
    """(meaning representation, text) of each prediction; without a table, None and the text."""
    if kind_of(path) in TABLES:
        return _read_table(path, PREDICTION_COLUMN)
    if kind_of(path) == ".jsonl":
        return [(None, row["prediction"]) for row in read_records(path, "prediction")]
    return [(None, line.strip()) for line in read_text(path).splitlines()]


def read_references(path: Path) -> dict[str, Sequence[str]]:
    """{meaning representation: its references} in the order of the file; without a table, the number of the group."""
    if kind_of(path) in TABLES:
        return _grouped(_read_table(path, REFERENCE_COLUMN))
    text = "\n".join(line.strip() for line in read_text(path).splitlines()).strip()
    if BETWEEN in text.partition("\n")[0]:
        return _grouped(_read_pairs(path, text))
    groups = [group.split("\n") for group in re.split(r"\n{2,}", text) if group]
    if len(groups) == 1:
        groups = [[line] for line in groups[0]]
    return {str(number): group for number, group in enumerate(groups)}


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for context, text in pairs:
        found.setdefault(context, []).append(text)
    return {**found}


def _read_pairs(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        context, between, reference = map(str.strip, line.partition(BETWEEN))
        if line and not (between and reference):
            raise DataError("RA231", f"{path}: line {number} is no `context||reference`, as the first one is.")
        if line:
            yield context, reference


def _read_table(path: Path, column: re.Pattern[str]) -> list[tuple[str, str]]:
    text = read_text(path)
    for broken, right in REPAIRED:
        text = text.replace(broken, right)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names, *rows = csv.reader(lines, delimiter="\t" if "\t" in "".join(lines[:1]) else ",")
    except (ValueError, csv.Error) as error:
        raise DataError("RA231", f"{path} cannot be read as a table: {error}.") from None
    places = [index for pattern in (CONTEXT_COLUMN, column) for index, name in enumerate(names) if pattern.match(name)]
    if len(places) != 2:
        raise DataError(
            "RA231",
            f"{path}: the columns {', '.join(map(repr, names))} are not one with the meaning representation and one "
            "with the text; name them `mr` and `output` (predictions) or `ref` (references).",
        )
    # Lines are stripped at their end, which removes the separator before an empty last column.
    rows = [[*row, ""] if len(row) == len(names) - 1 else row for row in rows]
    wrong = [str(number) for number, row in enumerate(rows, 1) if len(row) != len(names)]
    if wrong:
        raise DataError(
            "RA231",
            f"{path}: row {some_of(wrong, 3)} has other than the {len(names)} columns of the header; look for a tab, "
            "comma or quote too many.",
        )
    context, value = places
    return [(row[context], row[value]) for row in rows]
