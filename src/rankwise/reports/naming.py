"""The names of methods and metrics, and the colour and shape of each method in every figure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import PurePath

from rankwise.reports.numbers import visible

NAMES = {
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "qdora": "QDoRA",
    "full": "Full",
    "lora+plus": "LoRA+",
}
VARIANTS = {
    "pissa": "PiSSA",
    "loftq": "LoftQ",
    "plus": "LoRA+",
    "rslora": "rsLoRA",
    "qv": "q, v",
    "int8": "8-bit products",
}
METRICS = {
    "eval_loss": "Evaluation loss",
    "retained.loss": "Retained loss",
    "perplexity.loss": "Loss",
    "perplexity.perplexity": "Perplexity",
    "preference.reward_accuracy": "Reward accuracy",
    "preference.reward_margin": "Reward margin",
    "labels.accuracy": "Accuracy",
    "labels.f1": "F1",
    "labels.mcc": "Matthews' correlation",
    "labels.pearson": "Pearson's correlation",
}


def method_name(method: str) -> str:
    """``lora+pissa`` -> LoRA (PiSSA); ``qlora+pissa+plus`` -> QLoRA (PiSSA, LoRA+)."""
    if method in NAMES:
        return NAMES[method]
    name, *words = method.split("+")
    variants = ", ".join(VARIANTS.get(word) or visible(word) for word in words)
    return (NAMES.get(name) or visible(name)) + (f" ({variants})" if words else "")


def long_name(method: str) -> str:
    """The name in a sentence: ``LoRA``, ``full fine-tuning``."""
    return "full fine-tuning" if method == "full" else method_name(method)


def method_numbers(methods: Iterable[str]) -> dict[str, int]:
    """A number for each method, which chooses its colour and shape. Those of NAMES never change."""
    found = {name: number for number, name in enumerate(NAMES) if name in methods}
    free = (number for number in itertools.count() if number not in [*found.values()])
    return found | {name: next(free) for name in methods if name not in NAMES}


def metric_name(metric: str) -> str:
    """``eval_loss`` -> Evaluation loss; ``e2e.BLEU`` -> BLEU on e2e."""
    if metric in METRICS:
        return METRICS[metric]
    task, _, figure = metric.partition(".")
    return visible(f"{figure} on {task}" if figure else metric)


def metric_in_sentence(metric: str) -> str:
    """``evaluation loss``, ``BLEU on e2e``: the name in a sentence. A task's own metric keeps its capitals."""
    return METRICS[metric].lower() if metric in METRICS else metric_name(metric)


def last_part(name: object) -> str:
    """The last component of a path of any system or of a hub id; a name without components is unchanged."""
    return PurePath(str(name).replace("\\", "/")).name or str(name)
