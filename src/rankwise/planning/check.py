"""Compare three real steps on this machine with the prediction for them."""

from __future__ import annotations

import dataclasses
import os

from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject
from rankwise.planning.estimate import estimate
from rankwise.planning.measure import measure
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import DTYPE_BYTES, Workload
from rankwise.reports.numbers import byte_size


@dataclasses.dataclass(frozen=True)
class Check:
    """Predicted and measured bytes of the same step: of tensors only, without the device's context."""

    method: str
    device_type: str
    predicted_bytes: int
    measured_bytes: int
    exact: bool
    step_seconds: tuple[float, ...]
    devices: int = 1

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_bytes / max(1, self.measured_bytes) - 1

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "step_seconds": list(self.step_seconds), "error": self.error}


def check_method(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    memory_bytes: int,
    *,
    exact: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Check:
    """Run three real training steps with random weights, and compare their peak memory with the predicted one.

    The steps run in a separate process, or in one process for each device. Raises ConfigError (RW134) if the steps of a
    process would take more than ``memory_bytes``, and what ``measure`` raises.
    """
    predicted = estimate(model, method, workload, exact=exact, trust_remote_code=trust_remote_code, revision=revision)
    needed = max(predicted.peak_bytes, dense_bytes(predicted, workload))
    if needed > memory_bytes:
        raise ConfigError(
            "RW134",
            f"three real steps of {method} would take {byte_size(needed)} and there are {byte_size(memory_bytes)}; "
            "lower --batch-size or --max-length, take another --method, or leave --check out.",
        )
    measured = measure(model, method, workload, trust_remote_code=trust_remote_code, revision=revision)
    return Check(
        method,
        measured.device_type,
        comparable(predicted, measured.device_type),
        measured.peak_bytes,
        exact,
        measured.step_seconds,
        workload.devices,
    )


def dense_bytes(predicted: MemoryEstimate, workload: Workload) -> int:
    """The bytes of the weights before quantization, which the check holds at first."""
    return predicted.total_parameters * DTYPE_BYTES[workload.dtype]


def comparable(predicted: MemoryEstimate, device_type: str) -> int:
    """The part of the prediction that the meter counts. torch's CUDA allocator counts neither the context nor unused
    segments.
    """
    return predicted.peak_bytes - (predicted.outside_bytes if device_type == "cuda" else 0)
