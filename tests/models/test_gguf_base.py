"""A GGUF base in its own bits: views of the file, equal to the expanded model, refused in one sentence where it cannot
be."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import rankwise as rw
from gguf_cases import EXPERTS, FAMILIES, base_gguf, logits, saved
from marks import at_some_level
from rankwise import ops
from rankwise.errors import ModelError, QuantizationError, RankwiseWarning
from rankwise.models import load_model, model_facts
from rankwise.models.gguf_base import _File
from rankwise.models.gguf_file import ONLY_ADAPTERS, read_gguf_header
from rankwise.models.prepared import mapped_files
from rankwise.quantization.config import FileConfig
from rankwise.quantization.experts import dequantize, four_bit_stacks
from rankwise.quantization.linear import Linear4bit, PackedEmbedding, count_weights

pytestmark = pytest.mark.filterwarnings("ignore:RW319")

READ = [kind for kind in FAMILIES if kind not in ONLY_ADAPTERS]


def packed(path: Path, dtype: torch.dtype = torch.float32):
    return load_model(path, dtype=dtype, quantization=FileConfig())[0]


@pytest.mark.parametrize("kind", READ)
def test_every_family_computes_as_its_expanded_file(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    model, dense = packed(path), load_model(path)[0]
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert model_facts(model, str(path))["parameters"] == model_facts(dense, str(path))["parameters"]
    dequantize(model)
    assert all(torch.equal(W, model.state_dict()[name]) for name, W in dense.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_the_weights_are_views_of_the_file(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    model, reader = packed(path), gguf.GGUFReader(path)
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2 and tensor.tensor_type.name == "Q8_0"]
    assert mapped_files(model).bytes == sum(tensor.n_bytes for tensor in matrices)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "tied")


def test_a_file_that_is_cut_while_it_is_mapped_is_noticed(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    files = mapped_files(packed(path))
    files.check()
    path.open("ab").write(b"\0")
    with pytest.raises(ModelError, match="RW305"):
        files.check()


def test_an_adapter_learns_over_packed_weights_and_merges_into_dense_ones(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    found = {}
    for name, model in (("packed", packed(path)), ("dense", load_model(path)[0])):
        torch.manual_seed(1)
        rw.add_adapter(model, rw.LoraConfig(r=2, use_dora=True, init_lora_weights=False))
        ids = torch.arange(3, 20)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        grads = [parameter.grad for parameter in rw.adapter_parameters(model).values()]
        rw.merge_adapter(model, reversible=False)
        found[name] = (*grads, logits(model))
    for ours, theirs in zip(found["packed"], found["dense"]):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def write_rows(path: Path, kind: str, architecture: str = "llama") -> Path:
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), architecture)
    rows = np.zeros((4, gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", rows, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["IQ4_NL", "MXFP4", "Q2_K"])
def test_another_type_is_named_with_its_tensor_and_the_way_out(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"RW316.*'blk\.0\.attn_q\.weight' as {kind}, .*--base-bits 16"):
        packed(write_rows(tmp_path / "odd.gguf", kind))


def test_another_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"RW316.*holds a falcon.*--base-bits 16"):
        packed(write_rows(tmp_path / "falcon.gguf", "Q8_0", "falcon"))


def test_a_folder_has_no_bits_of_a_file(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    with pytest.raises(ModelError, match="RW316"):
        packed(tmp_path / "base")


def test_a_missing_tensor_and_an_infinite_scale_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.1.ffn_up", b"blk.1.ffn_ux"))
    with pytest.raises(ModelError, match=r"RW308.*blk\.1\.ffn_up\.weight is missing"):
        packed(path)
    path.write_bytes(content)
    tensor = next(item for item in gguf.GGUFReader(path, "r+").tensors if item.name == "blk.1.ffn_up.weight")
    tensor.data[0, :2] = (0, 0x7C)
    with pytest.raises(ModelError, match=r"RW323.*up_proj"):
        packed(path)


def test_it_is_not_saved_in_another_format(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    model = packed(base_gguf(tmp_path, "q8_0"))
    with pytest.raises(QuantizationError, match="RW615"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@at_some_level
def test_stacked_experts_stay_in_the_file(kind: str, tmp_path: Path) -> None:
    """One tensor of the file, or two whose rows follow each other for each expert; the gate is the first."""
    saved("qwen3_moe", tmp_path)
    path = base_gguf(tmp_path, kind)
    model, (dense, _) = packed(path), load_model(path)
    stacks = dict(four_bit_stacks(model))
    assert len(stacks) == 4
    content = {item.name: item for item in gguf.GGUFReader(path).tensors}
    for name, stack in stacks.items():
        assert torch.equal(stack.dequantize(), dense.get_parameter(name))
        if name.endswith("down_proj"):
            number = name.split(".")[2]
            assert stack.codes.nbytes == content[f"blk.{number}.ffn_down_exps.weight"].n_bytes
    gate = stacks["model.layers.1.mlp.experts.gate_up_proj"].of_expert(2)
    tensor = content["blk.1.ffn_gate_exps.weight"]
    wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))[2]
    assert torch.equal(ops.dequantize_weight(gate)[:768], wanted)
    assert mapped_files(model).bytes >= sum(stack.codes.nbytes for stack in stacks.values())
    assert count_weights(model) == count_weights(dense)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)


def test_adapted_experts_of_a_file_train_and_merge_as_dense_ones(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    targets, found = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, []
    for model in (packed(path), load_model(path)[0]):
        torch.manual_seed(1)
        rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights=False, **targets))
        ids = torch.arange(3, 20)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        grads = [parameter.grad for parameter in rw.adapter_parameters(model).values()]
        rw.merge_adapter(model, reversible=False)
        found.append((*grads, logits(model)))
    assert len(found[0]) == 2 * (2 + 4) + 1
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_stack_of_two_types_is_expanded_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("qwen3_moe", tmp_path)
    path = base_gguf(tmp_path, "q8_0")
    kind = _File.kind
    is_up = "blk.0.ffn_up_exps.weight"
    begin = next(one.begin for name, one in read_gguf_header(path).tensors.items() if name == is_up)
    monkeypatch.setattr(_File, "kind", lambda self, one: "F16" if one.begin == begin else kind(self, one))
    with pytest.warns(RankwiseWarning, match="RW613.*1 expert tensors"):
        model = packed(path)
    assert len(dict(four_bit_stacks(model))) == 3


def test_a_token_outside_of_the_embedding_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    model = packed(base_gguf(tmp_path, "q8_0"))
    with pytest.raises(IndexError, match="97 rows"):
        model(input_ids=torch.tensor([[97]]))
