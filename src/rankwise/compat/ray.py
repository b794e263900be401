"""The private part of Ray that rankwise uses."""

from __future__ import annotations


def print_no_raylet_logs() -> None:
    """Keep Ray from printing, to the standard output, the last log lines of a node that was lost.

    Each of the node's agents sends them to every driver, which has no option for this; the runner says which step lost
    its machine. To be called before ``ray.init``.
    """
    from ray._private import worker

    worker.listen_error_messages = lambda *_: None
