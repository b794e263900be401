"""GGUF files: transformers reads merged ones as the model that was trained; adapters fit base files name by name."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import FAMILIES, base_gguf, logits, saved

import rankwise as rw
from rankwise.adapters import adapter_disabled
from rankwise.cli.main import main
from rankwise.errors import AdapterError, ConfigError, ModelError, RunError
from rankwise.export.merged import merge_to_folder
from rankwise.export.proof import LLAMA, Served, prove, run_server, server_python
from rankwise.export.rounding import round_as_served
from rankwise.export.whole import WholeModel, export_merged
from rankwise.models.gguf_file import read_gguf_header
from rankwise.records import RunRecord
from tiny_models import tiny_llama

# transformers reads no experts' GGUF of Mixtral's.
READ_BY_TRANSFORMERS = [kind for kind in FAMILIES if kind != "mixtral"]


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_reads_a_merged_gguf_as_the_model_that_was_trained(tmp_path, kind):
    model = saved(kind, tmp_path)
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", kind="f32"))
    loaded, tokenizer = rw.load_model(tmp_path / "served" / "model.gguf")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    with adapter_disabled(model):
        assert not torch.allclose(logits(loaded), logits(model), atol=1e-2)
    assert tokenizer.convert_tokens_to_ids("ab") == 95


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_an_adapter_s_pairs_added_to_the_base_s_tensors_are_the_merged_model(tmp_path, kind):
    """llama.cpp's own arithmetic by hand: W + (alpha / r) B A, tensor by tensor of the base's file."""
    model = saved(kind, tmp_path)
    base = base_gguf(model, tmp_path)
    rw.export_adapter(model, tmp_path / "served", target="llama.cpp", base_gguf=base)
    adapter = gguf.GGUFReader(tmp_path / "served" / "adapter.gguf")
    pairs = {tensor.name: np.array(tensor.data) for tensor in adapter.tensors}
    alpha = adapter.fields["adapter.lora.alpha"].contents()
    assert adapter.fields["general.file_type"].contents() == gguf.LlamaFileType.ALL_F32
    patched = gguf.GGUFReader(shutil.copy(base, tmp_path / "patched.gguf"), "r+")
    for tensor in patched.tensors:
        if f"{tensor.name}.lora_a" in pairs:
            A, B = (pairs.pop(f"{tensor.name}.lora_{side}") for side in "ab")
            tensor.data[...] += alpha / B.shape[-1] * (B @ A)
    assert not pairs
    patched.data.flush()
    loaded, _ = rw.load_model(tmp_path / "patched.gguf")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("named", "wanted"), [({}, ("org/base", "c0ffee")), ({"model": "org/other", "revision": "v2"}, ("org/other", "v2"))]
)
def test_a_merged_gguf_is_made_of_the_commit_that_the_header_is_of(tmp_path, monkeypatch, named, wanted):
    saved("llama", tmp_path)
    base = (tmp_path / "base").rename(tmp_path / wanted[1])
    facts = {"kind": "hub", "name": "org/base", "revision": "c0ffee"}
    RunRecord("lora", 0, {"model": "org/base"}, base_model=facts).save(tmp_path / "adapter")
    asked = []
    monkeypatch.setattr(
        "rankwise.models.source.download", lambda repo, *, revision, **_: asked.append((repo, revision)) or base
    )
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", **named))
    assert set(asked) == {wanted}


def test_a_gguf_base_keeps_its_header_and_untouched_tensors(tmp_path):
    model = saved("llama", tmp_path, target_modules=["q_proj", "down_proj"], use_dora=True)
    base = base_gguf(model, tmp_path, "q8_0")
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("ollama", str(tmp_path / "base"), base))
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(tmp_path / "served" / "model.gguf")
    same = {"general.file_type"}
    assert set(before.fields) == set(after.fields)
    for name, field in before.fields.items():
        if name not in same and not name.startswith("GGUF."):
            assert field.contents() == after.fields[name].contents()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_v.weight"] == "Q8_0"
    untouched = {t.name: t.data for t in before.tensors if "attn_q" not in t.name and "ffn_down" not in t.name}
    for tensor in after.tensors:
        if tensor.name in untouched:
            assert np.array_equal(tensor.data, untouched[tensor.name])
    lines = (tmp_path / "served" / "Modelfile").read_text().splitlines()
    assert lines == ["FROM ./model.gguf", 'PARAMETER stop "</s>"', "PARAMETER num_ctx 64"]


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_merge_into_a_gguf_is_the_merge_of_its_weights(tmp_path, kind):
    """Of a tied matrix the embedding is adapted and the head is not, so the file gets a head of its own."""
    model = saved(kind, tmp_path, use_dora=True, target_modules=["q_proj", "k_proj", "embed_tokens"])
    base = base_gguf(model, tmp_path)
    assert ("output.weight" in read_gguf_header(base).tensors) == (kind == "llama")
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", None, base, "f32"))
    assert "output.weight" in read_gguf_header(tmp_path / "served" / "model.gguf").tensors
    loaded, _ = rw.load_model(tmp_path / "served" / "model.gguf")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


def test_a_merge_into_gemma_2_s_embedding_is_refused(tmp_path):
    """llama.cpp reads no head of its own there, and does not load a file that has one."""
    base = base_gguf(saved("gemma2", tmp_path, target_modules=["q_proj", "embed_tokens"]), tmp_path)
    for given in (base, None):
        with pytest.raises(ModelError, match=r"RW741.*gemma2 has no tensor for lm_head"):
            export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", base_gguf=given))


def test_a_loftq_adapter_is_not_merged_into_a_gguf(tmp_path):
    base = base_gguf(saved("llama", tmp_path), tmp_path)
    model, _ = rw.load_model(tmp_path / "base", quantization=rw.Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights="loftq"))
    rw.save_adapter(model, tmp_path / "loftq", base_model=str(tmp_path / "base"))
    with pytest.raises(AdapterError, match="RW433"):
        export_merged(tmp_path / "loftq", tmp_path / "served", WholeModel("llama.cpp", base_gguf=base))


def test_new_tokens_are_written_from_the_base_s_weights(tmp_path):
    model = saved("llama", tmp_path, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    base = base_gguf(model, tmp_path)
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", str(base), kind="f32"))
    torch.testing.assert_close(logits(rw.load_model(tmp_path / "served" / "model.gguf")[0]), logits(model))
    with pytest.raises(ConfigError, match=r"RW735.*new tokens"):
        export_merged(tmp_path / "adapter", tmp_path / "other", WholeModel("llama.cpp", base_gguf=base))


def test_a_merge_keeps_the_alignment_of_its_base(tmp_path):
    model = saved("llama", tmp_path)
    reader = gguf.GGUFReader(base_gguf(model, tmp_path))
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(256)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = WholeModel("llama.cpp", base_gguf=tmp_path / "aligned.gguf", kind="f32")
    export_merged(tmp_path / "adapter", tmp_path / "served", wanted)
    torch.testing.assert_close(logits(rw.load_model(tmp_path / "served" / "model.gguf")[0]), logits(model))


def test_a_hub_base_is_merged_at_the_commit_of_the_adapter(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    asked = []

    def download(repo, *, revision, code, weights):
        asked.append(revision)
        commit = tmp_path / "commits" / (revision or "newest")
        shutil.copytree(tmp_path / "base", commit, dirs_exist_ok=True)
        return commit

    monkeypatch.setattr("rankwise.models.source.download", download)
    wanted = WholeModel("llama.cpp", "org/base", revision="c0ffee")
    export_merged(tmp_path / "adapter", tmp_path / "served", wanted)
    assert set(asked) == {"c0ffee"}


def test_a_type_is_for_tensors_that_are_not_quantized_yet(tmp_path):
    model = saved("llama", tmp_path, target_modules=["q_proj"])
    kinds = {}
    for name, base, kind in [("f32", "f32", None), ("q8_0", "q8_0", None), ("both", "q8_0", "q4_0")]:
        path = base_gguf(model, tmp_path, base)
        export_merged(tmp_path / "adapter", tmp_path / name, WholeModel("llama.cpp", None, path, kind))
        found = read_gguf_header(tmp_path / name / "model.gguf").tensors
        kinds[name] = [gguf.GGMLQuantizationType(found[f"blk.0.attn_{part}.weight"].ggml_type).name for part in "qv"]
    # The adapted weight first, then one that is copied.
    assert kinds == {"f32": ["F16", "F32"], "q8_0": ["F16", "Q8_0"], "both": ["Q4_0", "Q8_0"]}


def test_experts_are_merged_as_llama_cpp_stacks_them(tmp_path):
    """Beside Mixtral's file, which transformers does not read, stands the merge into transformers' own format."""
    saved("mixtral", tmp_path)
    base = base_gguf(rw.load_model(tmp_path / "base")[0], tmp_path)
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", None, base, "f32"))
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    experts = rw.load_model(tmp_path / "merged")[0].model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "served" / "model.gguf").tensors}
    for name, wanted in [("gate", gate), ("up", up), ("down", experts.down_proj.detach())]:
        torch.testing.assert_close(torch.tensor(found[f"blk.0.ffn_{name}_exps.weight"]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_type_is_written_where_rows_are_whole_blocks(tmp_path, kind):
    model = saved("llama", tmp_path)
    export_merged(tmp_path / "adapter", tmp_path / "served", WholeModel("llama.cpp", kind=kind))
    header = read_gguf_header(tmp_path / "served" / "model.gguf")
    kinds = {name: gguf.GGMLQuantizationType(t.ggml_type).name for name, t in header.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    # Rows of 48 are not whole blocks of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if kind[0] == "q" else kind.upper())
    assert kinds["output_norm.weight"] == "F32"
    loaded, _ = rw.load_model(tmp_path / "served" / "model.gguf")
    allowed = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.05}.get(kind, 1.0)
    assert (logits(loaded) - logits(model)).abs().max() < allowed


def test_a_base_of_another_model_is_refused_and_nothing_is_left(tmp_path):
    model = saved("llama", tmp_path)
    (tmp_path / "other").mkdir()
    other = base_gguf(saved("qwen2", tmp_path / "other"), tmp_path / "other")
    small = tiny_llama(intermediate_size=64)
    rw.add_adapter(small, rw.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    base = base_gguf(model, tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.read_bytes()[:-100])
    for adapted, file, code in [(model, other, "RW743"), (small, base, "RW743"), (model, cut, "RW310")]:
        with pytest.raises(ModelError, match=code):
            rw.export_adapter(adapted, tmp_path / "served", target="llama.cpp", base_gguf=file)
        assert not (tmp_path / "served").exists()


def test_bad_bases_by_the_command_line_give_one_error_and_leave_nothing(tmp_path, capsys):
    model = saved("llama", tmp_path)
    base = base_gguf(model, tmp_path)
    (tmp_path / "other").mkdir()
    other = base_gguf(saved("qwen2", tmp_path / "other"), tmp_path / "other")
    content = base.read_bytes()
    cases = {other: "RW743", tmp_path / "missing.gguf": "RW"}
    for kept in (0, 3, 40, 900, len(content) - 100):
        cut = tmp_path / f"cut{kept}.gguf"
        cut.write_bytes(content[:kept])
        cases[cut] = "RW310"
    before = sorted(tmp_path.iterdir())
    for file, code in cases.items():
        for more in ([], ["--merged"], ["--merged", "--quantize", "q8_0"]):
            given = ["--adapter", tmp_path / "adapter", "--output", tmp_path / "served", "--base-gguf", file, *more]
            assert main(["export", "--for", "llama.cpp", *map(str, given)]) == 2
            said = capsys.readouterr().err
            assert said.count("error RW") == 1
            assert f"error {code}" in said
            assert "Traceback" not in said
            assert sorted(tmp_path.iterdir()) == before, (file, more)


def test_what_llama_cpp_does_not_know_is_refused(tmp_path):
    from tiny_models import tiny_falcon

    falcon = tiny_falcon()
    rw.add_adapter(falcon, rw.LoraConfig(r=2))
    with pytest.raises(ModelError, match="RW740.*falcon"):
        rw.export_adapter(falcon, tmp_path / "served", target="llama.cpp")
    tied = tiny_llama(tie_word_embeddings=True)
    rw.add_adapter(tied, rw.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="RW742"):
        rw.export_adapter(tied, tmp_path / "served", target="llama.cpp")
    assert list(tmp_path.iterdir()) == []


def has_llama_cpp() -> bool:
    try:
        return bool(server_python("llama.cpp", None))
    except RunError:
        return False


needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason=f"{LLAMA.variable} names no Python with xllamacpp")
PROMPTS = [[1, 5, 9, 14, 33, 60], [1, 44, 3, 8, 20, 21, 22]]


def as_served(model, served):
    files, is_merged = served.merged or served.model, served.merged is not None
    return round_as_served(copy.deepcopy(model), files, is_merged=is_merged)


@needs_llama_cpp
@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_cpp_answers_as_the_trained_model(tmp_path, kind):
    model = saved(kind, tmp_path)
    base = base_gguf(model, tmp_path)
    rw.export_adapter(model, tmp_path / "served", target="llama.cpp", base_gguf=base)
    export_merged(tmp_path / "adapter", tmp_path / "whole", WholeModel("llama.cpp", kind="f32"))
    python = server_python("llama.cpp", None)
    for served in (
        Served(base, tmp_path / "served" / "adapter.gguf", 3),
        Served(base, merged=tmp_path / "whole" / "model.gguf"),
    ):
        proof = prove("llama.cpp", python, model, served, PROMPTS, partial(as_served, model, served))
        assert proof.unexplained < proof.bound < 1e-2 < proof.effect


@needs_llama_cpp
def test_an_adapter_of_another_scale_or_without_effect_does_not_pass(tmp_path):
    model = saved("llama", tmp_path)
    base = base_gguf(model, tmp_path)
    rw.export_adapter(model, tmp_path / "served", target="llama.cpp", base_gguf=base)
    python = server_python("llama.cpp", None)
    path = tmp_path / "served" / "adapter.gguf"
    file = gguf.GGUFReader(path, "r+")
    file.fields["adapter.lora.alpha"].parts[-1][0] *= 2
    file.data.flush()
    with pytest.raises(RunError, match="RW738: not proven.*not explained"):
        prove("llama.cpp", python, model, Served(base, path, 3), PROMPTS, partial(as_served, model, Served(base)))
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter.zero_()
    file.fields["adapter.lora.alpha"].parts[-1][0] = 1e-9
    file.data.flush()
    with pytest.raises(RunError, match="RW738: not proven.*answers as without"):
        prove("llama.cpp", python, model, Served(base, path, 3), PROMPTS, partial(as_served, model, Served(base)))


def test_a_server_that_is_not_there_is_named_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv(LLAMA.variable, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match="RW739.*pip install xllamacpp"):
        server_python("llama.cpp", None)
    with pytest.raises(RunError, match="RW739.*unproven"):
        server_python("sglang", None)
    with pytest.raises(RunError, match="RW739.*there is no"):
        server_python("vllm", tmp_path / "python")
    assert server_python("vllm", Path(os.path.realpath("/bin/sh"))).endswith("sh")


FAKE_VLLM = """
import atexit, os, sys
__version__ = "0"
print("a log")
atexit.register(os._exit, 6)
atexit.register(print, "another log")
class SamplingParams:
    def __init__(self, **options): ...
class LLM:
    def __init__(self, model, **options):
        if model == "broken":
            print("ValueError: the cause", file=sys.stderr)
            raise RuntimeError("a process ended")
    def generate(self, prompts, params, use_tqdm, lora_request):
        return [] if use_tqdm is False else 1 / 0
"""


def test_what_a_server_prints_is_not_its_answer_and_its_first_error_is_told(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text("LoRARequest = tuple")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = {"server": "vllm", "model": "whole", "adapter": None, "prompts": [], "answers": [], "new_tokens": 1}
    assert run_server(sys.executable, job) == {"version": "vLLM 0", "base": {"texts": [], "logprobs": []}}
    with pytest.raises(RunError, match=r"RW739.*stopped with 6: ValueError: the cause\.$"):
        run_server(sys.executable, {**job, "model": "broken"})
