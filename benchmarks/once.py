"""What it gives to compute nothing twice: rows with a common beginning, and the reference of preferences.

    python benchmarks/once.py prompts demo FOLDER         # 8 rows with 300 tokens in common, and with none
    python benchmarks/once.py reference demo --data ../shared/data/e2e/trainset.csv
    ... --before SRC    # beside the source of another commit: `git worktree add OLD COMMIT`, then OLD/src

Runs are those of the command line, each with a cache of its own, in turn. Rows per second and memory are what a run's
record says; the seconds of an epoch and of a comparison are those of whole processes. Writes a JSON file into
benchmarks/results, and once.md beside it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import preferences
import results

from rankwise.records import load_record

COMMON, OWN, ROWS = 300, 100, 8
WORDS = ["time", "data", "model", "user", "value", "file", "path", "table", "query", "server", "client", "memory"]
GOALS = {"common": 2.2, "apart": 0.98, "memory": 0.5, "epoch": 0.7, "compare": 0.75}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    contenders.silence()
    rows: list[dict[str, Any]] = []
    for model in given.models:
        with contenders.model_folder(model) as folder, tempfile.TemporaryDirectory() as place:
            measure = {"prompts": prompts, "reference": reference}[given.what]
            rows += [{"model": Path(model).name, **row} for row in measure(folder, Path(place), given)]
    result = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "what": given.what,
        "rounds": given.rounds,
        "rows": rows,
    }
    results.publish(
        given.output, "once", result, page, given.name or f"{results.usual_name('once', result)}_{given.what}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prompts", "reference"])
    parser.add_argument("models", nargs="+", help="folders of models, or demo")
    parser.add_argument("--data", type=Path, help="CSV of E2E, with the columns mr and ref; of reference its pairs")
    parser.add_argument("--pairs", type=int, default=128, help="of training; a quarter of it is evaluated on")
    parser.add_argument("--steps", type=int, default=6, help="of a run of prompts")
    parser.add_argument("--products", default="auto", help="of prompts, as of `train`; both sides take the same")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of that many")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison")
    parser.add_argument("--before", type=Path, help="src of another commit, to run the reference with as well")
    parser.add_argument("--name", default="", help="of the JSON file in --output; default: by processor and subject")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args(arguments)
    if given.what == "reference" and given.data is None:
        parser.error("reference needs --data")
    return given


def rankwise(cache: Path, *options: object, source: Path | None = None) -> float:
    """Run the command and return its seconds."""
    more = {} if source is None else {"PYTHONPATH": str(source)}
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **more}
    started = time.monotonic()
    command = [sys.executable, "-m", "rankwise", *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - started


# --- common beginnings ---


def prompts(folder: str, place: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for common in (True, False):
        data = place / f"{common}.jsonl"
        write_chats(data, common=common, count=ROWS * given.steps)
        sides: dict[str, list[Any]] = {"auto": [], "off": []}
        for turn in range(given.rounds):
            for side, records in sides.items():
                output = place / f"{common}-{side}-{turn}"
                options = ("--model", folder, "--data", data, "--batch-size", ROWS, "--max-length", COMMON + 2 * OWN)
                options += ("--products", given.products)
                rankwise(place / "cache", "train", *options, "--share-prompts", side, "--output", output)
                records.append(load_record(output))
        row: dict[str, Any] = {"common": COMMON if common else 0, "own": OWN if common else COMMON + OWN}
        for side, records in sides.items():
            row[side] = {
                "rows_per_second": statistics.median(record.examples_per_second for record in records),
                "peak_memory_bytes": statistics.median(record.peak_memory_bytes for record in records),
                "predicted_peak_memory_bytes": records[0].predicted_peak_memory_bytes,
                "idle_bytes": records[0].idle_bytes,
                "train_loss": records[0].train_loss,
            }
        found.append(row)
    return found


def write_chats(path: Path, *, common: bool, count: int) -> None:
    """Chats of about as many tokens as words, whose system prompt is the same in all or begins otherwise in each."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=number))

    system, lines = words(COMMON - 20), []
    for number in range(count):
        said = {"system": system if common else f"{number} {words(COMMON - 20)}", "user": words(OWN // 2)}
        said["assistant"] = words(OWN // 2 - 20)
        lines.append({"messages": [{"role": role, "content": text} for role, text in said.items()]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# --- the reference ---


def reference(folder: str, place: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    train, held_out = place / "train.jsonl", place / "eval.jsonl"
    pairs = preferences.pairs_of(given.data, given.pairs + given.pairs // 4, 0)
    preferences.write_pairs(train, pairs[given.pairs // 4 :])
    preferences.write_pairs(held_out, pairs[: given.pairs // 4])
    options = ("--model", folder, "--data", train, "--eval-data", held_out, "--objective", "dpo", "--batch-size", 4)
    options += ("--max-length", 256, "--eval-limit", 0)
    found = []
    for name, source in {"now": None, "before": given.before}.items():
        if name == "before" and source is None:
            continue
        seconds = {epochs: [] for epochs in (1, 2)}
        for turn in range(given.rounds):
            for epochs, known in seconds.items():
                # Four evaluations in two epochs.
                every = ("--epochs", epochs, "--eval-steps", max(1, given.pairs // 8))
                output = place / f"{name}-{epochs}-{turn}"
                known.append(
                    rankwise(
                        place / output.name / "cache",
                        "train",
                        *options,
                        *every,
                        "--output",
                        output / "run",
                        source=source,
                    )
                )
        one, two = (statistics.median(known) for known in seconds.values())
        several = ("--methods", "lora,dora,qlora", "--seeds", given.seeds, "--learning-rates", "5e-5", "--epochs", 2)
        whole = rankwise(
            place / f"{name}-cache", "compare", *options, *several, "--output", place / f"{name}-compare", source=source
        )
        found.append({"source": name, "first_epoch": one, "second_epoch": two - one, "compare": whole})
    return found


# --- the table ---


def page(runs: list[results.Run]) -> list[str]:
    lines = ["# Nothing twice", "", "Made by `python benchmarks/once.py`; goals in brackets.", ""]
    for run in runs:
        lines += [
            f"## {run['what']}: {run['machine']['processor']}, {run['machine']['threads']} threads",
            "",
            f"`{run['command']}`, rankwise {run['versions']['rankwise']}",
            "",
        ]
        lines += [line for note in run.get("notes", ()) for line in (note, "")]
        lines += _prompts(run["rows"]) if run["what"] == "prompts" else _reference(run["rows"])
    return lines


def _prompts(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| model | tokens in common + own | rows/s apart | once | ratio | peak MB apart | once | ratio |"]
    lines.append("|" + "---|" * 8)
    for row in rows:
        speeds, peaks = (
            [row[side][name] for side in ("off", "auto")] for name in ("rows_per_second", "peak_memory_bytes")
        )
        goal = GOALS["common" if row["common"] else "apart"]
        memory = f"{peaks[1] / peaks[0]:.2f}" + (f" [{GOALS['memory']}]" if row["common"] else "")
        lines.append(
            f"| {row['model']} | {row['common']} + {row['own']} | {speeds[0]:.3g} | {speeds[1]:.3g} | "
            f"{speeds[1] / speeds[0]:.2f} [{goal}] | {peaks[0] / 1e6:,.0f} | {peaks[1] / 1e6:,.0f} | {memory} |"
        )
    return [*lines, ""]


def _reference(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| model | source | a run of one epoch, s | second epoch, s | compare, s |", "|" + "---|" * 5]
    for row in rows:
        figures = (f"{row[name]:.1f}" for name in ("first_epoch", "second_epoch", "compare"))
        lines.append(f"| {row['model']} | {row['source']} | {' | '.join(figures)} |")
    by_source = {(row["model"], row["source"]): row for row in rows}
    for (model, source), row in by_source.items():
        if source == "now" and (before := by_source.get((model, "before"))):
            epoch, whole = (row[name] / before[name] for name in ("second_epoch", "compare"))
            lines.append(
                f"| {model} | now / before | | {epoch:.2f} [{GOALS['epoch']}] | {whole:.2f} [{GOALS['compare']}] |"
            )
    return [*lines, ""]


if __name__ == "__main__":
    main()
