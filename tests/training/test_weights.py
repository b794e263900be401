"""States to safetensors and JSON and back: exact, whatever the optimizer, and never through a pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from rankwise.errors import InternalError, RunError
from rankwise.training.states import load_state, random_states, save_state, set_random_states, undisturbed_random_states
from rankwise.training.weights import sharded_state

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and (a == b or a != a)


@given(tree=trees)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back_as_it_was(tree: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, "thing", tree)
    assert same(load_state(folder, "thing"), tree)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_a_tensor_of_several_comes_back_if_its_library_calls_it_safe(tmp_path: Path) -> None:
    """As the states of torchao's optimizers."""
    two = TwoTensor(torch.rand(3), torch.rand(3))
    save_state(tmp_path, "thing", {"moment": two, "dtype": torch.bfloat16})
    with torch.serialization.safe_globals([TwoTensor]):
        found = load_state(tmp_path, "thing")
    assert same([found["moment"].a, found["moment"].b, found["dtype"]], [two.a, two.b, torch.bfloat16])
    with pytest.raises(RunError, match="RW511"):
        load_state(tmp_path, "thing")


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
    "lbfgs": torch.optim.LBFGS,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_takes_the_same_steps(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        return weight, OPTIMIZERS[name]([weight])

    def steps(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = ((weight - 3) ** 4).sum()
            value.backward()
            return value

        for _ in range(count):
            optimizer.step(loss)

    weight, optimizer = fresh()
    steps(weight, optimizer, 3)
    save_state(tmp_path, "optimizer", optimizer.state_dict())
    other, restored = fresh()
    other.data.copy_(weight.data)
    restored.load_state_dict(sharded_state(load_state(tmp_path, "optimizer"), restored))
    steps(weight, optimizer, 3)
    steps(other, restored, 3)
    assert torch.equal(weight, other)


def test_tensors_that_share_memory_or_are_transposed_survive(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    save_state(tmp_path, "s", {"a": base, "b": base, "c": base.T, "d": base[:, 1]})
    assert same(load_state(tmp_path, "s"), {"a": base, "b": base, "c": base.T, "d": base[:, 1]})


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="optimizer state holds a builtin_function"):
        save_state(tmp_path, "optimizer", {"state": {0: {"hook": len}}})


def test_random_states_continue_the_same_streams(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.randn(3).tolist()

    random.gauss(0, 1)
    np.random.normal()
    save_state(tmp_path, "random", random_states())
    expected = draw()
    draw()
    set_random_states(load_state(tmp_path, "random"))
    assert draw() == expected
    set_random_states(load_state(tmp_path, "random"))
    with undisturbed_random_states():
        draw()
    assert draw() == expected


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_are_not_opened(name: str, tmp_path: Path) -> None:
    save_state(tmp_path, "optimizer", {"a": torch.ones(2)})
    # Opened as a pickle, this would create a file.
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert torch.equal(load_state(tmp_path, "optimizer")["a"], torch.ones(2))
    assert not (tmp_path / "ran").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "cut tensors": lambda folder: cut(folder / "s.safetensors"),
    "cut json": lambda folder: cut(folder / "s.json"),
    "missing json": lambda folder: (folder / "s.json").unlink(),
    "missing tensors": lambda folder: (folder / "s.safetensors").unlink(),
    "other tensor": lambda folder: (folder / "s.json").write_text(json.dumps({"$tensor": "5"})),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_state_is_a_clear_error(kind: str, tmp_path: Path) -> None:
    save_state(tmp_path, "s", {"a": torch.ones(2)})
    DAMAGE[kind](tmp_path)
    with pytest.raises(RunError, match="older checkpoint") as caught:
        load_state(tmp_path, "s")
    assert caught.value.code == "RW511"
