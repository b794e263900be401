"""What DoRA costs in inference: the demo model alone, with the adapter beside it, and with the adapter merged.

    python article/benchmarks/merged_dora.py

A pass over two rows of 128 tokens, and 32 tokens drawn greedily after 16. The three models take turns; a ratio is that
of one turn, and printed is the median.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import rankwise as rw

TURNS = 9
IDS = torch.randint(5, 40_000, (2, 128), generator=torch.Generator().manual_seed(0))
WORK: dict[str, Callable[[Any], object]] = {
    "forward": lambda model: model(IDS),
    "generate": lambda model: model.generate(
        IDS[:1, :16], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    ),
}


def seconds(work: Callable[[Any], object], model: Any) -> float:
    began = time.perf_counter()
    work(model)
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    base, _ = rw.load_model("demo", dtype=torch.bfloat16)
    beside = copy.deepcopy(base)
    rw.add_adapter(beside, rw.LoraConfig(r=16, use_dora=True))
    merged = copy.deepcopy(beside)
    rw.merge_adapter(merged, reversible=False)
    models = [model.eval() for model in (base, merged, beside)]
    for name, work in WORK.items():
        turns = [[seconds(work, model) for model in models] for _ in range(1 + TURNS)][1:]
        of_merged, of_beside = (median(turn[place] / turn[0] for turn in turns) for place in (1, 2))
        print(f"{name}: {of_merged:.3f} of the base's time merged, {of_beside:.3f} unmerged")


if __name__ == "__main__":
    main()
