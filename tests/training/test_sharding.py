"""Optimizer states are saved without shards and restored to them, as far as one process shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from rankwise.acceleration.sharding import shard
from rankwise.compat.torch import is_sharded
from rankwise.training.sharding import sharded_state, whole, whole_state, whole_weights
from rankwise.training.weights import load_weights
from tiny_models import tiny_llama


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def values(state: dict[str, Any]) -> dict[tuple[int, str], torch.Tensor]:
    return {(index, name): value for index, moments in state["state"].items() for name, value in moments.items()}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_optimizers_state_is_whole_and_comes_back(count: int, mesh: Any) -> None:
    """Of two layers the first ``count`` are sharded."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    for layer in model[:count]:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before, saved = values(optimizer.state_dict()), whole_state(optimizer)
    assert sum(map(is_sharded, before.values())) == 4 * count
    assert not any(map(is_sharded, values(saved).values()))
    optimizer.load_state_dict(sharded_state(saved, optimizer))
    after = values(optimizer.state_dict())
    assert after.keys() == before.keys()
    for place, value in before.items():
        assert is_sharded(after[place]) == is_sharded(value)
        assert torch.equal(whole(after[place]), whole(value))
    optimizer.step()


def test_weights_are_loaded_into_the_shards_after_an_answer(mesh: Any, tmp_path: Path) -> None:
    """What lies outside of the layers stays gathered after a forward pass, until a backward pass."""
    model, stored = tiny_llama().requires_grad_(True), tiny_llama()
    with torch.no_grad():
        for parameter in stored.parameters():
            parameter += 1
    stored.save_pretrained(tmp_path / "stored")
    shard(model, mesh, trains_all=True)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))
    assert not is_sharded(model.lm_head.weight)
    load_weights(model, tmp_path / "stored")
    found = whole_weights(model)
    assert found is not None
    assert [name for name, value in stored.state_dict().items() if not torch.equal(found[name], value)] == []
