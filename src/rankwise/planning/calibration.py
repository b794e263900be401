"""The speed of this machine, measured once and stored: a few training steps on a small random Llama.

The file is ``machine.json`` in the user's cache folder: ``$XDG_CACHE_HOME/rankwise`` or ``~/.cache/rankwise``
(``%LOCALAPPDATA%\\\\rankwise`` on Windows, ``~/Library/Caches/rankwise`` on macOS).
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pydantic

from rankwise.errors import warn
from rankwise.foreign import JsonObject, checked, read_json, reason_of
from rankwise.planning.facts import ModelFacts, facts_of
from rankwise.planning.hardware import Hardware
from rankwise.planning.speed import Pace, flops_per_token, traffic_bytes
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload
from rankwise.records import write_json

FILE = "machine.json"
# Format 1 held steps without fused operators; format 2 counted dequantization by its bytes only.
SCHEMA = 3
# Two layers, wide enough that matrix products dominate; two batch sizes separate speed from bandwidth.
SHAPES: dict[str, JsonObject] = {
    "cpu": {"hidden_size": 1024, "intermediate_size": 2752, "rows": (1, 4), "tokens": 256},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "rows": (1, 8), "tokens": 1024},
}
LAYERS, VOCABULARY, HEADS, RANK = 2, 2048, 16, 16
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of a step at one batch size."""

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


def cache_folder() -> Path:
    """The folder for the user's caches on this system."""
    if platform.system() == "Windows":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rankwise"


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
    shape = _shape(device_type)
    workload = Workload(
        batch_size=rows,
        max_length=shape["tokens"],
        r=RANK,
        dtype=dtype,  # type: ignore[arg-type]
        device_type="cuda" if device_type == "cuda" else "cpu",
    )
    step, facts, estimate = _prepared(method, workload, device_type, shape)
    step()
    seconds = sorted(_seconds(step, device_type) for _ in range(STEPS))[STEPS // 2]
    flops = flops_per_token(method, facts, estimate.total_parameters, estimate.trainable_parameters, workload)
    return Timing(workload.tokens, workload.tokens * flops, traffic_bytes(estimate, facts, workload), seconds)


def _prepared(
    method: str, workload: Workload, device_type: str, shape: JsonObject
) -> tuple[Callable[[], None], ModelFacts, MemoryEstimate]:
    """A step as ``rankwise train`` takes it, with fused parts and loss, on a small random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rankwise.planning.fake_model import materialize, prepare, weights_dtype
    from rankwise.planning.step import autocast_dtype, make_batch, take_step

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    materialize(model, weights_dtype(method, workload), fill=True, device=device_type)
    flat = prepare(model, method, workload)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batch, autocast = make_batch(workload, device_type, flat=flat), autocast_dtype(method, workload)

    def step() -> None:
        take_step(model, optimizer, batch, lambda _: None, autocast)

    count = sum(parameter.numel() for parameter in trained)
    return step, facts_of(config.to_dict()), MemoryEstimate(method, 0, {}, count, total, 0.0, False)


def _seconds(step: Callable[[], None], device_type: str) -> float:
    import torch

    started = time.perf_counter()
    step()
    if device_type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
