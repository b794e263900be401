"""Every recipe is a complete run: its options are valid, and its adapter fits a model of the right architecture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, RobertaConfig

import rankwise as rw
from rankwise.comparison.settings import CompareSettings, check_compare
from rankwise.config import TrainSettings
from rankwise.labels import Labels
from rankwise.models import fetch_model, load_skeleton
from rankwise.options import read_settings
from rankwise.planning.plan import make_plan
from rankwise.planning.workload import PlanSettings
from rankwise.quantization.targets import four_bit_layers
from rankwise.training.setup import quantization_for, with_heads

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
# Training rows of recipes with epochs.
ROWS = {"e2e": 42_061, "cola": 8_551, "commonsense": 170_300, "orca": 100_000}
MODELS: dict[str, PretrainedConfig] = {
    "openai-community/gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16, architectures=["GPT2LMHeadModel"]),
    "openai-community/gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20, architectures=["GPT2LMHeadModel"]),
    "FacebookAI/roberta-base": RobertaConfig(max_position_embeddings=514, architectures=["RobertaForMaskedLM"]),
    "yahma/llama-7b-hf": LlamaConfig(architectures=["LlamaForCausalLM"]),
    "huggyllama/llama-7b": LlamaConfig(architectures=["LlamaForCausalLM"]),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(architectures=["LlamaForCausalLM"]),
    **{
        f"huggyllama/llama-{size}": LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
        )
        for size, width, mlp, layers in (("13b", 5120, 13824, 40), ("30b", 6656, 17920, 60), ("65b", 8192, 22016, 80))
    },
}
HIDDEN, MLP, LAYERS = 4096, 11008, 32
# LLaMA-7B. q, k, v are square; up and gate go out to the MLP, down comes back from it.
SQUARE, WIDE = 2 * HIDDEN, HIDDEN + MLP


def dora_parameters(r: int) -> int:
    """A and B have r (in + out) numbers, m has one per output row; targets q, k, v, up, down."""
    return LAYERS * (r * (3 * SQUARE + 2 * WIDE) + 3 * HIDDEN + MLP + HIDDEN)


def qlora_parameters(config: PretrainedConfig) -> int:
    """A and B of rank 64 on q, k, v, o (square), gate, up and down."""
    return (
        config.num_hidden_layers * 64 * (8 * config.hidden_size + 3 * (config.hidden_size + config.intermediate_size))
    )


TRAINABLE = {
    # r (in + out) for query and value each.
    "lora-e2e-gpt2-medium": 24 * 2 * 4 * (1024 + 1024),
    "lora-e2e-gpt2-large": 36 * 2 * 4 * (1280 + 1280),
    # query and value, and a head of two layers for two labels.
    "lora-cola-roberta-base": 12 * 2 * 8 * (768 + 768) + 768 * 769 + 2 * 769,
    "dora-commonsense-llama-7b-r16": dora_parameters(16),
    "dora-commonsense-llama-7b-r32": dora_parameters(32),
    "qlora-guanaco-7b": qlora_parameters(MODELS["huggyllama/llama-7b"]),
    "qlora-guanaco-13b": qlora_parameters(MODELS["huggyllama/llama-13b"]),
    "qlora-guanaco-33b": qlora_parameters(MODELS["huggyllama/llama-30b"]),
    "qlora-guanaco-65b": qlora_parameters(MODELS["huggyllama/llama-65b"]),
    # A magnitude for each output row besides.
    "qdora-orca-math-llama-2-7b": qlora_parameters(MODELS["huggyllama/llama-7b"]) + LAYERS * (5 * HIDDEN + 2 * MLP),
}


def in_short(files: list[Path]) -> list[Any]:
    """Larger models of a family whose smaller one is there, and another rank, are long."""
    larger = ("large", "r32", "13b", "33b", "65b")
    return [pytest.param(file, marks=[pytest.mark.long] * file.stem.endswith(larger)) for file in files]


def settings_of(file: Path) -> TrainSettings:
    return read_settings(TrainSettings, file, {})


def test_the_table_holds_every_recipe():
    assert {file.stem for file in FILES} == set(TRAINABLE)
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"--config article/recipes/{file.name}" in text for file in FILES)
    assert all(f"{count:,}" in text for count in TRAINABLE.values())


@pytest.mark.parametrize("file", in_short(FILES), ids=lambda file: file.stem)
def test_a_recipe_builds(file, tmp_path):
    settings = settings_of(file)
    assert settings.output == Path("runs") / file.stem
    MODELS[settings.model].save_pretrained(tmp_path)
    labels = Labels(("0", "1")) if settings.objective == "classify" else None
    model = load_skeleton(dataclasses.replace(fetch_model(tmp_path, weights=False), labels=labels))
    if (four_bits := quantization_for(settings.method, settings, settings.model)) is not None:
        rw.quantize(model, four_bits)
        assert len(list(four_bit_layers(model))) == 7 * model.config.num_hidden_layers
    rw.add_adapter(model, with_heads(model, settings.lora_config(settings.method)))
    trainable = sum(p.numel() for p in rw.adapter_parameters(model).values())
    assert trainable == TRAINABLE[file.stem]
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("file", in_short(FILES), ids=lambda file: file.stem)
def test_the_table_holds_the_predicted_memory_and_hours(file, tmp_path):
    settings = settings_of(file)
    MODELS[settings.model].save_pretrained(tmp_path)
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{file.name}`"))
    (memory, hours) = re.findall(r"\| ([\d.]+) GB \| ([^|]+) \|", row)[0]
    rows = next((count for word, count in ROWS.items() if word in file.stem), None)
    for gpu, told in zip(("RTX 4090", "A100 80GB SXM"), hours.split(", ")):
        given = {"model": str(tmp_path), "gpu": gpu, "rows": rows}
        [found] = make_plan(read_settings(PlanSettings, file, given), print).to_json()["methods"].values()
        assert float(memory) * 1e9 == pytest.approx(found["peak_bytes"], rel=found["error"] / 4, abs=5e7)
        if found["verdict"] == "too big":
            assert told == found["verdict"]
        else:
            assert float(told.split()[0]) == pytest.approx(found["seconds"] / 3600, rel=0.05, abs=0.06)
            assert ("tight" in told) == (found["verdict"] == "tight")


def test_the_papers_hyperparameters():
    medium, large = (settings_of(RECIPES / f"lora-e2e-gpt2-{size}.yaml") for size in ("medium", "large"))
    differing = {name for name in TrainSettings.model_fields if getattr(medium, name) != getattr(large, name)}
    assert differing == {"model", "output"}
    assert (medium.label_smoothing, medium.weight_decay, medium.warmup_steps, medium.lora_dropout) == (
        0.1,
        0.01,
        500,
        0.1,
    )
    cola = settings_of(RECIPES / "lora-cola-roberta-base.yaml")
    assert (cola.r, cola.lora_alpha, cola.learning_rate, cola.batch_size, cola.epochs) == (8, 8, 4e-4, 32, 80)
    for r, rate in ((16, 2e-4), (32, 1e-4)):
        dora = settings_of(RECIPES / f"dora-commonsense-llama-7b-r{r}.yaml")
        assert (dora.r, dora.lora_alpha, dora.learning_rate, dora.batch_size) == (r, 2 * r, rate, 16)
    for size, rate in (("7b", 2e-4), ("13b", 2e-4), ("33b", 1e-4), ("65b", 1e-4)):
        qlora = settings_of(RECIPES / f"qlora-guanaco-{size}.yaml")
        assert qlora.learning_rate == rate
        assert qlora.batch_size * qlora.gradient_accumulation == 16
        assert (qlora.quant_type, qlora.double_quant, qlora.optimizer) == ("nf4", True, "paged_adamw_32bit")


def script_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_math_problems_become_prompts_and_answers(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(7)]
    script_of("prepare_orca_math").main(rows, tmp_path, 4, 2)
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in ("train", "validation")]
    found = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [row["completion"] for part in found for row in part] == ["1", "2", "3", "4", "5", "6"]
    assert found[1][0]["prompt"] == "###Question:\n4 + 1?\n###Answer:\n"


def test_commonsense_rows_become_texts(tmp_path):
    script = script_of("prepare_commonsense")
    rows = [{"instruction": f"Is {n} even?", "input": "", "output": "the correct answer is true"} for n in range(130)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    script.main(tmp_path / "all.json", tmp_path / "out")
    parts = {name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation")}
    texts = [json.loads(line)["text"] for lines in parts.values() for line in lines]
    assert {name: len(lines) for name, lines in parts.items()} == {"train": 10, "validation": 120}
    assert len(set(texts)) == 130
    assert all("even?" in text and text.endswith("the correct answer is true") for text in texts)


@pytest.mark.parametrize("file", sorted(RECIPES.with_name("claims").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_claims_comparison_can_start(file):
    settings = read_settings(CompareSettings, file, {"data": "train.csv", "output": "out"})
    # The gradient of the norm is a method of this package, which an older installation does not know.
    check_compare(settings.model_copy(update={"methods": [m for m in settings.methods if m != "dora_through"]}))
    text = (file.parent / "README.md").read_text(encoding="utf-8")
    assert f"--config article/claims/{file.name}" in text
