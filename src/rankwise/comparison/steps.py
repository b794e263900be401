"""``python -m rankwise.comparison.steps JOB.json``: the steps of a comparison beside training, each in a process.

*Prepare* puts bases and encoded rows into the cache before the first run, so a GGUF file is read, quantized and its
data tokenized once, also for parallel runs. *Measure* loads a finished run once, and measures the loss of every
evaluation row, the tasks, some answers, the effect of merging, and the relative change of each weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.acceleration.generation import Decoding, Prompt
from rankwise.adapters.saving import labels_of
from rankwise.comparison.inputs import make_tasks, own_task
from rankwise.comparison.stages import FACTS_FILE, PERPLEXITY
from rankwise.compat.transformers import heads_of_labels
from rankwise.config import METHODS, TrainSettings, is_own
from rankwise.data import Rows, read_template
from rankwise.data.encoding import RowEncoder
from rankwise.data.preferences import PREFERENCE_FORMATS
from rankwise.data.rows import Row
from rankwise.disk import coded_error, hold, is_of_device
from rankwise.errors import RankwiseError, RankwiseWarning, RunError, is_out_of_memory
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.loading import needed_tokenizer
from rankwise.evaluation.record import Opened, open_folder
from rankwise.evaluation.retained import retained_task
from rankwise.evaluation.run import answer_task
from rankwise.evaluation.tasks.base import Task, writer
from rankwise.evaluation.tasks.labels import Constant
from rankwise.export.verify import is_more_than_rounding, logits, rounding_cost
from rankwise.foreign import Fields, JsonObject
from rankwise.labels import Labels
from rankwise.models import fetch_model
from rankwise.models.load import answer_room, load_tokenizer
from rankwise.models.prepared import needs_preparation
from rankwise.records import RunRecord, load_record, write_json
from rankwise.reports.comparison import EVALUATION_FOLDER, MergedCheck
from rankwise.training.setup import encode_data, load_for_training, quantization_for, read_data

# Number of evenly spread rows to which the model's answers are recorded, for people to read.
ANSWERED = 12
# Number of these rows that are answered one at a time, before and after merging, to measure the speed.
TIMED = 2
# Number of tokens of a plain text from which the model continues.
TEXT_PROMPT = 16
ANSWER_TOKENS = 32
# Number of rows whose logits are compared between the merged and the unmerged model.
CHECKED_ROWS = 4


def measure(job: Fields) -> JsonObject:
    """Write ``evaluation/TASK`` and ``measured.json`` into the run's folder. Returns the content of measured.json.

    ``job``: folder, model, cache, method (None for the base), dtype, device, trust_remote_code, revision; eval_data,
    objective, beta, prompt_column, completion_column, max_length, eval_limit, chat_template; retain; merged_check;
    tasks, task_data, task_limit; labels, where the objective has some. It also holds the hashes of the tasks'
    ``questions``, by which the runner sees that they changed.
    """
    torch.manual_seed(0)
    with hold(Path(job["folder"])):
        return _measure(job)


def _measure(job: Fields) -> JsonObject:
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    labels = job.get("labels") and Labels(tuple(job["labels"]["names"]), job["labels"]["problem"])
    own = own_task(job["eval_data"], job, labels)
    tasks = make_tasks(job["tasks"], data=job["task_data"], limit=job["task_limit"])
    rows = own.rows
    # Rewards are relative to the base, so the base has none.
    is_reference = job["method"] is None and job["objective"] in PREFERENCE_FORMATS
    retained = []
    if job["retain"] is not None:
        retained = [retained_task(job["retain"], max_length=job["max_length"], eval_limit=job["eval_limit"])]
    asked = [*([] if is_reference else [own]), *retained, *tasks]
    # Before anything can fail, results of other settings go: they would pass for those of these.
    places = {task.name: _open(task, folder) for task in asked}
    template = read_template(Path(job["chat_template"])) if job["chat_template"] else None
    prompts: list[Prompt] = []
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
    facts: JsonObject = {"merged": None, "update_norms": None}
    if job["method"] is not None:
        # The bytes of the adapter's file, or of the whole model's files.
        facts["adapter_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        # With room for the two tokens by which its time begins.
        timed = [prompt for prompt in prompts if answer_room(engine.model, len(prompt.ids), ANSWER_TOKENS) > 1]
        facts |= _merge_facts(job, engine, rows, timed[:TIMED])
    write_json(folder / FACTS_FILE, facts)
    return facts


def _engine(job: Fields, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Engine:
    """The engine of the evaluation, with the operators that the run used in its evaluations."""
    if job["method"] is None:
        return Engine(model, tokenizer, template)
    record = load_record(Path(job["folder"]))
    fast = record.settings.get("fast") is not False and record.method in METHODS
    dtype = getattr(torch, record.device["dtype"])
    is_rounded = record.method == "full" and dtype != torch.float32
    return Engine(model, tokenizer, template, trained_fast=fast, autocast=dtype if is_rounded else None)


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


def load_run(job: Fields, labels: Labels | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(trained model of a run in evaluation mode, tokenizer); the base where the job has no method. ``labels``: of the
    model's head."""
    from rankwise.adapters import load_adapter
    from rankwise.adapters.inject import method_type
    from rankwise.adapters.trained_base import quantization_of
    from rankwise.models import choose_device, fetch_model
    from rankwise.models.prepared import load_prepared

    folder, method = Path(job["folder"]), job["method"]
    record = load_record(folder) if method is not None else None
    choice = choose_device(job["device"], job["dtype"])
    whole = method == "full"
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
    elif record is not None and record.method not in METHODS:
        method_type(record.method).load(model, folder)
    elif record is not None:
        load_adapter(model, folder, trainable=False)
    return model.eval(), tokenizer


def _dtype(record: RunRecord | None, usual: torch.dtype) -> torch.dtype | None:
    """The dtype of the base in training; float32 after full fine-tuning, since 16 bits would round updates away."""
    if record is None:
        return usual
    return None if record.method == "full" else getattr(torch, record.device["dtype"])


def _prompts(engine: Engine, encoder: RowEncoder, chosen: Sequence[Row], *, is_text: bool) -> list[Prompt]:
    """The prompts of the ``chosen`` rows, or the beginnings of plain texts."""
    if is_text:
        return [Prompt(tuple(row.ids[:TEXT_PROMPT])) for row in encoder.encode(chosen, TEXT_PROMPT)]
    return [Prompt(ids) for ids in engine.prompt_ids(encoder, chosen)]


def _answers(engine: Engine, prompts: Sequence[Prompt], ends: set[int]) -> list[tuple[str, bool]]:
    """The greedy answers to ``prompts``, generated in batches, each with whether the limit of tokens ended it.

    ``ends``: tokens that end an answer in the rows.
    """
    answers = [("", False)] * len(prompts)
    rooms = [answer_room(engine.model, len(prompt.ids), ANSWER_TOKENS) for prompt in prompts]
    for room in set(rooms):
        numbers = [number for number, its in enumerate(rooms) if its == room]
        asked, decoding = [prompts[number] for number in numbers], Decoding(room, engine.stop_ids(ends))
        write = writer(engine, asked, decoding)
        for batch in engine.batches(asked, decoding):
            for index, (text, is_cut) in zip(batch, write(batch)):
                answers[numbers[index]] = text.strip(), is_cut
    return answers


def _tokens_per_second(engine: Engine, prompts: Sequence[Prompt]) -> float | None:
    """The speed of greedy answers generated one at a time; None without prompts, or where every answer is empty."""
    if not prompts:
        return None
    # The first call of this shape allocates and compiles.
    engine.generator(Decoding(2, engine.stop_ids())).answers(prompts[:1])
    tokens, started = 0, time.perf_counter()
    for prompt in prompts:
        decoding = Decoding(answer_room(engine.model, len(prompt.ids), ANSWER_TOKENS), engine.stop_ids())
        tokens += len(engine.generator(decoding).answers([prompt])[0])
    return tokens / (time.perf_counter() - started) if tokens else None


def _merge_facts(job: Fields, engine: Engine, rows: Rows, prompts: Sequence[Prompt]) -> JsonObject:
    """Merge the adapter in memory. Returns the changes of logits and speed, and the relative change of each weight.
    ``prompts`` are answered to measure the speed.
    """
    if job["method"] == "full":
        return {"merged": None, "update_norms": _full_norms(job, engine.model)}
    if not is_own(job["method"]):
        return {"merged": None, "update_norms": None}
    from rankwise.adapters import merge_adapter

    norms = _adapter_norms(engine.model)
    for head in heads_of_labels(engine.model):
        # It began at random.
        norms.pop(head, None)
    if not job["merged_check"]:
        return {"merged": None, "update_norms": norms}
    before, speed = _logits(engine, rows[:CHECKED_ROWS], job["max_length"]), _tokens_per_second(engine, prompts)
    merge_adapter(engine.model, reversible=False)
    if getattr(engine.model, "hf_quantizer", None) is not None:
        engine.model = engine.model.dequantize()
    after = _logits(engine, rows[:CHECKED_ROWS], job["max_length"])
    difference = max((one - two).abs().max().item() for one, two in zip(before, after))
    rounding = rounding_cost(engine.model, _ids(engine, rows[:CHECKED_ROWS], job["max_length"]))
    merged: MergedCheck = {
        "max_logit_difference": difference,
        "rounding_logit_difference": rounding,
        "is_more_than_rounding": is_more_than_rounding(difference, rounding),
        "generate_tokens_per_second_merged": _tokens_per_second(engine, prompts),
        "generate_tokens_per_second_unmerged": speed,
    }
    return {"merged": merged, "update_norms": norms}


@torch.inference_mode()
def _logits(engine: Engine, rows: Rows, max_length: int) -> list[Tensor]:
    ids = _ids(engine, rows, max_length)
    return [logits(engine.model, one).float().cpu() for one in ids]


def _ids(engine: Engine, rows: Rows, max_length: int) -> list[Tensor]:
    encoded, limit = engine.encoder(rows).encode(rows.items), min(max_length, engine.max_length)
    return [torch.tensor([row.ids[:limit]], device=engine.model.device) for row in encoded]


@torch.no_grad()
def _adapter_norms(model: nn.Module) -> dict[str, float]:
    """The relative change of every adapted weight, merged in float32, since rounding to 16 bits would add to it."""
    from rankwise.adapters.base_layer import dense_weight, with_weight
    from rankwise.adapters.experts import AdaptedExperts, relative_updates
    from rankwise.adapters.layer import AdaptedLayer
    from rankwise.adapters.state import inner_module, wrappers

    norms: dict[str, float] = {}
    for name, wrapper in wrappers(model):
        if isinstance(wrapper, AdaptedExperts):
            norms |= {f"{name}.{leaf}": value for leaf, value in relative_updates(wrapper).items()}
            continue
        W = dense_weight(inner_module(wrapper)).float()
        if isinstance(wrapper, AdaptedLayer):
            assert wrapper.at_work is not None, "the run's adapter is active"
            norms[name] = _relative(wrapper.at_work.merge(with_weight(wrapper.base_layer, W)), W)
        elif hasattr(wrapper.chosen(), "weight"):
            norms[name] = _relative(dense_weight(wrapper.chosen()).float(), W)
    return norms


def _relative(new: Tensor, W: Tensor) -> float:
    """``||W' - W||_F / ||W||_F`` in float32."""
    return float((new - W).norm() / W.norm().clamp_min(1e-30))


@torch.no_grad()
def _full_norms(job: Fields, model: nn.Module) -> dict[str, float]:
    """The relative change of the matrices of a fully fine-tuned model, in the float32 in which it trained."""
    heads = heads_of_labels(model)
    base, _ = load_run({**job, "method": None, "dtype": "float32"}, labels_of(model) if heads else None)
    norms: dict[str, float] = {}
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        # A head of labels began at random.
        is_compared = not isinstance(module, nn.Embedding) and name.partition(".")[0] not in heads
        if isinstance(weight, Tensor) and weight.dim() == 2 and is_compared:
            trained = model.get_submodule(name).get_parameter("weight")
            norms[name] = _relative(*(W.detach().cpu().float() for W in (trained, weight)))
    return norms


def answering(work: Callable[[], JsonObject], doing: str) -> int:
    """Run ``work`` and print its JSON document. Exit codes and errors are those of the command line."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", RankwiseWarning)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            document = work()
    except Exception as error:
        message = f"the memory of the device is full while {doing} ({error}); lower --batch-size."
        coded: RankwiseError | None
        if isinstance(error, RankwiseError):
            coded = error
        else:
            coded = RunError("RW550", message) if is_out_of_memory(error) else coded_error(error)
        if coded is None:
            raise
        told = {"code": coded.code, "message": coded.message, "of_device": is_of_device(error)}
        print(json.dumps({"error": told}))
        return coded.exit_code
    print(json.dumps(document))
    return 0


def prepare(job: Fields) -> JsonObject:
    """Fill the cache. ``job["runs"]``: the settings of one run of each method. Returns the kinds of prepared bases."""
    made: list[str] = []
    # Runs of labels draw their head anew, and nothing of theirs is kept.
    job = {**job, "runs": [run for run in job["runs"] if run["objective"] != "classify"]}
    for given in one_of_each_kind([TrainSettings.model_validate(settings) for settings in job["runs"]]):
        source = fetch_model(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
        if made and not needs_preparation(source, quantization_for(given)):
            continue
        loaded = load_for_training(given)
        # Rows of preferences are not cached.
        if not made and given.objective == "sft":
            encode_data(given, loaded.tokenizer, *read_data(given))
        made.append(given.method)
        del loaded
    return {"prepared": made}


def one_of_each_kind(runs: Sequence[TrainSettings]) -> list[TrainSettings]:
    """One run of each kind of base. Runs that start from the same base in the same dtype share it."""
    kinds: dict[tuple[bool, bool], TrainSettings] = {}
    for given in runs:
        kinds.setdefault((quantization_for(given) is not None, given.method == "full"), given)
    return list(kinds.values())


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    if "runs" in job:
        return answering(lambda: prepare(job), "preparing")
    return answering(lambda: measure(job), "measuring")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
