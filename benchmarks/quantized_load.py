"""Seconds that quantizing adds to loading a model folder, ours and bitsandbytes', alternating in one process.

python benchmarks/quantized_load.py MODEL_FOLDER      # a bfloat16 safetensors folder
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

import rankwise as rw

ROUNDS = 7


def main() -> None:
    folder = sys.argv[1]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: None,
        "NF4, ours": rw.Nf4Config,
        "NF4 double-quantized, ours": lambda: rw.Nf4Config(double_quant=True),
        "NF4, bitsandbytes": lambda: theirs,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for way, config in ways.items():
            start = time.perf_counter()
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config())
            seconds[way].append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain"][1:])
    print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, medians of {ROUNDS}\n")
    print("| load | seconds | beyond the plain load |\n|---|---|---|")
    for way, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"| {way} | {median:.3f} | {median - plain:.3f} |")


if __name__ == "__main__":
    main()
