"""A prepared base and kept rows are what would have been made again, to the bit, and what is said of them."""

from __future__ import annotations

import copy
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rows import snapshot

from rankwise.disk import hold
from rankwise.errors import RunError
from rankwise.models import fetch_model, model_facts
from rankwise.models.prepared import load_prepared
from rankwise.quantization.config import Fp4Config, Nf4Config
from rankwise.training.run import train

IDS = torch.tensor([[5, 9, 13, 40]])


def loaded(
    folder: Path, cache: Path | None, quantization: Any, dtype: torch.dtype = torch.float32, mapped: bool = True
) -> Any:
    source = fetch_model(str(folder))
    options = {"dtype": dtype, "device": "cpu", "quantization": copy.copy(quantization), "trust_remote_code": False}
    return load_prepared(source, cache=cache, mapped=mapped, **options)[0]


@pytest.mark.parametrize(
    "quantization", [Nf4Config(double_quant=True), Nf4Config(double_quant=False), Fp4Config(block_size=32)]
)
def test_a_prepared_base_is_the_same_model(model_folder: Path, tmp_path: Path, quantization: Any):
    fresh = loaded(model_folder, None, quantization, mapped=False)
    first = loaded(model_folder, tmp_path / "cache", quantization)
    again = loaded(model_folder, tmp_path / "cache", quantization)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert torch.equal(again(IDS).logits, fresh(IDS).logits)
    assert torch.equal(first(IDS).logits, fresh(IDS).logits)
    assert again.name_or_path == fresh.name_or_path
    source = fetch_model(str(model_folder))
    assert model_facts(again, source) == model_facts(fresh, source)


def test_another_config_is_another_base(model_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    first = loaded(folder, tmp_path / "cache", Nf4Config())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert not torch.equal(loaded(folder, tmp_path / "cache", Nf4Config())(IDS).logits, first(IDS).logits)


def test_what_a_kill_left_goes_and_another_process_is_not_disturbed(model_folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    loaded(model_folder, cache, Nf4Config())
    (folder,) = cache.iterdir()
    folder.rename(cache / f".{folder.name}.partial-0a1b2c3d")
    with ThreadPoolExecutor() as threads:
        with hold(folder):
            waiting = threads.submit(loaded, model_folder, cache, Nf4Config())
            time.sleep(0.5)
            assert not folder.exists()
            assert not waiting.done()
        waiting.result()
    assert list(cache.iterdir()) == [folder]


def test_a_folder_without_weights_is_prepared_again(model_folder: Path, tmp_path: Path):
    expected = loaded(model_folder, tmp_path / "cache", Nf4Config())(IDS).logits
    (folder,) = (tmp_path / "cache").iterdir()
    for missing in ("*", "*.safetensors", "config.json"):
        for path in folder.glob(missing):
            path.unlink()
        assert torch.equal(loaded(model_folder, tmp_path / "cache", Nf4Config())(IDS).logits, expected)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(model_folder: Path, tmp_path: Path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(RunError, match=r"RW551: .*file too large.*--cache names another folder, --no-mmap"):
            loaded(model_folder, tmp_path / "cache", Nf4Config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "cache").exists()


def test_formats_do_not_share_a_place_and_plain_folders_are_not_copied(model_folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    loaded(model_folder, cache, None)
    assert not cache.exists()
    loaded(model_folder, cache, Nf4Config(double_quant=True))
    loaded(model_folder, cache, Nf4Config(double_quant=False))
    loaded(model_folder, cache, Nf4Config(double_quant=True), torch.bfloat16)
    assert len(list(cache.iterdir())) == 3


def test_a_run_from_the_cache_is_the_same_run(settings: Any, tmp_path: Path):
    plain = train(settings(method="qdora", output=tmp_path / "plain"))
    runs = [train(settings(method="qdora", output=tmp_path / name, cache=tmp_path / "cache")) for name in ("a", "b")]
    assert [run.eval_loss for run in runs] == [plain.eval_loss] * 2
    assert runs[1].base_model == plain.base_model
    assert runs[1].data == plain.data
    name = "adapter_model.safetensors"
    assert snapshot(tmp_path / "b")[name] == snapshot(tmp_path / "plain")[name]
