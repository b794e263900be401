"""Unsloth's LoRA and QLoRA on the same shapes. It patches transformers when it is imported: a process of its own.

python benchmarks/gpu_unsloth.py SHAPE METHOD BATCH LENGTH --answer FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stand_in import source_tree

source_tree()

import contenders  # noqa: E402
import gpu_models  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from gpu_models import Row  # noqa: E402

from rankwise.records import write_json  # noqa: E402

METHODS = ("lora", "qlora")
# Unsloth has kernels for these; its DoRA is PEFT's.
SECONDS = {"1B": 60, "8B": 150}
# That a run may take, its model written to disk and loaded again.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unsloth_rows(shapes: list[str], batch: int, length: int, deadline: gpu_models.Deadline) -> Iterator[Row]:
    """The smaller shapes first. Nothing where Unsloth is not installed."""
    if importlib.util.find_spec("unsloth") is None:
        return
    for shape in sorted(shapes, key=lambda shape: SECONDS.get(shape, 0)):
        for method in METHODS:
            row = Row(f"Llama {shape}", method, "unsloth")
            if deadline.left() < SECONDS.get(shape, 0):
                row.note = "no time left"
            else:
                row = _in_a_process(row, [shape, method, str(batch), str(length)])
            yield row


def _in_a_process(row: Row, arguments: list[str]) -> Row:
    try:
        found = timing.in_fresh_process(__file__, arguments)
    except RuntimeError as error:
        row.note = str(error).strip().splitlines()[-1][:200]
        return row
    found.pop("process_peak_bytes")
    return Row(**found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("method")
    parser.add_argument("batch", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("--answer", type=Path, required=True)
    given = parser.parse_args()
    model = unsloth_model(given.shape, given.method, given.length)
    row = Row(f"Llama {given.shape}", given.method, "unsloth")
    found = gpu_models.time_model(row, model, given.shape, given.batch, given.length, "cuda")
    write_json(given.answer, dataclasses.asdict(found))


def unsloth_model(shape: str, method: str, length: int) -> Any:
    """It loads from folders alone, so the random model is written to one, with a tokenizer of a few words."""
    from unsloth import FastLanguageModel  # isort: skip  (before transformers, as it asks)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        gpu_models.random_llama(shape, length, "cuda").save_pretrained(folder)
        torch.cuda.empty_cache()
        tokenizer.save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=contenders.is_four_bit(method)
        )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=contenders.R,
        lora_alpha=contenders.ALPHA,
        lora_dropout=0,
        target_modules=LINEAR,
        bias="none",
        use_gradient_checkpointing=False,
    )
    return adapted.train()


if __name__ == "__main__":
    main()
