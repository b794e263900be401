"""The function that estimates memory. Imports no torch before it is needed."""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING

from rankwise.errors import ConfigError
from rankwise.planning.terms import PLANNED, MemoryEstimate
from rankwise.planning.workload import Workload

if TYPE_CHECKING:
    from rankwise.planning.facts import PlannedModel
    from rankwise.planning.fitting import Estimator


def estimate(
    model: str | os.PathLike[str] | PlannedModel,
    method: str,
    workload: Workload | None = None,
    *,
    exact: bool = False,
    deadline: float = math.inf,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> MemoryEstimate:
    """Peak memory of one step of ``method`` on ``model``: hub id, folder, GGUF file or demo; its weights are not read.

    A ``PlannedModel`` has its own ``trust_remote_code`` and revision. ``exact`` runs the real step on fake tensors
    (seconds), at most until ``deadline`` (by ``time.monotonic``); otherwise the closed form uses the config.

    Raises ConfigError: RW130 for settings, RW131 for an unknown method, RW132 for an optimizer whose memory is not
    known; AdapterError: RW401 to RW403 and RW419 for targets; ModelError: RW135 after the deadline, RW325 ff. and as
    ``fetch_model`` and ``load_skeleton`` do.
    """
    if method not in PLANNED:
        raise ConfigError("RW131", f"there is no method {method!r}; give one of {', '.join(PLANNED)}.")
    workload = workload or Workload()
    if exact:
        from rankwise.planning.dry_run import dry_run

        if not isinstance(model, str | os.PathLike):
            trust_remote_code = model.trust_remote_code
            model = model.place
        return dry_run(
            model, method, workload, deadline=deadline, trust_remote_code=trust_remote_code, revision=revision
        )
    # Not above: every --help imports this package.
    from rankwise.models.source import fetch_model
    from rankwise.planning.closed_form import of_shape
    from rankwise.planning.facts import read_model

    if isinstance(model, str | os.PathLike):
        source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
        model = read_model(source)
    return of_shape(model.known_shape(), method, workload)


def estimator_of(model: PlannedModel) -> Estimator:
    """The closed form for one model."""
    return functools.partial(estimate, model)
