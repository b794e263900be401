"""Every recipe is a complete run: its options are valid, and its adapter fits a model of the right architecture."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

import rankwise as rw
from rankwise.config import DORA, TrainSettings
from rankwise.models import load_skeleton
from rankwise.planning import Workload, estimate
from rankwise.planning.hardware import choose_hardware
from rankwise.planning.workload import workload_of
from rankwise.quantization.targets import four_bit_layers
from rankwise.settings_file import read_settings
from rankwise.training.setup import quantization_for

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
MODELS: dict[str, PretrainedConfig] = {
    "openai-community/gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16, architectures=["GPT2LMHeadModel"]),
    "openai-community/gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20, architectures=["GPT2LMHeadModel"]),
    "yahma/llama-7b-hf": LlamaConfig(architectures=["LlamaForCausalLM"]),
    "huggyllama/llama-7b": LlamaConfig(architectures=["LlamaForCausalLM"]),
}
HIDDEN, MLP, LAYERS = 4096, 11008, 32
# LLaMA-7B. q, k, v are square; up and gate go out to the MLP, down comes back from it.
SQUARE, WIDE = 2 * HIDDEN, HIDDEN + MLP


def dora_parameters(r: int) -> int:
    """A and B have r (in + out) numbers, m has one per output row; targets q, k, v, up, down."""
    return LAYERS * (r * (3 * SQUARE + 2 * WIDE) + 3 * HIDDEN + MLP + HIDDEN)


TRAINABLE = {
    # r (in + out) for query and value each.
    "lora-e2e-gpt2-medium": 24 * 2 * 4 * (1024 + 1024),
    "lora-e2e-gpt2-large": 36 * 2 * 4 * (1280 + 1280),
    "dora-commonsense-llama-7b-r16": dora_parameters(16),
    "dora-commonsense-llama-7b-r32": dora_parameters(32),
    "qlora-guanaco-7b": LAYERS * 64 * (4 * SQUARE + 3 * WIDE),
}


def settings_of(file: Path) -> TrainSettings:
    return read_settings(TrainSettings, file, {})


def test_the_table_holds_every_recipe():
    assert {file.stem for file in FILES} == set(TRAINABLE)
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"--config article/recipes/{file.name}" in text for file in FILES)
    assert all(f"{count:,}" in text for count in TRAINABLE.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_builds(file, tmp_path):
    settings = settings_of(file)
    assert settings.output == Path("runs") / file.stem
    MODELS[settings.model].save_pretrained(tmp_path)
    model = load_skeleton(tmp_path)
    if (four_bits := quantization_for(settings)) is not None:
        rw.quantize(model, four_bits)
        assert len(list(four_bit_layers(model))) == 7 * LAYERS
    rw.add_adapter(model, settings.lora_config(use_dora=settings.method in DORA))
    trainable = sum(p.numel() for p in rw.adapter_parameters(model).values())
    assert trainable == TRAINABLE[file.stem]
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_table_holds_the_predicted_memory(file, tmp_path):
    """Of the step that these settings make, on a card: the plan's own figure, to a quarter of its error."""
    settings = settings_of(file)
    MODELS[settings.model].save_pretrained(tmp_path)
    workload: Workload = workload_of(settings.model_dump(), choose_hardware(None, "80GB"))
    found = estimate(tmp_path, settings.method, workload)
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{file.name}`"))
    (printed,) = re.findall(r"([\d.]+) GB", row)
    assert float(printed) * 1e9 == pytest.approx(found.peak_bytes, rel=found.error / 4, abs=5e7)


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
    for r, rate in ((16, 2e-4), (32, 1e-4)):
        dora = settings_of(RECIPES / f"dora-commonsense-llama-7b-r{r}.yaml")
        assert (dora.r, dora.lora_alpha, dora.learning_rate, dora.batch_size) == (r, 2 * r, rate, 16)
    qlora = settings_of(RECIPES / "qlora-guanaco-7b.yaml")
    assert qlora.batch_size * qlora.gradient_accumulation == 16
    assert (qlora.quant_type, qlora.double_quant, qlora.optimizer) == ("nf4", True, "paged_adamw_32bit")


def test_commonsense_rows_become_texts(tmp_path):
    spec = importlib.util.spec_from_file_location("prepare_commonsense", RECIPES / "prepare_commonsense.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [{"instruction": f"Is {n} even?", "input": "", "output": "the correct answer is true"} for n in range(130)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    script.main(tmp_path / "all.json", tmp_path / "out")
    parts = {name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation")}
    texts = [json.loads(line)["text"] for lines in parts.values() for line in lines]
    assert {name: len(lines) for name, lines in parts.items()} == {"train": 10, "validation": 120}
    assert len(set(texts)) == 130
    assert all("even?" in text and text.endswith("the correct answer is true") for text in texts)
