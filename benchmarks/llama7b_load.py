"""Load a model of Llama-2-7B's exact shape as NF4 and take a QLoRA and a QDoRA step, and say what memory that took.

    python benchmarks/llama7b_load.py FOLDER [--layers 32] [--output DIR] [--double-quant]

The weights are random. FOLDER receives about 13 GB of bfloat16 shards, written one at a time, and keeps them for the
next run. Each phase (load, qlora, qdora) is a process of its own. Memory is RssAnon from /proc/self/status, sampled
every 2 ms: what the process itself holds. Pages of the mapped checkpoint are the system's and reported apart (RssFile).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PHASES = ("load", "qlora", "qdora")
LIMITS_BYTES = {"load": 5e9, "qlora": 8e9, "qdora": 8e9}
TOKENS = 256


class Memory:
    """The highest RssAnon and RssFile between ``start`` and ``stop``, in bytes."""

    def __init__(self) -> None:
        self.peak_anonymous_bytes = self.peak_file_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> Memory:
        self._thread.start()
        return self

    def stop(self) -> Memory:
        self._done.set()
        self._thread.join()
        self._sample()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._sample()

    def _sample(self) -> None:
        with open("/proc/self/status", encoding="ascii") as status:
            kilobytes = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, 1024 * int(kilobytes["RssAnon"]))
        self.peak_file_bytes = max(self.peak_file_bytes, 1024 * int(kilobytes["RssFile"]))


def write_model(folder: Path, layers: int) -> None:
    """The checkpoint, a shard per layer; config.json comes last and says that it is whole."""
    import torch
    from safetensors.torch import save_file

    settings = {**SHAPE, "num_hidden_layers": layers}
    if (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) == settings:
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number in range(layers + 1):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        shapes = _layer_shapes(number) if number < layers else _end_shapes()
        tensors = {key: _random(shape) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        print(f"\rwrote shard {number + 1} of {layers + 1}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(settings))


def _layer_shapes(number: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, path = SHAPE["hidden_size"], SHAPE["intermediate_size"], f"model.layers.{number}"
    shapes: dict[str, tuple[int, ...]] = {f"{path}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{path}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes[f"{path}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes | {f"{path}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}


def _end_shapes() -> dict[str, tuple[int, ...]]:
    hidden, table = SHAPE["hidden_size"], (SHAPE["vocab_size"], SHAPE["hidden_size"])
    return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (hidden,)}


def _random(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.ones(shape).bfloat16() if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02).bfloat16()


def run_phase(phase: str, folder: Path, double_quant: bool) -> dict[str, Any]:
    """Load the model, and for the other phases train one step; what it took, for JSON."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from rankwise import ops
    from rankwise.quantization import Nf4Config

    logging.disable_progress_bar()
    memory, begin = Memory().start(), time.perf_counter()
    config = Nf4Config(double_quant=double_quant)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    result: dict[str, Any] = {"phase": phase, "load_seconds": time.perf_counter() - begin}
    result["model_bytes"] = sum(tensor.nbytes for tensor in model.state_dict().values())
    if phase != "load":
        result |= train_step(model, use_dora=phase == "qdora")
    memory.stop()
    return result | {
        "peak_anonymous_bytes": memory.peak_anonymous_bytes,
        "peak_file_bytes": memory.peak_file_bytes,
        "limit_bytes": LIMITS_BYTES[phase],
        "implementation": ops.implementation(torch.zeros(1)),
        "threads": torch.get_num_threads(),
    }


def train_step(model: Any, *, use_dora: bool) -> dict[str, Any]:
    """One step of AdamW on 1 x 256 random tokens, adapters of rank 16 on all linear layers, checkpointing by layer."""
    import torch

    import rankwise as rw

    report = rw.add_adapter(model, rw.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=use_dora))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
    begin = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    if missing or not torch.isfinite(loss):
        raise SystemExit(f"the step failed: loss {loss.item()}, {len(missing)} adapters without gradient")
    return {
        "loss": loss.item(),
        "step_seconds": time.perf_counter() - begin,
        "trainable_parameters": report.trainable_parameters,
    }


def table(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# A model of Llama-2-7B's shape ({settings['layers']} of 32 layers) in NF4"
        + (", double-quantized" if settings["double_quant"] else ""),
        "",
        f"1 x {TOKENS} tokens, gradient checkpointing, rank 16 on all linear layers, AdamW; "
        f"{results[0]['threads']} threads, {results[0]['implementation']} operators, rankwise {settings['rankwise']}, "
        f"torch {settings['torch']}.",
        "",
        "| phase | peak RssAnon | limit | mapped files | 4-bit model | load | step | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        step = f"{result['step_seconds']:.1f} s" if "step_seconds" in result else ""
        loss = f"{result['loss']:.3f}" if "loss" in result else ""
        gigabytes = [
            result[key] / 1e9 for key in ("peak_anonymous_bytes", "limit_bytes", "peak_file_bytes", "model_bytes")
        ]
        cells = [
            result["phase"],
            *(f"{value:.2f} GB" for value in gigabytes),
            f"{result['load_seconds']:.1f} s",
            step,
            loss,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for llama7b_load.json and its page",
    )
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        print(json.dumps(run_phase(given.phase, given.folder, given.double_quant)))
        return 0
    write_model(given.folder, given.layers)
    results = []
    for phase in PHASES:
        command = [sys.executable, __file__, str(given.folder), "--phase", phase]
        command += ["--double-quant"] if given.double_quant else []
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    return report(results, given)


def report(phases: list[dict[str, Any]], given: argparse.Namespace) -> int:
    """Print and write the results; 1 when a phase took more memory than it may."""
    import results

    versions = results.versions(("rankwise", "torch"))
    settings = {"layers": given.layers, "double_quant": given.double_quant, **versions}
    text = table(phases, settings)
    if given.output:
        content = {**settings, "phases": phases}
        results.publish(given.output, "llama7b_load", content, lambda _: text.splitlines(), "llama7b_load")
    else:
        print(text)
    return int(any(phase["peak_anonymous_bytes"] > phase["limit_bytes"] for phase in phases))


if __name__ == "__main__":
    sys.exit(main())
