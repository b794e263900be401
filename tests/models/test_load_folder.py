"""Folders load complete or not at all: each kind of bad folder is one sentence with its code."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rankwise import foreign
from rankwise.errors import ModelError, RankwiseWarning
from rankwise.foreign import sha256_of
from rankwise.models import load_model, load_skeleton, load_tokenizer, model_facts, model_hash, source
from rankwise.records import RunRecord
from tiny_models import tiny_gpt2, tiny_llama

MODELS = {"llama": tiny_llama, "llama, tied": lambda: tiny_llama(tie_word_embeddings=True), "gpt2": tiny_gpt2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: tensors that still map the file would make its overwriting a bus error."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = read_weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_size", ["1GB", "10kB"])
@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_is_exact(name: str, max_shard_size: str, tmp_path: Path) -> None:
    model: PreTrainedModel = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)

    loaded, tokenizer = load_model(tmp_path)

    assert type(loaded) is type(model)
    assert tokenizer is None
    assert not loaded.training
    assert loaded.name_or_path == str(tmp_path.resolve())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_dtype_is_the_stored_one_unless_given(folder: Path) -> None:
    assert load_model(folder)[0].dtype == torch.float32
    assert load_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_model(folder, dtype="float16")[0].dtype == torch.float16


def test_a_quantization_config_is_passed_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    original = AutoModelForCausalLM.from_pretrained

    def spy(path: str, **arguments: object) -> object:
        seen.update(arguments)
        return original(path, **(arguments | {"quantization_config": None}))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    marker = object()
    load_model(folder, quantization=marker)

    assert seen["quantization_config"] is marker
    assert seen["use_safetensors"] is True
    assert seen["trust_remote_code"] is False


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])


def only_pickle(folder: Path) -> None:
    state = read_weights(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def pickle_in_disguise(folder: Path) -> None:
    torch.save(read_weights(folder), folder / "model.safetensors")


def pickle_named_by_the_config(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    edit_config(folder, transformers_weights="adapter_model.bin")


def shards(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shutil.rmtree(folder)
        tiny_llama().save_pretrained(folder, max_shard_size="10kB")
        change(folder)

    return damage


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def become_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def become_run(folder: Path) -> None:
    become_adapter(folder)
    RunRecord(method="lora", seed=0, settings={"model": "demo"}).save(folder)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD = {
    "no config": (remove("config.json"), "RW302", "holds no config.json"),
    "an adapter": (become_adapter, "RW302", "is an adapter.*org/base"),
    "a run": (become_run, "RW302", "is an adapter.*give demo as the model"),
    "a model and an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "RW302", "both a model and an"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "RW302", "as JSON"),
    "unknown model_type": (lambda f: edit_config(f, model_type="llama9"), "RW303", "'llama9'.* does not know"),
    "no language model": (lambda f: edit_config(f, model_type="t5"), "RW303", "not a causal language model"),
    "nonsense sizes": (lambda f: edit_config(f, hidden_size="many"), "RW316", "cannot load"),
    "no weights": (remove("model.safetensors"), "RW305", "holds no weights"),
    "truncated": (truncate, "RW306", "not fully covered"),
    "pickle only": (only_pickle, "RW307", r"pytorch_model\.bin"),
    "pickle in disguise": (pickle_in_disguise, "RW306", "is a pickle"),
    "pickle named by config": (pickle_named_by_the_config, "RW305", "not a safetensors file"),
    "weights outside": (lambda f: edit_config(f, transformers_weights="../x.safetensors"), "RW305", "of that folder"),
    "tensor missing": (lambda f: edit_weights(f, lambda t: t.pop(Q_PROJ)), "RW308", f"{Q_PROJ} is missing"),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({Q_PROJ: torch.zeros(3, 5)})),
        "RW308",
        rf"{Q_PROJ} is \(3, 5\), expected \(32, 32\)",
    ),
    "a kernel's code": (lambda f: edit_config(f, attn_implementation={"": "a/b"}), "RW304", "kernel 'a/b'"),
    "NaN": (lambda f: edit_weights(f, lambda t: t[Q_PROJ].fill_(float("nan"))), "RW323", Q_PROJ),
    "a shard missing": (shards(lambda f: min(f.glob("model-*")).unlink()), "RW305", "lacks 1 of"),
    "a shard outside": (shards(edit_index(lambda m: m.update(a="/etc/x.safetensors"))), "RW305", "of that folder"),
    "empty index": (shards(edit_index(dict.clear)), "RW305", "maps no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_one_sentence(name: str, folder: Path) -> None:
    damage, code, expected = BAD[name]
    damage(folder)

    with pytest.raises(ModelError, match=expected) as caught:
        load_model(folder)

    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig
class TinyConfig(LlamaConfig):
    model_type = "rankwise-tiny"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig
class TinyModel(LlamaForCausalLM):
    config_class = TinyConfig
"""


@pytest.fixture
def folder_with_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    (folder / "configuration_tiny.py").write_text(CODE.format(marker=str(folder.parent / "marker")))
    (folder / "modeling_tiny.py").write_text(MODEL_CODE)
    names = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}
    edit_config(folder, model_type="rankwise-tiny", auto_map=names)
    return folder


def test_code_runs_only_on_request(folder_with_code: Path) -> None:
    marker = folder_with_code.parent / "marker"

    with pytest.raises(ModelError, match="--trust-remote-code") as caught:
        load_model(folder_with_code)
    assert caught.value.code == "RW304"
    assert not marker.exists()

    model, _ = load_model(folder_with_code, trust_remote_code=True)
    assert type(model).__name__ == "TinyModel"
    assert marker.exists()


def test_code_beside_a_known_architecture_is_left_aside(folder_with_code: Path) -> None:
    edit_config(folder_with_code, model_type="llama")

    with pytest.warns(RankwiseWarning, match="RW320"):
        model, _ = load_model(folder_with_code)

    assert type(model).__name__ == "LlamaForCausalLM"
    assert not (folder_with_code.parent / "marker").exists()


def test_tensors_without_a_place_are_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))

    with pytest.warns(RankwiseWarning, match=r"RW318.*model\.extra"):
        load_model(folder)


def test_a_broken_tokenizer_is_an_error_and_none_is_none(folder: Path) -> None:
    assert load_tokenizer(folder) is None
    (folder / "tokenizer.json").write_text("{}")

    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert caught.value.code == "RW317"


def save_tokenizer(folder: Path, tokens: int) -> None:
    vocabulary = {f"t{number}": number for number in range(tokens)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0").save_pretrained(folder)


def test_a_tokenizer_comes_along(folder: Path) -> None:
    save_tokenizer(folder, tokens=97)
    _, tokenizer = load_model(folder)

    assert tokenizer is not None
    assert len(tokenizer) == 97
    assert tokenizer.name_or_path == str(folder.resolve())


def test_a_tokenizer_beyond_the_embedding_is_said(folder: Path) -> None:
    save_tokenizer(folder, tokens=98)

    with pytest.warns(RankwiseWarning, match="RW319.*98 tokens and the model 97"):
        load_model(folder)


def test_facts_for_the_record(folder: Path) -> None:
    model, _ = load_model(folder, dtype=torch.bfloat16)
    facts = model_facts(model, str(folder))

    assert facts["sha256"] == sha256_of(folder / "model.safetensors") == model_hash(str(folder))
    assert (facts["kind"], facts["architecture"], facts["dtype"]) == ("folder", "LlamaForCausalLM", "bfloat16")
    assert facts["parameters"] == tiny_llama().num_parameters()
    json.dumps(facts)


def test_weights_are_hashed_once_and_again_when_they_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read, file = model_hash(str(folder)), [], folder / "model.safetensors"
    monkeypatch.setattr(foreign, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    assert model_hash(str(folder)) == before
    # As a later process.
    source._hash_of.cache_clear()
    assert model_hash(str(folder)) == before
    assert read == []
    # In place, and with the time of the old bytes.
    status, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    source._hash_of.cache_clear()
    assert model_hash(str(folder)) != before
    assert read == [file]


def test_a_skeleton_needs_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    skeleton = load_skeleton(folder)

    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert skeleton.state_dict().keys() == tiny_llama().state_dict().keys()


def test_real_model_loads(shared: Path) -> None:
    model, tokenizer = load_model(shared / "models" / "stories260K")

    assert tokenizer is None
    assert model.num_parameters() == 260_032
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A folder in NF4 with double quantization, and the model it was saved from."""
    from rankwise.quantization import Nf4Config, quantize

    model = tiny_llama(hidden_size=64, intermediate_size=128)
    quantize(model, Nf4Config(double_quant=True))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", model


WISHES = {
    "none": (None, ""),
    "the same": (("nf4", 64, True), ""),
    "type": (("fp4", 64, True), "nf4 .* instead of fp4"),
    "block": (("nf4", 128, True), "blocks of 64, .*blocks of 128"),
    "double": (("nf4", 64, False), "with double quantization.*without double quantization"),
}


@pytest.mark.parametrize("wish", WISHES)
def test_a_four_bit_folder_loads_as_it_was_saved(packed, wish, recwarn):
    from rankwise.quantization import Fp4Config, Linear4bit, Nf4Config

    folder, model = packed
    asked, said = WISHES[wish]
    kinds = {"nf4": Nf4Config, "fp4": Fp4Config}
    config = None if asked is None else kinds[asked[0]](block_size=asked[1], double_quant=asked[2])
    loaded, _ = load_model(str(folder), quantization=config)
    ids = torch.tensor([[1, 5, 9, 14]])
    assert type(loaded.model.layers[0].self_attn.q_proj) is Linear4bit
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    warnings = [str(item.message) for item in recwarn if "RW324" in str(item.message)]
    assert len(warnings) == bool(said)
    assert all(re.search(said, warning) for warning in warnings)


def test_a_config_of_another_library_is_refused_on_a_four_bit_folder(packed):
    from transformers import BitsAndBytesConfig

    with pytest.raises(ModelError, match=r"RW316.*already quantized \(bitsandbytes\).*BitsAndBytesConfig"):
        load_model(str(packed[0]), quantization=BitsAndBytesConfig(load_in_4bit=True))
