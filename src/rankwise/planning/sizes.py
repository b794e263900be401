"""Parse and write amounts of memory. GB is 10^9 bytes, GiB is 2^30; the two differ by 7 %."""

from __future__ import annotations

import re

from rankwise.errors import ConfigError

# Bytes per unit; a letter alone (k, m, g, t) is decimal, and no unit at all means GB.
UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

# A larger number without a unit cannot mean GB.
MOST_BARE = 100_000
MOST_BYTES = 2**63
# Largest number of characters of a value in a message.
LONGEST_TEXT = 40

_SIZE = re.compile(r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)\s*([kmgt]?i?b?)", re.IGNORECASE)
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")


def parse_size(text: str | int | float) -> int:
    """Bytes in ``24``, ``24GB``, ``24 gb``, ``24g`` (each 24e9) or ``24GiB`` (24 * 2^30).

    A comma before three digits separates thousands (``1,024MB``), any other comma is a decimal point (``1,5TB``).

    Raises ConfigError (RW140) for an empty text and for text that is not a size.
    """
    found = _SIZE.fullmatch(str(text).strip())
    unit = (found.group(2).lower() or "gb") if found else ""
    if found is None or unit == "i":
        raise _no_size(text)
    unit = unit if unit.endswith("b") else f"{unit}b"
    number = float(_THOUSANDS.sub("", found.group(1)).replace(",", "."))
    if not found.group(2) and MOST_BARE < number < MOST_BYTES:
        raise ConfigError(
            "RW140",
            f"the memory {_shortened(text)} has no unit and would mean GB; did you mean bytes? Write "
            f"{size_option(number)}.",
        )
    size = number * UNITS.get(unit, 0)
    if size >= MOST_BYTES:
        raise ConfigError(
            "RW140", f"the memory {_shortened(text)} is more than any machine has; write 24GB, 24GiB or 24 (GB)."
        )
    if round(size) < 1:
        raise _no_size(text)
    return round(size)


def _shortened(text: object) -> str:
    """The value as given, shortened to LONGEST_TEXT characters."""
    given = str(text)
    return repr(given if len(given) <= LONGEST_TEXT else f"{given[:LONGEST_TEXT]}...")


def _no_size(text: object) -> ConfigError:
    return ConfigError(
        "RW140",
        f"the memory {_shortened(text)} is not a size above 0; write 24GB (10^9 bytes), 24GiB (2^30) or 24 (GB).",
    )


def size_option(size_bytes: float) -> str:
    """``24GB``, ``1.5MB`` or ``900kB``, as an option takes it."""
    unit = next((name for name in ("GB", "MB", "kB") if size_bytes >= UNITS[name.lower()]), "B")
    return f"{size_bytes / UNITS[unit.lower()]:.12g}{unit}"
