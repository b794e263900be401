"""Load a model of Llama-2-7B's layers in NF4 over several gloo processes, take a QLoRA step, and say what each held.

    python benchmarks/sharded_load.py FOLDER [--layers 2] [--processes 4] [--method qlora]

FOLDER receives random bfloat16 weights, as of ``llama7b_load.py``. Memory is RssAnon, what a process itself holds. The
same model is loaded whole for comparison, as every process did that reads more than its rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama7b_load


def measure(folder: Path, method: str, *, by_rows: bool) -> dict[str, Any]:
    """What one process held: before, at the peak of loading, after, and at the peak of a step, in bytes."""
    import torch
    from transformers.utils import logging

    from rankwise import LoraConfig, Nf4Config, add_adapter
    from rankwise.compat.transformers import before_weights
    from rankwise.models import load_model
    from rankwise.training import ranks, sharding
    from rankwise.training.meters import anonymous_memory_bytes, frozen_bytes

    logging.disable_progress_bar()
    config = LoraConfig(r=16, target_modules="all-linear", use_dora=method in ("dora", "qdora"))
    with ranks.joined("cpu"):
        found = {"before_bytes": anonymous_memory_bytes()}
        memory = llama7b_load.Memory().start()
        quantization = Nf4Config(double_quant=True) if method in ("qlora", "qdora") else None
        shard = functools.partial(sharding.shard_before_loading, device_type="cpu", trained_whole=(), trains_all=False)
        with before_weights(shard if by_rows else lambda model: None):
            model: Any = load_model(folder, dtype=torch.bfloat16, quantization=quantization)[0]
        found |= {"loading_bytes": memory.stop().peak_anonymous_bytes, "loaded_bytes": anonymous_memory_bytes()}
        memory = llama7b_load.Memory().start()
        add_adapter(model, config)
        model.train()
        ids = torch.randint(0, 32000, (1, llama7b_load.TOKENS))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found |= {"step_bytes": memory.stop().peak_anonymous_bytes, "frozen_bytes": frozen_bytes(model)}
        print(json.dumps(found | {"rank": ranks.rank(), "loss": loss.item()}), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--method", choices=("lora", "dora", "qlora", "qdora"), default="qlora")
    parser.add_argument("--inside", choices=("rows", "whole"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        measure(given.folder, given.method, by_rows=given.inside == "rows")
        return
    llama7b_load.write_model(given.folder, given.layers)
    for how, count in (("whole", 1), ("rows", given.processes)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*launcher, __file__, str(given.folder), "--method", given.method, "--inside", how]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        each = [json.loads(line) for line in lines if line.startswith("{")]
        most = {name: max(one[name] for one in each) for name in each[0] if name.endswith("_bytes")}
        sizes = ", ".join(f"{name.removesuffix('_bytes')} {size / 1e6:,.0f} MB" for name, size in most.items())
        print(f"{how}, {count} process{'es' if count > 1 else ''}: {sizes}", flush=True)


if __name__ == "__main__":
    main()
