"""The reference of preferences is computed once: for all epochs, evaluations, resumed runs and later runs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_preferences import write_marks, write_pairs
from training_rows import Recorder

from rankwise.config import TrainSettings
from rankwise.errors import RankwiseError
from rankwise.records import read_metrics
from rankwise.training.objectives import Scoring
from rankwise.training.run import train
from rankwise.training.session import Session

ROWS, EVAL_ROWS = 12, 6


@pytest.fixture
def preferring(tmp_path: Path, settings: Any) -> Callable[..., TrainSettings]:
    def make(objective: str = "dpo", **changes: Any) -> TrainSettings:
        write = write_pairs if objective == "dpo" else write_marks
        lines = write(tmp_path / "all.jsonl", ROWS + EVAL_ROWS).read_text().splitlines(keepends=True)
        parts = {"data": lines[:ROWS], "eval_data": lines[ROWS:]}
        for name, part in parts.items():
            (tmp_path / f"{objective}-{name}.jsonl").write_text("".join(part))
        given = {
            "objective": objective,
            **{name: str(tmp_path / f"{objective}-{name}.jsonl") for name in parts},
            "batch_size": 4,
            "epochs": 2,
            "max_steps": None,
            "eval_steps": 2,
            "logging_steps": 1,
        }
        return settings(**{**given, **changes})

    return make


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The number of answers in each pass of the reference, with a cache of its own."""
    found: list[int] = []
    compute = Scoring.reference

    def noted(self: Scoring, answers: Any) -> torch.Tensor:
        found.append(len(answers.mask))
        return compute(self, answers)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Scoring, "reference", noted)
    return found


def losses(given: TrainSettings) -> list[float]:
    return [line[name] for line in read_metrics(given.output) for name in ("loss", "eval_loss") if name in line]


@pytest.mark.parametrize(("objective", "answers"), [("dpo", 2), ("kto", 2)])
def test_each_answer_is_computed_once_and_losses_stay(
    objective: str, answers: int, preferring: Any, computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pair there are two; of a marked answer, itself and the one of another row for KTO's z."""
    first = preferring(objective, output=tmp_path / "first")
    train(first)
    assert sum(computed) == answers * (ROWS + EVAL_ROWS)
    computed.clear()
    second = preferring(objective, output=tmp_path / "second", seed=8)
    train(second)
    assert not computed
    monkeypatch.setattr(Session, "keep_reference", lambda *_: True)
    each = preferring(objective, output=tmp_path / "each")
    train(each)
    # Evaluations, of which each epoch has some, computed theirs too.
    assert sum(computed) > 2 * answers * (ROWS + EVAL_ROWS)
    torch.testing.assert_close(losses(first), losses(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "is_shared"),
    [
        ({"method": "dora", "seed": 3, "learning_rate": 1e-3}, True),
        ({"method": "qlora"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"max_length": 4}, False),
        ({"init": "pissa"}, False),
        ({"fast": False}, False),
    ],
    ids=str,
)
def test_runs_share_a_reference_that_is_theirs(
    changes: dict[str, Any], is_shared: bool, preferring: Any, computed: list[int], tmp_path: Path
) -> None:
    train(preferring(output=tmp_path / "first"))
    computed.clear()
    train(preferring(output=tmp_path / "second", **changes))
    assert bool(computed) is not is_shared


def test_an_adapter_that_is_continued_is_another_reference(
    preferring: Any, computed: list[int], tmp_path: Path
) -> None:
    train(preferring(output=tmp_path / "first"))
    computed.clear()
    train(preferring(output=tmp_path / "second", adapter=tmp_path / "first"))
    assert sum(computed) == 2 * (ROWS + EVAL_ROWS)


def test_a_resumed_run_finds_the_values_in_its_folder(preferring: Any, computed: list[int], tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="RW540"):
        train(preferring(save_steps=2), Recorder(stop_at=4))
    shutil.rmtree(tmp_path / "cache")
    computed.clear()
    assert train(preferring(save_steps=2, resume=True)).status == "finished"
    assert not computed


def test_a_damaged_file_is_said_and_computed_again(preferring: Any, computed: list[int], tmp_path: Path) -> None:
    first = preferring(output=tmp_path / "first")
    train(first)
    (file,) = (tmp_path / "cache").rglob("reference/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    computed.clear()
    second, heard = preferring(output=tmp_path / "second"), Recorder()
    train(second, heard)
    assert any("damaged" in note and file.name in note for note in heard.notes)
    assert sum(computed) == 2 * (ROWS + EVAL_ROWS)
    assert losses(second) == losses(first)


def test_a_reference_that_was_stopped_goes_on(preferring: Any, computed: list[int], tmp_path: Path) -> None:
    class Stopping(Recorder):
        def phase(self, text: str) -> None:
            super().phase(text)
            if "reference" in text:
                os.kill(os.getpid(), signal.SIGINT)

    given = preferring()
    with pytest.raises(RankwiseError, match="RW542"):
        train(given, Stopping())
    done = sum(computed)
    assert 0 < done < 2 * (ROWS + EVAL_ROWS)
    train(given.model_copy(update={"resume": True}))
    assert sum(computed) == 2 * (ROWS + EVAL_ROWS)
