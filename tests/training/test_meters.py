"""What a run's peak memory counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rankwise.models.mapped import mapped_files
from rankwise.training.watch import MemoryMeter, anonymous_memory_bytes

SIZE = 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_frozen_weights_in_a_mapped_file_count(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(SIZE, SIZE)}, tmp_path / "w.safetensors")
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)).requires_grad_(False)
    assert mapped_files(model).bytes == 0
    model[1].weight = nn.Parameter(load_file(tmp_path / "w.safetensors")["weight"], requires_grad=False)
    in_file = mapped_files(model).bytes
    assert in_file == 4 * SIZE * SIZE
    with MemoryMeter("cpu", mapped=in_file) as memory:
        assert memory.now() == pytest.approx(anonymous_memory_bytes() + in_file, abs=2e6)
    assert mapped_files(model.requires_grad_(True)).bytes == 0, "what trains is written to, and then no file's any more"
