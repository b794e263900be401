"""Optimizer states are saved without shards and restored to them, as far as one process shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from rankwise.compat.torch import is_sharded
from rankwise.training.sharding import sharded_state, whole, whole_state


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
