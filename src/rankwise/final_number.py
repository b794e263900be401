"""The final number of a worked solution, by the rules of GSM8K (Cobbe et al. 2021)."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
# A fraction such as 3/4 is one number. A minus right before it is its sign, except after a word, a number or a bracket,
# as in 20-30 and covid-19.
SIGN = r"(?P<sign>(?<![\w)%])[-\u2212\u2013](?=[$£€]?[\d.])[$£€]?)?"
PATTERN = re.compile(rf"{SIGN}(?P<number>(?:{DIGITS})(?:\s?/\s?(?:{DIGITS}))?)")
# Maximum length in characters. A model that repeats a digit writes longer numbers, and a Fraction of millions of
# digits takes minutes.
LONGEST_NUMBER = 1000
# What may stand between a mark and its number: signs, no words.
SIGNS = r"[^\w\n]{0,20}"
# If the text after ``A:`` itself names the answer by one of these phrases, the phrase decides.
ANSWER = rf"\bfinal answer\b(?:\s+[-\u2013](?=\s))?(?={SIGNS}\d)|\banswer\s*(?:is|:|=)"
MARKERS = (
    # ``#### Step 2: add them`` and ``#### 2. Add them`` are headings.
    re.compile(rf"####(?!{SIGNS}\d+[.):]\s+[^\W\d])(?={SIGNS}\d)(?P<rest>[^\n]*)"),
    re.compile(r"\\boxed\s*\{(?P<rest>[^{}\n]*)"),
    re.compile(rf"(?im:{ANSWER}|^[^\S\n]*A:(?![^\n]*(?:{ANSWER})))(?P<rest>[^\n]*)"),
)
# The calculator annotations in GSM8K's solutions: 48/2 = <<48/2=24>>24.
CALCULATOR = re.compile(r"<<[^<>\n]*>>")
# Separators of thousands in LaTeX: 1{,}200 and 1\,200.
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3}(?!\d))")


def extract_answer(text: str) -> Fraction | None:
    r"""The final number of ``text``, or None.

    The first rule that matches decides: the number directly after ``####``; the one in ``\boxed{}``; the one after
    ``answer is``, ``answer:`` or ``A:``, where the number after the line's last equals sign counts, or directly after
    ``final answer``; the last number of the text. Commas, currency signs, units and a final full stop are ignored.
    """
    text = THOUSANDS.sub(",", CALCULATOR.sub("", text))
    for marker in MARKERS:
        for found in marker.finditer(text):
            number = _first_number(found["rest"])
            if number is not None:
                return number
    numbers = list(PATTERN.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _first_number(rest: str) -> Fraction | None:
    """The first number after the last equals sign; the first of the whole text if there is no equals sign."""
    found = PATTERN.search(rest.rpartition("=")[2]) or PATTERN.search(rest)
    return _value(found) if found else None


def _value(found: re.Match[str]) -> Fraction | None:
    """The matched number with its sign; None for a division by zero or a number too long to be an answer."""
    if len(found[0]) > LONGEST_NUMBER:
        return None
    top, _, bottom = re.sub(r"[^\d./]", "", found["number"]).partition("/")
    divisor = Fraction(Decimal(bottom)) if bottom else Fraction(1)
    if not divisor:
        return None
    value = Fraction(Decimal(top)) / divisor
    return -value if found["sign"] else value
