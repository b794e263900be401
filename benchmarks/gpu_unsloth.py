"""Unsloth's LoRA and QLoRA on the same shapes: a job of `gpu.py`. It patches transformers when it is imported.

python benchmarks/gpu_unsloth.py JOB --answer FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from stand_in import source_tree

source_tree()

if importlib.util.find_spec("unsloth"):
    # Before transformers, which it patches.
    import unsloth  # noqa: F401

import contenders  # noqa: E402
import gpu_job  # noqa: E402
import gpu_models  # noqa: E402
import torch  # noqa: E402
from gpu_jobs import Job, end_with_parent  # noqa: E402

from rankwise.records import write_json  # noqa: E402

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=json.loads)
    parser.add_argument("--answer", type=Path, required=True)
    given = parser.parse_args()
    end_with_parent()
    job = Job.of(given.job)
    model = unsloth_model(job)
    before = gpu_job.card_state(job.device)
    row = gpu_models.time_model(job, model)
    states = {"card_before": before, "card_after": gpu_job.card_state(job.device)}
    write_json(given.answer, {**dataclasses.asdict(row), **states})


def unsloth_model(job: Job) -> Any:
    """It loads from folders alone, so the random model is written to one, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        gpu_models.random_llama(job).save_pretrained(folder)
        torch.cuda.empty_cache()
        tokenizer.save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=job.length, dtype=torch.bfloat16, load_in_4bit=contenders.is_four_bit(job.method)
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
