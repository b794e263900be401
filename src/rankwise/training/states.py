"""Files of states, exact and without pickle, and the states of random generators.

A state is a tree of dicts, lists and scalars that holds tensors, written as safetensors and JSON. The tensors are
numbered in ``NAME.safetensors``; the rest is ``NAME.json``, where ``{"$tensor": "0"}`` is the first of them. A tensor
that consists of others, as the states of torchao's optimizers, is its class and its parts. From JSON, tuples come back
as lists, and keys as text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rankwise.errors import InternalError, RunError, one_line

# The keys of a tensor's number, of a dtype's name, and of the class of a tensor that consists of others.
TENSOR, DTYPE, KIND = "$tensor", "$dtype", "$kind"
# By generator: "python", "numpy", "cpu", and if there is one "cuda" or "mps".
RandomStates = dict[str, Any]


def save_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write ``state`` as ``folder/name.json`` and, if it holds tensors, ``folder/name.safetensors``.

    Tensors may have any device and layout; values and dtypes are kept exactly. Raises InternalError (RW590) for a value
    of a different type.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def other(value: object) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, torch.dtype):
            return {DTYPE: str(value).removeprefix("torch.")}
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            parts = {name: getattr(value, name) for name in names}
            return {KIND: type(value).__name__, "from": [parts, context, value.shape, value.stride()]}
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            text = f"the {name} state holds a {kind}, which a checkpoint cannot hold; please report this optimizer."
            raise InternalError("RW590", text)
        key, value = str(len(tensors)), value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory. A copy of each would double the optimizer's state.
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if storage in storages else value
        storages.add(storage)
        return {TENSOR: key}

    text = json.dumps(state, default=other)
    if tensors:
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """Read what ``save_state`` wrote; tensors are on the CPU.

    Raises RunError (RW511) for files that are missing, damaged or do not belong together.
    """
    with reading_state(folder, name):
        path = folder / f"{name}.safetensors"
        tensors = safetensors.torch.load_file(path) if path.exists() else {}
        # The classes that their libraries declare safe to load.
        safe = torch.serialization.get_safe_globals()
        kinds: dict[str, Any] = {kind.__name__: kind for kind in safe if isinstance(kind, type)}

        def made(found: dict[str, Any]) -> Any:
            if TENSOR in found:
                return tensors[found[TENSOR]]
            if DTYPE in found:
                return getattr(torch, found[DTYPE])
            if KIND in found:
                return kinds[found[KIND]].__tensor_unflatten__(*found["from"])
            return found

        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"), object_hook=made)


@contextmanager
def reading_state(folder: Path, name: str) -> Iterator[None]:
    """Raise errors about the values in a checkpoint's file as RunError (RW511)."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  torch, NumPy and safetensors raise many kinds for values of a wrong form
        text = f"cannot read the {name} state in {folder}: {one_line(error)}; resume from an older checkpoint."
        raise RunError("RW511", text) from None


def seed_all(seed: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> RandomStates:
    """The states of every generator that training draws from: Python's, NumPy's, torch's on each device."""
    states: RandomStates = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: RandomStates) -> None:
    """Set every generator to its state in ``states``, a result of ``random_states``.

    Raises RunError (RW511) if the number of CUDA devices differs.
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        if len(states["cuda"]) != torch.cuda.device_count():
            raise RunError(
                "RW511",
                f"the checkpoint has the random states of {len(states['cuda'])} CUDA devices and this machine shows "
                f"{torch.cuda.device_count()}; set CUDA_VISIBLE_DEVICES to as many.",
            )
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


@contextmanager
def undisturbed_random_states() -> Iterator[None]:
    """A context at whose end the random states are restored, so that an evaluation does not change the training."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
