"""The Penn Treebank tokenizer of Stanford CoreNLP 3.4.1, as coco-caption calls it: lower case, no punctuation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rankwise.errors import DataError
from rankwise_article.java import TOKENIZER_JAR, java_program

CLASS = "edu.stanford.nlp.process.PTBTokenizer"
# The tokenizer writes brackets as -lrb- in lower case, so neither coco-caption nor this module drops them.
DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
# Characters that the tokenizer treats as line ends: each text must stay one line.
LINE_ENDS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")
SECONDS = 600
SECONDS_PER_TEXT = 0.05


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """The tokens of each text, joined by single spaces.

    The texts are given at once, in order, since the tokenizer looks across line ends.
    Raises DataError (RA237) when Java fails.
    """
    if not texts:
        return []
    given = "\n".join(LINE_ENDS.sub(" ", text) for text in texts) + "\n"
    seconds = SECONDS + SECONDS_PER_TEXT * len(texts)
    with java_program("PTBTokenizer", TOKENIZER_JAR, [CLASS, "-preserveLines", "-lowerCase"], seconds=seconds) as java:
        lines = java.filter(given).split("\n")[:-1]
    if len(lines) != len(texts):
        raise DataError(
            "RA237",
            f"the Java program PTBTokenizer gave {len(lines):,} lines for {len(texts):,} texts; look for unusual "
            "control characters in them.",
        )
    return [" ".join(word for word in line.rstrip().split(" ") if word not in DROPPED) for line in lines]
