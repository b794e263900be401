"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``0:42``, ``3:07``, ``2:15:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parameter_count(count: int) -> str:
    """``4,884,480 (4.9M)``; small counts without the short form."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count:,} ({count / limit:.3g}{unit})"
    return f"{count:,}"


def one_line(text: str, limit: int = 240) -> str:
    """``text`` without line breaks and control characters, cut at ``limit`` characters."""
    joined = printable(" ".join(text.split()))
    return joined if len(joined) <= limit else f"{joined[: limit - 3]}..."


def printable(text: str) -> str:
    """``text`` with control characters made visible: foreign text must not steer the terminal."""
    codes = {ord(character) for character in text if character not in "\n\t" and not character.isprintable()}
    return text.translate({code: chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}" for code in codes})
