"""The runs of the table, and what is kept of each."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.errors import RunError
from rankwise.foreign import JsonObject, read_json
from rankwise.records import write_bytes, write_json
from rankwise_article.bleu_nist import MtevalStatistics
from rankwise_article.e2e_scores import ON_JAVA, score_e2e

# What a run's record keeps of ``run.json``.
KEPT = (
    "method", "seed", "status", "steps", "train_loss", "initial_eval_loss", "eval_loss", "trainable_parameters",
    "total_parameters", "frozen_bytes", "peak_memory_bytes", "predicted_peak_memory_bytes", "versions", "device",
)  # fmt: skip
COUNTS = ("matches", "counts", "information", "closest", "reference_words", "references")
# Speed is the median over rounds, in which the methods take turns, of so many steps.
ROUNDS, TIMED_STEPS, SPEED = 3, 16, "speed.json"
TRAIN, DEV, TEST = "trainset.csv", "devset.csv", "testset_w_refs.csv"


def unfinished(state: Path, settings: JsonObject) -> list[tuple[str, int]]:
    pairs = [(method, seed) for seed in settings["seeds"] for method in settings["methods"]]
    return [(method, seed) for method, seed in pairs if not (state / "runs" / f"{method}-{seed}").is_dir()]


def carry_out(state: Path, settings: JsonObject, data: Path, work: Path, method: str, seed: int) -> None:
    rows = train_rows(data / TRAIN, settings["rows"], work)
    rate = _rate(state, settings, rows, data, work, method)
    run, answers = work / f"{method}-{seed}", work / f"{method}-{seed}-answers"
    steps = -(-settings["rows"] // settings["train"]["batch_size"])
    train_by(settings, method, rows, data, run, seed=seed, eval_steps=steps, learning_rate=rate)
    tuned = {"model" if method == "full" else "adapter": run}
    _rankwise("evaluate", **tuned, task="e2e", data=data / TEST, output=answers)
    _keep(run, answers / "e2e", state / "runs" / f"{method}-{seed}")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def measure_speeds(state: Path, settings: JsonObject, data: Path, work: Path) -> None:
    """Write the training examples of each method a second; nothing else may run meanwhile."""
    rows, run = train_rows(data / TRAIN, settings["rows"], work), work / "timed"
    found: dict[str, list[float]] = {}
    short = {"seed": 0, "max_steps": TIMED_STEPS, "eval_steps": TIMED_STEPS, "eval_limit": 8}
    for method in [*settings["methods"]] * ROUNDS:
        train_by(settings, method, rows, data, run, **short)
        record = read_json(run / "run.json")
        found.setdefault(method, []).append(record["examples_per_second"])
        shutil.rmtree(run)
    speed = {method: statistics.median(speeds) for method, speeds in found.items()}
    device = {name: record["device"][name] for name in ("name", "threads")}
    write_json(state / SPEED, {"examples_per_second": speed, "device": device})


def train_rows(file: Path, count: int, work: Path) -> Path:
    """``count`` rows of ``file``, spread evenly over it, as a file of their own."""
    work.mkdir(parents=True, exist_ok=True)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header, *rows = csv.reader(lines)
    chosen = work / f"train-{count}.csv"
    with chosen.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([header, *(rows[number * len(rows) // count] for number in range(count))])
    return chosen


def _rate(state: Path, settings: JsonObject, rows: Path, data: Path, work: Path, method: str) -> float:
    """The rate of the method's runs. Searched once, and kept in ``STATE/rates.json``."""
    search, kept = settings["search"], state / "rates.json"
    method = search["shared"].get(method, method)
    rates = search["rates"][method]
    losses = read_json(kept) if kept.is_file() else {}
    tried = losses.setdefault(method, {})
    for rate in rates:
        if f"{rate:.1e}" not in tried:
            run, steps = work / f"{method}-rate-{rate:.1e}", search["steps"]
            train_by(settings, method, rows, data, run, seed=0, eval_steps=steps, max_steps=steps, learning_rate=rate)
            tried[f"{rate:.1e}"] = read_json(run / "run.json")["eval_loss"]
            write_json(kept, losses)
            shutil.rmtree(run)
    return chosen_rate(rates, tried, search["margin"])


def chosen_rate(rates: Sequence[float], losses: Mapping[str, float], margin: float) -> float:
    """The default, which comes first, unless another rate's loss is lower by more than ``margin``."""
    best = min(rates, key=lambda rate: losses[f"{rate:.1e}"])
    return best if losses[f"{best:.1e}"] < (1 - margin) * losses[f"{rates[0]:.1e}"] else rates[0]


def train_by(settings: JsonObject, method: str, rows: Path, data: Path, run: Path, **options: object) -> None:
    if (run / "run.json").is_file() and read_json(run / "run.json")["status"] == "finished":
        return
    # A row of another name, as lora-int8, gives its method.
    given = {"method": method, **settings["train"], **settings["methods"][method], **options}
    started = {"resume": True} if any(run.glob("checkpoints/step-*")) else {"overwrite": True}
    _rankwise("train", data=rows, eval_data=data / DEV, output=run, **given, **started)


def _rankwise(command_name: str, **options: object) -> None:
    command = [sys.executable, "-m", "rankwise", command_name]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [] if value is None else [flag] if value is True else [flag, str(value)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RunError("RA262", f"`{' '.join(command[1:])}` ended with {done.returncode}; its last lines say why.")


def _keep(run: Path, answers: Path, folder: Path) -> None:
    """Write the folder of a finished run, whole or not at all."""
    with (answers / "predictions.jsonl").open(encoding="utf-8") as lines:
        examples = [json.loads(line) for line in lines]
    texts = [example["prediction"] for example in examples]
    scores = score_e2e(texts, [example["references"] for example in examples])
    record = read_json(run / "run.json")
    kept = {name: record[name] for name in KEPT}
    kept["settings"] = {name: record["settings"][name] for name in ("r", "lora_alpha", "batch_size", "learning_rate")}
    kept["data_sha256"] = {"train": record["data"]["train"]["sha256"]}
    kept["scores"] = {name: round(value, 6) for name, value in scores.metrics.items() if value is not None}
    unready = folder.with_name(f".{folder.name}")
    unready.mkdir(parents=True, exist_ok=True)
    write_json(unready / "run.json", kept)
    write_bytes(unready / "outputs.txt", "".join(f"{text}\n" for text in texts).encode())
    write_bytes(unready / "scores.tsv", scores_file(scores.statistics, scores.per_example).encode())
    unready.rename(folder)


def scores_file(counted: MtevalStatistics, per_example: Mapping[str, Sequence[float]]) -> str:
    columns = {name: [f"{value:.4f}" for value in per_example[name]] for name in ON_JAVA}
    for name in COUNTS:
        values = getattr(counted, name)
        for order, column in enumerate(values.reshape(len(values), -1).T, 1):
            columns[f"{name}_{order}" if values.ndim > 1 else name] = [f"{value:.7g}" for value in column]
    lines = [columns.keys(), *zip(*columns.values())]
    return "".join("\t".join(line) + "\n" for line in lines)
