"""An answer that repeats itself up to the limit is named, with what the losses of its run say about the cause."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.generate import cause
from rankwise.records import RunRecord
from rankwise.verbs.speaker import Said, Speaker, repeated


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("It is a luxury " + "luxury " * 20 + "lux", "luxury"),
        ("a list " + "of a list " * 12, "of a list"),
        ("!" * 60, "!"),
        ("one two three four five six seven eight nine ten eleven twelve", None),
        ("no no no", None),
    ],
)
def test_a_phrase_that_fills_the_end_is_found(text: str, phrase: str | None) -> None:
    assert repeated(text.strip()) == phrase


@pytest.mark.parametrize(
    ("losses", "kind", "said"),
    [
        ([3.6, 3.1, 2.4, 1.53], "eval_loss", "too short: its evaluation loss went from 3.60 to 1.53"),
        ([3.6, 3.1, 2.9, 2.89], "loss", "too short: its training loss went from 3.60 to 2.89"),
        ([3.6, 18.0, 9.0, 3.0], "loss", "diverged: its training loss went from 3.60 to 3.00, and up to 18.00"),
        ([3.6, 3.7, 3.9, 4.0], "eval_loss", "diverged: its evaluation loss went from 3.60 to 3.70"),
        ([3.6, 0.2, 0.1, 0.1], "loss", "settled"),
        ([3.6], "loss", "see its losses"),
    ],
)
def test_the_losses_tell_the_cause(losses: list[float], kind: str, said: str, tmp_path: Path) -> None:
    RunRecord(
        method="lora", seed=0, settings={}, eval_loss=min(losses[1:], default=None) if kind == "eval_loss" else None
    ).save(tmp_path)
    lines = (json.dumps({"step": step, kind: loss}) + "\n" for step, loss in enumerate(losses))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert said in cause(tmp_path, base_too=False)


@pytest.mark.parametrize(("base", "said"), [("A pub.", "loss"), ("by the by " * 9, "the base repeats itself too")])
def test_generate_names_it(base: str, said: str, run_folder: Path, rankwise: Any, monkeypatch: Any) -> None:
    tuned = Said("luxury " * 9 + "lux", 40)
    said_in_turn = itertools.cycle([tuned, Said(base, 40 if "by" in base else None)])
    monkeypatch.setattr(Speaker, "say", lambda *_: next(said_in_turn))
    asked = ("generate", "--adapter", run_folder, "--compare", "--prompt", "x")
    told = rankwise(*asked)
    assert "the tuned answer ended at the limit of 40 tokens (--max-new-tokens), repeating 'luxury'" in told.stderr
    assert said in told.stderr
    document = rankwise(*asked, "--json").document
    assert document["answers"][0]["repeats"]["tuned"] == "luxury"
    assert said in document["symptom"]
