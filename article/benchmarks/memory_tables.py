"""LLaMA's four sizes, weights only and whole training steps, as Markdown; docs/memory.md quotes some of it.

    python article/benchmarks/memory_tables.py > benchmarks/results/llama_memory.md

Only shapes are needed: the script writes a config.json for each size (Touvron et al. 2023, table 2) and plans with it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rankwise.planning import MemoryEstimate, Workload, estimate

# Width, layers, heads, width of the feed-forward part.
SHAPES = {
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "33B": (6656, 60, 52, 17920),
    "65B": (8192, 80, 64, 22016),
}
METHODS = ("full", "lora", "dora", "qlora", "qdora")
STEPS = {
    "batch 1 x 512 tokens, r = 64 on all linear layers, gradient checkpointing, paged 32-bit AdamW (QLoRA's setting)": (
        Workload(batch_size=1, max_length=512, r=64, gradient_checkpointing=True, optimizer="paged_adamw_32bit")
    ),
    "batch 1 x 512 tokens, r = 64 on all linear layers, gradient checkpointing, AdamW": (
        Workload(batch_size=1, max_length=512, r=64, gradient_checkpointing=True)
    ),
    "batch 8 x 1,024 tokens, r = 16 on all linear layers, AdamW (the defaults of `rankwise train`)": Workload(),
}


def write_config(folder: Path, name: str) -> Path:
    """A LLaMA config.json of that size."""
    width, layers, heads, feed_forward = SHAPES[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": feed_forward,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    place = folder / name
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def weight_bytes(found: MemoryEstimate) -> int:
    return found.breakdown["weights"] + found.breakdown["weights_4bit"]


def print_table(title: str, cells: dict[str, dict[str, int]]) -> None:
    print(f"\n{title}, in GB (10^9 bytes):\n")
    print(f"| | {' | '.join(METHODS)} |")
    print(f"|---|{'---|' * len(METHODS)}")
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(f'{row[method] / 1e9:,.1f}' for method in METHODS)} |")


def main() -> None:
    print("# Memory of LLaMA's sizes, as planned\n\n`python article/benchmarks/memory_tables.py`")
    with tempfile.TemporaryDirectory() as folder:
        places = {name: write_config(Path(folder), name) for name in SHAPES}
        for index, (title, workload) in enumerate(STEPS.items()):
            found = {
                name: {method: estimate(place, method, workload) for method in METHODS}
                for name, place in places.items()
            }
            if index == 0:
                weights = {
                    name: {method: weight_bytes(row[method]) for method in METHODS} for name, row in found.items()
                }
                print_table("Weights only", weights)
            peaks = {name: {method: row[method].peak_bytes for method in METHODS} for name, row in found.items()}
            print_table(f"Peak of a training step on one CUDA GPU: {title}", peaks)
    errors = sorted({f"{row[method].error:.1%}" for row in found.values() for method in METHODS})
    print(f"\nError to expect of each peak: {', '.join(errors)}.")


if __name__ == "__main__":
    main()
