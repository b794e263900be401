"""Settings tables of the verbs other than ``train``, which has its own in ``rankwise.config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rankwise.config import LARGEST_SEED, LONGEST_ROW, MANY, Settings, Temperature, text_list

MODEL = "Hub id, folder, .gguf file, or `demo`."
DATA = "Hub id, folder, or .jsonl/.json/.csv/.parquet file (also .gz)."
REMOTE_CODE = "Run Python code that comes with a hub repository."
REVISION = "Branch, tag or commit of a hub model."


class PreviewSettings(Settings):
    """The options of ``rankwise preview``."""

    model: str = Field(description=MODEL)
    data: str = Field(description=DATA)
    row: int | None = Field(
        None, ge=0, le=MANY, description="Row to show, counted from 0; default: the first good one."
    )
    max_length: int = Field(1024, ge=2, le=LONGEST_ROW, description="Tokens per row; longer rows are cut and counted.")
    chat_template: Path | None = Field(None, description="Jinja file that overrides the tokenizer's template.")
    prompt_column: str | None = Field(None, description="Column with the prompt, for tables of other names.")
    completion_column: str | None = Field(None, description="Column with the completion.")
    skip_bad_rows: int | None = Field(
        None, ge=0, le=MANY, description="Stop where there are more bad rows, as `train` would; default: never."
    )
    trust_remote_code: bool = Field(False, description=REMOTE_CODE)
    revision: str | None = Field(None, description=REVISION)


class GenerateSettings(Settings):
    """The options of ``rankwise generate``."""

    prompt: Annotated[tuple[str, ...], BeforeValidator(text_list)] = Field(
        (),
        description="Text to answer; may be given several times; - reads one a line from standard input.",
        json_schema_extra={"repeated": True},
    )
    prompt_file: Path | None = Field(None, description="File with a prompt a line; .jsonl: texts, or their `prompt`.")
    messages: Path | None = Field(
        None, description="Conversation to continue: a JSON list of {role, content}; .jsonl: one conversation a line."
    )
    system: str | None = Field(None, min_length=1, description="System message before each prompt and conversation.")
    adapter: Path | None = Field(None, description="Run folder or PEFT adapter folder.")
    model: str | None = Field(None, description=f"{MODEL} With --adapter: the base it was trained on.")
    compare: bool = Field(False, description="Show base and tuned model side by side.")
    max_new_tokens: int = Field(128, ge=1, le=LONGEST_ROW, description="Longest answer, in tokens.")
    temperature: Temperature = Field(
        0.0, ge=0, le=1000, description="0 always takes the likeliest token; above 0 it samples."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that make up this share.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the sampling.")
    raw: bool = Field(False, description="Give the prompt as it is, without a chat template.")
    chat_template: Path | None = Field(None, description="Jinja file that overrides the tokenizer's template.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Dtype of the base; auto: as the adapter was trained, else what suits the device."
    )
    quantization: Literal["auto", "none", "nf4", "fp4"] = Field(
        "auto", description="4-bit layers or not; auto: as the adapter was trained."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Device; auto takes the fastest.")
    trust_remote_code: bool = Field(False, description=REMOTE_CODE)
    revision: str | None = Field(None, description=REVISION)


class MergeSettings(Settings):
    """The options of ``rankwise merge``."""

    adapter: Path = Field(description="Run folder or PEFT adapter folder.")
    output: Path = Field(description="Folder to write the merged model to; must not exist or be empty.")
    model: str | None = Field(None, description="Base model; default: the one named by the adapter.")
    onto: Literal["original", "quantized"] | None = Field(
        None,
        description="Weights to merge into: the original ones, or those that a 4-bit run trained on (dequantized). "
        "Default: original, or with --verify whichever stays closer to the model as trained.",
    )
    quantization: Literal["nf4", "fp4"] | None = Field(
        None,
        description="4-bit format that the adapter trained on, where its folder does not say: adapters of PEFT's have "
        "no record.",
    )
    double_quant: bool = Field(True, description="Whether that format's scales were quantized again.")
    verify: bool = Field(False, description="Measure how far each way of merging moves the model, and record it.")
    text: Path | None = Field(None, description="Text file to measure on with --verify; default: a built-in text.")
    trust_remote_code: bool = Field(False, description=REMOTE_CODE)
    revision: str | None = Field(None, description=f"{REVISION} Default: the one trained on.")


class ExplainSettings(Settings):
    """The options of ``rankwise explain``."""

    code: str = Field(description="Code of a message, such as RW203.", json_schema_extra={"argument": True})


class InspectSettings(Settings):
    """The options of ``rankwise inspect``."""

    folder: Path = Field(description="Adapter, run or model folder.", json_schema_extra={"argument": True})
    model: str | None = Field(None, description="Base model; say whether the adapter fits it.")
