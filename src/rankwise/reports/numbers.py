"""Numbers and foreign text for readers: rounded to what is known, with units and without invisible characters."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from rankwise.foreign import Json

MINUS, NONE, THIN = "\u2212", "–", "\u202f"
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
COUNT_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def is_number(value: Json) -> TypeGuard[float]:
    """Whether the value is a finite number. JSON written by Python may hold NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def significant(value: Json, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, written out: 1234.5 -> 1,230 and 0.00012 -> 0.00012."""
    if not is_number(value):
        return NONE
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return _fixed(rounded, min(max(places, 0), 8))


def estimate(value: float | None, interval: Sequence[float] | None, *, signed: bool = False) -> tuple[str, str]:
    """``("1.2813", "± 0.0042")``: the value to the digits that its interval supports, and the interval or nothing.

    An interval with unequal sides is written out: ``("+0.6", "(0.1 to 2.6)")``.
    """
    if value is None:
        return NONE, ""
    plus = "+" if signed and value > 0 else ""
    if interval is None:
        return plus + significant(value, 2 if signed else 4), ""
    low, high = interval
    half = (high - low) / 2
    # Two significant digits of the uncertainty: of 0.0123 3 decimals, of 1.5 one, of 40 none.
    decimals = min(max(0, 1 - math.floor(math.log10(half))), 8) if half > 0 else 4
    if abs(low + half - value) < 0.5 * 10**-decimals:
        return plus + _fixed(value, decimals), f"±{THIN}{_fixed(half, decimals)}"
    return plus + _fixed(value, decimals), f"({_fixed(low, decimals)} to {_fixed(high, decimals)})"


def byte_size(value: Json) -> str:
    """Decimal units and three digits, ``2.74 GB``: as disks and GPUs are sold."""
    return _scaled(value, BYTE_UNITS, " ", "B")


def short_count(value: Json) -> str:
    """``4.88M``; below a thousand as it is."""
    return _scaled(value, COUNT_UNITS, "", "")


def duration(value: Json) -> str:
    """``48 s``, ``3 min 40 s``, ``2 h 15 min``."""
    if not is_number(value):
        return NONE
    seconds = round(value)
    if seconds < 60:
        return f"{significant(value, 2)} s" if value < 10 else f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s"


def rate(value: Json) -> str:
    """A learning rate as people write it: ``2e-4``."""
    if not is_number(value) or value <= 0:
        return NONE
    mantissa, _, exponent = f"{value:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: Json) -> str:
    return f"{significant(100 * value, 2)} %" if is_number(value) else NONE


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def capital(text: str) -> str:
    """``text`` with a capital first letter; the others stay, as in ``QLoRA``."""
    return text[:1].upper() + text[1:]


def listed(names: Iterable[str], joint: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *head, last = list(names) or [""]
    return f"{', '.join(head)} {joint} {last}" if head else last


def visible(text: Json) -> str:
    """Foreign text in which control characters and marks that turn the reading order are written out."""
    return "".join(char if char in "\n\t" or not _is_hidden(char) else f"\\u{ord(char):04x}" for char in str(text))


def _is_hidden(char: str) -> bool:
    """Whether the character is a control, a lone surrogate or a bidirectional override. Joiners are parts of words."""
    if char in "\u200c\u200d\u00ad":
        return False
    return unicodedata.category(char) in ("Cc", "Cs", "Cf")


def shortened(text: str, limit: int) -> str:
    """``text`` cut at ``limit`` characters, with the number of characters left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def _scaled(value: Json, units: Sequence[tuple[float, str]], joint: str, smallest: str) -> str:
    if not is_number(value):
        return NONE
    for size, unit in units:
        # 999.6 kB would be written as 1,000 kB.
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)}{joint}{unit}"
    return f"{significant(value)}{joint}{smallest}".rstrip()
