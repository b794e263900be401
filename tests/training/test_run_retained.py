"""``train --retain``: the base's loss once, that of the kept weights beside it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rows import Recorder, write_rows

from rankwise.conflicts import check_conflicts
from rankwise.errors import ConfigError, DataError, Interrupted, RunError
from rankwise.evaluation.retained import RetainedRows
from rankwise.records import load_record
from rankwise.training.parts import part_of
from rankwise.training.run import train
from small_engines import arc_docs, write_lines

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")


@pytest.fixture
def run(settings: Any, tmp_path: Path) -> Any:
    rows = write_rows(tmp_path / "stay.jsonl", 12, seed=5)

    def train_with(observer: Any = None, **changes: Any) -> Any:
        given = settings(retain=str(rows), **changes)
        return train(given, observer, None, part_of(RetainedRows, given))

    return train_with


def losses(folder: Path, part: str) -> list[tuple[float, float]]:
    lines = (folder / "retained" / part / "predictions.jsonl").read_text().splitlines()
    return [(found["loss"], found["tokens"]) for found in (json.loads(line)["scores"] for line in lines)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_record_holds_both_losses_and_their_paired_difference(method: str, run: Any, tmp_path: Path) -> None:
    record = run(method=method)
    found: Any = record.retained
    assert record == load_record(tmp_path / "run")
    means = []
    for part in ("base", "kept"):
        rows = losses(tmp_path / "run", part)
        means.append(sum(loss * tokens for loss, tokens in rows) / sum(tokens for _, tokens in rows))
    assert (found["rows"], found["base"], found["loss"]) == (12, pytest.approx(means[0]), pytest.approx(means[1]))
    assert found["difference"] == pytest.approx(means[1] - means[0])
    low, high = found["interval"]
    assert low < found["difference"] < high
    assert found["margin"] == pytest.approx(0.02 * means[0])
    # Rows of the same task: the loss falls.
    assert found["verdict"] == "kept"


def test_training_is_the_same_to_the_bit_and_an_overwritten_run_leaves_nothing(
    run: Any, settings: Any, tmp_path: Path
) -> None:
    measured = run(lora_dropout=0.1)
    assert len(list((tmp_path / "run" / "retained").rglob("*.json*"))) == 6
    plain = train(settings(lora_dropout=0.1, overwrite=True))
    assert not (tmp_path / "run" / "retained").exists()
    assert plain.retained is None
    assert (measured.eval_loss, measured.train_loss) == (plain.eval_loss, plain.train_loss)


def test_a_resumed_run_keeps_what_the_base_lost(run: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(Recorder(stop_at=5))
    base = tmp_path / "run" / "retained" / "base" / "predictions.jsonl"
    lines = base.read_text().splitlines()
    first = json.loads(lines[0])
    first["scores"]["loss"] += 7.0
    base.write_text("\n".join([json.dumps(first), *lines[1:], ""]))
    before = losses(tmp_path / "run", "base")
    record = run(resume=True)
    assert losses(tmp_path / "run", "base") == before
    total = sum(tokens for _, tokens in before)
    assert record.retained["base"] == pytest.approx(sum(loss * tokens for loss, tokens in before) / total)


def test_other_rows_cannot_be_resumed_with(run: Any, settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(Recorder(stop_at=5))
    write_rows(tmp_path / "stay.jsonl", 12, seed=6)
    with pytest.raises(RunError, match="RW570"):
        run(resume=True)
    with pytest.raises(RunError, match="RW507: .*--retain was"):
        train(settings(resume=True))


def test_rows_of_the_training_data_are_named(run: Any, tmp_path: Path, settings: Any) -> None:
    given = settings(retain=str(tmp_path / "train.jsonl"), max_steps=1)
    record = train(given, Recorder(), None, part_of(RetainedRows, given))
    assert [item["message"][:40] for item in record.warnings if item["code"] == "RW218"] == [
        "40 of 40 retained rows are also in the t"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retain_margin": 0.1}, "--retain-margin says how much of --retain may be lost"),
        ({"retain": "rows.jsonl", "devices": 2}, "--retain is measured in one process"),
        ({"retain": "rows.jsonl", "objective": "classify"}, "--retain does not go with --objective classify"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str, settings: Any) -> None:
    with pytest.raises(ConfigError, match=f"RW112: .*{said}"):
        check_conflicts(settings(**changes), changes.get("devices", 1))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{}", "RW204"),
        ("helaswag", "RW20"),
        ("lambada_openai={}", "RW112: --retain lambada_openai: only tasks with choices of which one is right"),
    ],
)
def test_what_cannot_be_retained_is_refused_before_the_model_is_loaded(
    source: str, said: str, settings: Any, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("" if source == "{}" else json.dumps({"text": "a b c"}) + "\n")
    given, told = settings(retain=source.format(rows)), Recorder()
    with pytest.raises((ConfigError, DataError), match=said):
        train(given, told, None, part_of(RetainedRows, given))
    assert told.phases == ["Reading data"]


def test_the_loss_of_a_task_is_that_of_the_right_choice_among_all(settings: Any, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "arc.jsonl", arc_docs(12))
    given = settings(retain=f"arc_easy={data}", eval_limit=10)
    found: Any = train(given, None, None, part_of(RetainedRows, given)).retained
    means = []
    for part in ("base", "kept"):
        lines = (tmp_path / "run" / "retained" / part / "predictions.jsonl").read_text().splitlines()
        examples = [json.loads(line) for line in lines]
        shares = [torch.tensor(item["details"]["log_likelihoods"], dtype=torch.float64) for item in examples]
        rights = [item["details"]["right"] for item in examples]
        assert [arc["answerKey"] for arc in arc_docs(10)] == ["ABCD"[right] for right in rights]
        assert [item["scores"]["accuracy"] for item in examples] == [
            float(z.argmax() == right) for z, right in zip(shares, rights)
        ]
        means.append(sum(-float(z.log_softmax(0)[right]) for z, right in zip(shares, rights)) / 10)
    assert (found["source"], found["rows"], found["unit"]) == ("arc_easy", 10, "question")
    assert (found["base"], found["difference"]) == (pytest.approx(means[0]), pytest.approx(means[1] - means[0]))
