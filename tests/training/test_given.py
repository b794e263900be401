"""A run over a model and rows in memory, and the functions of a user that it calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_rows import Recorder
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.adapters import has_adapter
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, DataError, Interrupted
from rankwise.foreign import sha256_of
from rankwise.records import load_record, read_metrics
from rankwise.training.checkpoints import list_checkpoints
from rankwise.training.parts import Given
from rankwise.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")

SAME = ("train_loss", "eval_loss", "initial_eval_loss", "kept_step", "trainable_parameters")


def loaded(folder: Path) -> dict[str, Any]:
    return {"model": AutoModelForCausalLM.from_pretrained(folder), "tokenizer": AutoTokenizer.from_pretrained(folder)}


def records(file: str) -> list[Any]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def weights_of(folder: Path) -> str:
    return sha256_of(folder / "adapter_model.safetensors")


@pytest.fixture
def from_memory(settings: Any, model_folder: Path, tmp_path: Path) -> Any:
    """(settings, what is given) of the run that ``settings`` names, with everything in memory."""

    def make(name: str = "run", **changes: Any) -> tuple[TrainSettings, Given]:
        asked = settings(output=tmp_path / name, **changes).model_dump(exclude_unset=True)
        rows = {place: records(asked.pop(place)) for place in ("data", "eval_data")}
        for place in ("device", "dtype"):
            del asked[place]
        return TrainSettings(**{**asked, "data": "D", "eval_data": "E", "model": "M"}), Given(
            **loaded(model_folder), rows=rows
        )

    return make


def test_a_model_and_rows_in_memory_train_as_those_of_files(settings: Any, from_memory: Any, tmp_path: Path) -> None:
    """Also as a Dataset; the very model that was given has the adapter, and gives logits again."""
    expected = train(settings(output=tmp_path / "files", lora_dropout=0.1))
    asked, given = from_memory(lora_dropout=0.1)
    given.rows["eval_data"] = Dataset.from_list(given.rows["eval_data"])
    found = train(asked, given=given)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "files")
    assert [getattr(found, name) for name in SAME] == [getattr(expected, name) for name in SAME]
    ids = torch.tensor([[1, 5, 6]])
    assert has_adapter(given.model)
    assert given.model(input_ids=ids, labels=ids).logits is not None


@pytest.mark.parametrize("stop", ["signal", "error"])
def test_a_stopped_run_gives_the_model_back_and_the_same_call_resumes(
    stop: str, from_memory: Any, tmp_path: Path
) -> None:
    asked, given = from_memory("straight")
    train(asked, given=given)
    asked, given = from_memory()
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    if stop == "signal":
        with pytest.raises(Interrupted, match="RW540"):
            train(asked, Recorder(stop_at=3), given=given)
    else:

        def fail(info: Any) -> None:
            if info.step == 3:
                raise ConnectionError("a tracker that nobody has heard of")

        given.callbacks.on_step = fail
        with pytest.raises(ConnectionError, match="a tracker that nobody"):
            train(asked, given=given)
        assert load_record(tmp_path / "run").status == "failed"
    assert list_checkpoints(tmp_path / "run")[-1].step == 3
    after = given.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    again = Given(model=given.model, tokenizer=given.tokenizer, rows=given.rows)
    assert train(asked.model_copy(update={"resume": True}), given=again).steps == 8
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "straight")


def test_a_run_resumes_over_the_same_weights_and_rows_only(from_memory: Any) -> None:
    asked, given = from_memory()
    with pytest.raises(Interrupted):
        train(asked, Recorder(stop_at=3), given=given)
    given.model.model.norm.weight.data[0] += 1
    given.rows["data"].reverse()
    with pytest.raises(Exception, match="RW508.* --data, --model;"):
        train(asked.model_copy(update={"resume": True}), given=given)


def test_callbacks_are_told_of_everything_and_change_nothing(from_memory: Any, tmp_path: Path) -> None:
    asked, given = from_memory("plain", lora_dropout=0.1)
    train(asked, given=given)
    asked, given = from_memory(lora_dropout=0.1)
    steps, saved = [], []

    def measure(info: Any) -> dict[str, float]:
        torch.rand(3)
        prompt = given.tokenizer("w1 w2", return_tensors="pt")
        answer = info.model.generate(**prompt, max_new_tokens=2, do_sample=True)
        return {"answered": float(len(answer[0]))}

    given.callbacks.on_step = lambda info: steps.append((info.step, torch.rand(1)))
    given.callbacks.on_evaluation = measure
    given.callbacks.on_save = saved.append
    train(asked, given=given)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "plain")
    assert [step for step, _ in steps] == list(range(1, 9))
    assert saved[-1] == tmp_path / "run" / "checkpoints" / "step-8"
    lines = [line for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert [(line["step"], line["answered"] > 2) for line in lines] == [(0, True), (4, True), (8, True)]


@pytest.mark.parametrize("place", ["on_step", "on_evaluation", "on_save"])
def test_a_callback_ends_a_run_as_early_stopping_does(place: str, from_memory: Any, tmp_path: Path) -> None:
    """It is evaluated, saved and finished at that step."""

    def end(told: Any) -> None:
        step = told.step if hasattr(told, "step") else int(told.name.removeprefix("step-"))
        if step >= 3:
            raise StopIteration

    asked, given = from_memory(save_steps=3, eval_steps=3)
    setattr(given.callbacks, place, end)
    with pytest.warns(match="RW527.*after step 3 of 8: a callback ended the run"):
        record = train(asked, given=given)
    assert (record.status, record.steps, record.kept_step) == ("finished", 3, 3)
    assert list_checkpoints(tmp_path / "run")[-1].step == 3


@pytest.mark.parametrize("place", ["on_evaluation", "on_save"])
def test_an_error_anywhere_leaves_a_checkpoint(place: str, from_memory: Any, tmp_path: Path) -> None:
    asked, given = from_memory()

    def fail(told: Any) -> None:
        if getattr(told, "step", 4) >= 4:
            raise KeyError("own")

    setattr(given.callbacks, place, fail)
    with pytest.raises(KeyError, match="own"):
        train(asked, given=given)
    assert list_checkpoints(tmp_path / "run")
    assert not has_adapter(given.model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "qlora"}, "--method qlora does not go with its dense layers"),
        ({"dtype": "float32", "revision": "main"}, "revision is for a model that is loaded; dtype is for"),
        ({"new_tokens": "<a>"}, "new_tokens is for a model that is loaded"),
    ],
)
def test_what_a_model_in_memory_cannot_be_is_refused(changes: Any, said: str, from_memory: Any) -> None:
    asked, given = from_memory()
    with pytest.raises(ConfigError, match=f"RW112.*{said}"):
        train(TrainSettings(**asked.model_dump(exclude_unset=True), **changes), given=given)


def test_a_model_with_an_adapter_or_without_a_tokenizer_is_refused(from_memory: Any) -> None:
    asked, given = from_memory()
    with pytest.raises(ConfigError, match="RW115.*tokenizer=TOKENIZER"):
        train(asked, given=Given(model=given.model, rows=given.rows))
    rw.add_adapter(given.model, rw.LoraConfig(r=2))
    with pytest.raises(ConfigError, match=r"RW112.*rw\.remove_adapter"):
        train(asked, given=given)
    assert has_adapter(given.model)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["text"], "RW202.*a list of dicts, not str"),
        ({"prompt": "a"}, "RW202.*not dict"),
        (iter([{"prompt": "a", "completion": "b"}]), "RW202.*not list_iterator"),
        ([], "RW204"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "RW203.*the data in memory, row 2"),
    ],
)
def test_rows_of_another_kind_are_refused(rows: Any, said: str, from_memory: Any) -> None:
    asked, given = from_memory()
    given.rows["data"] = rows
    with pytest.raises(DataError, match=said):
        train(asked, given=given)


def test_a_dense_model_of_16_bits_cannot_be_trained_whole(from_memory: Any) -> None:
    asked, given = from_memory(method="full")
    given.model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="RW112.*trains float32 weights, and its are torch.bfloat16"):
        train(asked, given=given)
