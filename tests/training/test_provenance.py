"""What a record says of the device."""

from __future__ import annotations

import types

import pytest
import torch

from rankwise.acceleration import grow_segments
from rankwise.training.run import device_record

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        # Set and taken away, so that what the test sets goes again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_segments_grow_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grow_segments() == "expandable_segments:True"
    assert grow_segments() == "expandable_segments:True"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert grow_segments() == "max_split_size_mb:64"


def test_a_card_s_record_says_what_allocates_and_what_optimizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=24_000_000_000)
    )
    record = device_record(torch.device("cuda"), torch.bfloat16, "adamw_torch")
    assert record["allocator"] == "expandable_segments:True"
    assert record["optimizer"] == "adamw_torch_fused"
    assert record["memory_bytes"] == 24_000_000_000


def test_a_cpu_s_record_names_neither() -> None:
    assert not {"allocator", "optimizer"} & set(device_record(torch.device("cpu"), torch.float32, "adamw_torch"))
