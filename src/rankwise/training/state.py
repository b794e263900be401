"""The states of optimizers, schedules and random generators as safetensors and JSON, exact and without pickle.

A state is a tree of dicts, lists, tuples and scalars that holds tensors. The tensors are numbered in
``NAME.safetensors``; the rest is ``NAME.json``, where a tensor is ``{"$tensor": "0"}``, and values that JSON does not
have (tuples, keys that are not text, infinities) are objects whose key starts with ``$``.
"""

from __future__ import annotations

import json
import math
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
from rankwise.foreign import JsonObject, read_json
from rankwise.training.checkpoints import check_no_pickles

# By generator: "python", "numpy", "cpu", and where there is one "cuda" or "mps".
RandomStates = dict[str, Any]


def save_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write ``state`` as ``folder/name.json`` and, where it holds tensors, ``folder/name.safetensors``.

    Tensors may have any device and layout; values and dtypes are kept exactly. Raises InternalError (RW590) for a value
    of a different type, with its place in the tree.
    """
    tensors: dict[str, Tensor] = {}
    document = _encode(state, tensors, name)
    if tensors:
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """Read what ``save_state`` wrote; tensors are on the CPU.

    Raises RunError: RW512 for a folder that holds pickles, RW511 for files that are missing, damaged or do not belong
    together.
    """
    check_no_pickles(folder)
    with reading_state(folder, name):
        document = read_json(folder / f"{name}.json")
        path = folder / f"{name}.safetensors"
        tensors = safetensors.torch.load_file(path) if path.exists() else {}
        return _decode(document, tensors)


@contextmanager
def reading_state(folder: Path, name: str) -> Iterator[None]:
    """Raise errors about the values in a checkpoint's file as RunError (RW511)."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  torch, NumPy and safetensors raise many kinds for values of a wrong form
        reason = one_line(error) or type(error).__name__
        raise RunError(
            "RW511", f"cannot read the {name} state in {folder}: {reason}; resume from an older checkpoint."
        ) from None


def seed_all(seed: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> RandomStates:
    """The states of every generator that training draws from: Python's, NumPy's, torch's on each device."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: RandomStates = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: RandomStates) -> None:
    """Set every generator to its state in ``states``, a result of ``random_states``.

    Raises RunError (RW511) where the number of CUDA devices differs.
    """
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
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


def _encode(value: object, tensors: dict[str, Tensor], place: str) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A copy, since safetensors refuses tensors that share memory.
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": key}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item(), tensors, place)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list):
        return [_encode(item, tensors, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, tensors, f"{place}[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, tensors, place)
    raise InternalError(
        "RW590", f"{place} is a {type(value).__name__}, which a checkpoint cannot hold; please report this optimizer."
    )


def _encode_dict(value: dict[Any, object], tensors: dict[str, Tensor], place: str) -> JsonObject:
    items = [(key, _encode(item, tensors, f"{place}[{key!r}]")) for key, item in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {"$dict": [[_encode(key, tensors, f"{place} key"), item] for key, item in items]}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["$dict"]}
    return {key: _decode(item, tensors) for key, item in value.items()}
