"""``--learning-rate auto``: short runs before the run, which itself is that of the rate they found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_rows import Recorder, encoded_rows

from rankwise.config import TrainSettings
from rankwise.constants import IGNORED
from rankwise.default_rate import default_rate
from rankwise.errors import ConfigError, Interrupted, RunError
from rankwise.records import load_record
from rankwise.training import rate_search
from rankwise.training.rate_search import kept_apart, rounds
from rankwise.training.run import train
from rankwise.training.setup import Data
from tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")
SHORT = {"learning_rate": "auto:1e-3,1e-2,3e-2,1e-1", "budget": 2}


@pytest.mark.parametrize("rates", [2, 3, 4, 6, 13, 30])
def test_the_rounds_stay_within_the_budget_and_end_with_few_rates(rates: int) -> None:
    found = rounds(rates, 600)
    assert found[0][0] == rates
    assert 1 <= found[-1][0] <= 3
    assert [length for _, length in found] == sorted(length for _, length in found)
    assert 500 < sum(count * length for count, length in found) <= 600
    # Never so few steps that a run is all warm-up.
    assert min(length for _, length in rounds(rates, 1)) == 2


METHODS = [
    {"method": "lora", "lora_dropout": 0.1},
    {"method": "qdora", "loraplus_ratio": 4, "warmup_steps": 2},
    {"method": "full", "dtype": "bfloat16", "learning_rate": "auto:1e-4,1e-3,3e-3"},
    # The second rate diverges.
    {"neftune_noise_alpha": 5, "max_grad_norm": 0, "learning_rate": "auto:1e-3,1e25"},
]


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_the_run_is_that_of_the_rate_found(changes: dict[str, Any], settings: Any, tmp_path: Path) -> None:
    given = settings(**SHORT | changes)
    found = train(given)
    search = found.rate_search
    assert search is not None
    assert found.settings["learning_rate"] == search["chosen"]
    plain = train(
        given.model_copy(update={"learning_rate": search["chosen"], "budget": None, "output": tmp_path / "plain"})
    )
    assert (plain.train_loss, plain.eval_loss) == (found.train_loss, found.eval_loss)
    assert plain.learning_rates == found.learning_rates
    name = "model.safetensors" if given.method == "full" else "adapter_model.safetensors"
    one, two = load_file(tmp_path / "run" / name), load_file(tmp_path / "plain" / name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {trial["learning_rate"] for trial in search["trials"]} == set(given.searched_rates)


def test_a_rate_that_learns_is_taken_and_the_others_stop(settings: Any, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"w{n} ", "completion": "w1 w2 w3"}) + "\n" for n in range(40))
    (tmp_path / "same.jsonl").write_text(rows)
    given = {"data": str(tmp_path / "same.jsonl"), "eval_data": None, "eval_steps": None}
    record = train(settings(learning_rate="auto:1e-9,1e-8,1e-2,1e6", budget=4, **given))
    search = load_record(tmp_path / "run").rate_search
    assert search == record.rate_search
    assert search is not None
    assert search["chosen"] == 1e-2
    first = {trial["learning_rate"]: trial["loss"] for trial in search["trials"][:4]}
    assert min(first, key=lambda rate: first[rate] or 1e9) == 1e-2
    assert len(search["trials"]) == 6
    assert search["trials"][-1]["steps"] > search["trials"][0]["steps"]
    assert 0 < search["rows"] <= 4


def test_a_resumed_run_does_not_search_again(settings: Any, tmp_path: Path) -> None:
    given = settings(**SHORT)
    straight = train(given.model_copy(update={"output": tmp_path / "straight"}))
    with pytest.raises(Interrupted):
        train(given, Recorder(stop_at=4))
    for change in ({"learning_rate": "auto:1e-3,1e-2"}, {"budget": 1}):
        with pytest.raises(RunError, match="RW507"):
            train(given.model_copy(update={"resume": True, **change}))
    watched = Recorder()
    resumed = train(given.model_copy(update={"resume": True}), watched)
    assert not [phase for phase in watched.phases if "Trying" in phase]
    assert resumed.rate_search is not None
    assert straight.rate_search is not None
    assert resumed.rate_search["trials"] == straight.rate_search["trials"]
    assert resumed.eval_loss == straight.eval_loss
    # Also where no option but --output is given again, as the command line does.
    settings_then = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert train(TrainSettings.model_validate(settings_then | {"resume": True})).eval_loss == resumed.eval_loss


def test_a_rate_whose_last_update_diverges_is_left_out(settings: Any) -> None:
    """Each short run has two steps, of which the first only warms up."""
    given = {"learning_rate": "auto:1e-3,1e-2,1e30", "budget": 0.01, "max_grad_norm": 0, "warmup_steps": 4}
    search = train(settings(**given, lr_scheduler_type="constant_with_warmup")).rate_search
    assert search is not None
    assert [trial["loss"] is None for trial in search["trials"]] == [False, False, True]


@pytest.mark.parametrize(("change", "taken"), [({}, 3), ({"seed": 1}, 0)])
def test_a_search_that_was_stopped_continues(
    change: dict[str, Any], taken: int, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, runs, judge = settings(**SHORT), [], rate_search.loss_after
    straight = train(given.model_copy(update={**change, "output": tmp_path / "straight"}))

    def counted(loop: Any, rows: Any) -> float | None:
        runs.append(rows)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return judge(loop, rows)

    monkeypatch.setattr(rate_search, "loss_after", counted)
    with pytest.raises(KeyboardInterrupt):
        train(given)
    assert [path.name for path in tmp_path.glob("*run*")] == [".run.rankwise-search"]
    found = train(given.model_copy(update=change))
    assert straight.rate_search is not None
    assert found.rate_search is not None
    assert found.rate_search["trials"] == straight.rate_search["trials"]
    assert len(runs) - 4 == len(straight.rate_search["trials"]) - taken
    assert not (tmp_path / ".run.rankwise-search").exists()


def test_the_rows_that_judge_are_of_prompts_that_no_short_run_sees() -> None:
    rows = encoded_rows(200)
    twice = rows.map(
        lambda row: {"input_ids": [1, *row["input_ids"][1:2], *row["input_ids"][2:]], "labels": row["labels"]}
    )
    data: Any = Data(dataclasses.make_dataclass("Encoded", ["dataset"])(twice), None, None, 32)  # type: ignore[arg-type]
    training, held = kept_apart(data)

    def prompts(found: Any) -> set[tuple[int, ...]]:
        return {
            tuple(ids[: next(place for place, label in enumerate(labels) if label != IGNORED)])
            for ids, labels in zip(found["input_ids"], found["labels"])
        }

    assert not prompts(training.train.dataset) & prompts(held)
    assert len(training.train.dataset) + len(held) == 200
    assert 4 <= len(held) <= 20
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, dataset=twice.shuffle(seed=1)))
    assert prompts(kept_apart(data)[1]) == prompts(held)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"budget": 1}, ConfigError, "RW112"),
    ({"learning_rate": "auto", "objective": "dpo"}, ConfigError, "RW112"),
    ({"learning_rate": "auto:1e20,1e25", "max_grad_norm": 0}, ConfigError, "RW176"),
]


@pytest.mark.parametrize(("changes", "error", "code"), REFUSED)
def test_what_cannot_be_searched(changes: dict[str, Any], error: type[Exception], code: str, settings: Any) -> None:
    with pytest.raises(error, match=code):
        train(settings(**changes))


def test_too_few_rows_are_refused(settings: Any, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"w{n} ", "completion": "w1"}) + "\n" for n in range(9))
    (tmp_path / "few.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match="RW175"):
        train(settings(learning_rate="auto", data=str(tmp_path / "few.jsonl")))


@pytest.mark.parametrize(
    "value", ["fast", "auto:", "auto:1e-3", "auto:1e-3,1e-3", "auto:1e-3,-1", "auto:1e-3,inf", "-1", "nan"]
)
def test_rates_that_cannot_be(value: str) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        TrainSettings.model_validate({"model": "m", "data": "d", "output": "o", "learning_rate": value})


def test_rates_as_they_are_written() -> None:
    def rates(**given: Any) -> tuple[float, ...]:
        return TrainSettings.model_validate({"model": "m", "data": "d", "output": "o", **given}).searched_rates

    assert rates(learning_rate="auto:1e-2, 3e-4") == (3e-4, 1e-2)
    assert rates(learning_rate="3e-4") == ()


def test_a_rate_far_above_the_default_is_told(settings: Any) -> None:
    watcher = Recorder()
    train(settings(learning_rate=5.0, max_steps=1), watcher)
    assert any(note.startswith("learning rate 5, which is") for note in watcher.notes)


@pytest.mark.parametrize("learning_rate", [None, "auto"])
def test_a_rate_that_was_not_given_follows_from_the_width(learning_rate: str | None, settings: Any) -> None:
    given, watcher = settings(learning_rate=learning_rate, max_steps=12), Recorder()
    record = train(given, watcher)
    usual = default_rate("llama", tiny_llama().config.hidden_size, given.model_dump())
    if learning_rate is None:
        assert record.settings["learning_rate"] == usual.rate
        assert f"learning rate {usual}" in watcher.notes
    else:
        assert record.rate_search is not None
        trials = record.rate_search["trials"]
        assert [trial["learning_rate"] for trial in trials] == list(usual.around)
        assert sum(trial["steps"] for trial in trials) <= 6
    # A longer run that is resumed keeps the rate.
    again = train(given.model_copy(update={"resume": True, "max_steps": 14}))
    assert again.settings["learning_rate"] == record.settings["learning_rate"]
    # What was asked stands beside it.
    assert again.asked == record.asked == {"learning_rate": learning_rate, "products": "auto"}
