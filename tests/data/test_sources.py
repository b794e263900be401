"""Sources of several files or parts: folders, saved data sets, the hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from data_files import jsonl, refusal

from rankwise.data import read_rows
from rankwise.errors import RankwiseWarning


def test_folders_follow_the_split(tmp_path: Path) -> None:
    for name in ("train-1", "train-2", "valid", "test"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    assert [row.text for row in read_rows(tmp_path)] == ["train-1", "train-2"]
    assert [row.place for row in read_rows(tmp_path, split="validation")] == ["valid.jsonl, line 1"]
    assert "has no split" in refusal(tmp_path, split="extra")
    jsonl(tmp_path / "train-3.jsonl", {"mr": "a", "ref": "b"})
    assert refusal(tmp_path).startswith("RW209: the files in")


def test_a_split_may_name_a_folder_of_files(tmp_path: Path) -> None:
    for name in ("train/a", "train/deep/b", "train/.old/a", "train/._b", "test/a", "validation/a", "validation/test"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        jsonl(path, {"text": name})
    read = {split: [row.text for row in read_rows(tmp_path, split=split)] for split in ("train", "test")}
    assert read == {"train": ["train/a", "train/deep/b"], "test": ["test/a", "validation/test"]}


def test_files_of_no_split_are_named_where_others_have_one(tmp_path: Path) -> None:
    for name in ("train", "letters", "test"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    with pytest.warns(RankwiseWarning, match="^RW187: .* the others are left out: letters.jsonl. Name each"):
        assert [row.text for row in read_rows(tmp_path)] == ["train"]


def test_a_folder_without_the_split_says_how_much_it_holds_and_what_to_do(tmp_path: Path) -> None:
    for number in range(12):
        jsonl(tmp_path / f"test-{number:02}.jsonl", {"text": "a"})
    message = refusal(tmp_path)
    assert message.startswith("RW208: ")
    assert f"test-09.jsonl and 2 more. To read one of them, give --data {tmp_path}/test-00.jsonl." in message


def test_a_folder_without_data_says_so(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith("RW204: ")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(tmp_path / "two")
    assert [row.text for row in read_rows(tmp_path / "one")] == ["a", "b"]
    assert [row.text for row in read_rows(tmp_path / "two", split="test")] == ["b"]
    message = refusal(tmp_path / "two", split="validation")
    assert message.endswith(f"it holds train, test. To read one of them, give --eval-data {tmp_path}/two/train.")
    assert [row.text for row in read_rows(tmp_path / "two" / "train")] == ["a", "b"]


def test_the_hub_is_asked_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        if name == "nobody/nothing":
            raise ConnectionError("Couldn't reach it on the Hub")
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("openai/gsm8k:main", split="test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert rows[0].place == "openai/gsm8k:main, row 1"
    message = refusal("nobody/nothing")
    assert message.startswith("RW208: 'nobody/nothing' is not a file or folder here")
    assert "Couldn't reach it" in message


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "validation")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "validation")),
        ("openai/gsm8k:train", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:train[:5%]", ("openai/gsm8k", None, "train[:5%]")),
        ("openai/gsm8k:main:train[10:20]", ("openai/gsm8k", "main", "train[10:20]")),
        ("openai/gsm8k:train_sft[:1%]", ("openai/gsm8k", None, "train_sft[:1%]")),
        ("gsm8k[:100]", ("gsm8k", None, "validation[:100]")),
    ],
)
def test_a_hub_id_may_name_configuration_split_and_slice(source, asked, monkeypatch):
    heard = []

    def load(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        heard.append((name, configuration, split))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(source, split="validation").source == source
    assert heard == [asked]


def test_a_slice_that_is_none_is_told_in_one_sentence(monkeypatch):
    def load(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        raise ValueError(f"Unrecognized instruction format: {split}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("openai/gsm8k:train[five]")
    assert message.startswith("RW208")
    assert "the hub does not give its split 'train[five]': Unrecognized instruction format" in message
    assert refusal("openai/gsm8k:train[:5%").startswith("RW201")
