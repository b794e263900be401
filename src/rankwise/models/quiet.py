"""Call transformers quietly, and turn its errors into one sentence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report, whose content rankwise reports itself; progress bars only on a terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def reason_of(error: Exception) -> str:
    """An exception's message on one line, to end a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__
