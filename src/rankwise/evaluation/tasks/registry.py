"""Find tasks by name, and read and check their data. lm-evaluation-harness is imported only where it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import ConfigError
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.evaluation.tasks.names import COMMONSENSE, check_tasks
from rankwise.evaluation.tasks.options import Kind, check_options, given_options
from rankwise.foreign import JsonObject

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task

# {task that needs --data: what the data are}.
WHERE = {
    "perplexity": "any file of rows",
    "e2e": "testset_w_refs.csv of github.com/tuetschek/e2e-dataset",
    "vicuna": "the 80 questions as JSON lines of question_id and text",
}
# LoRA paper, table 11.
LORA_BEAM_PENALTY, LORA_NGRAM = 0.9, 4
# LLM-Adapters' and DoRA's evaluation of the commonsense sets.
PAPER_BEAMS = 4


def make_tasks(settings: EvaluateSettings) -> list[Task]:
    """The requested tasks with their data. Raises as ``make_task``, and RW152 for an option that no task uses."""
    duplicates = sorted({name for name in settings.task if settings.task.count(name) > 1})
    if duplicates:
        raise ConfigError("RW152", f"--task {', '.join(duplicates)} is given twice; once is enough.")
    if given_options(settings):
        check_options(settings, [kind_of(name, settings) for name in settings.task])
    return [make_task(name, settings) for name in settings.task]


def kind_of(name: str, settings: EvaluateSettings) -> Kind:
    """The kind of the task ``name``, which decides its options. Raises DataError as ``instructions_in`` does."""
    kinds: dict[str, Kind] = {"perplexity": "perplexity", "e2e": "e2e", "gsm8k": "gsm8k", "vicuna": "vicuna"}
    if name not in COMMONSENSE:
        return kinds.get(name, "other")
    if settings.protocol is not None:
        return settings.protocol
    from rankwise.evaluation.tasks.commonsense import instructions_in

    data = settings.data_of(name)
    return "generative" if data is not None and instructions_in(name, data) is not None else "loglikelihood"


def make_task(name: str, settings: EvaluateSettings) -> Task:
    """The task ``name`` with its data read.

    Raises ConfigError: RW150 data that must be given, RW152 options that do not go together, RW153 a missing package,
    RW154 no such task; DataError RW250 to RW252 for data that do not fit.
    """
    data = settings.data_of(name)
    if name in WHERE and data is None:
        raise ConfigError("RW150", f"--task {name} needs data; give --data F with {WHERE[name]}.")
    if name == "perplexity":
        return _perplexity(settings, str(data))
    if name == "e2e":
        return _e2e(settings, str(data))
    if name in COMMONSENSE:
        return _commonsense(name, settings, data)
    if name == "gsm8k":
        return _gsm8k(settings, data)
    if name == "vicuna":
        return _vicuna(settings, Path(str(data)))
    check_tasks([name])
    return _harness(name, settings, data)


def _decoding(settings: EvaluateSettings, **defaults: float | None) -> JsonObject:
    """Options of ``Decoding`` by name, as given or these defaults; None leaves the length of an answer to the task."""
    given = {name: getattr(settings, name) for name in defaults}
    found = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    return {name: value for name, value in found.items() if value is not None}


def _perplexity(settings: EvaluateSettings, data: str) -> Task:
    from rankwise.data import read_rows
    from rankwise.evaluation.loading import max_length_of
    from rankwise.evaluation.tasks.perplexity import Perplexity

    columns = (settings.prompt_column, settings.completion_column)
    rows = read_rows(data, split="validation", prompt_column=columns[0], completion_column=columns[1])
    length = max_length_of(settings.adapter) if settings.max_length is None else settings.max_length
    return Perplexity(rows[: settings.limit], max_length=length)


def _e2e(settings: EvaluateSettings, data: str) -> Task:
    from rankwise.data import read_rows
    from rankwise.evaluation.tasks.e2e import E2e

    beams = settings.num_beams or 1
    decoding = _decoding(
        settings,
        max_new_tokens=None,
        num_beams=1,
        length_penalty=LORA_BEAM_PENALTY if beams > 1 else 1.0,
        no_repeat_ngram_size=LORA_NGRAM if beams > 1 else 0,
    )
    return E2e(read_rows(data, split="test"), limit=settings.limit, decoding=decoding)


def _commonsense(name: str, settings: EvaluateSettings, data: str | None) -> Task:
    from rankwise.evaluation.tasks.commonsense import Commonsense, instructions_in

    if kind_of(name, settings) == "loglikelihood":
        return _harness(name, settings, data)
    rows = instructions_in(name, data) if data is not None else None
    if rows is None:
        place = "no data were given" if data is None else f"{data} is in another form"
        raise ConfigError(
            "RW150",
            f"--task {name} --protocol generative needs the rows of LLM-Adapters (instruction, output, answer), and "
            f"{place}; give --data F with test.json of github.com/AGI-Edgerunners/LLM-Adapters/tree/main/dataset.",
        )
    if settings.num_fewshot:
        raise ConfigError("RW152", "--num-fewshot goes with --protocol loglikelihood; the generative one has none.")
    decoding = _decoding(settings, max_new_tokens=None, num_beams=PAPER_BEAMS, length_penalty=1.0)
    return Commonsense(name, rows, limit=settings.limit, prompt_style=settings.prompt_style, decoding=decoding)


def _gsm8k(settings: EvaluateSettings, data: str | None) -> Task:
    from rankwise.evaluation.tasks.gsm8k import Gsm8k, read_problems, worked_examples

    shots = 8 if settings.num_fewshot is None else settings.num_fewshot
    if shots == 0 and settings.fewshot_data is not None:
        raise ConfigError("RW152", "--fewshot-data goes with worked examples, and --num-fewshot is 0; leave one out.")
    problems = read_problems(data)
    return Gsm8k(
        problems,
        worked=worked_examples(shots, settings.fewshot_data, problems),
        limit=settings.limit,
        decoding=_decoding(settings, max_new_tokens=None, num_beams=1),
    )


def _vicuna(settings: EvaluateSettings, data: Path) -> Task:
    from rankwise.evaluation.tasks.vicuna import Judge, Vicuna

    given = (settings.judge_url, settings.judge_model, settings.reference_answers)
    if any(given) and not all(given):
        raise ConfigError("RW152", "the judge needs --judge-url, --judge-model and --reference-answers together.")
    judge = None
    if settings.judge_url and settings.judge_model and settings.reference_answers:
        judge = Judge(
            settings.judge_url, settings.judge_model, settings.judge_key_env, Path(settings.reference_answers)
        )
    decoding = _decoding(settings, max_new_tokens=None, temperature=0.0, top_p=1.0, seed=0)
    return Vicuna(data, limit=settings.limit, decoding=decoding, judge=judge)


def _harness(name: str, settings: EvaluateSettings, data: str | None) -> Task:
    from rankwise.evaluation.tasks.harness import HarnessTask

    return HarnessTask(
        name,
        data=data,
        fewshot_data=settings.fewshot_data,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
    )
