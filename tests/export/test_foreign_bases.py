"""A checkpoint in FP8: read densely, trained over, and merged into its dequantized values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankwise as rw
from rankwise.errors import ModelError, RankwiseWarning
from rankwise.export.merged import merge_to_folder
from tiny_models import tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 90, 2]])


@pytest.fixture
def fp8(tmp_path: Path) -> tuple[Path, Path]:
    """The folder in FP8, one scale a matrix, and a dense one of the same values."""
    torch.manual_seed(0)
    model = tiny_llama()
    folders = tmp_path / "fp8", tmp_path / "dense"
    for folder in folders:
        model.save_pretrained(folder)
    stored, dense = (load_file(folder / "model.safetensors") for folder in folders)
    for name, W in list(dense.items()):
        if W.dim() == 2 and "embed" not in name and "lm_head" not in name:
            scale = W.abs().max() / 448
            stored[name] = (W / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            dense[name] = stored[name].float() * scale
    for folder, tensors in zip(folders, (stored, dense)):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders


def logits(folder: Path, adapter: Path | None = None) -> Any:
    model, _ = rw.load_model(str(folder), dtype=torch.float32)
    if adapter is not None:
        rw.load_adapter(model, adapter)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_it_is_read_densely_and_says_so(fp8: tuple[Path, Path]) -> None:
    with pytest.warns(RankwiseWarning, match=r"RW179.*fp8"):
        found = logits(fp8[0])
    torch.testing.assert_close(found, logits(fp8[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_merge_into_the_dequantized_values(fp8: tuple[Path, Path], use_dora: bool, tmp_path: Path) -> None:
    model, _ = rw.load_model(str(fp8[0]), dtype=torch.float32)
    rw.add_adapter(model, rw.LoraConfig(r=4, use_dora=use_dora, init_lora_weights=False))
    rw.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"RW309.*--onto quantized"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "no", model=str(fp8[0]))
    report = merge_to_folder(tmp_path / "adapter", tmp_path / "merged", model=str(fp8[0]), onto="quantized")
    assert report.merged_modules == 14
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged, trained = logits(tmp_path / "merged"), logits(fp8[1], tmp_path / "adapter")
    torch.testing.assert_close(merged, trained, rtol=1e-3, atol=1e-3)
    assert (merged - logits(fp8[1])).abs().max() > 0.05
