"""The private parts of datasets that rankwise uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

HUB_SECONDS = 10


@contextlib.contextmanager
def hub_or_cache() -> Iterator[bool]:
    """Context manager: yields whether the hub answers. If it does not, ``datasets`` uses only its cache inside.

    ``datasets`` would retry an unreachable hub for half a minute. It reads the environment variable for offline use
    only at import, so the constant is patched.
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
