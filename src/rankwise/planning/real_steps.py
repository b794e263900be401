"""Real steps on this machine, in processes of their own: their peak beside the plan's, and their seconds.

The weights are random, since neither memory nor time depends on their values, so nothing is downloaded. ``python -m
rankwise.planning.real_steps ORDER`` takes one JSON object and prints one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rankwise.errors import ConfigError, InternalError
from rankwise.foreign import JsonObject
from rankwise.planning.extend import MemoryEstimate, estimate
from rankwise.planning.speed import read_model
from rankwise.planning.workload import DTYPE_BYTES, PLANNED, Workload
from rankwise.reports.numbers import byte_size

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

# --- steps in a process of their own ---

STEPS = 3
INTERVAL_SECONDS = 0.002
# Exit codes of a process that the kernel killed, mostly for lack of memory: directly, and through a shell.
KILLED = (-9, 137)
MEMORY_WORDS = ("MemoryError", "OutOfMemoryError", "DefaultCPUAllocator")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measurement of three real steps. On the CPU ``peak_bytes`` is the growth of the process's anonymous memory
    since before the model was made; on CUDA it is the peak of torch's allocator, without the context. With several
    processes it is the largest value."""

    peak_bytes: int
    baseline_bytes: int
    step_seconds: tuple[float, ...]
    device_type: str
    trainable_parameters: int
    total_parameters: int


def measure(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Measurement:
    """The peak memory of three real steps with random weights, in a new process for each device.

    Raises ConfigError: RW130 for an unknown method, RW133 where a process ends without a result, for example because
    memory ran out.
    """
    if method not in PLANNED:
        raise ConfigError("RW130", f"there is no method {method!r}; give one of {', '.join(PLANNED)}.")
    order = {
        "model": os.fspath(model),
        "method": method,
        "workload": dataclasses.asdict(workload),
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workload.devices)]
    command = [sys.executable, *(several if workload.devices > 1 else []), "-m", "rankwise.planning.real_steps"]
    done = subprocess.run([*command, json.dumps(order)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _no_answer(done.returncode, done.stderr)
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Measurement(**{**answer, "step_seconds": tuple(answer["step_seconds"])})


def _no_answer(code: int, stderr: str) -> ConfigError:
    """The error RW133. It advises smaller steps only where memory ran out."""
    lines = stderr.strip().splitlines() or ["no message"]
    # torch's launcher writes a report after the message of a process.
    last = next((line for line in lines if line.startswith(("[rank", "torch.", "RuntimeError"))), lines[-1])
    starved = code in KILLED or any(word in stderr for word in MEMORY_WORDS)
    remedy = "memory ran out: make the batch or the rows smaller" if starved else "correct the cause"
    return ConfigError("RW133", f"the measured steps ended with code {code} ({last}); {remedy}.")


def carry_out(order: JsonObject) -> Measurement:
    """The work of the process: build the model, run the steps, measure."""
    import torch

    from rankwise.acceleration import give_back_freed_memory, limit_generated_kernels
    from rankwise.acceleration.sharding import mesh_of_all, shard
    from rankwise.models import fetch_model, load_skeleton
    from rankwise.planning.step import (
        autocast_dtype,
        begin_gradients,
        make_batch,
        materialize,
        prepare,
        take_step,
        weights_dtype,
        write_answers,
    )

    limit_generated_kernels()
    workload, method = Workload(**order["workload"]), order["method"]
    remote = {name: order[name] for name in ("trust_remote_code", "revision")}
    source = read_model(fetch_model(order["model"], **remote, weights=False), labels=workload.labels).source
    model = load_skeleton(source, trust_remote_code=order["trust_remote_code"])
    device, strategy = workload.device_type, workload.strategy
    if workload.devices > 1:
        _join(device)
    if strategy == "fsdp":
        # Imported before the model is made, so that it does not count.
        import torch.distributed.fsdp
    _warm_up(device, workload)
    baseline = _anonymous_bytes() if device == "cpu" else 0
    total = sum(parameter.numel() for parameter in model.parameters())
    materialize(model, weights_dtype(method, workload), fill=True, device=device)
    flat = prepare(model, method, workload) or workload.packing
    if strategy == "fsdp":
        shard(model, mesh_of_all(device), trains_all=method == "full")
        # A run reads only its rows, or frees the rest as here.
        give_back_freed_memory()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _real_optimizer(trained, workload)
    batch, autocast, seconds = make_batch(workload, device, flat=flat), autocast_dtype(method, workload), []

    def step() -> None:
        started = time.perf_counter()
        if workload.written:
            write_answers(model, method, workload)
        if workload.accumulates:
            begin_gradients(trained)
        take_step(model, optimizer, batch, lambda _: None, autocast, averages=strategy == "ddp")
        seconds.append(time.perf_counter() - started)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak_of([step] * STEPS) - baseline
    count = sum(parameter.numel() for parameter in trained)
    return Measurement(_most(peak), baseline, tuple(seconds), device, count, total)


def _join(device: str) -> None:
    import torch

    from rankwise.acceleration import share_one_heap

    share_one_heap()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")


def _most(peak_bytes: int) -> int:
    """The largest value of all processes."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return peak_bytes
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, peak_bytes)
    dist.destroy_process_group()
    return max(everyone)


def _warm_up(device: str, workload: Workload) -> None:
    """Run a small product, so that memory that libraries allocate once does not count as the model's."""
    import torch

    x = torch.ones(64, 64, dtype=getattr(torch, workload.dtype), device=device, requires_grad=True)
    torch.nn.functional.cross_entropy((x @ x).float(), torch.zeros(64, dtype=torch.long, device=device)).backward()


def _real_optimizer(trained: Sequence[Parameter], workload: Workload) -> Optimizer:
    """Raises ConfigError (RW132) for what needs more than torch's AdamW."""
    import torch

    if workload.optimizer not in ("adamw_torch", "adamw_torch_fused") or workload.activation_offloading:
        what = "activation offloading" if workload.activation_offloading else f"the optimizer {workload.optimizer!r}"
        raise ConfigError("RW132", f"steps with {what} cannot be measured here; leave --check out.")
    fused = workload.optimizer.endswith("fused") or workload.device_type == "cuda"
    return torch.optim.AdamW(trained, fused=fused)


def _peak_of(steps: list[Callable[[], None]]) -> int:
    """The highest anonymous memory while ``steps`` run, sampled every 2 ms in another thread."""
    seen, done = [_anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL_SECONDS):
            seen[0] = max(seen[0], _anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        for step in steps:
            step()
    finally:
        done.set()
        thread.join()
    return max(seen[0], _anonymous_bytes())


def _anonymous_bytes() -> int:
    """The anonymous resident memory of this process in bytes; on systems other than Linux, all resident memory."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return int(psutil.Process().memory_info().rss)


# --- the prediction beside them ---


@dataclasses.dataclass(frozen=True)
class Check:
    """Predicted and measured bytes of the same step: of tensors only, without the device's context."""

    method: str
    device_type: str
    predicted_bytes: int
    measured_bytes: int
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
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Check:
    """Run three real training steps with random weights, and compare their peak memory with the predicted one.

    The steps run in a separate process, or in one process for each device. Raises ConfigError (RW134) if the steps of a
    process would take more than ``memory_bytes``, and what ``measure`` raises.
    """
    predicted = estimate(model, method, workload, trust_remote_code=trust_remote_code, revision=revision)
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


def main() -> None:
    order = json.loads(sys.argv[1])
    if not isinstance(order, dict):
        raise InternalError("RW133", "a measurement reads one JSON object.")
    found = json.dumps(dataclasses.asdict(carry_out(order)))
    if os.environ.get("RANK", "0") == "0":
        print(found)


if __name__ == "__main__":
    main()
