"""How transformers is called: quietly, without doing slow things twice, and with its errors as one sentence."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report, whose content we raise or warn; progress bars only on a terminal."""
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


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Let transformers' GGUF loader reuse what it works out twice (the header) or per module (the table of names).

    Both are pure functions of the gguf package; for the demo model their repetition is half of the loading time.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    repeated = ((gguf, "GGUFReader"), (gguf, "get_tensor_name_map"), (loader, "tqdm"))
    kept = {(module, name): getattr(module, name) for module, name in repeated}
    try:
        for (module, name), original in kept.items():
            # Of tqdm, disable=None means: no bar without a terminal.
            new = (
                functools.partial(original, disable=True if os.environ.get("TQDM_DISABLE") else None)
                if name == "tqdm"
                else functools.cache(original)
            )
            setattr(module, name, new)
        yield
    finally:
        for (module, name), original in kept.items():
            setattr(module, name, original)


def reason_of(error: Exception) -> str:
    """An exception as the rest of one sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__
