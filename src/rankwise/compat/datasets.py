"""The private parts of datasets that we use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

HUB_SECONDS = 10


@contextlib.contextmanager
def hub_or_cache() -> Iterator[bool]:
    """Whether the hub answers. If not, ``datasets`` uses its cache alone within this context.

    ``datasets`` itself asks an unreachable hub again and again, for half a minute, and reads the environment variable
    that forbids it only when it is imported: so its constant is patched.
    """
    import datasets
    from huggingface_hub import constants, get_session

    before = datasets.config.HF_HUB_OFFLINE
    answers = not before
    if answers:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception:  # noqa: BLE001  the exceptions of the hub's client differ from version to version
            answers = False
    datasets.config.HF_HUB_OFFLINE = not answers
    try:
        yield answers
    finally:
        datasets.config.HF_HUB_OFFLINE = before
