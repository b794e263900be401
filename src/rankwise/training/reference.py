"""The reference's log-probabilities of a run's answers. They never change, so each is computed once and kept.

A value is found by the reference (the base, its products, the versions of libraries: the key of a file) and by the
tokens of prompt and answer. Files lie in the run's folder, so that a resumed run has the bits of an undisturbed one,
and in the cache, where other runs over the same base find them: those of a comparison, and later ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.records import write_bytes

FILE = "reference.safetensors"
# (prompt, answer), as token ids.
Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass
class Reference:
    """``key``: the hash of all that a value depends on beside the tokens."""

    key: str
    # Training computes frozen products in 8 bits, and evaluations do not.
    in_eight_bits: bool = False
    # {digest of a pair: the sum of the reference's log-probabilities of its answer}.
    values: MutableMapping[bytes, float] = dataclasses.field(default_factory=dict)

    def digest(self, pair: Pair, *, trains: bool) -> bytes:
        """``trains``: the value is for a training step."""
        prompt, answer = (np.asarray(ids, dtype=np.int64).tobytes() for ids in pair)
        kind = f"{len(prompt)} {trains and self.in_eight_bits} ".encode()
        return hashlib.sha256(kind + prompt + answer).digest()

    def knows(self, pairs: Sequence[Pair], *, trains: bool) -> bool:
        return all(self.digest(pair, trains=trains) in self.values for pair in pairs)

    def of(self, pairs: Sequence[Pair], *, trains: bool) -> Tensor:
        """(B,) float32. Every pair must be known."""
        return torch.tensor([self.values[self.digest(pair, trains=trains)] for pair in pairs])


def key_of(*inputs: object) -> str:
    """The key of a reference that depends on ``inputs``, as JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def read_values(file: Path, key: str) -> dict[bytes, float]:
    """The values that ``file`` keeps for ``key``; none if there is no file, or one of another key.

    Raises ValueError for a file that is damaged.
    """
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
            if found.get("key") != key:
                return {}
            digests, values = (opened.get_tensor(name) for name in ("digests", "values"))
        if found.get("sha256") != _checksum(digests, values) or len(digests) != len(values):
            raise ValueError("its values do not have the checksum that was written with them")
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None
    return dict(zip((bytes(row) for row in digests.numpy()), values.tolist()))


def write_values(file: Path, key: str, values: Mapping[bytes, float]) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    digests = torch.from_numpy(np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 32).copy())
    numbers = torch.tensor(list(values.values()))
    metadata = {"key": key, "sha256": _checksum(digests, numbers)}
    write_bytes(file, safetensors.torch.save({"digests": digests, "values": numbers}, metadata))


def _checksum(digests: Tensor, values: Tensor) -> str:
    return hashlib.sha256(digests.numpy().tobytes() + values.numpy().tobytes()).hexdigest()
