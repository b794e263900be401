"""Option names of other tools and rankwise's names for them, for advice where an option does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("model-name-or-path", "model-name", "model-id", "model-path", "base-model", "pretrained-model"),
    "data": ("dataset", "dataset-name", "dataset-path", "data-path", "train-file", "train-data", "training-data"),
    "eval-data": ("eval-dataset", "eval-file", "validation-file", "validation-data", "valid-data", "test-file"),
    "output": ("output-dir", "out", "out-dir", "save-path", "save-dir"),
    "adapter": ("adapter-name-or-path", "adapter-path", "lora-path", "lora-weights", "peft-model"),
    "r": ("rank", "lora-r", "lora-rank"),
    "lora-alpha": ("alpha",),
    "lora-dropout": ("dropout",),
    "target-modules": ("targets", "lora-target", "lora-target-modules"),
    "learning-rate": ("lr",),
    "learning-rates": ("lr", "learning-rate"),
    "lr-scheduler-type": ("scheduler", "lr-scheduler", "schedule"),
    "batch-size": ("per-device-train-batch-size", "train-batch-size", "micro-batch-size", "per-device-batch-size"),
    "gradient-accumulation": ("gradient-accumulation-steps", "grad-accum", "accumulation-steps"),
    "epochs": ("num-train-epochs", "num-epochs"),
    "max-steps": ("steps", "num-steps", "iters"),
    "max-length": ("max-seq-length", "max-seq-len", "cutoff-len", "seq-len", "block-size"),
    "optimizer": ("optim",),
    "warmup-steps": ("warmup", "num-warmup-steps"),
    "devices": ("nproc-per-node", "num-processes", "num-gpus", "gpus", "world-size"),
    "dtype": ("torch-dtype", "precision", "bf16", "fp16"),
    "max-new-tokens": ("max-tokens",),
    "resume": ("resume-from-checkpoint",),
    "overwrite": ("overwrite-output-dir", "force"),
    "method": ("use-dora", "finetuning-type", "peft-type", "load-in-4bit"),
    "methods": ("method",),
    "task": ("tasks", "benchmark"),
    "objective": ("training-type", "stage", "rlhf-type"),
    "reward": ("reward-funcs", "reward-func", "reward-function", "rewards"),
    "num-generations": ("group-size", "num-samples"),
    "max-completion-length": ("max-new-tokens",),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": ("adam", "adamw", "adamw_hf"),
    "adamw_bnb_8bit": ("adam8bit", "adamw8bit", "adam_8bit"),
    "paged_adamw_32bit": ("paged_adamw",),
    "lion_32bit": ("lion",),
}
# Similarity from which a name counts as a typing error of another; below it, names of other tools are ambiguous.
SLIP = 0.85


def close_names(
    name: str, known: Collection[str], table: dict[str, tuple[str, ...]], *, cutoff: float
) -> Sequence[str]:
    """The options in ``known`` that other tools call ``name``, by ``table`` ({ours: theirs}); else the most similar."""
    meant = [ours for ours, theirs in table.items() if name.lower() in theirs and ours in known]
    called = {other: ours for ours, theirs in table.items() if ours in known for other in theirs}
    slips = difflib.get_close_matches(name, called, n=1, cutoff=SLIP)
    alike = difflib.get_close_matches(name, sorted(known), n=3, cutoff=cutoff)
    return meant or list(dict.fromkeys([*(called[other] for other in slips), *alike]))
