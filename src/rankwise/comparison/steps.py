"""``python -m rankwise.comparison.steps JOB.json``: the steps of a comparison beside training, each in a process.

*Prepare* puts bases into the cache before the first run, so a GGUF file is read and quantized once, also for parallel
runs. *Measure* loads a finished run once, and measures the loss of every evaluation row, the tasks, and some answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.acceleration.generation import Decoding, Prompt
from rankwise.comparison.inputs import make_tasks, own_task
from rankwise.comparison.stages import PERPLEXITY
from rankwise.config import TrainSettings
from rankwise.data import Rows, read_template
from rankwise.data.encoding import RowEncoder
from rankwise.data.rows import Row
from rankwise.disk import coded_error, hold
from rankwise.errors import RankwiseError, RankwiseWarning, RunError, is_out_of_memory, out_of_memory
from rankwise.evaluation.engine import Engine, needed_tokenizer
from rankwise.evaluation.record import Opened, open_folder
from rankwise.evaluation.retained import retained_task
from rankwise.evaluation.run import answer_task
from rankwise.evaluation.tasks.base import Task, writer
from rankwise.foreign import Fields
from rankwise.labels import SEVERAL, SINGLE, Labels
from rankwise.methods import method_of, method_type
from rankwise.models import fetch_model
from rankwise.models.load import answer_room, load_tokenizer
from rankwise.models.prepared import needs_preparation
from rankwise.objectives import OBJECTIVES
from rankwise.records import RunRecord, load_record
from rankwise.reports.comparison import EVALUATION_FOLDER
from rankwise.training.parts import Base, part_of
from rankwise.training.setup import load_for_training, quantization_for

# Number of evenly spread rows to which the model's answers are recorded, for people to read.
ANSWERED = 12
# Number of tokens of a plain text from which the model continues.
TEXT_PROMPT = 16
ANSWER_TOKENS = 32


def measure(job: Fields) -> None:
    """Write ``evaluation/TASK`` into the run's folder for each task.

    ``job``: folder, model, cache, method (None for the base), dtype, device, trust_remote_code, revision; eval_data,
    objective, beta, prompt_column, completion_column, max_length, eval_limit, chat_template; retain;
    tasks, task_data, task_limit; labels, if the objective has some. It also holds the hashes of the tasks'
    ``questions``, by which the runner sees that they changed.
    """
    torch.manual_seed(0)
    with hold(Path(job["folder"])):
        _measure(job)


def _measure(job: Fields) -> None:
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    labels = job.get("labels") and Labels(tuple(job["labels"]["names"]), job["labels"]["problem"])
    own = own_task(job["eval_data"], job, labels)
    tasks = make_tasks(job["tasks"], data=job["task_data"], limit=job["task_limit"])
    rows = own.rows
    # Rewards are relative to the base, so the base has none.
    is_reference = job["method"] is None and OBJECTIVES[job["objective"]].of_preferences
    retained = []
    if job["retain"] is not None:
        retained = [retained_task(job["retain"], max_length=job["max_length"], eval_limit=job["eval_limit"])]
    asked = [*([] if is_reference else [own]), *retained, *tasks]
    # Before anything can fail, results of other settings go: they would pass for those of these.
    places = {task.name: _open(task, folder) for task in asked}
    template = read_template(Path(job["chat_template"])) if job["chat_template"] else None
    answers: dict[str, tuple[str, bool]] = {}
    if labels is not None:
        engine = _engine(job, *_load_labels(job, rows, labels), None)
    else:
        engine = _engine(job, *load_run(job), template)
        shown = range(0, len(rows), max(1, len(rows) // ANSWERED))[:ANSWERED]
        encoder = engine.encoder(rows)
        prompts = _prompts(engine, encoder, [rows[number] for number in shown], is_text=rows.kind == "text")
        answers = dict(zip(map(str, shown), _answers(engine, prompts, encoder.stop_ids())))
    adapter = None if job["method"] is None else folder
    for task in asked:
        given = answers if task.name == PERPLEXITY else {}
        answer_task(task, engine, places[task.name], model=job["model"], adapter=adapter, answers=given)


def _engine(job: Fields, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Engine:
    """The engine of the evaluation, with the operators that the run used in its evaluations."""
    if job["method"] is None:
        return Engine(model=model, tokenizer=tokenizer, template=template)
    record = load_record(Path(job["folder"]))
    fast = record.settings.get("fast") is not False and not method_of(record.method).is_guest
    dtype = getattr(torch, record.device["dtype"])
    is_rounded = method_of(record.method).trains_all and dtype != torch.float32
    return Engine(
        model=model, tokenizer=tokenizer, template=template, trained_fast=fast, autocast=dtype if is_rounded else None
    )


def _open(task: Task, folder: Path) -> Opened:
    """Open the folder of a task. Outdated results, for which this step was started, are removed."""
    place = folder / EVALUATION_FOLDER / task.name
    settings = {"task": task.name, "data_sha256": task.data_sha256, "task_settings": task.describe()}
    try:
        return open_folder(place, settings, overwrite=False)
    except RunError as error:
        if error.code != "RW570":
            raise
        return open_folder(place, settings, overwrite=True)


def _load_labels(job: Fields, rows: Rows, labels: Labels) -> tuple[Any, PreTrainedTokenizerBase]:
    """A run's model with its head; for the base, which has none, what answers every row alike."""
    if job["method"] is not None:
        return load_run(job, labels)
    remote = {name: job[name] for name in ("revision", "trust_remote_code")}
    tokenizer = needed_tokenizer(load_tokenizer(job["model"], **remote), job["model"])
    targets = [labels.number(row.target) for row in rows if row.target is not None]
    return Constant(targets, labels), tokenizer


class Constant(nn.Module):
    """The best constant answer to rows of these targets, in the place of a model: the labels' frequencies, or the
    mean of numbers."""

    def __init__(self, targets: Sequence[Any], labels: Labels) -> None:
        super().__init__()
        y = torch.tensor(targets)
        if labels.problem == SINGLE:
            z = (torch.bincount(y, minlength=len(labels.names)) / len(y)).log()
        else:
            z = y.mean(0).logit(eps=1e-6) if labels.problem == SEVERAL else y.mean(0, keepdim=True)
        self.z, self.device = z, z.device

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.z.expand(len(input_ids), -1))


def load_run(job: Fields, labels: Labels | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(trained model of a run in evaluation mode, tokenizer); the base where the job has no method. ``labels``: of the
    model's head."""
    from rankwise.adapters import load_adapter
    from rankwise.adapters.folder import quantization_of
    from rankwise.models import choose_device, fetch_model
    from rankwise.models.prepared import load_prepared

    folder, method = Path(job["folder"]), job["method"]
    record = load_record(folder) if method is not None else None
    choice = choose_device(job["device"], job["dtype"])
    whole = method is not None and method_of(method).trains_all
    source = fetch_model(
        str(folder) if whole else job["model"],
        revision=None if whole else job["revision"],
        trust_remote_code=job["trust_remote_code"],
    )
    model, tokenizer = load_prepared(
        dataclasses.replace(source, labels=labels),
        dtype=_dtype(record, choice.dtype),
        device=str(choice.device),
        quantization=quantization_of(folder) if record and not whole else None,
        trust_remote_code=job["trust_remote_code"],
        cache=Path(job["cache"]),
    )
    assert tokenizer is not None, "the run's rows were encoded by it"
    if whole:
        model.requires_grad_(True)
    elif record is not None and method_of(record.method).is_guest:
        method_type(record.method).load(model, folder)
    elif record is not None:
        load_adapter(model, folder, trainable=False)
    return model.eval(), tokenizer


def _dtype(record: RunRecord | None, usual: torch.dtype) -> torch.dtype | None:
    """The dtype of the base in training; float32 after full fine-tuning, since 16 bits would round updates away."""
    if record is None:
        return usual
    return None if method_of(record.method).trains_all else getattr(torch, record.device["dtype"])


def _prompts(engine: Engine, encoder: RowEncoder, chosen: Sequence[Row], *, is_text: bool) -> list[Prompt]:
    """The prompts of the ``chosen`` rows, or the beginnings of plain texts."""
    if is_text:
        return [Prompt(tuple(row.ids[:TEXT_PROMPT])) for row in encoder.encode(chosen)]
    return [Prompt(ids) for ids in engine.prompt_ids(encoder, chosen)]


def _answers(engine: Engine, prompts: Sequence[Prompt], ends: set[int]) -> list[tuple[str, bool]]:
    """The greedy answers to ``prompts``, generated in batches, each with whether the limit of tokens ended it.

    ``ends``: tokens that end an answer in the rows.
    """
    answers = [("", False)] * len(prompts)
    limits = [answer_room(engine.model, len(prompt.ids), ANSWER_TOKENS) for prompt in prompts]
    for limit in set(limits):
        numbers = [number for number, own in enumerate(limits) if own == limit]
        asked, decoding = (
            [prompts[number] for number in numbers],
            Decoding(max_new_tokens=limit, stop_ids=engine.stop_ids(ends)),
        )
        write = writer(engine, asked, decoding)
        for batch in engine.batches(asked, decoding):
            for index, (text, is_cut) in zip(batch, write(batch)):
                answers[numbers[index]] = text.strip(), is_cut
    return answers


def answering(work: Callable[[], None]) -> int:
    """Run ``work``, and print the JSON document of its error. Exit codes and errors are those of the command line."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", RankwiseWarning)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            work()
    except Exception as error:
        coded: RankwiseError | None = out_of_memory(error) if is_out_of_memory(error) else coded_error(error)
        if isinstance(error, RankwiseError):
            coded = error
        if coded is None:
            raise
        told = {"code": coded.code, "kind": type(coded).__name__, "message": coded.message}
        print(json.dumps({"error": told}))
        return coded.exit_code
    return 0


def prepare_steps(job: Fields) -> None:
    """Fill the cache. ``job["runs"]``: the settings of one run of each method."""
    runs = [TrainSettings.model_validate(run) for run in job["runs"]]
    # Runs that start from the same base in the same dtype share it.
    rows = [(method_of(given.method), given) for given in reversed(runs)]
    for given in {(row.four_bits, row.trains_all): given for row, given in rows}.values():
        source = fetch_model(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
        if OBJECTIVES[given.objective].of_labels:
            source = dataclasses.replace(source, labels=Labels(("0", "1")))
        quantization = quantization_for(given.method, given, given.model)
        if needs_preparation(source, quantization):
            load_for_training(part_of(Base, given, quantization=quantization), source)


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    if "runs" in job:
        return answering(lambda: prepare_steps(job))
    return answering(lambda: measure(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
