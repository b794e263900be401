"""The options of ``rankwise evaluate`` that each task uses. An option that no task of a command uses is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rankwise.errors import ConfigError
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.options import flag

# generative and loglikelihood: the commonsense sets under the one protocol and the other; other: lm-evaluation-harness.
Kind = Literal["perplexity", "e2e", "generative", "loglikelihood", "gsm8k", "vicuna", "other"]

WORDS: Mapping[Kind, str] = {
    "perplexity": "perplexity",
    "e2e": "e2e",
    "generative": "commonsense sets with --protocol generative",
    "loglikelihood": "commonsense sets with --protocol loglikelihood",
    "gsm8k": "gsm8k",
    "vicuna": "vicuna",
    "other": "other tasks of lm-evaluation-harness",
}
COMMONSENSE: tuple[Kind, ...] = ("generative", "loglikelihood")
WITH_EXAMPLES: tuple[Kind, ...] = ("loglikelihood", "gsm8k", "other")
# {option: the kinds of tasks that use it}. Options that are not here apply to every task.
USED_BY: Mapping[str, tuple[Kind, ...]] = {
    "protocol": COMMONSENSE,
    "prompt_style": ("generative",),
    "num_fewshot": WITH_EXAMPLES,
    "fewshot_data": WITH_EXAMPLES,
    "max_new_tokens": ("e2e", "generative", "gsm8k", "vicuna"),
    "num_beams": ("e2e", "generative", "gsm8k"),
    "length_penalty": ("e2e", "generative"),
    "no_repeat_ngram_size": ("e2e",),
    "temperature": ("vicuna",),
    "top_p": ("vicuna",),
    "seed": ("vicuna",),
    "max_length": ("perplexity",),
    "prompt_column": ("perplexity",),
    "completion_column": ("perplexity",),
    "chat_template": ("perplexity", "e2e", "generative", "gsm8k", "vicuna"),
    "judge_url": ("vicuna",),
    "judge_model": ("vicuna",),
    "judge_key_env": ("vicuna",),
    "reference_answers": ("vicuna",),
}


def given_options(settings: EvaluateSettings) -> list[str]:
    """Options of ``USED_BY`` that differ from their default."""
    fields = EvaluateSettings.model_fields
    return [name for name in USED_BY if getattr(settings, name) != fields[name].default]


def check_options(settings: EvaluateSettings, kinds: Sequence[Kind]) -> None:
    """Raise ConfigError (RW152) for options that none of the tasks uses. ``kinds`` are the kinds of the tasks."""
    given = given_options(settings)
    problems = [
        f"{flag(name)} belongs to {', '.join(WORDS[kind] for kind in USED_BY[name])}"
        for name in given
        if not set(kinds) & set(USED_BY[name])
    ]
    if not problems:
        problems = list(_without_partner(settings, given, kinds))
    if problems:
        tasks = ", ".join(settings.task)
        raise ConfigError("RW152", f"--task {tasks} would ignore what was given: {'; '.join(problems)}; leave it out.")


def _without_partner(settings: EvaluateSettings, given: Sequence[str], kinds: Sequence[Kind]) -> list[str]:
    """Options that have no effect without another one."""
    found = []
    searches = (settings.num_beams or 1) > 1 or (settings.num_beams is None and "generative" in kinds)
    if "length_penalty" in given and not searches:
        found.append("--length-penalty goes with --num-beams above 1")
    if settings.temperature == 0:
        found += [f"{flag(name)} goes with --temperature above 0" for name in ("top_p", "seed") if name in given]
    if "chat_template" in given and not _uses_template(settings, kinds):
        found.append("--chat-template goes with --prompt-style trained, and for gsm8k with --num-fewshot 0")
    return found


def _uses_template(settings: EvaluateSettings, kinds: Sequence[Kind]) -> bool:
    """Whether a task writes its questions as training does. Worked examples and LLM-Adapters' template do not."""
    users = set(kinds) & set(USED_BY["chat_template"])
    if settings.prompt_style != "trained":
        users.discard("generative")
    if settings.num_fewshot != 0:
        users.discard("gsm8k")
    return bool(users)
