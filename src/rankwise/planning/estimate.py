"""The one function that gives a memory plan. Imports no torch before it is needed."""

from __future__ import annotations

import math
import os

from rankwise.errors import ConfigError
from rankwise.planning.terms import METHODS, MemoryEstimate
from rankwise.planning.workload import Workload


def estimate(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload | None = None,
    *,
    exact: bool = False,
    deadline: float = math.inf,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> MemoryEstimate:
    """Peak memory of one step of ``method`` on ``model``: hub id, folder, GGUF file or demo; its weights are not read.

    ``exact`` runs the real step on fake tensors (seconds), until ``deadline`` by ``time.monotonic``; otherwise the
    closed form answers from the config. Raises ConfigError: RW130 for settings, RW131 for an unknown method;
    ModelError: RW135 after the deadline, RW325 ff. and as ``load_skeleton`` does.
    """
    if method not in METHODS:
        raise ConfigError("RW131", f"there is no method {method!r}; give one of {', '.join(METHODS)}.")
    workload = workload or Workload()
    if exact:
        from rankwise.planning.dry_run import dry_run

        return dry_run(
            model, method, workload, deadline=deadline, trust_remote_code=trust_remote_code, revision=revision
        )
    # Not above: every --help imports this package.
    from rankwise.planning.closed_form import closed_form

    return closed_form(model, method, workload, trust_remote_code=trust_remote_code, revision=revision)
