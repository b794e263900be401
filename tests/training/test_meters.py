"""What a run's peak memory counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rankwise.acceleration import anonymous_memory_bytes
from rankwise.errors import ModelError
from rankwise.models.prepared import mapped_files
from rankwise.training.watch import MemoryMeter

SIZE = 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_frozen_weights_in_a_mapped_file_count(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(SIZE, SIZE)}, tmp_path / "w.safetensors")
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)).requires_grad_(False)
    assert mapped_files(model).bytes == 0
    model[1].weight = nn.Parameter(load_file(tmp_path / "w.safetensors")["weight"], requires_grad=False)
    files = mapped_files(model)
    in_file = files.bytes
    assert in_file == 4 * SIZE * SIZE
    (tmp_path / "w.safetensors").rename(tmp_path / "old")
    (tmp_path / "w.safetensors").write_bytes(b"another file")
    files.check()
    with MemoryMeter("cpu", mapped=in_file) as memory:
        assert memory.now() == pytest.approx(anonymous_memory_bytes() + in_file, abs=2e6)
    files = mapped_files(model)
    with (tmp_path / "old").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match="RW305: .* was changed while its weights were in use"):
        files.check()
    assert mapped_files(model.requires_grad_(True)).bytes == 0, "what trains is written to, and then no file's any more"
