"""What a user can set for ``rankwise evaluate``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankwise.config import (
    LARGEST_BATCH,
    LARGEST_SEED,
    LONGEST_ROW,
    MANY,
    Settings,
    Temperature,
    comma_list,
    text_list,
)
from rankwise.errors import ConfigError

Protocol = Literal["generative", "loglikelihood"]
PromptStyle = Literal["llm-adapters", "trained"]


def task_list(value: Any) -> Any:
    """One name, names with commas between them, or a list of such."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    return tuple(name for item in items for name in (comma_list(item) if isinstance(item, str) else (item,)))


class EvaluateSettings(Settings):
    """The options of ``rankwise evaluate``, and the keys of its ``--config`` file."""

    task: Annotated[tuple[str, ...], BeforeValidator(task_list)] = Field(
        min_length=1,
        description="perplexity, e2e, boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa, "
        "gsm8k, vicuna, or any task of lm-evaluation-harness; may be given several times.",
        json_schema_extra={"repeated": True},
    )
    model: str | None = Field(
        None, description="Hub id, folder, .gguf file, or `demo`. Default: the base that the adapter names."
    )
    adapter: Annotated[tuple[Path, ...], BeforeValidator(text_list)] = Field(
        (),
        description="Run folder or PEFT adapter folder; several are evaluated beside their base.",
        json_schema_extra={"repeated": True},
    )
    base: bool | None = Field(
        None, description="Evaluate the base model too; default: where several adapters are given."
    )
    data: Annotated[tuple[str, ...], BeforeValidator(text_list)] = Field(
        (),
        description="File, folder or hub id with the task's data; TASK=DATA where tasks have data of their own.",
        json_schema_extra={"repeated": True},
    )
    output: Path | None = Field(
        None, description="Folder for results and predictions; default: one under `evaluations`, named by the settings."
    )
    limit: int | None = Field(None, ge=1, le=MANY, description="Only the first N questions of each task.")
    overwrite: bool = Field(False, description="Replace the results in --output.")

    protocol: Protocol | None = Field(
        None,
        description="Commonsense sets: generative (an answer is written and read) or loglikelihood (answers are "
        "scored). Default: what the data are for.",
    )
    prompt_style: PromptStyle = Field(
        "llm-adapters",
        description="Generative commonsense prompts: the template of the LLM-Adapters and DoRA papers, or as training "
        "writes such rows.",
    )
    num_fewshot: int | None = Field(
        None,
        ge=0,
        le=MANY,
        description="Worked examples in front of each question; default: gsm8k 8, others the task's own.",
    )
    fewshot_data: str | None = Field(None, description="Where those examples come from: a file like that of --data.")
    max_new_tokens: int | None = Field(
        None, ge=1, le=LONGEST_ROW, description="Longest answer, in tokens; default: the task's own."
    )
    num_beams: int | None = Field(
        None,
        ge=1,
        le=LARGEST_BATCH,
        description="Beam search; default: 1 (greedy), 4 for generative commonsense sets as in the papers.",
    )
    length_penalty: float | None = Field(
        None, description="Beam search divides by length to this power; default: 0.9 for e2e (LoRA paper), else 1."
    )
    no_repeat_ngram_size: int | None = Field(
        None,
        ge=0,
        le=LONGEST_ROW,
        description="No repeated n-gram in an answer; default: 4 for e2e with beams (LoRA paper), else 0.",
    )
    temperature: Temperature = Field(
        0.0, ge=0, le=1000, description="vicuna: 0 takes the likeliest token; above 0 samples."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="vicuna: sample from the likeliest tokens of this share.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the sampling.")
    max_length: int | None = Field(
        None,
        ge=2,
        le=LONGEST_ROW,
        description="perplexity: tokens per row; default: as the adapters were trained, else 1024.",
    )
    prompt_column: str | None = Field(None, description="perplexity: column with the prompt.")
    completion_column: str | None = Field(None, description="perplexity: column with the completion.")
    chat_template: Path | None = Field(None, description="Jinja file that overrides the tokenizer's template.")

    judge_url: str | None = Field(None, description="vicuna: OpenAI-compatible endpoint that compares answers.")
    judge_model: str | None = Field(None, description="vicuna: name of the judging model there.")
    judge_key_env: str = Field("OPENAI_API_KEY", description="vicuna: environment variable that holds the key.")
    reference_answers: str | None = Field(None, description="vicuna: the reference system's answers (JSONL).")

    batch_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST_BATCH,
        description="Most sequences in a batch; default: as many as a budget of tokens admits.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Dtype of the base; auto: as the adapter was trained, else what suits the device."
    )
    quantization: Literal["auto", "none", "nf4", "fp4"] = Field(
        "auto", description="4-bit layers or not; auto: as the adapters were trained."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Device; auto takes the fastest.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a hub repository.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")

    def data_of(self, task: str) -> str | None:
        """The data given for one task: ``TASK=DATA`` before data for all. Raises as ``split_data``."""
        named, common = split_data(self.data, self.task)
        return named.get(task, common)


def split_data(data: tuple[str, ...], tasks: tuple[str, ...]) -> tuple[Mapping[str, str], str | None]:
    """``("e2e=a.csv", "b.jsonl")`` -> ({"e2e": "a.csv"}, "b.jsonl"). A path with ``=`` stays one.

    Raises ConfigError (RW152) where two are given for the same tasks, or one for none of them.
    """
    named: dict[str, str] = {}
    common: list[str] = []
    for item in data:
        name, equals, place = item.partition("=")
        if not equals or name not in tasks:
            common.append(item)
        elif name in named:
            raise ConfigError("RW152", f"--data {name}= is given twice, {named[name]} and {place}; give one.")
        else:
            named[name] = place
    if len(common) > 1:
        raise ConfigError(
            "RW152", f"--data is given {len(common)} times for all tasks ({', '.join(common)}); give one, or TASK=DATA."
        )
    if common and set(tasks) <= set(named):
        raise ConfigError("RW152", f"--data {common[0]} is for no task: each has data of its own. Leave it out.")
    return named, next(iter(common), None)
