"""Stands for `rankwise train` and for measuring: the same files and exit codes, in a fraction of a second.

A method called `dies` is killed, `refuses` cannot run here, `diverges` fails at its second step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from operator import mul
from pathlib import Path
from typing import Any

import yaml

from rankwise.records import METRICS_FILE, RunRecord, load_record, write_json

STEPS = 6
STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
LOSS = {"lora": 2.0, "dora": 2.0, "full": 1.5}
# What a method loses of the rows of --retain.
LOST = {"lora": 0.001, "dora": 0.001, "full": 0.3}


def main(arguments: list[str]) -> int:
    if code := os.environ.get("FAKE_STOPPED_CODE"):
        signal.signal(signal.SIGINT, lambda *_: os._exit(int(code)))
    if arguments[0] != "train":
        job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        if "runs" not in job:
            measure(job)
        return 0
    settings = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8"))
    return train(settings, resume="--resume" in arguments)


def train(settings: dict[str, Any], *, resume: bool) -> int:
    folder, method, seed = Path(settings["output"]), settings["method"], settings["seed"]
    if (folder / "run.json").exists() != resume:
        return refuse("RW502", "RunError", "the folder and --resume do not fit")
    if method == "prefix":
        return refuse("RW181", "ConfigError", "not on this model")
    if settings["max-length"] == 2:
        return refuse("RW219", "DataError", "no row is short enough")
    folder.mkdir(parents=True, exist_ok=True)
    record = (
        load_record(folder)
        if resume
        else RunRecord(method=method, seed=seed, settings={k.replace("-", "_"): v for k, v in settings.items()})
    )
    record.save(folder)
    with open(folder.parents[1] / "started.txt", "a", encoding="utf-8") as log:
        log.write(f"{folder.name}\n")
    if str(settings["learning-rate"]).startswith("auto:"):
        found_rate(record, [float(rate) for rate in settings["learning-rate"].removeprefix("auto:").split(",")])
        record.save(folder)
    for step in range(len(list(folder.glob("step-*"))), STEPS):
        time.sleep(STEP_SECONDS)
        if method == "bottleneck" and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if method == "qdora" and step == 1:
            return refuse("RW530", "RunError", "the loss is nan at step 2")
        with open(folder / METRICS_FILE, "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps({"step": step + 1, "loss": 3.0, "train_seconds": 0.5 * (step + 1)}) + "\n")
        (folder / f"step-{step}").touch()
    away = abs(record.settings["learning_rate"] - 2e-4) * 100
    record.eval_loss = LOSS.get(method, 2.5) + away + random.Random(seed).gauss(0, 0.01)
    record.status, record.steps, record.wall_seconds = "finished", STEPS, 60.0
    record.device = {"name": "a machine", "type": "cpu", "dtype": "float32", "threads": 1}
    record.peak_memory_bytes, record.tokens_per_second, record.trainable_parameters = 10**9, 100.0, 10
    record.save(folder)
    print(json.dumps({"output": str(folder)}))
    return 0


def found_rate(record: RunRecord, rates: list[float]) -> None:
    """As a search by halving leaves it: two steps of each rate, then six of the two best."""
    ranked = sorted(rates, key=lambda rate: abs(rate - 2e-4))
    trials: list[Any] = [{"learning_rate": rate, "steps": 2, "loss": 2.5 + abs(rate - 2e-4)} for rate in rates]
    trials += [{"learning_rate": rate, "steps": 6, "loss": 2.2 + abs(rate - 2e-4)} for rate in ranked[:2]]
    record.rate_search = {"chosen": ranked[0], "budget": 1.0, "rows": 4, "seconds": 1.0, "trials": trials}
    record.settings |= {"learning_rate": ranked[0], "budget": None}


def measure(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    write_losses(folder, "perplexity", 3.0 if job["method"] is None else load_record(folder).eval_loss)
    if job["retain"] is not None:
        write_losses(folder, "retained", 2.0 * (1 + LOST.get(job["method"], 0.0)))
    for task in job["tasks"]:
        better = {"accuracy": True}
        found = {"task": task, "primary": "accuracy", "metrics": {"accuracy": 50.0}, "higher_is_better": better}
        (folder / "evaluation" / task).mkdir(exist_ok=True)
        write_json(folder / "evaluation" / task / "result.json", found)


def write_losses(folder: Path, task: str, center: float) -> None:
    place = folder / "evaluation" / task
    place.mkdir(parents=True, exist_ok=True)
    draw = random.Random(str(folder.name))
    losses = [center + 0.3 * (index - 4.5) + draw.gauss(0, 0.01) for index in range(10)]
    tokens = [3 + index for index in range(10)]
    texts = {"prompt": "", "prediction": ""}
    lines = [
        {"id": str(index), **texts, "cluster": f"text {index // 2}", "scores": {"loss": loss, "tokens": tokens[index]}}
        for index, loss in enumerate(losses)
    ]
    (place / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "task": task,
        "primary": "loss",
        "count": len(losses),
        "examples": "predictions.jsonl",
        "metrics": {"loss": sum(map(mul, losses, tokens)) / sum(tokens)},
        "higher_is_better": {"loss": False},
    }
    write_json(place / "result.json", result)


def refuse(code: str, kind: str, message: str) -> int:
    print(json.dumps({"error": {"code": code, "kind": kind, "message": message}}))
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
