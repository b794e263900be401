"""Processor seconds that a model takes for lm-evaluation-harness' requests: behind our engine, and behind HFLM.

    python benchmarks/harness.py TASK=FILE [TASK=FILE ...] [--limit 64] [--shots 0] [--batch 16] [--rounds 3]

One loaded model, the same requests, dtype and number of rows in a batch; both sides in every round, medians. Processor
time is that of all threads, and a busy machine does not stretch it: set OMP_NUM_THREADS=1 where it is busy. FILE has
rows as `rankwise evaluate --task TASK --data FILE` reads them; with --shots N its last rows are the worked examples.
A task that writes answers is timed in the same way. Prints a table; writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import results
import timing

from rankwise.data.files import read_file
from rankwise.evaluation.engine import Engine, LoadOptions, load_as_trained
from rankwise.evaluation.harness_model import EngineLM
from rankwise.evaluation.record import Responses
from rankwise.evaluation.tasks.harness import HarnessTask

TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
# Of a log-likelihood, summed over the tokens of an answer. HFLM rounds each token's to the dtype of the model.


def requests_of(name: str, file: str, limit: int, shots: int, folder: Path) -> list[Any]:
    records = [dict(record) for _, record in read_file(Path(file)).records]
    if len(records) < limit + shots:
        raise SystemExit(f"{file} has {len(records)} rows; --limit and --shots ask for {limit + shots}.")
    rows = {"data": records[:limit], "fewshot_data": records[len(records) - shots :] if shots else None}
    options: dict[str, str | None] = {}
    for part, chosen in rows.items():
        path = folder / f"{name}-{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen or ()), encoding="utf-8")
        options[part] = None if chosen is None else str(path)
    task = HarnessTask(name, **options, num_fewshot=shots, limit=None)  # type: ignore[arg-type]
    [built] = task.tasks.values()
    built.set_config(key="num_fewshot", value=shots)
    built.set_fewshot_seed(seed=1234)
    with contextlib.redirect_stderr(io.StringIO()):
        built.build_all_requests()
    return list(built.instances)


def timed(name: str, engine: Engine, requests: list[Any], rounds: int) -> tuple[float, float, int]:
    """Median seconds of ours and of HFLM's, and how many answers differ."""
    from lm_eval.models.huggingface import HFLM

    answers: dict[str, list[Any]] = {}
    kind = requests[0].request_type
    theirs = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=engine.batch_size)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model = EngineLM(engine, Responses(Path(folder)), lambda done, total: None)
            answers["ours"] = getattr(model, kind)(requests)

    def hflm() -> None:
        answers["HFLM"] = getattr(theirs, kind)(requests, disable_tqdm=True)

    seconds: dict[str, list[float]] = {"ours": [], "HFLM": []}
    for _ in range(rounds):
        for side, call in (("ours", ours), ("HFLM", hflm)):
            start = time.process_time()
            call()
            seconds[side].append(time.process_time() - start)
    medians = timing.medians(seconds)
    allowed = TOLERANCE[str(engine.model.dtype).removeprefix("torch.")]
    different = sum(
        a != b if isinstance(a, str) else abs(a[0] - b[0]) > allowed
        for a, b in zip(answers["ours"], answers["HFLM"], strict=True)
    )
    return medians["ours"], medians["HFLM"], different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="+", help="TASK=FILE")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    parser.add_argument("--limit", type=int, default=64, help="questions of each task")
    parser.add_argument("--shots", type=int, default=0, help="worked examples in front of each")
    parser.add_argument("--batch", type=int, default=16, help="rows in a batch, on both sides")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    loaded = load_as_trained(given.model, (), LoadOptions(dtype=given.dtype))
    engine = Engine(model=loaded.model, tokenizer=loaded.tokenizer, batch_size=given.batch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, _, file in (item.partition("=") for item in given.task):
            requests = requests_of(name, file, given.limit, given.shots, Path(folder))
            ours, hflm, different = timed(name, engine, requests, given.rounds)
            numbers = (results.number(ours, 1), results.number(hflm, 1), results.number(hflm / ours, 2))
            rows.append([name, str(given.shots), str(len(requests)), *numbers, str(different)])
    print(f"`{results.command()}`\n")
    headings = ["task", "examples", "requests", "ours, s", "HFLM, s", "times as fast", "answers that differ"]
    print("\n".join(results.table(headings, rows)))


if __name__ == "__main__":
    main()
