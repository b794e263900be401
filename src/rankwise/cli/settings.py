"""Settings tables of the verbs other than ``train``, which has its own in ``rankwise.config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rankwise.config import LARGEST_RANK, LARGEST_SEED, LONGEST_ROW, MANY, Settings, Temperature, comma_list, text_list

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


class ChatSettings(Settings):
    """The options of ``rankwise chat``: those of ``generate`` that a conversation has."""

    adapter: Path | None = Field(None, description="Run folder or PEFT adapter folder.")
    model: str | None = Field(None, description=f"{MODEL} With --adapter: the base it was trained on.")
    system: str | None = Field(None, min_length=1, description="System message of the conversation.")
    max_new_tokens: int = Field(512, ge=1, le=LONGEST_ROW, description="Longest answer, in tokens.")
    temperature: Temperature = Field(
        0.0, ge=0, le=1000, description="0 always takes the likeliest token; above 0 it samples."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that make up this share.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the sampling.")
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

    adapter: Annotated[tuple[Path, ...], BeforeValidator(text_list)] = Field(
        min_length=1,
        description="Run folder or PEFT adapter folder; with --combine several.",
        json_schema_extra={"repeated": True},
    )
    output: Path = Field(description="Folder to write the merged model to; must not exist or be empty.")
    combine: Literal["linear", "cat", "svd", "ties", "dare_ties"] | None = Field(
        None, description="Write one adapter made of several, which merge and export take, and no merged model."
    )
    weights: Annotated[tuple[float, ...] | None, BeforeValidator(comma_list)] = Field(
        None, description="With --combine, a weight for each adapter: 0.7,0.3. Default: equal ones that sum to 1."
    )
    rank: int | None = Field(
        None, ge=1, le=LARGEST_RANK, description="With --combine svd, the rank; default: the largest of theirs."
    )
    density: float | None = Field(
        None, gt=0, le=1, description="With --combine ties or dare_ties, the share of entries kept; default: 0.5."
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of dare_ties.")
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


class ExportSettings(Settings):
    """The options of ``rankwise export``."""

    adapter: Path = Field(description="Run folder or PEFT adapter folder.")
    target: Literal["vllm", "sglang", "llama.cpp", "ollama", "peft"] = Field(
        alias="for", description="The program that shall read it."
    )
    output: Path = Field(description="Folder to write to; must not exist or be empty.")
    model: str | None = Field(None, description="Base model; default: the one named by the adapter.")
    rank: int | None = Field(None, ge=1, le=LARGEST_RANK, description="Rank to write; default: the adapter's own.")
    max_error: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest relative error of the update: the least rank that keeps it is written. Default for DoRA, "
        "whose update has full rank: 0.05.",
    )
    data: str | None = Field(None, description=f"Rows whose inputs weigh that error; default: the run's own. {DATA}")
    merged: bool = Field(False, description="Write the base with the adapter folded in, not the adapter.")
    quantize: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = Field(
        None,
        description="With --merged, the GGUF's type: of changed weights, and of those not quantized yet; else f16.",
    )
    base_gguf: Path | None = Field(None, description="GGUF of the base, for llama.cpp and Ollama.")
    verify: bool = Field(False, description="Serve the result and its base, and compare with the model as trained.")
    server_python: Path | None = Field(None, description="Python that has xllamacpp or vLLM, for --verify.")
    trust_remote_code: bool = Field(False, description=REMOTE_CODE)
    revision: str | None = Field(None, description=f"{REVISION} Default: the one trained on.")


class ExplainSettings(Settings):
    """The options of ``rankwise explain``."""

    code: str = Field(description="Code of a message, such as RW203.", json_schema_extra={"argument": True})


class InspectSettings(Settings):
    """The options of ``rankwise inspect``."""

    folder: Path = Field(description="Adapter, run or model folder.", json_schema_extra={"argument": True})
    model: str | None = Field(None, description="Base model; say whether the adapter fits it.")
