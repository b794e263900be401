"""Real steps on this machine, in processes of their own: their peak beside the plan's, and their seconds.

The weights are random, since neither memory nor time depends on their values, so nothing is downloaded. ``python -m
rankwise.planning.real_steps ORDER`` takes one JSON object and prints one. The measured speed is kept in
``machine.json`` in the user's cache folder: ``$XDG_CACHE_HOME/rankwise`` or ``~/.cache/rankwise``
(``%LOCALAPPDATA%\\\\rankwise`` on Windows, ``~/Library/Caches/rankwise`` on macOS).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pydantic

from rankwise.disk import cache_folder
from rankwise.errors import ConfigError, InternalError, warn
from rankwise.foreign import JsonObject, checked, read_json, reason_of
from rankwise.planning.extend import MemoryEstimate, estimate
from rankwise.planning.hardware import Hardware
from rankwise.planning.speed import Pace, facts_of, flops_per_token, read_model, traffic_bytes
from rankwise.planning.workload import DTYPE_BYTES, PLANNED, Workload
from rankwise.records import write_json
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


# --- the speed of this machine ---

FILE = "machine.json"
# Format 1 held steps without fused operators; format 2 counted dequantization by its bytes only.
SCHEMA = 3
# Two layers, wide enough that matrix products dominate; two batch sizes separate speed from bandwidth.
SHAPES: dict[str, JsonObject] = {
    "cpu": {"hidden_size": 1024, "intermediate_size": 2752, "rows": (1, 4), "tokens": 256},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "rows": (1, 8), "tokens": 1024},
}
LAYERS, VOCABULARY, HEADS, RANK = 2, 2048, 16, 16


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step at one batch size."""

    tokens: int
    flops: float
    traffic_bytes: float
    seconds: float


Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class _Rates:
    """The measured rates of one method, as in the file."""

    flops_per_second: Rate
    bytes_per_second: Rate | None = None


@dataclasses.dataclass(frozen=True)
class _Machine:
    """The file's entry for one device and dtype."""

    # {method: fields of _Rates}.
    methods: dict[str, JsonObject]
    date: str
    threads: int
    torch: str


def measured_pace(hardware: Hardware, method: str, dtype: str) -> Pace | None:
    """The pace measured for this device, method and dtype, or None. A damaged file is ignored with warning RW144."""
    found = _read().get(_key(hardware, dtype))
    if found is None or method not in found.methods:
        return None
    rates = checked(_Rates, found.methods[method])
    basis = f"measured on this machine on {found.date} ({found.threads} threads, torch {found.torch})"
    return Pace(rates.flops_per_second, rates.bytes_per_second, True, basis)


def calibrate(
    hardware: Hardware, methods: Sequence[str], dtype: str, say: Callable[[str], None]
) -> dict[str, dict[str, float | None]]:
    """Time each method on this machine, store the figures, and return {method: {flops_per_second, ...}}."""
    import torch

    results: dict[str, dict[str, float | None]] = {}
    for method in methods:
        timings = [_time(method, rows, hardware.device_type, dtype) for rows in _shape(hardware.device_type)["rows"]]
        pace, bandwidth = solve(timings)
        results[method] = {"flops_per_second": pace, "bytes_per_second": bandwidth}
        seconds = ", ".join(f"{timing.seconds:.2f} s for {timing.tokens:,} tokens" for timing in timings)
        say(f"{method:<6} {seconds}: {pace / 1e9:,.0f} GFLOP/s")
    known, key = _read(), _key(hardware, dtype)
    before = known[key].methods if key in known else {}
    today, threads = time.strftime("%Y-%m-%d"), torch.get_num_threads()
    known[key] = _Machine({**before, **results}, today, threads, str(torch.__version__))
    cache_folder().mkdir(parents=True, exist_ok=True)
    machines = {name: dataclasses.asdict(machine) for name, machine in known.items()}
    write_json(cache_folder() / FILE, {"schema": SCHEMA, "machines": machines})
    return results


def solve(timings: Sequence[Timing]) -> tuple[float, float | None]:
    """(F, B) that solve  seconds = flops / F + bytes / B  for both timings.

    Where no positive B solves this, the traffic of the weights is hidden: B is None, and the larger batch gives F.
    """
    small, large = timings[0], timings[-1]
    determinant = small.flops * large.traffic_bytes - large.flops * small.traffic_bytes
    if determinant:
        per_flop = (small.seconds * large.traffic_bytes - large.seconds * small.traffic_bytes) / determinant
        per_byte = (small.flops * large.seconds - large.flops * small.seconds) / determinant
        if per_flop > 0 and per_byte > 0:
            return 1 / per_flop, 1 / per_byte
    return large.flops / large.seconds, None


def _time(method: str, rows: int, device_type: str, dtype: str) -> Timing:
    """Real steps of a small random Llama, with the parts that `rankwise train` makes faster."""
    shape = _shape(device_type)
    workload = Workload(
        batch_size=rows,
        max_length=shape["tokens"],
        r=RANK,
        dtype=dtype,  # type: ignore[arg-type]
        device_type="cuda" if device_type == "cuda" else "cpu",
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "tie_word_embeddings": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), config)
        measured = measure(folder, method, workload)
    facts, trained, total = facts_of(config), measured.trainable_parameters, measured.total_parameters
    # The first step also warms up.
    seconds = min(measured.step_seconds[1:])
    flops = flops_per_token(method, facts, total, trained, workload)
    own = MemoryEstimate(method, 0, {}, trained, total, 0.0)
    return Timing(workload.tokens, workload.tokens * flops, traffic_bytes(own, facts, workload), seconds)


def _shape(device_type: str) -> JsonObject:
    return SHAPES["cuda" if device_type == "cuda" else "cpu"]


def _key(hardware: Hardware, dtype: str) -> str:
    return f"{hardware.name}, {dtype}"


def _read() -> dict[str, _Machine]:
    path = cache_folder() / FILE
    try:
        content = read_json(path)
        if content["schema"] != SCHEMA:
            return {}
        machines = {name: checked(_Machine, machine) for name, machine in dict(content["machines"]).items()}
        for machine in machines.values():
            for rates in machine.methods.values():
                checked(_Rates, rates)
        return machines
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = reason_of(error)
        warn("RW144", f"{path} cannot be read ({reason}), so its timings are ignored; --calibrate writes it again.")
        return {}


def main() -> None:
    order = json.loads(sys.argv[1])
    if not isinstance(order, dict):
        raise InternalError("RW133", "a measurement reads one JSON object.")
    found = json.dumps(dataclasses.asdict(carry_out(order)))
    if os.environ.get("RANK", "0") == "0":
        print(found)


if __name__ == "__main__":
    main()
