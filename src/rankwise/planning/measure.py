"""Take three real steps in a fresh process and measure their peak, to check a plan.

The weights are random, so that nothing is downloaded: memory does not depend on their values. Run as
``python -m rankwise.planning.measure``, it reads one JSON object from its standard input and writes one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from rankwise.errors import ConfigError, InternalError
from rankwise.foreign import JsonObject
from rankwise.planning.terms import PLANNED
from rankwise.planning.workload import Workload

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

STEPS = 3
INTERVAL_SECONDS = 0.002
# By the kernel, mostly because memory ran out; the second where a shell stands between.
KILLED = (-9, 137)
MEMORY_WORDS = ("MemoryError", "OutOfMemoryError", "DefaultCPUAllocator")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Three real steps. On the CPU ``peak_bytes`` is the growth of the process's anonymous memory over what its
    libraries took before the model was made; on CUDA it is the peak of torch's allocator, without the context."""

    peak_bytes: int
    baseline_bytes: int
    step_seconds: tuple[float, ...]
    device_type: str


def measure(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Measurement:
    """Peak memory of three real steps of random weights, in a process of its own.

    Raises ConfigError (RW131) for an unknown method, (RW133) for a workload of several devices, or when the process
    ends without an answer, as it does when the memory does not suffice.
    """
    if method not in PLANNED:
        raise ConfigError("RW131", f"there is no method {method!r}; give one of {', '.join(PLANNED)}.")
    if workload.devices > 1:
        raise ConfigError("RW133", f"steps on {workload.devices} devices cannot be measured here; measure on one.")
    order = {
        "model": os.fspath(model),
        "method": method,
        "workload": dataclasses.asdict(workload),
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    command = [sys.executable, "-m", "rankwise.planning.measure"]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=False)
    if done.returncode:
        raise _no_answer(done.returncode, done.stderr)
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Measurement(**{**answer, "step_seconds": tuple(answer["step_seconds"])})


def _no_answer(code: int, stderr: str) -> ConfigError:
    """The error's advice depends on the cause: smaller steps help only where memory ran out."""
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    starved = code in KILLED or any(word in stderr for word in MEMORY_WORDS)
    remedy = "the memory did not suffice: make the batch or the rows smaller" if starved else "correct what it says"
    return ConfigError("RW133", f"the measured steps ended with code {code} ({last}); {remedy}.")


def carry_out(order: JsonObject) -> Measurement:
    """The work of the process: build the model, take the steps, measure."""
    import torch

    from rankwise.acceleration import limit_generated_kernels
    from rankwise.models import load_skeleton
    from rankwise.planning.fake_model import materialize, prepare, weights_dtype
    from rankwise.planning.step import autocast_dtype, make_batch, take_step
    from rankwise.planning.written import write_answers

    limit_generated_kernels()
    workload, method = Workload(**order["workload"]), order["method"]
    model = load_skeleton(order["model"], trust_remote_code=order["trust_remote_code"], revision=order["revision"])
    device = workload.device_type
    _warm_up(device, workload)
    baseline = _anonymous_bytes() if device == "cpu" else 0
    materialize(model, weights_dtype(method, workload), fill=True, device=device)
    flat = prepare(model, method, workload)
    optimizer = _real_optimizer(model, workload)
    batch, autocast, seconds = make_batch(workload, device, flat=flat), autocast_dtype(method, workload), []

    offloading = _offloading(model, workload)

    def step() -> None:
        started = time.perf_counter()
        if workload.written:
            write_answers(model, method, workload)
        with offloading:
            take_step(model, optimizer, batch, lambda _: None, autocast)
        seconds.append(time.perf_counter() - started)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak_of([step] * STEPS) - baseline
    return Measurement(peak, baseline, tuple(seconds), device)


def _offloading(model: PreTrainedModel, workload: Workload) -> AbstractContextManager[object]:
    """A context for every step in which activations are offloaded as the trainer does it."""
    if not workload.activation_offloading:
        return nullcontext()
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    from rankwise.acceleration import move_once

    context = get_act_offloading_ctx_manager(model=model)
    move_once(context)
    return context


def _warm_up(device: str, workload: Workload) -> None:
    """A small product, so that memory which libraries take once does not count as the model's."""
    import torch

    x = torch.ones(64, 64, dtype=getattr(torch, workload.dtype), device=device, requires_grad=True)
    torch.nn.functional.cross_entropy((x @ x).float(), torch.zeros(64, dtype=torch.long, device=device)).backward()


def _real_optimizer(model: PreTrainedModel, workload: Workload) -> Optimizer:
    """The optimizer of transformers' name, or our own. Raises ConfigError (RW132) if it cannot be made here."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if workload.optimizer in ("adamw_torch", "adamw_torch_fused"):
        fused = workload.optimizer.endswith("fused") or workload.device_type == "cuda"
        return torch.optim.AdamW(parameters, fused=fused)
    if workload.device_type == "cuda" and any(word in workload.optimizer for word in ("8bit", "paged", "bnb")):
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(output_dir=".", optim=workload.optimizer)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        return kind(parameters, **options)
    raise ConfigError("RW132", f"steps with the optimizer {workload.optimizer!r} cannot be measured here.")


def _peak_of(steps: list[Callable[[], None]]) -> int:
    """The highest anonymous memory seen while ``steps`` run, looked at every 2 ms from a thread of its own."""
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
    """Anonymous resident memory of this process on Linux, its resident memory elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return int(psutil.Process().memory_info().rss)


def main() -> None:
    order = json.load(sys.stdin)
    if not isinstance(order, dict):
        raise InternalError("RW133", "a measurement reads one JSON object.")
    print(json.dumps(dataclasses.asdict(carry_out(order))))


if __name__ == "__main__":
    main()
