"""`from_pretrained(..., quantization_config=Nf4Config(...))`: equal to quantizing afterwards, and sparing of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rankwise as rw
from rankwise.errors import QuantizationError
from rankwise.quantization import Fp4Config, Linear4bit, Nf4Config, quantize
from tables import thinned
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
BUILD = {
    "llama": lambda: tiny_llama(attention_bias=True),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@thinned(
    {
        "base": list(BUILD),
        "dtype": [torch.float32, torch.bfloat16],
        "config": [Nf4Config(), Fp4Config(block_size=32, double_quant=True)],
    }
)
def test_it_equals_quantizing_afterwards(base, dtype, config, tmp_path):
    BUILD[base]().to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    streamed, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=config, output_loading_info=True
    )
    assert not any(info.values())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    quantize(plain, config)
    assert states_equal(streamed, plain)
    assert torch.equal(logits(streamed), logits(plain))
    assert streamed.config.quantization_config.to_dict() == plain.config.quantization_config.to_dict()
    for model in (streamed, plain):
        assert model.is_quantized
        assert model.hf_quantizer.is_trainable
        assert model.hf_quantizer.is_serializable()
    assert not any(tensor.is_meta for tensor in streamed.state_dict().values())


def test_a_stored_dtype_is_rounded_before_it_is_quantized(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=Nf4Config())
    plain = tiny_llama().to(torch.bfloat16)
    quantize(plain, Nf4Config())
    assert states_equal(streamed, plain)
    assert streamed.model.layers[0].mlp.up_proj.dtype == torch.bfloat16


def test_the_head_of_a_classifier_stays_dense_and_may_be_new(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=Nf4Config(), num_labels=2)
    assert type(model.score) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)


def test_exclusions_hold_while_loading(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = Nf4Config(modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules() if "_proj" in name}
    assert kinds.pop("down_proj") is nn.Linear
    assert set(kinds.values()) == {Linear4bit}


def test_load_model_passes_the_config_on(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model, _ = rw.load_model(str(tmp_path), quantization=Nf4Config(double_quant=True))
    assert model.model.layers[0].mlp.up_proj.double_quant
    assert not model.training


def test_the_trainer_takes_it_with_an_adapter(tmp_path):
    from transformers import Trainer, TrainingArguments

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(target_modules="all-linear", use_dora=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    settings = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "learning_rate": 0.01, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), **settings)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all("lora_" in name or "magnitude" in name for name in changed)


def _damage(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_nan_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")

    _damage(tmp_path, change)
    with pytest.raises(QuantizationError, match=r"RW603.*layers\.0\.mlp\.up_proj.*layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Nf4Config())


def test_a_missing_weight_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    _damage(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(QuantizationError, match=r"RW612.*layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Nf4Config())


def test_a_weight_of_another_shape_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    _damage(tmp_path, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 31)}))
    with pytest.raises(QuantizationError, match=r"RW612.*layers\.1\.mlp\.up_proj.*\(48, 31\).*\(48, 32\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Nf4Config())


def test_disk_offload_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"RW615.*disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=Nf4Config(), device_map={"": "disk"}, offload_folder=str(tmp_path / "o")
        )


SETTINGS = {
    "vocab_size": 12000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
}
PROBE = """
import json, os, sys, threading
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from rankwise.quantization import Nf4Config

torch.set_num_threads(1)
logging.disable_progress_bar()

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def measured(folder):
    AutoModelForCausalLM.from_pretrained(folder + "/small", quantization_config=Nf4Config())  # imports and warms up
    peak = before = anonymous_bytes()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = AutoModelForCausalLM.from_pretrained(folder + "/big", quantization_config=Nf4Config())
    done.set()
    thread.join()
    size = sum(t.nbytes for t in model.state_dict().values())
    return {"peak": max(peak, anonymous_bytes()) - before, "model": size}

# A child each, which finds torch and transformers imported, and no memory that another loading left.
for folder in sys.argv[1:]:
    if os.fork() == 0:
        print(json.dumps(measured(folder)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def _write_shards(folder: Path) -> int:
    """A model of about 0.2 GB in bfloat16, one shard per layer; returns the bytes of its largest tensor."""
    hidden, inner, vocabulary = SETTINGS["hidden_size"], SETTINGS["intermediate_size"], SETTINGS["vocab_size"]
    noise = torch.randn(inner * hidden).mul_(0.02).bfloat16()
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shards = [
        {
            **{f"model.layers.{i}.{name}.weight": noise[: a * b].view(a, b).clone() for name, (a, b) in shapes.items()},
            f"model.layers.{i}.input_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"model.layers.{i}.post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
        }
        for i in range(SETTINGS["num_hidden_layers"])
    ]
    table = torch.zeros(vocabulary, hidden).bfloat16()
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    shards.append({**ends, "model.norm.weight": torch.ones(hidden).bfloat16()})
    _write(folder, shards, SETTINGS)
    return table.nbytes


def _write(folder: Path, shards: list[dict[str, torch.Tensor]], settings: dict) -> None:
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(settings))


def _write_experts(folder: Path) -> int:
    """A Mixtral of about 0.2 GB in bfloat16, a tensor for each expert; returns the bytes of its largest stack."""
    E, hidden, inner = 8, 512, 1280
    settings = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": E}
    settings |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 6, "num_attention_heads": 8}
    settings |= {"num_key_value_heads": 8, "vocab_size": 1000, "dtype": "bfloat16"}
    noise = torch.randn(inner * hidden).mul_(0.02).bfloat16()

    def shard(layer: str) -> dict[str, torch.Tensor]:
        shapes = {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (E, hidden)
        for index in range(E):
            path = f"{layer}.block_sparse_moe.experts.{index}"
            shapes |= {f"{path}.w1.weight": (inner, hidden), f"{path}.w3.weight": (inner, hidden)}
            shapes[f"{path}.w2.weight"] = (hidden, inner)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors = {name: noise[: a * b].view(a, b).clone() for name, (a, b) in shapes.items()}
        return tensors | {f"{layer}.{name}.weight": torch.ones(hidden).bfloat16() for name in norms}

    table = torch.zeros(1000, hidden).bfloat16()
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    shards = [shard(f"model.layers.{layer}") for layer in range(6)]
    _write(folder, [*shards, {**ends, "model.norm.weight": torch.ones(hidden).bfloat16()}], settings)
    return E * 2 * inner * hidden * 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
def test_loading_takes_the_4_bit_model_and_two_tensors_of_memory(tmp_path):
    folders, largest = [tmp_path / "shards", tmp_path / "experts"], []
    for folder, write, small in zip(folders, (_write_shards, _write_experts), (tiny_llama(), tiny_moe("mixtral"))):
        (folder / "big").mkdir(parents=True)
        largest.append(write(folder / "big"))
        small.save_pretrained(folder / "small")
    command = [sys.executable, "-c", PROBE, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, tensor in zip(result.stdout.splitlines(), largest, strict=True):
        measured = json.loads(line)
        assert 50e6 < measured["model"] < 100e6
        assert measured["peak"] <= measured["model"] + 2 * tensor, measured
