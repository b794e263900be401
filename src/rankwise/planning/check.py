"""Three real steps on this machine against the prediction for it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from rankwise.planning.estimate import MemoryEstimate, estimate
from rankwise.planning.measure import measure
from rankwise.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Check:
    """Predicted and measured bytes of the same step: tensors alone, without the device's context."""

    method: str
    device_type: str
    predicted_bytes: int
    measured_bytes: int
    exact: bool
    step_seconds: tuple[float, ...]

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_bytes / max(1, self.measured_bytes) - 1

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "step_seconds": list(self.step_seconds), "error": self.error}


def check_method(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    *,
    exact: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Check:
    """Run the steps with random weights in a process of its own. Raises ConfigError (RW133) as ``measure`` does."""
    place: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    predicted = estimate(model, method, workload, exact=exact, **place)
    measured = measure(model, method, workload, **place)
    return Check(
        method,
        measured.device_type,
        comparable(predicted, measured.device_type),
        measured.peak_bytes,
        exact,
        measured.step_seconds,
    )


def comparable(predicted: MemoryEstimate, device_type: str) -> int:
    """On CUDA the meter is torch's allocator, which does not see the context and what lies unused in its segments."""
    return predicted.peak_bytes - (predicted.outside_bytes if device_type == "cuda" else 0)
