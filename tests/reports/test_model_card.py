"""The model card: valid front matter, figures of the record only, honest words on where it can be served."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from rankwise.records import RunRecord
from rankwise.reports.model_card import model_card

CONFIG = {"base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16, "use_dora": False, "bias": "none"}


def record(method: str = "lora", **fields: object) -> RunRecord:
    settings = {
        "model": "org/base",
        "method": method,
        "r": 8,
        "lora_alpha": 16,
        "learning_rate": 2e-4,
        "packing": False,
    }
    return RunRecord(method=method, seed=3, settings=settings, status="finished", **fields)


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora"])
def test_front_matter_of_an_adapter(method: str) -> None:
    matter = front_matter(model_card(record(method), CONFIG))

    assert matter["base_model"] == "org/base"
    assert matter["base_model_relation"] == "adapter"
    assert matter["library_name"] == "peft"
    assert matter["pipeline_tag"] == "text-generation"
    assert "base_model:adapter:org/base" in matter["tags"]


def test_front_matter_of_full_fine_tuning() -> None:
    card = model_card(record("full"))
    matter = front_matter(card)

    assert (matter["base_model_relation"], matter["library_name"]) == ("finetune", "transformers")
    assert "PeftModel" not in card
    assert "vLLM" not in card


@pytest.mark.parametrize("base", ["a: b", "- x", 'quote " and \\ back', "#hash", "C:\\models\\llama", "ünï/code"])
def test_awkward_names_stay_valid_yaml(base: str) -> None:
    assert front_matter(model_card(record(), CONFIG | {"base_model_name_or_path": base}))["base_model"] == base


@pytest.mark.parametrize("base", ['a "b"', "C:\\new\\model", "ünï/code"])
def test_awkward_names_stay_valid_python(base: str) -> None:
    card = model_card(record("qlora", base_model={"name": base}), CONFIG | {"base_model_name_or_path": base})
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    texts = [node.value for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert texts.count(base) == len(blocks) == 1


def test_sizes_have_units_and_empty_facts_no_line() -> None:
    card = model_card(record(peak_memory_bytes=1156973184, data={"train": {"rows": 3, "prompt_ending": ""}}), CONFIG)
    assert "| peak memory | 1.16 GB |" in card
    assert "| rows | 3 |" in card
    assert "prompt" not in card.split("## Data")[1].split("##")[0]


def test_what_markdown_would_interpret_is_escaped_in_cells() -> None:
    made = record(warnings=[{"code": "RW1", "message": "the end is </s>"}])
    made.settings |= {"new_tokens": ["<tool>"], "target_modules": ".*_proj|.*mlp.*", "kept_name": 1}
    card = model_card(made, CONFIG)
    for line in (
        r"- RW1: the end is \</s\>",
        r"| new_tokens | \<tool\> |",
        r"| target_modules | .\*\_proj\|.\*mlp.\* |",
        "| kept_name | 1 |",
    ):
        assert line in card, line


def test_demo_names_the_model_on_the_hub() -> None:
    card = model_card(record(base_model={"name": "demo", "kind": "demo"}))

    assert front_matter(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in card
    assert "dequantized weights of a GGUF file" in card


def test_a_gguf_file_in_its_own_bits_was_not_quantized() -> None:
    own = {"kind": "gguf", "name": "m.gguf", "dtype": "bfloat16", "quantization": {"quant_type": "file"}}
    card = model_card(record(base_model=own), CONFIG)
    assert "a GGUF file in its own bits" in card
    assert "4 bits" not in card
    assert "BitsAndBytesConfig" not in card


def test_every_measured_figure_and_no_other() -> None:
    known = {"train_loss": 1.25, "initial_eval_loss": 3.5, "eval_loss": 1.75, "steps": 40, "kept_step": 30}
    card = model_card(record(**known), CONFIG)
    results = card.split("## Results")[1].split("##")[0]

    assert sorted(map(float, re.findall(r"\| ([\d.]+) \|", results))) == sorted(known.values())
    assert "## Results" not in model_card(record(), CONFIG)


def test_data_and_settings_are_tables() -> None:
    files = {"train": {"path": "/home/me/rows.jsonl", "rows": 12, "sha256": "ab"}, "eval": {"path": "e.csv", "rows": 3}}
    card = model_card(record(data=files), CONFIG)

    assert "| what | train | eval |" in card
    assert "| path | rows.jsonl | e.csv |" in card
    assert "/home/me" not in card
    assert "| rows | 12 | 3 |" in card
    assert "| learning_rate | 0.0002 |" in card
    assert "| packing | no |" in card


def test_a_bar_in_a_value_does_not_break_the_table() -> None:
    told = [{"code": "RW218", "message": "a | b\nc"}]
    card = model_card(record(warnings=told, data={"train": {"source": "x|y"}}), CONFIG)

    assert "x\\|y" in card
    assert "- RW218: a \\| b c" in card


SERVING = {
    "plain": ({}, ["vLLM, as it is", "SGLang, as it is", "--for llama.cpp"], ["max-lora-rank", "since it", "DoRA"]),
    "dora": (
        {"use_dora": True},
        ["--for vllm`, since it refuses DoRA's magnitudes", "--for sglang`, since it refuses DoRA's", "at most 1 %"],
        ["max-lora-rank"],
    ),
    "rank pattern": (
        {"rank_pattern": {"q": 65}},
        ["--for vllm` and --max-lora-rank 128, since it ignores `rank_pattern`"],
        ["vLLM, as it is"],
    ),
    "rank of one value": ({"r": 64}, ["vLLM, as it is, with --max-lora-rank 64"], []),
    "too large a rank": ({"r": 600}, ["rank 600 is beyond its largest, 512"], []),
    "alpha pattern": ({"alpha_pattern": {"q": 64}}, ["since it ignores `alpha_pattern`"], []),
    "rslora": ({"use_rslora": True}, ["vLLM, as it is", "--for sglang`, since it ignores rsLoRA's scale"], []),
    "stacked experts": (
        {"target_parameters": ["mlp.experts.down_proj"]},
        ["vLLM on a GPU, of qwen2_moe, qwen3_moe, olmoe, gpt_oss: `rankwise export --for vllm`", "SGLang: merge first"],
        ["vLLM, as it is"],
    ),
    "modules to save": (
        {"modules_to_save": ["lm_head"]},
        ["PEFT, as it is", "no server takes `modules_to_save` beside an adapter"],
        ["vLLM", "llama.cpp"],
    ),
}


@pytest.mark.parametrize("name", SERVING)
def test_where_it_can_be_served(name: str) -> None:
    changes, present, absent = SERVING[name]
    serving = model_card(record(), CONFIG | changes).split("## Where it can be served")[1]

    for sentence in present:
        assert sentence in serving
    for sentence in absent:
        assert sentence not in serving


def test_method_stands_in_for_an_absent_adapter_config() -> None:
    card = model_card(record("dora"))

    assert "DoRA adapter of rank 8 and alpha 16" in card
    assert "it refuses DoRA's magnitudes" in card
    assert "dora" in front_matter(card)["tags"]


def test_snippets_are_valid_python() -> None:
    for method in ("lora", "qdora", "full"):
        snippets = re.findall(r"```python\n(.*?)```", model_card(record(method)), flags=re.DOTALL)
        assert len(snippets) == 1
        for snippet in snippets:
            compile(snippet, "card", "exec")


BASE_IN_FOUR_BITS = {
    "dtype": "float16",
    "quantization": {
        "quant_method": "rankwise_4bit",
        "quant_type": "fp4",
        "block_size": 32,
        "double_quant": False,
        "compute_dtype": None,
    },
}


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_4_bit_base_is_loaded_in_4_bits(method: str) -> None:
    card = model_card(record(method, base_model=BASE_IN_FOUR_BITS), CONFIG)
    (theirs,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)

    assert "quantized to 4 bits during training (FP4, blocks of 32)" in card
    assert "bnb_4bit_compute_dtype=torch.float16" in theirs
    assert "bnb_4bit_use_double_quant=False" in theirs
    assert "quantization_config=quantization" in theirs
    assert "import torch\n" in theirs


def test_a_dense_base_is_loaded_as_it_is() -> None:
    assert "antization" not in model_card(record("dora"), CONFIG).split("## How to load it")[1].split("##")[0]


def test_unfinished_run_says_so() -> None:
    interrupted = record()
    interrupted.status = "interrupted"

    assert "interrupted" in model_card(interrupted, CONFIG)
    assert "interrupted" not in model_card(record(), CONFIG)


def test_a_loftq_adapter_is_not_said_to_be_served_as_it_is() -> None:
    run = record("qlora")
    run.settings["init"] = "loftq"
    text = model_card(run, {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "org/base"})
    assert "rankwise merge --onto quantized" in text
    assert "as it is" not in text
