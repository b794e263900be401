"""``make demo``: fine-tune the demo model on what Python's own functions say of themselves, and look at the result.

Nothing is downloaded: the model lies in a package, the data are the docstrings of the standard library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from rankwise.cli import train
from rankwise.cli.generate import Answer, Sampling, Speaker, Wording, print_answer
from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.progress import watching
from rankwise.config import Settings, TrainSettings, read_settings
from rankwise.records import RUN_FILE

SHOWN = 3
STDLIB = "stdlib"


class DemoSettings(Settings):
    """The options of ``rankwise demo``. Its output is always the demo's own, so it is replaced without asking."""

    output: Path = Field(Path("runs/demo"), description="Run folder to write.")
    max_steps: int = Field(60, ge=1, description="Optimizer steps.")
    eval_limit: int = Field(48, ge=1, description="Rows to evaluate on.")


def run(settings: DemoSettings, output: Output) -> Mapping[str, Any]:
    from rankwise.training.run import train as train_run

    output.line("SmolLM2-135M-Instruct learns to say what a Python function does, from its signature alone.\n")
    chosen = _train_settings(settings)
    with watching(output, every=chosen.logging_steps) as observer:
        record = train_run(chosen, observer)
    output.line()
    for label, text in train.summary(settings.output, record):
        output.line(f"{label:<12}{text}")
    output.line("\nThree signatures it was not trained on:\n")
    answers = _answers(settings.output, output)
    output.line(f"loss curve: {settings.output / 'loss.svg'}")
    return {"record": record.to_json(), "answers": [dataclasses.asdict(answer) for answer in answers]}


def _train_settings(settings: DemoSettings) -> TrainSettings:
    given = {
        "model": "demo",
        "data": STDLIB,
        "eval_data": STDLIB,
        "output": settings.output,
        "max_steps": settings.max_steps,
        "eval_limit": settings.eval_limit,
        "eval_steps": max(1, settings.max_steps // 3),
        "logging_steps": max(1, settings.max_steps // 12),
        "max_length": 160,
        "learning_rate": 5e-4,
        "overwrite": (settings.output / RUN_FILE).is_file(),
    }
    return read_settings(TrainSettings, None, given)


def _answers(adapter: Path, output: Output) -> list[Answer]:
    """Base and tuned model on evenly spread evaluation rows, loaded from the run folder as a user would."""
    from rankwise.adapters import load_adapter
    from rankwise.data import read_rows
    from rankwise.models import choose_device, load_model

    choice = choose_device("auto")
    model, tokenizer = load_model("demo", dtype=choice.dtype, device=str(choice.device))
    load_adapter(model, adapter, trainable=False)
    speaker = Speaker(model.eval(), tokenizer, Wording(chat=True), adapted=True, sampling=Sampling(max_new_tokens=40))
    rows = read_rows(STDLIB, split="validation")
    answers = []
    for index in range(SHOWN):
        answers.append(speaker.answer(rows[(2 * index + 1) * len(rows) // (2 * SHOWN)].prompt, both=True))
        print_answer(output, answers[-1])
    return answers


VERB = Verb(
    name="demo",
    settings=DemoSettings,
    run=run,
    summary="Fine-tune the demo model on Python's own docstrings: a minute or two on a laptop, nothing to download.",
    examples=("rankwise demo",),
    metavars={"output": "DIR"},
    hidden=True,
)
