"""A comparison folder as ``rankwise compare`` leaves it, made up: no run behind it, but figures that hang together."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.comparison import results
from rankwise.comparison.results import metrics_of
from rankwise.comparison.verdicts import Spreads

METHODS = ("lora", "qlora", "dora", "qdora")
RATES = (1e-4, 2e-4, 5e-4)
TRUTH: dict[str, dict[str, float]] = {
    "lora": {"loss": 1.285, "bleu": 63.1, "speed": 610, "memory": 2.74e9, "parameters": 4_884_480},
    "qlora": {"loss": 1.306, "bleu": 62.2, "speed": 540, "memory": 1.95e9, "parameters": 4_884_480},
    "dora": {"loss": 1.281, "bleu": 63.4, "speed": 575, "memory": 2.86e9, "parameters": 5_040_000},
    "qdora": {"loss": 1.303, "bleu": 62.5, "speed": 505, "memory": 2.10e9, "parameters": 5_040_000},
}
EXAMPLES = 60
SERVED = (
    ["PEFT, as it is", "vLLM, as it is", "SGLang, as it is", "merged (`rankwise merge`): anywhere"],
    ["PEFT, as it is", "vLLM: `rankwise export --for vllm`, since it refuses DoRA's magnitudes"],
)
HOSTILE = (
    "</script><script>window.hacked = true</script>",
    '<img src=x onerror="window.hacked=true"> \'quoted\' "twice" & &amp; {{ 7 * 7 }} {% raw %}',
    "\u202eright to left override\u202c שלום עולם مرحبا بالعالم",
    "W" + "ö" * 600,
    "| a | table | ``` # heading [link](javascript:alert(1)) \x00\x1b[31m ]]> <!-- -->",
)


def write_comparison(
    folder: Path,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    extras: bool = True,
    hostile: bool = False,
) -> dict[str, Any]:
    """Write the folder and return the content of its ``report.json``.

    ``extras`` adds a method that failed and one that was skipped; ``hostile`` puts markup into every free text.
    """
    runs = [_run(folder, name, rate, seed, phase, hostile) for name, rate, seed, phase in _cells(methods, seeds)]
    if extras:
        runs += [_failed(seeds[0]), _skipped(seeds[0])]
    base = _evaluate(folder / "base", None, random.Random(99), hostile)
    document: dict[str, Any] = {
        "command": f"rankwise compare --model demo --data trainset.csv --methods {','.join(methods)} "
        f"--seeds {len(seeds)} --learning-rates 1e-4,2e-4,5e-4 --task e2e --max-steps 200 --output {folder.name}",
        "settings": {"model": HOSTILE[1] if hostile else "demo", "objective": "sft", "seeds": list(seeds)},
        "created": "2026-07-14T09:12:44+00:00",
        "versions": {"python": "3.11.7", "rankwise": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.24.0"},
        "device": {"type": "cpu", "dtype": "bfloat16", "name": HOSTILE[0] if hostile else "x86_64", "threads": 2},
        "model": {
            "name": HOSTILE[1] if hostile else "demo",
            "base_model": HOSTILE[1] if hostile else "HuggingFaceTB/SmolLM2-135M-Instruct",
            "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
        },
        "data": {
            "train": {"source": "trainset.csv", "sha256": "f526a9fea961814ff5d98d2f3e905f0619147f2b", "rows": 42061},
            "eval": {"source": "devset.csv", "sha256": "598bd0aa7b9a114dd90b42516d8d8b8890083281", "rows": 256},
            "overlap": 3,
        },
        "primary_metric": "eval_loss",
        "confidence": 0.95,
        "base": {"tasks": {"e2e": base}, "folder": "base"},
        "warnings": [{"code": "RW218", "message": HOSTILE[0] if hostile else "3 of 256 evaluation rows are in train."}],
        "runs": runs,
        **_conclusions(folder, methods, runs),
        "learning_rates": {name: _search(name, runs) for name in methods},
        "standings": [],
        "seconds": 3391.0,
    }
    if extras:
        document["methods"] |= {"full": _empty(failed=1), "prefix": _empty(skipped="it needs the package peft.")}
    (folder / "recommended.yaml").write_text("model: demo\nmethod: dora\nlearning-rate: 0.0002\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    return document


def _cells(methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, float, int, str]]:
    final = [(name, 2e-4, seed, "final") for name in methods for seed in seeds]
    search = [(name, rate, seeds[0], "search") for name in methods for rate in RATES if rate != 2e-4]
    return [*final, *search]


def _run(folder: Path, name: str, rate: float, seed: int, phase: str, hostile: bool) -> dict[str, Any]:
    draw = random.Random(f"{name} {rate} {seed}")
    truth = TRUTH.get(name, TRUTH["lora"])
    loss = truth["loss"] + 0.004 * draw.gauss(0, 1) + 0.03 * abs(math.log2(rate / 2e-4))
    place = folder / "runs" / f"{name}-lr{rate:g}-seed{seed}"
    place.mkdir(parents=True)
    _write_metrics(place, loss, draw)
    record = {
        "method": name,
        "seed": seed,
        "settings": {"model": "demo", "method": name, "r": 16, "lora_alpha": 32.0, "learning_rate": rate},
        "train_loss": loss + 0.05,
        "initial_eval_loss": 2.5965,
        "eval_loss": loss,
        "tokens_per_second": truth["speed"] * (1 + 0.01 * draw.gauss(0, 1)),
        "examples_per_second": truth["speed"] / 60,
        "peak_memory_bytes": int(truth["memory"] * (1 + 0.003 * draw.gauss(0, 1))),
        "predicted_peak_memory_bytes": int(truth["memory"] * 1.03),
        "trainable_parameters": int(truth["parameters"]),
        "total_parameters": 139_399_488,
        "wall_seconds": 130_000 / truth["speed"] * (1 + 0.01 * draw.gauss(0, 1)),
        "steps": 200,
        "kept_step": 180 if draw.random() < 0.3 else 200,
        "versions": {"rankwise": "0.1.0"},
        "device": {"type": "cpu", "name": "x86_64", "dtype": "bfloat16", "threads": 2},
        "warnings": [],
        "status": "finished",
    }
    (place / "run.json").write_text(json.dumps(record), encoding="utf-8")
    tasks = {"e2e": _evaluate(place, truth["bleu"], draw, hostile)} if phase == "final" else {}
    return {
        **record,
        "id": place.name,
        "method": name,
        "seed": seed,
        "learning_rate": rate,
        "phase": phase,
        "status": "finished",
        "alone": True,
        "error": None,
        "folder": f"runs/{place.name}",
        "tasks": tasks,
        "adapter_bytes": 19_600_000,
    }


def _write_metrics(place: Path, loss: float, draw: random.Random) -> None:
    lines: list[Mapping[str, float]] = [{"step": 0, "eval_loss": 2.5965}]
    for step in range(10, 201, 10):
        here = loss + 1.2 * math.exp(-step / 30)
        lines.append({"step": step, "loss": here + 0.06 * draw.gauss(0, 1), "learning_rate": 2e-4 * (1 - step / 200)})
        if step % 20 == 0:
            lines.append({"step": step, "eval_loss": loss + 1.25 * math.exp(-step / 28)})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _evaluate(place: Path, bleu: float | None, draw: random.Random, hostile: bool) -> dict[str, Any]:
    at = place / "evaluation" / "e2e"
    at.mkdir(parents=True)
    rows = [_example(index, bleu, draw, hostile) for index in range(EXAMPLES)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (at / "predictions.jsonl").write_text(text, encoding="utf-8")
    value = 4.1 if bleu is None else bleu + 0.4 * draw.gauss(0, 1)
    result = {
        "task": "e2e",
        "model": "demo",
        "adapter": None if bleu is None else str(place),
        "metrics": {"BLEU": value, "ROUGE-L": value + 6, "CIDEr": value / 28},
        "primary": "BLEU",
        "higher_is_better": {"BLEU": True, "ROUGE-L": True, "CIDEr": True},
        "standard_errors": {"BLEU": 0.6, "ROUGE-L": 0.5, "CIDEr": None},
        "count": EXAMPLES,
        "settings": {"max_new_tokens": 60},
        "data_sha256": "0d1f0e",
        "versions": {"sacrebleu": "2.5.1"},
        "wall_seconds": 12.5,
        "examples": "predictions.jsonl",
    }
    (at / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return result


NAMES = ("Blue Spice", "Giraffe", "The Cricketers", "The Mill", "The Phoenix", "The Punter")


def _example(index: int, bleu: float | None, draw: random.Random, hostile: bool) -> dict[str, Any]:
    name = HOSTILE[index % len(HOSTILE)] if hostile else NAMES[index % len(NAMES)]
    prompt = f"name[{name}], eatType[pub], food[Fast food], priceRange[£20-25], area[riverside], near[Café {index}]\n"
    good = f"{name} is a fast food pub at the riverside near Café {index}. Its prices are £20-25."
    bad = "What is the most popular restaurant in the city?" if index % 7 else good
    tuned = good if draw.random() < 0.8 else f"{name} is a pub near Café {index}."
    score = {bad: 3.5, good: 71.0}
    text = bad if bleu is None else tuned
    if bleu is not None and index % 11 == 5:
        text = "name name name name name"
    return {
        "id": f"e2e-{index}",
        "cluster": None,
        "prompt": prompt,
        "prediction": text,
        "references": [good, f"At the riverside near Café {index} there is {name}, a pub with fast food."],
        "scores": {"BLEU": 1.2 if text.startswith("name name") else score.get(text, 38.0 + index / 10)},
    }


def _conclusions(folder: Path, methods: Sequence[str], runs: Sequence[Any]) -> dict[str, Any]:
    """As the comparison itself draws them."""
    better, scores = metrics_of(runs), results.scores_by_metric(folder, methods, runs)
    figures = {
        name: {
            **results.method_figures(name, runs, scores, better),
            "learning_rate": 2e-4,
            "learning_rate_at_edge": name == "qdora",
            "serving": SERVED[name.endswith("dora")],
            "skipped": None,
        }
        for name in methods
    }
    spreads = Spreads(scores["eval_loss"], metric="eval_loss", margin=0.01)
    found: Any = results.conclusions(figures, scores, better, spreads, {})
    best = f"{found['recommendation']['method']}-lr0.0002-seed{min(run['seed'] for run in runs)}"
    command = "rankwise train --config recommended.yaml --output runs/final"
    found["recommendation"] |= {
        "config": "recommended.yaml",
        "command": command,
        "run": best,
        "adapter": f"runs/{best}",
    }
    return found


def _empty(*, failed: int = 0, skipped: str | None = None) -> dict[str, Any]:
    figures = ("learning_rate", "tokens_per_second", "peak_memory_bytes", "wall_seconds")
    more = ("predicted_peak_memory_bytes", "trainable_parameters", "adapter_bytes", "verdict", "retained")
    return {
        **{key: {} for key in ("mean", "interval", "per_seed", "higher_is_better", "ranges", "costs")},
        **dict.fromkeys((*figures, *more)),
        "seeds": 0,
        "failed": failed,
        "learning_rate_at_edge": False,
        "alone": True,
        "serving": [],
        "skipped": skipped,
    }


def _search(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = min(run["seed"] for run in runs)
    tried = [
        {
            "learning_rate": run["learning_rate"],
            "metric": "eval_loss",
            "value": run["eval_loss"],
            "steps": 200,
            "run": run["id"],
        }
        for run in sorted(runs, key=lambda run: run["learning_rate"])
        if run["method"] == name and run["seed"] == first and "eval_loss" in run
    ]
    return {"tried": tried, "chosen": 2e-4, "at_edge": name == "qdora"}


def _failed(seed: int) -> dict[str, Any]:
    return _without_record("full", seed, "failed", "RW550", "the memory of the device is full; lower --batch-size.")


def _skipped(seed: int) -> dict[str, Any]:
    return _without_record("prefix", seed, "skipped", "RW571", "it needs the package peft.")


def _without_record(method: str, seed: int, status: str, code: str, message: str) -> dict[str, Any]:
    return {
        "id": f"{method}-lr0.0001-seed{seed}",
        "method": method,
        "seed": seed,
        "learning_rate": 1e-4,
        "phase": "final",
        "status": status,
        "alone": True,
        "error": {"code": code, "message": message},
        "folder": f"runs/{method}-lr0.0001-seed{seed}",
        "tasks": {},
        "adapter_bytes": None,
    }
