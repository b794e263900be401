"""GGUF adapters fit base files name by name, and llama.cpp answers with them as the trained model does."""

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

import rankwise as rw
from gguf_cases import FAMILIES, GEMMA4, base_gguf, logits, saved, tiny
from rankwise.errors import AdapterError, ModelError, RunError
from rankwise.export.proof import LLAMA, Served, prove, run_server, server_python
from rankwise.export.verify import round_as_served
from tiny_models import tiny_llama

# transformers reads no experts' GGUF of Mixtral's, none of Phi 2, Qwen 3.5 and SmolLM3, and not all of Gemma 4's.
UNREAD = ("gemma4_text", "mixtral", "phi", "qwen3_5_text", "smollm3")
READ_BY_TRANSFORMERS = [kind for kind in FAMILIES if kind not in UNREAD]


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_an_adapter_s_pairs_added_to_the_base_s_tensors_are_the_merged_model(tmp_path, kind):
    """llama.cpp's own arithmetic by hand: W + (alpha / r) B A, tensor by tensor of the base's file."""
    model = saved(kind, tmp_path)
    base = base_gguf(tmp_path)
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


def test_a_base_of_another_model_is_refused_and_nothing_is_left(tmp_path):
    model = saved("llama", tmp_path)
    (tmp_path / "other").mkdir()
    saved("qwen2", tmp_path / "other")
    other = base_gguf(tmp_path / "other")
    small = tiny_llama(intermediate_size=64)
    rw.add_adapter(small, rw.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    base = base_gguf(tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.read_bytes()[:-100])
    for adapted, file, code in [(model, other, "RW743"), (small, base, "RW743"), (model, cut, "RW310")]:
        with pytest.raises(ModelError, match=code):
            rw.export_adapter(adapted, tmp_path / "served", target="llama.cpp", base_gguf=file)
        assert not (tmp_path / "served").exists()


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
    gemma = tiny("gemma4_text", **GEMMA4)
    rw.add_adapter(gemma, rw.LoraConfig(r=2))
    with pytest.raises(ModelError, match=r"RW740.*leave per_layer_model_projection out"):
        rw.export_adapter(gemma, tmp_path / "served", target="llama.cpp")
    assert list(tmp_path.iterdir()) == []


def has_llama_cpp() -> bool:
    try:
        return bool(server_python("llama.cpp", None))
    except RunError:
        return False


needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason=f"{LLAMA.variable} names no Python with xllamacpp")
PROMPTS = [[1, 5, 9, 14, 33, 60], [1, 44, 3, 8, 20, 21, 22]]


def as_served(model, served):
    return round_as_served(copy.deepcopy(model), served.model)


@needs_llama_cpp
@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_cpp_answers_as_the_trained_model(tmp_path, kind):
    model = saved(kind, tmp_path)
    base = base_gguf(tmp_path)
    rw.export_adapter(model, tmp_path / "served", target="llama.cpp", base_gguf=base)
    served = Served(base, tmp_path / "served" / "adapter.gguf", 3)
    python = server_python("llama.cpp", None)
    proof = prove("llama.cpp", python, model, served, PROMPTS, partial(as_served, model, served))
    assert proof.unexplained < proof.bound < 1e-2 < proof.effect


@needs_llama_cpp
def test_an_adapter_of_another_scale_or_without_effect_does_not_pass(tmp_path):
    model = saved("llama", tmp_path)
    base = base_gguf(tmp_path)
    rw.export_adapter(model, tmp_path / "served", target="llama.cpp", base_gguf=base)
    python = server_python("llama.cpp", None)
    path = tmp_path / "served" / "adapter.gguf"
    file = gguf.GGUFReader(path, "r+")
    file.fields["adapter.lora.alpha"].parts[-1][0] *= 2
    file.data.flush()
    with pytest.raises(RunError, match="RW738: not proven.*allowed"):
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
    (package / "lora" / "request.py").write_text("LoRARequest = tuple")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = {"server": "vllm", "model": "whole", "prompts": [], "answers": [], "new_tokens": 1}
    job |= {"adapter": None, "labels": None}
    assert run_server(sys.executable, job) == {"version": "vLLM 0", "base": {"texts": [], "logprobs": []}}
    with pytest.raises(RunError, match=r"RW739.*stopped with 6: ValueError: the cause\.$"):
        run_server(sys.executable, {**job, "model": "broken"})
