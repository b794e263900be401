"""Alternating timings, counted costs and fresh processes: what the benchmarks of training steps share."""

from __future__ import annotations

import json
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

Call = Callable[[], object]
Prepared = tuple[Call, Call]
"""What is timed, and what puts things back afterwards, outside the clock."""

aten = torch.ops.aten


def nothing() -> None: ...


def synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Prepared], rounds: int, *, warmup: int = 1, device_type: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every contender in every round. Each round calls all of them, so that a busy moment hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, (call, put_back) in contenders.items():
            synchronize(device_type)
            start = time.perf_counter()
            call()
            synchronize(device_type)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
            put_back()
    return seconds


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
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with counter:
        call()
    return int(counter.get_total_flops())


def _in_place(self: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.addmm_flop(self, a, b))


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(q, k, v))


def _cpu_attention_backward(dy: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(dy, q, k, v))


# What torch's counter has no formula for.
_UNCOUNTED = {
    aten.addmm_: _in_place,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``script ARGUMENTS --answer FILE`` writes to FILE as JSON, run in a process of its own.

    RuntimeError with the end of what it said when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, script, *arguments, "--answer", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{Path(script).name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
        content: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return content


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
