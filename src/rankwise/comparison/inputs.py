"""What all runs share: the folder with its settings, the data, and the tasks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.comparison.settings import SAME_RUNS, SHARED, CompareSettings
from rankwise.comparison.stages import PERPLEXITY
from rankwise.data import Row, Rows, limited, read_rows, read_template, warn_of_overlap
from rankwise.data.objectives import formats_of, labels_in, unknown_labels
from rankwise.data.readers import EVAL_ROWS
from rankwise.data.rows import check_bad_rows
from rankwise.disk import refuse_links
from rankwise.errors import ConfigError, DataError, ModelError, RunError, one_line
from rankwise.evaluation.record import text_sha256
from rankwise.evaluation.settings import EvaluateSettings, split_data
from rankwise.evaluation.tasks.making import make_task
from rankwise.evaluation.tasks.rows import LabelAnswers, Perplexity, Preference
from rankwise.foreign import Fields, Json, JsonObject, read_json
from rankwise.labels import Labels
from rankwise.lora_config import LoraConfig
from rankwise.methods import method_of
from rankwise.models.device import choose_device
from rankwise.models.source import fetch_model
from rankwise.objectives import OBJECTIVES
from rankwise.options import flag
from rankwise.planning.facts import read_model
from rankwise.records import write_json, write_text
from rankwise.reports.comparison import BEST_FOLDER, RETAINED

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task


SETTINGS_FILE = "settings.json"
# Settings that do not change what is learned, as in a resumed run.
NEUTRAL = {"device", "ignore_plan", "logging_steps", "save_steps", "save_total_limit", "trust_remote_code"}
# The files in a folder before the first run. Hidden files are locks, or left by a killed write.
OURS = {SETTINGS_FILE, "data"}
# The folders of a comparison, without the cache, whose content is never removed.
FOLDERS = ("base", BEST_FOLDER, "cells", "data", "runs")


def check_folder(output: Path) -> None:
    """Raise RunError: RW581 for a folder with files not of a comparison, RW554 for links in the place of folders."""
    if output.exists() and not output.is_dir():
        raise RunError("RW581", f"--output {output} is a file; give a folder.")
    refuse_links(output, FOLDERS)
    if (output / SETTINGS_FILE).is_file() or not output.is_dir():
        return
    foreign = sorted(path.name for path in output.iterdir() if path.name not in OURS and path.name[0] != ".")
    if foreign:
        raise RunError(
            "RW581",
            f"{output} holds files that are not of a comparison ({', '.join(foreign[:5])}); give a new or empty "
            "--output.",
        )


def check_same(output: Path, given: CompareSettings, data: Fields) -> None:
    """Record the settings on which the runs of this folder depend, or compare them with the recorded ones.

    Methods, seeds, learning rates and tasks may be added, since finished runs stay valid. Raises RunError: RW580 with
    every other setting that differs, RW581 if the record cannot be read.
    """
    now = json.loads(json.dumps(_identity(given, data)))
    path = output / SETTINGS_FILE
    if not path.is_file():
        write_json(path, now)
        return
    try:
        before = read_json(path)
        options, digests = before["options"], before["data"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError("RW581", f"cannot read {path}: {one_line(error)}; give a different --output.") from None
    changed = [
        f"{flag(name)} was {options.get(name)!r} and is {value!r}"
        for name, value in now["options"].items()
        if name not in NEUTRAL and options.get(name, value) != value
    ]
    changed += [
        f"the content of {label} differs"
        for label, digest in now["data"].items()
        if digests.get(label, digest) != digest
    ]
    if changed:
        raise RunError(
            "RW580",
            f"the comparison in {output} was started with other settings: {'; '.join(changed)}; give the same ones, "
            "or a different --output.",
        )


def _identity(given: CompareSettings, data: Fields) -> JsonObject:
    options = given.model_dump(mode="json")
    # With --budget, the rates are part of one run, which other rates would change.
    names = ("model", *SAME_RUNS, *SHARED, *(("learning_rates",) if given.budget else ()))
    kept = {name: options[name] for name in names} | {"time": None if given.time is None else "given"}
    content = {"--data": data["train"]["sha256"], "--eval-data": data["eval"]["sha256"]}
    if given.chat_template is not None:
        content["--chat-template"] = hashlib.sha256(read_template(given.chat_template).encode()).hexdigest()
    return {"options": kept, "data": content}


def own_task(eval_data: str, settings: Fields, labels: Labels | None = None) -> Perplexity | Preference | LabelAnswers:
    """The loss of demonstrations, the rewards of preferences, or the answers that are ``labels``.

    ``settings``: objective, beta, max_length, prompt_column and completion_column. Raises DataError as the readers do,
    and as ``Preference``.
    """
    columns = {name: settings[name] for name in ("prompt_column", "completion_column")}
    formats = formats_of(settings["objective"])
    rows = read_rows(eval_data, split="validation", formats=formats, **columns)
    if labels is not None:
        return LabelAnswers(rows, labels, max_length=settings["max_length"])
    if formats is None:
        return Perplexity(rows, max_length=settings["max_length"])
    return Preference(
        rows, max_length=settings["max_length"], beta=settings["beta"] or OBJECTIVES[settings["objective"]].beta
    )


def make_tasks(names: Sequence[str], *, data: Sequence[str], limit: int | None) -> list[Task]:
    """The tasks with their data. ``data``: TASK=FILE for tasks that need a file; ``limit``: the largest number of
    examples of a task.

    Raises what ``rankwise evaluate`` raises for tasks that do not exist, or lack data or packages.
    """
    others = tuple(name for name in dict.fromkeys(names) if name != PERPLEXITY)
    # Checked also without tasks, since data for a task that is not given are refused.
    split_data(tuple(data), others)
    return [make_task(name, EvaluateSettings(task=others, data=tuple(data), limit=limit)) for name in others]


EVAL_SHARE = 0.1
# With --time, as many rows as cost a tenth of a run, where a row costs half of what it costs in training.
EVALUATED = 0.2
# Adapter settings that name parts of the model.
NAMING = (
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "enable_lora"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files from which every run reads its rows, and their description for the record."""

    train: str
    evaluation: str
    described: JsonObject
    train_rows: int
    eval_rows: int
    # Mean of the characters of a training row.
    row_characters: int
    # Of the training rows, if the objective answers with labels.
    labels: Labels | None = None
    # The sha256 of each task's questions.
    questions: JsonObject = dataclasses.field(default_factory=dict)
    # The source of the rows of --retain.
    retain: str | None = None


def prepare_inputs(given: CompareSettings, check: Callable[[JsonObject], None]) -> Inputs:
    """Read both sets once. If the evaluation set is part of a larger set, write that part into ``DIR/data``.

    ``check`` is called first with the description of the data, and may raise.

    Without --eval-data the source's validation split is taken, else a tenth of the training data. That tenth is chosen
    by the hash of the prompts: rows of one prompt stay together, and the order of the file does not matter.
    Raises DataError as the readers do, ConfigError (RW168) when rows cannot be split.
    """
    layout = {**given.columns, "formats": formats_of(given.objective)}
    folder = given.output / "data"
    rows = read_rows(given.data, split="train", **layout)
    held_out = _own_evaluation(given, rows, layout)
    train, how = _absolute(given.data), f"--eval-data {given.eval_data}" if given.eval_data else "its validation part"
    is_split = held_out is None
    if held_out is None:
        rows, held_out = split_by_prompt(rows, EVAL_SHARE)
        how = "a tenth of the training data, by prompt"
    usual = EVAL_ROWS
    if given.time is not None:
        trained = (given.max_steps or 0) * given.batch_size * given.gradient_accumulation or len(rows) * given.epochs
        usual = max(usual, int(EVALUATED * trained))
    part = limited(held_out, given.eval_limit, usual)
    overlap = warn_of_overlap(rows, part)
    described = {
        "train": {"source": rows.source, "sha256": _content_hash(rows), "rows": len(rows)},
        "eval": {"source": part.source, "sha256": _content_hash(part), "rows": len(part), "chosen": how},
        "overlap": overlap,
    }
    questions: JsonObject = {}
    if given.retain is not None:
        from rankwise.evaluation import retained

        kept = retained.retained_task(given.retain, max_length=given.max_length, eval_limit=given.eval_limit)
        if not isinstance(kept, retained.RetainedQuestions):
            warn_of_overlap(rows, kept.rows, "retained")
        described["retain"] = retained.described(kept)
        questions[RETAINED] = kept.data_sha256
    labels = labels_in(rows) if OBJECTIVES[given.objective].of_labels else None
    if labels is not None:
        check_bad_rows(unknown_labels(part, labels), len(part), allowed=None, before=0)
    check(described)
    if is_split:
        train = _write(rows, folder / "train.jsonl", layout)
    evaluation = _absolute(given.eval_data or given.data)
    if is_split or len(part) < len(held_out):
        evaluation = _write(part, folder / "eval.jsonl", layout)
    retain = given.retain and _absolute(given.retain)
    characters = sum(len(row.content()) for row in rows) // len(rows)
    return Inputs(
        train=train,
        evaluation=evaluation,
        described=described,
        train_rows=len(rows),
        eval_rows=len(part),
        row_characters=characters,
        labels=labels,
        questions=questions,
        retain=retain,
    )


def check_model(given: CompareSettings) -> None:
    """Check device, model and adapter settings before data are read and before hours of training, with the errors and
    warnings of ``add_adapter``: settings that name missing modules, and those that leave out a mixture's experts.

    Raises AdapterError as ``plan_adapter`` does, and ModelError if the model or the device does not exist.
    """
    if given.device not in ("auto", "cpu") and given.executor == "local":
        # Its import of torch takes seconds.
        choose_device(given.device)
    config, usual = given.lora_config("lora"), LoraConfig()
    asked = any(getattr(config, name) != getattr(usual, name) for name in NAMING)
    remote: JsonObject = {"trust_remote_code": given.trust_remote_code, "revision": given.revision}
    source = fetch_model(given.model, **remote, weights=False)
    if OBJECTIVES[given.objective].of_labels:
        # Which ones does not matter here.
        source = dataclasses.replace(source, labels=Labels(("0", "1")))
    if not any(method_of(name).has_adapter for name in given.methods):
        return
    if not asked:
        try:
            is_mixture = read_model(source).facts.experts > 0
        except ModelError:
            # The runs report what is wrong with the model.
            return
        if not is_mixture:
            return
    from rankwise.adapters import plan_adapter
    from rankwise.models import load_skeleton

    plan_adapter(load_skeleton(source, trust_remote_code=given.trust_remote_code), config)


def split_by_prompt(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(the other rows, at least ``share`` of the rows). Rows with one prompt stay together; the prompts with the
    smallest hashes are taken.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(prompt_of(row), []).append(index)
    if len(groups) < 2:
        raise ConfigError(
            "RW168",
            f"{rows.source} has only one prompt, so no rows can be held out for evaluation; give --eval-data.",
        )
    chosen: set[int] = set()
    for prompt in sorted(groups, key=text_sha256)[: len(groups) - 1]:
        if len(chosen) >= share * len(rows):
            break
        chosen.update(groups[prompt])
    parts = [[row for index, row in enumerate(rows) if (index in chosen) == inside] for inside in (False, True)]
    return dataclasses.replace(rows, items=parts[0]), dataclasses.replace(rows, items=parts[1])


def prompt_of(row: Row) -> str:
    """The prompt of the row. Rows with the same prompt form a cluster."""
    if row.kind == "chat":
        asked = [message for message in row.messages if message["role"] == "user"]
        return str(asked[0].get("content") or "") if asked else row.content()
    return row.prompt if row.kind == "prompt" else row.text


def _own_evaluation(given: CompareSettings, rows: Rows, layout: Fields) -> Rows | None:
    if given.eval_data is not None:
        return read_rows(given.eval_data, split="validation", **layout)
    if Path(given.data).expanduser().is_file():
        return None
    try:
        found = read_rows(given.data, split="validation", **layout)
    except DataError as error:
        if error.code != "RW208":
            raise
        return None
    # A folder whose file names contain no split gives all files for every split.
    return None if found.sha256 == rows.sha256 else found


def _write(rows: Rows, path: Path, layout: Fields) -> str:
    """Write the rows in a format that is read and rendered as the source is; ``layout``: the options for reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(_record(row, rows, layout), ensure_ascii=False) + "\n" for row in rows))
    return str(path.resolve())


def _record(row: Row, rows: Rows, layout: Fields) -> JsonObject:
    if row.kind == "text":
        labelled = {} if row.target is None else {"text_pair": row.completion, "label": row.target}
        return {"text": row.text, **labelled}
    tools = {"tools": row.tools} if row.tools else {}
    if row.label is not None:
        return {**_preference(row, rows), **tools}
    if row.kind == "chat":
        messages = [dict(message) for message in row.messages]
        if row.first_trained:
            return {"prompt": messages[: row.first_trained], "completion": messages[row.first_trained :], **tools}
        return {"messages": messages, **tools}
    if not rows.uses_template:
        return {"mr": row.prompt.removesuffix("\n"), "ref": row.completion}
    usual = ("question", "answer") if rows.separator == "\n" else ("prompt", "completion")
    names = (layout["prompt_column"] or usual[0], layout["completion_column"] or usual[1])
    return {**dict(zip(names, (row.prompt, row.completion))), **tools}


def _preference(row: Row, rows: Rows) -> JsonObject:
    first = row.first_trained
    prompt: Json = row.prompt if row.kind == "prompt" else list(row.messages[:first])
    answers = [side.completion if row.kind == "prompt" else list(side.messages[first:]) for side in row.sides]
    named = {"question" if rows.separator == "\n" else "prompt": prompt}
    if row.rejected is None:
        return {**named, "completion": answers[0], "label": row.label}
    return {**named, "chosen": answers[0], "rejected": answers[1]}


def _content_hash(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.content().encode() + b"\0")
        # Rows that differ only in their mark differ.
        digest.update(b"bad" if row.label is False else b"")
        digest.update(b"" if row.target is None else str(row.target).encode())
    return digest.hexdigest()


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
