"""Run three real steps in a new process and measure their peak, to check a plan.

The weights are random, since memory does not depend on their values, so nothing is downloaded. ``python -m
rankwise.planning.measure ORDER`` takes one JSON object and prints one.
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


def measure(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Measurement:
    """The peak memory of three real steps with random weights, in a new process for each device.

    Raises ConfigError: RW131 for an unknown method, RW133 where a process ends without a result, for example because
    memory ran out.
    """
    if method not in PLANNED:
        raise ConfigError("RW131", f"there is no method {method!r}; give one of {', '.join(PLANNED)}.")
    order = {
        "model": os.fspath(model),
        "method": method,
        "workload": dataclasses.asdict(workload),
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workload.devices)]
    command = [sys.executable, *(several if workload.devices > 1 else []), "-m", "rankwise.planning.measure"]
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
    from rankwise.models import load_skeleton
    from rankwise.planning.fake_model import materialize, prepare, weights_dtype
    from rankwise.planning.step import autocast_dtype, loss_of, make_batch, take_step
    from rankwise.planning.written import write_answers

    limit_generated_kernels()
    workload, method = Workload(**order["workload"]), order["method"]
    model = load_skeleton(order["model"], trust_remote_code=order["trust_remote_code"], revision=order["revision"])
    device, strategy = workload.device_type, workload.strategy
    if workload.devices > 1:
        _join(device)
    if strategy == "fsdp":
        # Imported before the model is made, so that it does not count.
        import torch.distributed.fsdp
    _warm_up(device, workload)
    baseline = _anonymous_bytes() if device == "cpu" else 0
    materialize(model, weights_dtype(method, workload), fill=True, device=device)
    flat = prepare(model, method, workload)
    loss = None
    if strategy == "fsdp":
        shard(model, mesh_of_all(device), trains_all=method == "full")
        # A run reads only its rows, or frees the rest as here.
        give_back_freed_memory()
    elif strategy == "ddp":
        loss = functools.partial(loss_of, call=torch.nn.parallel.DistributedDataParallel(model))
    optimizer = _real_optimizer(model, workload)
    batch, autocast, seconds = make_batch(workload, device, flat=flat), autocast_dtype(method, workload), []

    offloading = _offloading(model, workload)

    def step() -> None:
        started = time.perf_counter()
        if workload.written:
            write_answers(model, method, workload)
        with offloading:
            take_step(model, optimizer, batch, lambda _: None, autocast, loss)
        seconds.append(time.perf_counter() - started)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak_of([step] * STEPS) - baseline
    return Measurement(_most(peak), baseline, tuple(seconds), device)


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
    """Run a small product, so that memory that libraries allocate once does not count as the model's."""
    import torch

    x = torch.ones(64, 64, dtype=getattr(torch, workload.dtype), device=device, requires_grad=True)
    torch.nn.functional.cross_entropy((x @ x).float(), torch.zeros(64, dtype=torch.long, device=device)).backward()


def _real_optimizer(model: PreTrainedModel, workload: Workload) -> Optimizer:
    """The optimizer of transformers' name, or rankwise's. Raises ConfigError (RW132) if it cannot be made here."""
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


def main() -> None:
    order = json.loads(sys.argv[1])
    if not isinstance(order, dict):
        raise InternalError("RW133", "a measurement reads one JSON object.")
    found = json.dumps(dataclasses.asdict(carry_out(order)))
    if os.environ.get("RANK", "0") == "0":
        print(found)


if __name__ == "__main__":
    main()
