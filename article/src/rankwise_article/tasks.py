"""The tasks that ``rankwise evaluate`` and ``rankwise compare`` find by their entry points, and their options."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rankwise.errors import ConfigError
from rankwise.evaluation import EvaluateSettings, Task, TaskType, harness_task
from rankwise.options import Batch, Seed, Settings, Temperature, Tokens, Whole

# LoRA paper, table 11.
LORA_BEAM_PENALTY, LORA_NGRAM = 0.9, 4
# LLM-Adapters' and DoRA's evaluation of the commonsense sets.
PAPER_BEAMS = 4


class Gsm8kOptions(Settings):
    max_new_tokens: Tokens = 256
    # Beams of beam search; 1 is greedy.
    num_beams: Batch = 1


class E2eOptions(Settings):
    # The LoRA repository's length of an answer.
    max_new_tokens: Tokens = 64
    num_beams: Batch = 1
    # Beam search divides a score by the length to this power.
    length_penalty: float | None = None
    # Never repeat an n-gram of this size in an answer.
    no_repeat_ngram_size: Whole | None = None


class CommonsenseOptions(Settings):
    # An answer is written and read, or the choices are scored; by default, what the data are for.
    protocol: Literal["generative", "loglikelihood"] | None = None
    # LLM-Adapters' prompts, or those that `rankwise train` makes of such rows.
    prompt_style: Literal["llm-adapters", "trained"] = "llm-adapters"
    max_new_tokens: Tokens = 32
    num_beams: Batch = PAPER_BEAMS
    length_penalty: float = 1.0


class VicunaOptions(Settings):
    max_new_tokens: Tokens = 1024
    # 0 takes the likeliest token; above 0 samples from the likeliest whose probabilities add up to `top_p`.
    temperature: Temperature = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    # OpenAI-compatible endpoint that compares answers, the name of its model, and the variable that holds the key.
    judge_url: Annotated[str, Field(pattern=r"^https?://[^\s/]")] | None = None
    judge_model: str | None = None
    judge_key_env: str = "OPENAI_API_KEY"
    # The reference system's answers, JSON lines.
    reference_answers: Path | None = None


def _make_e2e(name: str, settings: EvaluateSettings, options: E2eOptions) -> Task:
    from rankwise.data import read_rows
    from rankwise_article.e2e import E2e

    searches = options.num_beams > 1
    if options.length_penalty is not None and not searches:
        raise ConfigError("RW112", "--set length_penalty goes with --set num_beams above 1; leave it out.")
    defaults = {
        "length_penalty": LORA_BEAM_PENALTY if searches else 1.0,
        "no_repeat_ngram_size": LORA_NGRAM if searches else 0,
    }
    decoding = defaults | options.model_dump(exclude_none=True)
    return E2e(read_rows(str(settings.data_of(name)), split="test"), limit=settings.limit, decoding=decoding)


def _uses_e2e(name: str, settings: EvaluateSettings, options: E2eOptions) -> Collection[str]:
    return ("chat_template", *E2eOptions.model_fields)


def _make_gsm8k(name: str, settings: EvaluateSettings, options: Gsm8kOptions) -> Task:
    from rankwise_article.gsm8k import Gsm8k, read_problems, worked_examples

    shots = 8 if settings.num_fewshot is None else settings.num_fewshot
    if shots == 0 and settings.fewshot_data is not None:
        raise ConfigError("RW112", "--fewshot-data goes with worked examples, and --num-fewshot is 0; leave one out.")
    problems = read_problems(settings.data_of(name))
    worked = worked_examples(shots, settings.fewshot_data, problems)
    return Gsm8k(problems, worked=worked, limit=settings.limit, decoding=options.model_dump())


def _uses_gsm8k(name: str, settings: EvaluateSettings, options: Gsm8kOptions) -> Collection[str]:
    """Worked examples are written without a chat template."""
    template = ("chat_template",) if settings.num_fewshot == 0 else ()
    return ("num_fewshot", "fewshot_data", *template, *Gsm8kOptions.model_fields)


def _is_written(name: str, settings: EvaluateSettings, options: CommonsenseOptions) -> bool:
    """Whether answers are written: by the protocol that is given, else by what the data are for."""
    from rankwise_article.commonsense import instructions_in

    if options.protocol is not None:
        return options.protocol == "generative"
    data = settings.data_of(name)
    return data is not None and instructions_in(name, data) is not None


def _make_commonsense(name: str, settings: EvaluateSettings, options: CommonsenseOptions) -> Task:
    from rankwise_article.commonsense import Commonsense, instructions_in

    data = settings.data_of(name)
    if not _is_written(name, settings, options):
        return harness_task(name, settings, data)
    rows = instructions_in(name, data) if data is not None else None
    if rows is None:
        place = "no data were given" if data is None else f"{data} is in a different form"
        raise ConfigError(
            "RW150",
            f"--task {name} --set protocol=generative needs the rows of LLM-Adapters (instruction, output, answer), "
            f"and {place}; give --data F with test.json of github.com/AGI-Edgerunners/LLM-Adapters/tree/main/dataset.",
        )
    decoding = options.model_dump(exclude={"protocol", "prompt_style"})
    return Commonsense(name, rows, limit=settings.limit, prompt_style=options.prompt_style, decoding=decoding)


def _uses_commonsense(name: str, settings: EvaluateSettings, options: CommonsenseOptions) -> Collection[str]:
    """Of the generative protocol only training's style of prompts has a chat template."""
    if not _is_written(name, settings, options):
        return ("protocol", "num_fewshot", "fewshot_data")
    unused = {"length_penalty"} if options.num_beams == 1 else set()
    template = ("chat_template",) if options.prompt_style == "trained" else ()
    return (*({*CommonsenseOptions.model_fields} - unused), *template)


def _make_vicuna(name: str, settings: EvaluateSettings, options: VicunaOptions) -> Task:
    from rankwise_article.judge import JudgeClient
    from rankwise_article.vicuna import Vicuna

    judge, answers = None, options.reference_answers
    if options.judge_url and options.judge_model and answers:
        key = os.environ.get(options.judge_key_env, "").strip()
        judge = JudgeClient(options.judge_url, options.judge_model, key)
    elif options.judge_url or options.judge_model or answers:
        raise ConfigError(
            "RW112", "the judge needs --set judge_url=, --set judge_model= and --set reference_answers= together."
        )
    decoding = options.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    data = Path(str(settings.data_of(name)))
    return Vicuna(data, limit=settings.limit, decoding=decoding, judge=judge, reference_answers=answers)


def _uses_vicuna(name: str, settings: EvaluateSettings, options: VicunaOptions) -> Collection[str]:
    unused = {"top_p", "seed"} if options.temperature == 0 else set()
    return ("chat_template", *({*VicunaOptions.model_fields} - unused))


# Where the last value says what --data must hold, rankwise has seen to it that data are given.
E2E = TaskType(_make_e2e, E2eOptions, _uses_e2e, "testset_w_refs.csv of github.com/tuetschek/e2e-dataset")
GSM8K = TaskType(_make_gsm8k, Gsm8kOptions, _uses_gsm8k)
COMMONSENSE = TaskType(_make_commonsense, CommonsenseOptions, _uses_commonsense)
VICUNA = TaskType(_make_vicuna, VicunaOptions, _uses_vicuna, "the 80 questions as JSON lines of question_id and text")
