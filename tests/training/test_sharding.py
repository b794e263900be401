"""Optimizer states are saved without shards and restored to them, as far as one process shows it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from rankwise.compat.torch import is_sharded, is_unit
from rankwise.compat.transformers import before_weights
from rankwise.training import ranks
from rankwise.training.weights import (
    load_weights,
    shard,
    shard_before_loading,
    sharded_state,
    whole,
    whole_state,
    whole_weights,
)
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


# Names of whole modules, trains_all, number of processes, whether the head is the embedding: whether rows are read.
TIED = {
    "frozen": ((), False, 2, True, True),
    "a head that trains": (("lm_head",), False, 2, True, False),
    "a norm that trains": (("norm",), False, 2, True, True),
    "a head of its own that trains": (("lm_head",), False, 2, False, True),
    "all, of even rows": ((), True, 2, True, True),
    "all, of uneven rows": ((), True, 3, True, False),
    "all, of uneven rows, a head of its own": ((), True, 3, False, True),
}


@pytest.mark.parametrize("case", TIED.values(), ids=TIED)
def test_what_trains_of_tied_weights_is_one_weight(
    case: tuple[tuple[str, ...], bool, int, bool, bool], mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, trains_all, count, is_tied, by_rows = case
    tiny_llama(vocab_size=98, tie_word_embeddings=is_tied).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ranks, "count", lambda: count)
    given: Any = {"device_type": "cpu", "trained_whole": names, "trains_all": trains_all}
    with before_weights(functools.partial(shard_before_loading, **given)):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert is_unit(model) is by_rows
    # What a trained head is copied from.
    if names == ("lm_head",):
        assert not is_sharded(model.lm_head.weight)
