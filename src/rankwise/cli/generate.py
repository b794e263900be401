"""``rankwise generate``: answer prompts with a base model, a tuned one, or both side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.settings import GenerateSettings
from rankwise.errors import ConfigError, ModelError
from rankwise.records import RUN_FILE, RunRecord, load_record


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest with temperature 0, else drawn with a seed."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt and what the models said; a model that was not asked is None."""

    prompt: str
    base: str | None
    tuned: str | None


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A loaded model that answers prompts. ``chat``: the prompt goes through the tokenizer's chat template."""

    model: Any
    tokenizer: Any
    chat: bool
    adapted: bool
    sampling: Sampling

    def answer(self, prompt: str, *, both: bool) -> Answer:
        """The tuned model's answer, or the base's where there is no adapter; with ``both``, both."""
        from rankwise.adapters import adapter_disabled

        if not self.adapted:
            return Answer(prompt, self._continue(prompt), None)
        tuned = self._continue(prompt)
        if not both:
            return Answer(prompt, None, tuned)
        with adapter_disabled(self.model):
            return Answer(prompt, self._continue(prompt), tuned)

    def _continue(self, prompt: str) -> str:
        import torch

        inputs = self._encode(prompt)
        chosen = {"do_sample": False}
        if self.sampling.temperature > 0:
            torch.manual_seed(self.sampling.seed)
            chosen = {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.sampling.max_new_tokens, pad_token_id=self._pad_token(), **chosen
            )
        return self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _encode(self, prompt: str) -> Any:
        """(1, length) token ids and their mask, on the model's device."""
        if not self.chat:
            return self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)

    def _pad_token(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id


def run(settings: GenerateSettings, output: Output) -> Mapping[str, Any]:
    if settings.compare and settings.adapter is None:
        raise ConfigError("RW114", "--compare shows base and tuned model side by side; give --adapter FOLDER too.")
    record = record_of(settings.adapter)
    name = settings.model or base_model_name(settings.adapter, record)
    waiting = output.console.status(f"loading {name}") if output.is_terminal else contextlib.nullcontext()
    with waiting:
        speaker, device = _load(settings, name, record)
    answers = []
    for prompt in settings.prompt:
        answers.append(speaker.answer(prompt, both=settings.compare))
        print_answer(output, answers[-1])
    return {
        "model": name,
        "adapter": str(settings.adapter) if settings.adapter else None,
        "device": device,
        "chat_template": speaker.chat,
        "answers": [dataclasses.asdict(answer) for answer in answers],
    }


def record_of(adapter: Path | None) -> RunRecord | None:
    """The record beside an adapter; adapters from elsewhere have none."""
    return load_record(adapter) if adapter is not None and (adapter / RUN_FILE).is_file() else None


def base_model_name(adapter: Path | None, record: RunRecord | None) -> str:
    """The base an adapter was trained on, by its run record or its PEFT configuration. Raises ConfigError (RW115)."""
    if adapter is None:
        raise ConfigError("RW115", "there is nothing to generate with; give --model M, --adapter FOLDER or both.")
    if record is not None and isinstance(record.settings.get("model"), str):
        return str(record.settings["model"])
    from rankwise.adapters.peft_config import read_config

    name = read_config(adapter).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError("RW115", f"the adapter in {adapter} does not name its base model; give --model M.")
    return name


def print_answer(output: Output, answer: Answer) -> None:
    """Side by side on a terminal; otherwise a labelled line each, which greps and wraps well."""
    if answer.base is not None and answer.tuned is not None and output.is_terminal:
        table = Table(title=Text(answer.prompt), title_justify="left", title_style="bold", expand=True)
        table.add_column("base", ratio=1, style="dim")
        table.add_column("tuned", ratio=1)
        table.add_row(Text(answer.base), Text(answer.tuned))
        output.console.print(table)
        return
    output.line(answer.prompt, style="bold")
    for label, text in (("base", answer.base), ("tuned", answer.tuned)):
        if text is not None:
            output.line(f"  {label}: {text}" if answer.base and answer.tuned else text)
    output.line()
