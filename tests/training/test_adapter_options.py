"""Options that go through ``train`` to the adapter and to the 4-bit weights, seen in what the run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_rows import Recorder

from rankwise import LoraConfig, Nf4Config, add_adapter, quantize, save_adapter
from rankwise.errors import RunError
from rankwise.records import load_record
from rankwise.training.run import train
from rankwise.training.setup import with_adapters_options
from tiny_models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")


@pytest.fixture
def gpt2_folder(tmp_path: Path, tokenizer: Any) -> str:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_ranks_and_layers(settings: Any, tmp_path: Path) -> None:
    chosen = {"target_modules": "q_proj,v_proj", "layers_to_transform": "1"}
    train(settings(max_steps=2, eval_steps=2, rank_pattern="v_proj=2", alpha_pattern="v_proj=8", **chosen))
    shapes = {key: tuple(value.shape) for key, value in trained(tmp_path / "run").items()}
    layer = "base_model.model.model.layers.1.self_attn"
    assert {key: shape for key, shape in shapes.items() if "lora_A" in key} == {
        f"{layer}.q_proj.lora_A.weight": (4, 32),
        f"{layer}.v_proj.lora_A.weight": (2, 32),
    }
    assert '"v_proj": 8' in (tmp_path / "run" / "adapter_config.json").read_text()


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_and_parts_of_a_fused_layer(bias: str, gpt2_folder: str, settings: Any, tmp_path: Path) -> None:
    chosen = {"target_modules": "c_attn", "enable_lora": "c_attn=1:0:1", "bias": bias}
    record = train(settings(model=gpt2_folder, max_steps=2, eval_steps=2, **chosen))
    tensors = trained(tmp_path / "run")
    B = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    queries, keys, values = B.chunk(3)
    assert queries.any()
    assert not keys.any()
    assert values.any()
    biases = {key for key in tensors if key.endswith(".bias")}
    assert len(biases) == {"none": 0, "lora_only": 2}.get(bias, len(biases))
    assert (len(biases) > 2) == (bias == "all")
    assert record.settings["enable_lora"] == {"c_attn": [True, False, True]}


def test_another_adapter_or_other_new_tokens_do_not_resume(settings: Any, tmp_path: Path) -> None:
    """Under the same names as those with which the run was started."""
    first, tokens = tmp_path / "first", tmp_path / "tokens.txt"
    short = {"max_steps": 1, "eval_steps": None, "eval_data": None, "lr_scheduler_type": "constant"}
    tokens.write_text("<yes>")
    train(settings(**short, output=first, new_tokens=str(tokens)))
    train(settings(**short, adapter=first))
    tokens.write_text("<no>")
    adapter = first / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(adapter).items()}, adapter, {"format": "pt"})
    longer = short | {"max_steps": 2, "resume": True}
    with pytest.raises(RunError, match="RW508.*--adapter"):
        train(settings(**longer, adapter=first))
    with pytest.raises(RunError, match="RW508.*--new-tokens"):
        train(settings(**longer, output=first, new_tokens=str(tokens)))


def test_a_continued_adapter_keeps_its_tokens_and_template(settings: Any, tmp_path: Path) -> None:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} </s> {% endfor %}")
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "<yes> w2"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    short = {"data": str(rows), "eval_data": None, "eval_steps": None, "max_steps": 1}
    first = train(settings(**short, output=tmp_path / "first", new_tokens="<yes>", chat_template=template))
    second = train(settings(**short, adapter=tmp_path / "first"))
    used = [{key: run.data["train"][key] for key in ("tokens", "chat_template_sha256")} for run in (first, second)]
    assert used[0] == used[1]
    assert "<yes>" in (tmp_path / "run" / "tokenizer.json").read_text()


def test_an_adapter_of_one_layer_given_as_a_number_is_continued(settings: Any, tmp_path: Path) -> None:
    """As PEFT writes it. The memory plan reads a list, as the command line gives it."""
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1]))
    save_adapter(model, tmp_path / "first")
    config = tmp_path / "first" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_to_transform": 1}))
    assert with_adapters_options(settings(adapter=tmp_path / "first")).layers_to_transform == (1,)


FORMAT = ("quant_type", "block_size", "double_quant")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, ("nf4", 64, True)), ({"quant_type": "fp4", "block_size": 32, "double_quant": False}, ("fp4", 32, False))],
)
def test_the_format_of_four_bits(chosen: dict[str, Any], expected: tuple[Any, ...], settings: Any) -> None:
    stored = train(settings(method="qlora", max_steps=1, **chosen)).base_model["quantization"]
    assert tuple(stored[name] for name in FORMAT) == expected


def test_four_bit_options_without_four_bits_are_said(settings: Any) -> None:
    watcher = Recorder()
    train(settings(max_steps=1, quant_type="fp4", block_size=32), watcher)
    assert "RW529" in watcher.warnings
    watcher = Recorder()
    train(settings(max_steps=1, overwrite=True), watcher)
    assert "RW529" not in watcher.warnings


@pytest.mark.parametrize(
    ("method", "chosen", "named"),
    [
        ("full", {"target_modules": ("q_proj",), "r": 4, "bias": "all"}, "--r, --target-modules, --bias"),
        ("full", {"bias": "all", "modules_to_save": ("lm_head",)}, "--r, --modules-to-save, --bias"),
    ],
)
def test_adapter_options_that_the_method_does_not_use_are_said(
    method: str, chosen: dict[str, Any], named: str, settings: Any
) -> None:
    record = train(settings(method=method, max_steps=1, **chosen))
    told = [item["message"] for item in record.warnings if item["code"] == "RW529"]
    assert [message.split(":")[0] for message in told] == ([named] if named else [])


def test_lora_on_a_checkpoint_of_four_bits_is_recorded(settings: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    quantize(model, Nf4Config(double_quant=True))
    model.save_pretrained(tmp_path / "four-bits")
    tokenizer.save_pretrained(tmp_path / "four-bits")
    train(settings(model=str(tmp_path / "four-bits"), method="lora", max_steps=1))
    record = load_record(tmp_path / "run")
    assert record.method == "lora"
    assert record.base_model["quantization"]["quant_type"] == "nf4"
