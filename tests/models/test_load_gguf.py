"""A GGUF file becomes an ordinary model: it trains, saves and reloads; a damaged file is one sentence."""

from __future__ import annotations

import copy
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.compat import transformers as compat
from rankwise.errors import ModelError, RankwiseWarning
from rankwise.models import load_model, load_skeleton, load_tokenizer, model_facts
from rankwise.models.gguf_file import read_gguf_header
from rankwise.models.prepared import mapped_files
from rankwise.quantization.config import Nf4Config
from rankwise.quantization.linear import weights_in_file

WIDTH, HIDDEN, VOCABULARY, HEADS = 32, 64, 97, 4


def write_tiny(
    path: Path, *, tied: bool = True, extra: str | None = None, architecture: str = "llama", width: int = HIDDEN
) -> Path:
    """A one-layer Llama in Q8_0 with random weights and no tokenizer."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "blk.0.ffn_down": (WIDTH, HIDDEN)}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (HIDDEN, WIDTH) for name in ("gate", "up")}
    shapes |= {} if tied else {"output": (VOCABULARY, WIDTH)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = gguf.quantize(random.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    if extra:
        writer.add_tensor(extra, np.ones(WIDTH // HEADS // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_ordinary_saveable_and_trainable(tied: bool, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", tied=tied)
    model, tokenizer = load_model(path)

    assert tokenizer is None
    assert model.name_or_path == str(path.resolve())
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    ids = torch.arange(10).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("part_bytes", [64, 1 << 22])
def test_weights_are_those_of_the_file(tiny: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "GGUF_PART_BYTES", part_bytes)
    reader = gguf.GGUFReader(str(tiny))
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    model, _ = load_model(tiny)

    down = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(down, torch.from_numpy(stored["blk.0.ffn_down.weight"].copy()))
    # llama.cpp interleaves the two halves of each query head; undone, rows come in pairs.
    q = (
        torch.from_numpy(stored["blk.0.attn_q.weight"].copy())
        .view(HEADS, -1, 2, WIDTH)
        .transpose(1, 2)
        .reshape(-1, WIDTH)
    )
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, q)


@pytest.mark.parametrize("quantization", [None, Nf4Config(block_size=32)])
def test_while_a_base_is_prepared_its_weights_are_in_a_file(
    tiny: Path, tmp_path: Path, quantization: Nf4Config | None
) -> None:
    expected = load_model(tiny, quantization=copy.copy(quantization))[0].state_dict()
    with weights_in_file(tmp_path / "weights"):
        model = load_model(tiny, quantization=quantization)[0].requires_grad_(False)
        held, sizes = mapped_files(model), [parameter.nbytes for parameter in model.parameters()]
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert (held.bytes, [*held.versions]) == (pytest.approx(sum(sizes), rel=0.1), [tmp_path / "weights"])


def test_dtype_is_float32_unless_given(tiny: Path) -> None:
    assert load_model(tiny)[0].dtype == torch.float32
    assert load_model(tiny, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_adapter_beside_the_file_is_not_picked_up(tiny: Path) -> None:
    (tiny.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')

    assert type(load_model(tiny)[0]).__name__ == "LlamaForCausalLM"


def test_a_skeleton_of_a_gguf(tiny: Path) -> None:
    assert {p.device.type for p in load_skeleton(tiny).parameters()} == {"meta"}


def test_ignored_rope_factors_are_said(tmp_path: Path) -> None:
    with pytest.warns(RankwiseWarning, match="RW321"):
        load_model(write_tiny(tmp_path / "tiny.gguf", extra="rope_freqs.weight"))


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="llama9") as caught:
        load_model(write_tiny(tmp_path / "tiny.gguf", architecture="llama9"))
    assert caught.value.code == "RW316"


def test_a_type_that_cannot_be_read_is_named_with_its_tensor(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_1
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "llama")
    row = np.zeros((4, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", row, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"RW316.*'blk\.0\.attn_q\.weight' as Q8_1"):
        load_model(tmp_path / "odd.gguf")


def test_header_is_what_gguf_reads(tiny: Path) -> None:
    header, reader = read_gguf_header(tiny), gguf.GGUFReader(str(tiny))

    assert header.metadata["general.architecture"] == "llama"
    assert {t.name: tuple(t.shape) for t in reader.tensors} == {n: t.shape for n, t in header.tensors.items()}
    assert {t.name: t.n_bytes for t in reader.tensors} == {n: t.end - t.begin for n, t in header.tensors.items()}


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = entry(b"general.architecture", 8, text(b"llama"))


def gguf_bytes(entries: list[bytes], *, tensors: int = 0, version: int = 3, tail: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries)) + b"".join(entries) + tail


DAMAGE = {
    "empty": (b"", "inside its header"),
    "old version": (gguf_bytes([ARCHITECTURE], version=1), "version 1"),
    "no architecture": (gguf_bytes([entry(b"a", 4, b"\1\0\0\0")]), "does not name its architecture"),
    "endless text": (gguf_bytes([struct.pack("<Q", 2**63) + b"x"]), "cut short"),
    "endless texts": (gguf_bytes([entry(b"a", 9, struct.pack("<IQ", 8, 2**60))]), "inside its header"),
    "unknown value": (gguf_bytes([entry(b"a", 99, b"")]), "unknown type 99"),
    "endless entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + ARCHITECTURE, "inside its header"),
    "endless tensors": (gguf_bytes([ARCHITECTURE], tensors=2**60), "inside its header"),
    "tensor past the end": (
        gguf_bytes([ARCHITECTURE], tensors=1, tail=text(b"t") + struct.pack("<IQIQ", 1, 2**40, 0, 0) + b"\0" * 64),
        "its header promises",
    ),
    "unknown storage": (
        gguf_bytes([ARCHITECTURE], tensors=1, tail=text(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0) + b"\0" * 64),
        "ggml type 999",
    ),
    "not UTF-8": (gguf_bytes([entry(b"\xff\xfe", 4, b"\0\0\0\0")]), "inside its header"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, expected = DAMAGE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)

    with pytest.raises(ModelError, match=expected) as caught:
        load_model(path)
    assert caught.value.code == "RW310"
    assert "model.gguf" in caught.value.message


def test_a_truncated_file_is_refused(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-2000])

    with pytest.raises(ModelError, match="download it again"):
        load_model(tiny)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 2000), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    original = tmp_path_factory.getbasetemp() / "fuzz-original.gguf"
    if not original.exists():
        write_tiny(original)
    content = bytearray(original.read_bytes())
    content[position] = value
    path.write_bytes(content)

    try:
        header = read_gguf_header(path)
    except ModelError:
        return
    assert all(tensor.end <= len(content) for tensor in header.tensors.values())


@pytest.fixture(scope="module")
def demo() -> tuple:
    try:
        return load_model("demo", dtype=torch.bfloat16)
    except ModelError as error:
        # Only a missing package is a reason; any other failure is one of ours.
        if error.code != "RW311":
            raise
        pytest.skip(error.message)


@pytest.mark.slow
def test_demo_answers_a_question(demo: tuple) -> None:
    tokenizer = demo[1]
    # In float32: two first words are nearly alike, and in bfloat16 products round by where their memory lies.
    model, _ = load_model("demo", dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.long
def test_demo_saves_and_reloads_whole(demo: tuple, tmp_path: Path) -> None:
    model, tokenizer = demo
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_model(tmp_path)

    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert tokenizer_again.chat_template == tokenizer.chat_template
    assert (tokenizer_again.eos_token, tokenizer_again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert model_facts(model, "demo")["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.long
def test_demo_tokenizer_is_transformers_own(demo: tuple) -> None:
    from transformers import AutoTokenizer

    from rankwise.models import resolve_model

    path = resolve_model("demo").path
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ours = load_tokenizer("demo")

    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
