"""Real steps on this machine, in a process of their own: their peak beside the plan's, and their seconds.

The weights are random, since neither memory nor time depends on their values, so nothing is downloaded. ``python -m
rankwise.planning.real_steps ORDER`` takes one JSON object and prints one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject
from rankwise.planning.extend import estimate
from rankwise.planning.facts import read_model
from rankwise.planning.memory import MemoryEstimate
from rankwise.planning.workload import DTYPE_BYTES, MEASURED_OPTIMIZERS, Workload
from rankwise.reports.numbers import byte_size

STEPS = 3
INTERVAL_SECONDS = 0.002


@dataclasses.dataclass(frozen=True)
class Measurement:
    """On the CPU ``peak_bytes`` is the growth of the process's anonymous memory since before the model was made; on
    CUDA it is the peak of torch's allocator, without the context."""

    peak_bytes: int
    step_seconds: list[float]


@dataclasses.dataclass(frozen=True)
class Check:
    """Predicted and measured bytes of the same step: of tensors only, without the device's context."""

    method: str
    device_type: str
    predicted_bytes: int
    measured_bytes: int
    step_seconds: list[float]

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_bytes / max(1, self.measured_bytes) - 1

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "error": self.error}


def check_method(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    memory_bytes: int,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Check:
    """Run three real training steps with random weights, and compare their peak memory with the predicted one.

    The steps run in a separate process. Raises ConfigError: RW134 if they would take more than ``memory_bytes``, RW133
    if they cannot be measured or their process ends without a result, and what ``estimate`` raises.
    """
    is_plain = workload.devices == 1 and not workload.written and not workload.activation_offloading
    if not is_plain or workload.optimizer not in MEASURED_OPTIMIZERS:
        raise ConfigError(
            "RW133",
            "only steps of one process with adamw_torch can be measured here, without generation and activation "
            "offloading; leave --check out.",
        )
    predicted = estimate(model, method, workload, trust_remote_code=trust_remote_code, revision=revision)
    # The weights are there before they are quantized.
    needed = max(predicted.peak_bytes, predicted.total_parameters * DTYPE_BYTES[workload.dtype])
    if needed > memory_bytes:
        raise ConfigError(
            "RW134",
            f"three real steps of {method} would take {byte_size(needed)} and there are {byte_size(memory_bytes)}; "
            "lower --batch-size or --max-length, take another --method, or leave --check out.",
        )
    found = measure(model, method, workload, trust_remote_code=trust_remote_code, revision=revision)
    device = workload.device_type
    return Check(method, device, comparable(predicted), found.peak_bytes, found.step_seconds)


def comparable(predicted: MemoryEstimate) -> int:
    """The part of the prediction that three steps show: without an idle process, and on CUDA without unused segments,
    which torch's allocator does not count.
    """
    return predicted.peak_bytes - predicted.outside_bytes


def measure(model: str | os.PathLike[str], method: str, workload: Workload, **remote: object) -> Measurement:
    """The peak memory of three real steps with random weights, in a new process."""
    order = {"model": os.fspath(model), "method": method, "workload": dataclasses.asdict(workload), "remote": remote}
    command = [sys.executable, "-m", "rankwise.planning.real_steps", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            "RW133",
            f"the measured steps ended with code {done.returncode} ({last}); correct the cause, or "
            "where memory ran out (code -9) make the batch or the rows smaller.",
        )
    return Measurement(**json.loads(done.stdout.strip().splitlines()[-1]))


# --- in the process of the steps ---


def carry_out(order: JsonObject) -> Measurement:
    """Build the model, run the steps, measure."""
    import torch

    from rankwise.acceleration import anonymous_memory_bytes, limit_generated_kernels
    from rankwise.models import fetch_model, load_skeleton
    from rankwise.planning.step import batch_of, begin_gradients, dtypes, made, materialize, new_optimizer, objective_of
    from rankwise.training.batches import KEY
    from rankwise.training.step import TrainingStep, around_step

    limit_generated_kernels()
    workload, method, remote = Workload(**order["workload"]), order["method"], order["remote"]
    source = read_model(fetch_model(order["model"], **remote, weights=False), labels=workload.labels).source
    model = load_skeleton(source, trust_remote_code=remote["trust_remote_code"])
    device = workload.device_type
    _warm_up(device, workload)
    baseline = anonymous_memory_bytes() if device == "cpu" else 0
    weights, autocast = dtypes(method, workload)
    materialize(model, weights, fill=True, device=device)
    prepared = made(model, method, workload)
    objective = objective_of(model, workload, prepared.layout)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = TrainingStep(
        model=model,
        objective=objective,
        optimizer=new_optimizer(workload, model),
        trained=trained,
        autocast=autocast,
        around=functools.partial(around_step, model, prepared.computing),
    )
    batch, seconds = batch_of(objective, workload, prepared.layout), []

    def take() -> None:
        started = time.perf_counter()
        if workload.accumulates:
            begin_gradients(trained)
        found, norm = step.gradients(step.prepared([batch], 0), batch[KEY].targets)
        found.read(norm)
        step.update()
        seconds.append(time.perf_counter() - started)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            take()
        return Measurement(torch.cuda.max_memory_allocated(), seconds)
    return Measurement(_peak_of([take] * STEPS) - baseline, seconds)


def _warm_up(device: str, workload: Workload) -> None:
    """Run a small product, so that memory that libraries allocate once does not count as the model's."""
    import torch

    x = torch.ones(64, 64, dtype=getattr(torch, workload.dtype), device=device, requires_grad=True)
    torch.nn.functional.cross_entropy((x @ x).float(), torch.zeros(64, dtype=torch.long, device=device)).backward()


def _peak_of(steps: list[Callable[[], None]]) -> int:
    """The highest anonymous memory while ``steps`` run, sampled every 2 ms in another thread."""
    from rankwise.acceleration import anonymous_memory_bytes

    seen, done = [anonymous_memory_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL_SECONDS):
            seen[0] = max(seen[0], anonymous_memory_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        for step in steps:
            step()
    finally:
        done.set()
        thread.join()
    return max(seen[0], anonymous_memory_bytes())


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(carry_out(json.loads(sys.argv[1])))))
