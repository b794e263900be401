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


def decimals_for(uncertainty: float) -> int:
    """Decimals that show two significant digits of ``uncertainty``: 0.0123 -> 3, 1.5 -> 1, 40 -> 0."""
    if not uncertainty > 0:
        return 4
    return min(max(0, 1 - math.floor(math.log10(uncertainty))), 8)


def significant(value: Json, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, written out: 1234.5 -> 1,230 and 0.00012 -> 0.00012."""
    if not is_number(value):
        return NONE
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    # 9.996 rounds to 10.0, which has a digit more.
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return _sign(f"{rounded:,.{min(max(places, 0), 8)}f}")


def fixed(value: float, decimals: int) -> str:
    return _sign(f"{value:,.{decimals}f}")


def signed(value: float, decimals: int) -> str:
    """The number with its sign; zero has none."""
    text = fixed(value, decimals)
    return text if not any(digit in text for digit in "123456789") or text.startswith(MINUS) else f"+{text}"


def half_width(interval: Json) -> float | None:
    """Half of ``[low, high]``; None if no interval can be given."""
    if not isinstance(interval, Sequence) or len(interval) != 2:
        return None
    low, high = interval
    return (high - low) / 2 if is_number(low) and is_number(high) else None


def estimate(mean: Json, interval: Json) -> tuple[str, str]:
    """``("1.2813", "± 0.0042")``: the mean to the digits that its interval supports, and the interval or nothing."""
    if not is_number(mean):
        return NONE, ""
    half = half_width(interval)
    if half is None:
        return significant(mean, 4), ""
    decimals = decimals_for(half)
    return fixed(mean, decimals), f"±{THIN}{half:,.{decimals}f}"


def difference(value: float, interval: Sequence[float] | None) -> tuple[str, str]:
    """``("−0.0212", "± 0.0081")``: as ``estimate``, with its sign; two digits where no interval can be given.

    An interval with unequal sides is written out: ``("+0.6", "(0.1 to 2.6)")``.
    """
    half = half_width(interval)
    if half is None or interval is None:
        return f"{'+' if value > 0 else ''}{significant(value, 2)}", ""
    decimals = decimals_for(half)
    is_even = abs(interval[0] + half - value) < 0.5 * 10**-decimals
    return signed(value, decimals), f"± {fixed(half, decimals)}" if is_even else f"({span(interval)})"


def span(interval: Sequence[float]) -> str:
    """``10.62 to 10.70``: both ends with the digits that the width supports."""
    low, high = interval
    decimals = decimals_for((high - low) / 2)
    return f"{fixed(low, decimals)} to {fixed(high, decimals)}"


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


def is_above(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Whether the whole range ``a`` lies above ``b``. An unknown range is never above another."""
    return a is not None and b is not None and a[0] > b[1]


def p_value(value: Json) -> str:
    if not is_number(value):
        return NONE
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def percent(value: Json, digits: int = 2) -> str:
    return f"{significant(100 * value, digits)} %" if is_number(value) else NONE


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


def _sign(text: str) -> str:
    return text.replace("-", MINUS)


def _scaled(value: Json, units: Sequence[tuple[float, str]], joint: str, smallest: str) -> str:
    if not is_number(value):
        return NONE
    for size, unit in units:
        # 999.6 kB would be written as 1,000 kB.
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)}{joint}{unit}"
    return f"{significant(value)}{joint}{smallest}".rstrip()
