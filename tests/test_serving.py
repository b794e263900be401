"""One table says what each server takes, and the page shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.serving import SERVERS, WORDS, refusing, served, served_in_short, traits_of, vllm_rank

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
FORMS = {"peft": "PEFT's folder", "gguf": "`adapter.gguf`"}


@pytest.mark.parametrize("target", SERVERS)
def test_the_page_has_the_table(target):
    server = SERVERS[target]
    refused, ignored = (", ".join(WORDS[trait] for trait in traits) for traits in (server.refuses, server.ignores))
    assert f"| {server.name} | {FORMS[server.form]} | {refused} | {ignored} |" in PAGE.read_text(encoding="utf-8")


def test_ranks_are_those_of_vllms_flag():
    assert [vllm_rank(r) for r in (1, 3, 16, 17, 512, 513)] == [1, 8, 16, 32, 512, None]


def test_an_adapter_that_belongs_on_four_bits_has_no_server():
    """An export of it is refused (RW433)."""
    for places in (served("qlora", {"r": 8, "init": "loftq"}), served_in_short("qlora", {"r": 8, "init": "loftq"})):
        assert places[0].startswith("PEFT")
        assert places[-1] == "merged (`rankwise merge --onto quantized`): anywhere"
        assert not any("export" in place or "vLLM" in place for place in places)


def test_a_variant_is_served_as_its_method_is():
    for method in ("lora", "dora", "full"):
        assert served(f"{method}+r8", {"r": 8}) == served(method, {"r": 8})


def test_a_model_that_answers_with_labels_is_no_model_for_every_server():
    for method in ("full", "lora", "dora"):
        for places in (served(method, {"objective": "classify"}), served_in_short(method, {"objective": "classify"})):
            assert "transformers, and vLLM" in places[-1]
            assert not any("anywhere" in place or "any server" in place for place in places)


def test_who_refuses_dora_is_said_from_the_table():
    assert refusing("dora") == "vLLM and SGLang"
    assert traits_of({"use_dora": True, "bias": "all"}) == ("dora", "bias")
    config = {"r": 40, "use_rslora": True}
    assert "vLLM, as it is, with --max-lora-rank 64" in served("lora", config)
    assert "SGLang: `rankwise export --for sglang`, since it ignores rsLoRA's scale" in served("lora", config)
