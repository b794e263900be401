"""What all files of Triton's cases share: the kernels that have run, and memory that shows what is not written."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from rankwise import ops

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE)


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error of ``ours`` against float64 is not above that of the reference and a few roundings of float32."""
    assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
    if truth.numel():
        error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 1.01 * allowed + 4e-6 * (1 + truth.abs().max()), (float(error), float(allowed))


@contextmanager
def noting_launches() -> Iterator[set[str]]:
    """The names of the kernels that have run so far."""
    names: set[str] = set()
    launching = KernelInterface.__getitem__

    def noting(self: Any, grid: Any) -> Any:
        names.add(self.fn.__name__)
        return launching(self, grid)

    with patch.object(KernelInterface, "__getitem__", noting):
        yield names


def check_all_have_run(modules: Sequence[str], launched: set[str]) -> None:
    """Every kernel in ``modules`` of `rankwise.ops.triton` is among those launched."""
    loaded = [importlib.import_module(f"rankwise.ops.triton.{name}") for name in modules]
    kernels = {name for module in loaded for name in vars(module) if name.endswith("_kernel")}
    assert len(kernels) >= len(modules)
    assert kernels <= launched


@contextmanager
def triton_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch, byte: int) -> Iterator[None]:
    """Only Triton may run, and memory comes filled with NaN (integers: ``byte``), so that what is not written shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else byte)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    ops.set_implementation("triton")
    torch.manual_seed(0)
    yield
    ops.set_implementation("auto")
