"""METEOR 1.5 and the Penn Treebank tokenizer, the Java programs of ``pycocoevalcap``, as coco-caption calls them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import DataError

PACKAGE = "pycocoevalcap"
TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
TOKENIZER = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
METEOR_JAR = "meteor/meteor-1.5.jar"
METEOR = ("Meteor", "-", "-", "-stdio", "-l", "en", "-norm")
# UTF-8 and a decimal point whatever the user's locale says; one collector thread is enough.
OPTIONS = ("-Xmx2G", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Duser.language=en")
# The tokenizer writes brackets as -lrb- in lower case, so neither coco-caption nor this module drops them.
DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
# Characters that the tokenizer treats as line ends: each text must stay one line.
LINE_ENDS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")


def missing_java() -> str | None:
    """What METEOR and the tokenizer need that is missing here, and how to get it, as a clause; None if nothing is
    missing.
    """
    if not all(_file(name).is_file() for name in (TOKENIZER_JAR, METEOR_JAR)):
        return f"{PACKAGE} is not installed; get it with `pip install pycocoevalcap`"
    if shutil.which("java") is None:
        return (
            "there is no `java` on the PATH; install a Java runtime, such as OpenJDK 17 (Debian: default-jre-headless)"
        )
    return None


def _file(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else PACKAGE) / name


def _command(jar: str, arguments: Sequence[str]) -> list[str]:
    return ["java", *OPTIONS, "-cp", str(_file(jar)), *arguments]


def _lines(jar: str, arguments: Sequence[str], lines: Sequence[str], count: int) -> list[str]:
    """The ``count`` lines that a program writes for ``lines``. Raises DataError (RA237) when it fails."""
    done = subprocess.run(
        _command(jar, arguments),
        cwd=_file(jar).parent,
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
    if not texts:
        return []
    lines = _lines(TOKENIZER_JAR, TOKENIZER, [LINE_ENDS.sub(" ", text) for text in texts], len(texts))
    return [" ".join(word for word in line.rstrip().split(" ") if word not in DROPPED) for line in lines]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR (Denkowski and Lavie 2014) of the corpus, from summed statistics, and of each tokenized prediction.

    Raises DataError (RA237).
    """
    # coco-caption cleans the predictions, and not the references.
    cleaned = [prediction.replace("|||", "").replace("  ", " ") for prediction in predictions]
    process = subprocess.Popen(
        _command(METEOR_JAR, METEOR),
        cwd=_file(METEOR_JAR).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    try:
        # Leaving the block ends the input, at which the program ends.
        with process as java:
            pairs = zip(references, cleaned, strict=True)
            asked = [f"SCORE ||| {' ||| '.join(group)} ||| {text}" for group, text in pairs]
            statistics = [_answers(java, line, 1)[0] for line in asked]
            *scores, whole = map(float, _answers(java, " ||| ".join(["EVAL", *statistics]), len(cleaned) + 1))
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
