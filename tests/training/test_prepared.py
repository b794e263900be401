"""A prepared base and kept rows are what would have been made again, to the bit, and what is said of them."""

from __future__ import annotations

import copy
import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rows import snapshot, write_rows

from rankwise.data import encode_rows, read_rows
from rankwise.data.encoding import encode_rows_once
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


def test_a_full_disk_is_one_sentence_and_leaves_nothing(model_folder: Path, tmp_path: Path):
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


def test_kept_rows_are_the_same_rows(tokenizer: Any, tmp_path: Path):
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", 30))
    options: dict[str, Any] = {"max_length": 4, "chat_template": None, "name": "train"}
    with pytest.warns(UserWarning, match="RW215"):
        fresh = encode_rows(rows, tokenizer, **options)
    for _ in range(2):
        with pytest.warns(UserWarning, match="RW215"):
            kept = encode_rows_once(rows, tokenizer, cache=tmp_path / "cache", **options)
        assert kept.report == fresh.report
        assert kept.dataset.to_list() == fresh.dataset.to_list()
        assert kept.dataset.features == fresh.dataset.features
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("place", [-1, 200])
def test_kept_rows_that_were_damaged_are_encoded_anew(place: int, tokenizer: Any, tmp_path: Path):
    """Other ids would train another model, and ends outside the arrays end the process."""
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", 30))
    options: dict[str, Any] = {"max_length": 64, "chat_template": None, "name": "train", "cache": tmp_path / "cache"}
    fresh = encode_rows_once(rows, tokenizer, **options)
    (path,) = (tmp_path / "cache").iterdir()
    sound = path.read_bytes()
    for damaged in (sound[:place] + b"\x7f" + sound[place:][1:], sound[:place]):
        path.write_bytes(damaged)
        assert encode_rows_once(rows, tokenizer, **options).dataset.to_list() == fresh.dataset.to_list()
        assert path.read_bytes() != damaged


def test_other_rows_and_other_rules_are_encoded_anew(tokenizer: Any, tmp_path: Path):
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", 30))
    options: dict[str, Any] = {"chat_template": None, "name": "train", "cache": tmp_path / "cache"}
    encode_rows_once(rows, tokenizer, max_length=16, **options)
    encode_rows_once(rows[:29], tokenizer, max_length=16, **options)
    encode_rows_once(rows, tokenizer, max_length=15, **options)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s>{% endfor %}"
    encode_rows_once(rows, tokenizer, max_length=16, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_the_same_messages_trained_from_another_turn_on_are_encoded_anew(tokenizer: Any, tmp_path: Path):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s>{% endfor %}"
    turns = [{"role": role, "content": f"w{index}"} for index, role in enumerate(["user", "assistant"] * 2)]
    options: dict[str, Any] = {"max_length": 32, "chat_template": None, "name": "train", "cache": tmp_path / "cache"}
    trained = []
    for first in (1, 3):
        path = tmp_path / f"from-{first}.jsonl"
        path.write_text(json.dumps({"prompt": turns[:first], "completion": turns[first:]}) + "\n")
        (labels,) = encode_rows_once(read_rows(path), tokenizer, **options).dataset["labels"]
        trained.append(sum(label != -100 for label in labels))
    assert trained[0] > trained[1] > 0


def test_a_run_from_the_cache_is_the_same_run(settings: Any, tmp_path: Path):
    plain = train(settings(method="qdora", output=tmp_path / "plain"))
    runs = [train(settings(method="qdora", output=tmp_path / name, cache=tmp_path / "cache")) for name in ("a", "b")]
    assert [run.eval_loss for run in runs] == [plain.eval_loss] * 2
    assert runs[1].base_model == plain.base_model
    assert runs[1].data == plain.data
    name = "adapter_model.safetensors"
    assert snapshot(tmp_path / "b")[name] == snapshot(tmp_path / "plain")[name]
