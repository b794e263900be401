"""The header of a GGUF file: written, read, and refused where llama.cpp has no key for a setting."""

from __future__ import annotations

import json
import math

import gguf
import pytest
import torch
from gguf_cases import base_gguf, logits, saved, tiny, write_tokenizer
from transformers import AutoConfig

import rankwise as rw
from rankwise.errors import ModelError
from rankwise.export.gguf_computed import check_computed
from rankwise.export.gguf_header import _prepends_space
from rankwise.export.gguf_names import GgufNames


def test_the_part_of_a_head_that_rotates_is_written(tmp_path):
    """llama.cpp rotates as many dimensions as the header says."""
    model = tiny("phi3", partial_rotary_factor=0.5, hidden_size=64)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    fields = gguf.GGUFReader(base_gguf(model, tmp_path)).fields
    assert fields["phi3.rope.dimension_count"].contents() == 8


READ_FROM_THE_HEADER = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "global": ("gemma3_text", {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "caps": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "large": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 8, "num_hidden_layers": 46}),
    "window": ("phi3", {"sliding_window": 4}),
    "partial": ("phi3", {"partial_rotary_factor": 0.5, "hidden_size": 64}),
    "heads": ("qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("case", READ_FROM_THE_HEADER)
def test_a_gguf_base_has_the_settings_of_its_header(tmp_path, case):
    """transformers' reader leaves these at their defaults."""
    kind, settings = READ_FROM_THE_HEADER[case]
    model = tiny(kind, **settings)
    if case == "global":
        model.config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
        model = type(model)(model.config).eval()
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    loaded, _ = rw.load_model(base_gguf(model, tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


OTHERWISE = {
    "hidden_act=relu": ("llama", {"hidden_act": "relu"}),
    "norm_topk_prob=False": ("qwen3_moe", {"norm_topk_prob": False}),
    "use_sliding_window=True": ("qwen2", {"use_sliding_window": True}),
    "query_pre_attn_scalar=144": ("gemma2", {"query_pre_attn_scalar": 144}),
    "layer_types": ("gemma3_text", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}),
    "rope_theta of 500": ("gemma3_text", {"rope_local_base_freq": 500}),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_llama_cpp_would_compute_otherwise_is_refused(what):
    kind, settings = OTHERWISE[what]
    names = GgufNames(AutoConfig.for_model(kind, **settings))
    with pytest.raises(ModelError, match=f"RW746.*{what}"):
        check_computed(names.architecture, names.config)
    usual = GgufNames(AutoConfig.for_model(kind, **({"norm_topk_prob": True} if "moe" in kind else {})))
    check_computed(usual.architecture, usual.config)


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "splits", "prefix"),
    [
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}, None, True),
        (None, METASPACE | {"prepend_scheme": "first"}, True),
        (None, METASPACE | {"prepend_scheme": "always"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
        (None, METASPACE | {"add_prefix_space": False}, False),
        ({"type": "Replace"}, {"type": "Split"}, False),
    ],
)
def test_a_space_before_the_first_word_is_written_wherever_the_tokenizer_adds_it(normalizer, splits, prefix):
    assert _prepends_space({"normalizer": normalizer, "pre_tokenizer": splits}) is prefix


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
    ],
)
def test_rotary_settings_are_written_or_refused(tmp_path, rope, fields):
    model = saved("llama", tmp_path, changes={"rope_parameters": {"rope_theta": 5e5, **rope}})
    if fields is None:
        with pytest.raises(ModelError, match="RW745.*dynamic"):
            base_gguf(model, tmp_path)
        return
    found = gguf.GGUFReader(base_gguf(model, tmp_path)).fields
    assert found["llama.rope.freq_base"].contents() == 5e5
    start = "llama.rope.scaling."
    assert {name[len(start) :]: found[name].contents() for name in found if name.startswith(start)} == fields


def test_tokens_and_their_kinds_are_those_of_the_tokenizer(tmp_path):
    model = saved("llama", tmp_path)
    file = tmp_path / "base" / "tokenizer.json"
    document = json.loads(file.read_text())
    added = {**document["added_tokens"][0], "id": 96, "content": "<call>", "special": False}
    document["model"]["vocab"].pop("Ġ")
    file.write_text(json.dumps({**document, "added_tokens": [*document["added_tokens"], added], "unknown": math.inf}))
    fields = gguf.GGUFReader(base_gguf(model, tmp_path)).fields
    texts, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    names = [gguf.TokenType(kind).name for kind in kinds]
    assert list(zip(texts, names))[:3] == [(text, "CONTROL") for text in ("<pad>", "<s>", "</s>")]
    assert set(names[3:96]) == {"NORMAL"}
    assert (texts[96], names[96]) == ("<call>", "USER_DEFINED")
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


BYTES = {"type": "ByteLevel", "use_regex": True}


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([BYTES], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTES], "smollm"),
        ([{"type": "Digits", "individual_digits": False}, BYTES], None),
        ([{"type": "ByteLevel", "use_regex": False}], None),
        ([{"type": "Whitespace"}, BYTES], None),
    ],
)
def test_a_way_of_splitting_text_has_its_name_or_is_refused(tmp_path, parts, name):
    model = saved("llama", tmp_path)
    file = tmp_path / "base" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0]
    file.write_text(json.dumps(document))
    if name is None:
        # No folder: that of a merged model is a temporary one.
        with pytest.raises(ModelError, match=f"RW744.*splits text by {parts[0]['type']}"):
            base_gguf(model, tmp_path)
    else:
        assert gguf.GGUFReader(base_gguf(model, tmp_path)).fields["tokenizer.ggml.pre"].contents() == name
