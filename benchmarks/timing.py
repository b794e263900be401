"""Alternating timings, counted costs and fresh processes: what the benchmarks of training steps share."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import flop_counter

from rankwise.ops import table  # noqa: F401  registers our operators

Call = Callable[[], object]
Prepared = tuple[Call, Call]
"""What is timed, and what puts things back afterwards, outside the clock."""

aten = torch.ops.aten


def nothing() -> None: ...


def synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Prepared], rounds: int, *, warmup: int = 1, device_type: str = "cpu", calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of every contender in every round: a round calls all of them, so that a busy moment hits them
    alike. Of several ``calls`` in a row the mean, between two events on a card: one call's launches do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, (call, put_back) in contenders.items():
            took = _seconds_of(call, put_back, device_type, calls)
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def _seconds_of(call: Call, put_back: Call, device_type: str, calls: int) -> float:
    synchronize(device_type)
    if device_type == "cuda" and calls > 1:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
            put_back()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / calls
    start = time.perf_counter()
    call()
    synchronize(device_type)
    took = time.perf_counter() - start
    put_back()
    return took


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


class Floor:
    """The frozen matrix products of a model's linear layers, the output head included: forward and input gradient once.

    T = tokens, K = in features, N = out features. Weights are random and of their own for every layer, or
    (``share_weights``) one for every shape; inputs and gradients are shared by layers of the same width.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        T: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        share_weights: bool = False,
    ) -> None:
        def made(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        kept: dict[tuple[int, int], Tensor] = {}
        self.W = [kept.setdefault(shape, made(*shape)) if share_weights else made(*shape) for shape in shapes]
        self.x = {K: made(T, K) for _, K in shapes}
        self.dy = {N: made(T, N) for N, _ in shapes}

    @torch.no_grad()
    def __call__(self) -> None:
        for W in self.W:
            functional.linear(self.x[W.shape[1]], W)
        for W in reversed(self.W):
            self.dy[W.shape[0]] @ W


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of every linear layer of a plain model, the output head included."""
    return [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)]


def saved_bytes(model: nn.Module, forward: Call) -> int:
    """Bytes that autograd keeps for the backward pass: distinct storages, those of parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}
    # The tensors themselves, so that no address is given out a second time.

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    del result
    return total


def flops(call: Call) -> int:
    """Of all matrix products and attention in ``call``, by torch's counter."""
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_uncounted())
    with counter:
        call()
    return int(counter.get_total_flops())


def _in_place(self: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.addmm_flop(self, a, b))


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(q, k, v))


def _cpu_attention_backward(dy: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(dy, q, k, v))


def _packed_product(x: Any, packed: Any, absmax: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * int(shape[0])


def _packed_input_gradient(dy: Any, packed: Any, absmax: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * int(shape[1])


def _bitsandbytes_product(x: Any, packed: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * int(shape[0])


def _uncounted() -> dict[Any, Any]:
    """What torch's counter has no formula for, or cannot look into."""
    found = {
        aten.addmm_: _in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
        torch.ops.rankwise.linear_4bit: _packed_product,
        torch.ops.rankwise.linear_4bit_input_grad: _packed_input_gradient,
    }
    if "bitsandbytes" in sys.modules:
        found[torch.ops.bitsandbytes.gemm_4bit] = _bitsandbytes_product
    return found


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``script ARGUMENTS --answer FILE`` writes to FILE as JSON, run in a process of its own.

    ``process_peak_bytes``, its largest anonymous memory, is added. RuntimeError with the end of what it said when it
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        peak = watched([sys.executable, script, *arguments, "--answer", str(answer)])
        content: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return content | {"process_peak_bytes": peak}


def watched(command: Sequence[str], every_seconds: float = 0.02) -> int:
    """Run ``command`` to its end and watch its anonymous memory from outside; the peak in bytes."""
    peak = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, text=True)
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(every_seconds)
        finally:
            process.kill()
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    return peak


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 where there is no such figure, or no such process any more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
