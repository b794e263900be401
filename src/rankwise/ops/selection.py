"""Which implementation runs: plain PyTorch, the native CPU library, or Triton.

``auto`` selects the native library for CPU tensors and Triton for CUDA tensors. Where these cannot run, it selects
plain PyTorch and warns once (RW608).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from rankwise.compat.torch import is_fake, transform_interpreter
from rankwise.errors import QuantizationError, warn

_MODULES = {
    "reference": "rankwise.ops.reference",
    "native": "rankwise.ops.cpu.four_bit",
    "triton": "rankwise.ops.triton.four_bit",
}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fakes:
    """The device whose tensors fake CPU tensors count as, "cpu" or "cuda", and what a GPU there has."""

    device_type: str
    triton: bool = True
    flash: bool = True


_fakes: Fakes | None = None
_choice: str | None = None
_modules: dict[str, ModuleType] = {}
_said: set[str] = set()


def set_implementation(name: str | None) -> None:
    """Choose the implementation for the whole process: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.

    None: as at the start, what the environment variable ``RANKWISE_OPS`` names, and warnings are given anew. A forced
    implementation that cannot run raises RW607 at its first use; there is no fallback.

    Raises:
        QuantizationError: RW607, no such name.
    """
    global _choice
    _choice = name if name is None else _known(name)
    _modules.clear()
    if name is None:
        _said.clear()


def forced() -> str:
    """The name given to `set_implementation` or in ``RANKWISE_OPS``; ``"auto"`` without one."""
    return _choice or _known(os.environ.get("RANKWISE_OPS", "auto"))


def implementation(tensor: Tensor) -> str:
    """The name of the implementation that would run on ``tensor``: ``"reference"``, ``"native"`` or ``"triton"``.

    Raises:
        QuantizationError: RW607, the forced implementation cannot run here.
    """
    module = module_for(tensor.device)
    return next(name for name, path in _MODULES.items() if path == module.__name__)


def module_for(device: torch.device) -> ModuleType:
    """The module whose functions run on tensors of ``device``."""
    module = _modules.get(device.type)
    if module is None:
        module = importlib.import_module(_MODULES[_choose(device.type)])
        _modules[device.type] = module
    return module


def native_on_cpu() -> bool:
    """Whether operators on CPU tensors run in the native library."""
    module = _modules.get("cpu") or module_for(torch.device("cpu"))
    return module.__name__ == _MODULES["native"]


def transforms_functions() -> bool:
    """Whether a ``torch.func`` transform is active: kernels and hand-written gradients cannot take its tensors."""
    return transform_interpreter() is not None


def is_traced() -> bool:
    """Whether a compiler or a ``torch.func`` transform traces the computation, and so must see plain operations."""
    return torch.compiler.is_compiling() or transforms_functions()


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` stay in that dtype: without autocast, or with autocast to it."""
    kind = device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == dtype


def as_autocast(x: Tensor) -> Tensor:
    """``x`` as autocast passes it to a product or to attention: in autocast's dtype if autocast is on, unless x is
    float64."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def takes_native(tensor: Tensor) -> bool:
    """Whether the native library runs on this tensor: a plain CPU tensor, or a fake one within ``fakes_as("cpu")``."""
    known = type(tensor) in (Tensor, torch.nn.Parameter) or _fakes_of(tensor, "cpu") is not None
    return known and tensor.is_cpu and native_on_cpu() and not transforms_functions()


@contextmanager
def fakes_as(device_type: str, *, triton: bool = True, flash: bool = True) -> Iterator[None]:
    """Within this context fake CPU tensors dispatch as if on ``device_type``, ``"cpu"`` or ``"cuda"`` (with or without
    Triton and flash attention): their storages are those of a real step there."""
    global _fakes
    before, _fakes = _fakes, Fakes(device_type, triton, flash)
    try:
        yield
    finally:
        _fakes = before


def _fakes_of(tensor: Tensor, device_type: str) -> Fakes | None:
    """What the tensor counts as, if it is a fake one that counts as one of ``device_type``."""
    return _fakes if _fakes is not None and _fakes.device_type == device_type and is_fake(tensor) else None


def enough_chunks(chunks: Sequence[T], of: Tensor) -> Sequence[T]:
    """Those of a loop over chunks of equal memory that have to run: all, of fake tensors the first two and the last."""
    return [*chunks[:2], chunks[-1]] if _fakes is not None and is_fake(of) and len(chunks) > 3 else chunks


def runs_triton(device: torch.device) -> bool:
    """Whether operators on tensors of ``device`` run in Triton."""
    return module_for(device).__name__ == _MODULES["triton"]


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this CUDA tensor, or would run on the one that a fake CPU tensor represents.

    A real CPU tensor counts only where Triton is forced, for its interpreter.
    """
    if tensor.is_cuda or (tensor.is_cpu and forced() == "triton"):
        return runs_triton(tensor.device)
    fakes = _fakes_of(tensor, "cuda")
    return fakes is not None and fakes.triton


def is_on_card(tensor: Tensor) -> bool:
    """Whether the tensor is on a CUDA device, or is a fake CPU tensor that represents one."""
    return tensor.is_cuda or _fakes_of(tensor, "cuda") is not None


def card_capability(tensor: Tensor) -> tuple[int, int]:
    """The compute capability of the tensor's GPU. For a fake tensor: (8, 0) with flash attention, (7, 5) without."""
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device)
    fakes = _fakes_of(tensor, "cuda")
    return (8, 0) if fakes is None or fakes.flash else (7, 5)


def _choose(device: str) -> str:
    choice = forced()
    if choice == "auto":
        return _automatic(device)
    if (why := obstacle(choice, device)) is not None:
        raise QuantizationError("RW607", f"the implementation {choice!r} was forced and cannot run: {why}")
    return choice


def _automatic(device: str) -> str:
    wanted = {"cpu": "native", "cuda": "triton"}.get(device)
    if wanted is None:
        say_once("RW608", f"there are no 4-bit kernels for {device}: plain PyTorch runs, slowly.")
        return "reference"
    if (why := obstacle(wanted, device)) is None:
        return wanted
    say_once("RW608", f"4-bit products run in plain PyTorch, slowly: {why}")
    return "reference"


def obstacle(choice: str, device: str) -> str | None:
    """Why ``choice`` cannot run on ``device`` and what to do, or None if it can."""
    if choice == "native":
        if device != "cpu":
            return f"the native library works on CPU tensors, and this one is on {device}."
        from rankwise.ops.cpu import native

        return native.obstacle()
    if choice == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed. Install it with: pip install triton"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton runs on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1 set, for tests)."
    return None


def _known(name: str) -> str:
    if name != "auto" and name not in _MODULES:
        names = ", ".join(["auto", *_MODULES])
        raise QuantizationError(
            "RW607", f"there is no implementation {name!r} (set_implementation or RANKWISE_OPS): use {names}."
        )
    return name


def say_once(code: str, message: str) -> None:
    """Warn, but only once with the same message in a process."""
    if message not in _said:
        _said.add(message)
        warn(code, message, stacklevel=6)
