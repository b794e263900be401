"""The layouts of preferences, and their token ids beside those that trl's own trainers make of the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from rankwise.data import encode_preferences, preview_row, read_rows
from rankwise.data.objectives import formats_of, unpaired
from rankwise.errors import DataError, RankwiseWarning
from tiny_models import tiny_llama

USER = {"role": "user", "content": "What is 2 + 2 ?"}
FOUR, FIVE = ({"role": "assistant", "content": text} for text in ("4", "It is 5 ."))
AS_MESSAGES = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "messages": AS_MESSAGES,
    "messages, answers as text": {**AS_MESSAGES, "chosen": "4", "rejected": "It is 5 ."},
    "whole conversations": {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    "implicit messages": {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    "implicit messages beside a prompt": {"prompt": "2 + 2", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    "a prompt as text": {"prompt": USER["content"], "chosen": [FOUR], "rejected": [FIVE]},
    "text": {"prompt": USER["content"], "chosen": "4", "rejected": "It is 5 ."},
    "a question": {"question": USER["content"], "chosen": "4", "rejected": "It is 5 ."},
}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_ids(layout: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    found = [
        encode_preferences(
            read_rows(written(tmp_path / "rows.jsonl", row), formats=formats_of("dpo")),
            tokenizer,
            max_length=99,
        )
        for row in (AS_MESSAGES, LAYOUTS[layout])
    ]
    assert found[0].dataset.to_list() == found[1].dataset.to_list()
    assert found[1].report.rows == found[1].report.stop_token_rows == 1


def test_both_sides_of_a_pair_see_the_tools(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {**LAYOUTS["text"], "tools": [{"name": "add"}]})
    [row] = read_rows(path, formats=formats_of("dpo"))
    assert row.rejected is not None
    assert row.tools == row.rejected.tools == ({"name": "add"},)


@pytest.mark.parametrize("layout", ["text", "implicit messages"])
def test_a_column_that_pairs_do_not_read_is_named(layout: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {**LAYOUTS[layout], "system": "Be brief."})
    with pytest.warns(RankwiseWarning, match="RW227: .*`system` in 1 of 1 rows"):
        read_rows(path, formats=formats_of("dpo"))


def test_texts_that_begin_alike_have_an_implicit_prompt(tmp_path: Path) -> None:
    pair = {"chosen": "Human: hi Assistant: hello", "rejected": "Human: hi Assistant: go away"}
    [row] = read_rows(written(tmp_path / "rows.jsonl", pair), formats=formats_of("dpo"))
    assert row.rejected is not None
    assert (row.prompt, row.completion, row.rejected.completion) == ("Human: hi Assistant:", " hello", " go away")


def test_ids_are_those_of_trl(tmp_path: Path) -> None:
    """Of messages: the completion is everything behind the generation prompt."""
    tokenizer = byte_tokenizer()
    rows = [AS_MESSAGES, {**AS_MESSAGES, "prompt": [{"role": "system", "content": "Be short ."}, USER]}]
    arguments = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=60)
    trainer = DPOTrainer(
        model=tiny_llama(vocab_size=len(tokenizer)),
        ref_model=tiny_llama(vocab_size=len(tokenizer)),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )
    ours = encode_preferences(
        read_rows(written(tmp_path / "rows.jsonl", *rows), formats=formats_of("dpo")), tokenizer, max_length=60
    )
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for own, theirs in zip(ours.dataset, trainer.train_dataset, strict=True):
        assert own["prompt_ids"] == theirs["prompt_ids"]
        for name in names[1:]:
            assert own[name] == theirs[name][: 60 - len(own["prompt_ids"])]


@pytest.mark.parametrize("label", [True, 1, "true", "1"])
def test_marked_answers(label: Any, tmp_path: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl",
        {"prompt": "a b", "completion": "c", "label": label},
        {"prompt": "a b", "completion": "d", "label": False},
    )
    rows = read_rows(path, formats=formats_of("kto"))
    assert [row.label for row in rows] == [True, False]
    encoded = encode_preferences(rows, byte_tokenizer(), max_length=99)
    assert encoded.dataset["label"] == [True, False]


def test_a_pair_is_a_good_and_a_bad_answer(tmp_path: Path) -> None:
    rows = unpaired(read_rows(written(tmp_path / "rows.jsonl", LAYOUTS["text"]), formats=formats_of("kto")))
    assert [(row.completion, row.label) for row in rows] == [("4", True), ("It is 5 .", False)]


def test_cut_pairs_are_reported_and_equal_ones_left_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    long = {"prompt": [USER], "chosen": "a a a a a a b", "rejected": "a a a a a a c"}
    rows = read_rows(written(tmp_path / "rows.jsonl", AS_MESSAGES, long), formats=formats_of("dpo"))
    room = len(encode_preferences(rows, tokenizer, max_length=99).dataset[0]["prompt_ids"]) + 5
    with pytest.warns(RankwiseWarning, match="RW216"):
        encoded = encode_preferences(rows, tokenizer, max_length=room)
    assert encoded.report.rows == 1


def test_answers_of_one_label_are_warned_of(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "completion": "c", "label": index < 10} for index in range(20)]
    with pytest.warns(RankwiseWarning, match="RW262"):
        encode_preferences(
            read_rows(written(tmp_path / "rows.jsonl", *rows), formats=formats_of("kto")),
            byte_tokenizer(),
            max_length=99,
        )


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no label": ("kto", {"prompt": "a", "completion": "b", "label": None}, "RW203: .*, found null"),
    "a label of three values": (
        "kto",
        {"prompt": "a", "completion": "b", "label": 2},
        "RW203: .*true or false in `label`, found the number '2'",
    ),
    "a label of words": ("kto", {"prompt": "a", "completion": "b", "label": "Good "}, 'RW203: .*found "good"'),
    "nothing in common": ("dpo", {"chosen": "yes", "rejected": "no"}, "RW203"),
    "equal conversations": ("dpo", {"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, "RW203"),
    "no answer": ("dpo", {"prompt": [USER], "chosen": [USER], "rejected": [FIVE]}, "RW203"),
    "demonstrations": ("dpo", {"prompt": "a", "completion": "b"}, "RW207"),
    "pairs for demonstrations": ("sft", LAYOUTS["text"], "RW207"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str, tmp_path: Path) -> None:
    objective, row, said = BAD[case]
    with pytest.raises(DataError, match=said):
        read_rows(written(tmp_path / "rows.jsonl", row), formats=formats_of(objective))


def test_a_preview_has_both_sides(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path / "rows.jsonl", AS_MESSAGES), formats=formats_of("dpo"))
    shown = preview_row(rows, 0, byte_tokenizer(), max_length=99)
    assert shown.rejected is not None
    trained = ["".join(part.text for part in side.segments if part.trained) for side in (shown, shown.rejected)]
    assert "4" in trained[0]
    assert "5" in trained[1]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_demo_set_holds_no_preferences(objective: str) -> None:
    with pytest.raises(DataError, match="`prompt`, `completion`") as caught:
        read_rows("stdlib", formats=formats_of(objective))
    assert caught.value.code == "RW207"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_neighbours_of_pairs_made_single_have_other_prompts(tmp_path: Path, size: int) -> None:
    """KTO estimates z by the answer of the row before in a batch; the first row's is the last one's."""
    pairs = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    items = unpaired(read_rows(written(tmp_path / "rows.jsonl", *pairs), formats=formats_of("kto"))).items
    assert sorted(row.completion for row in items) == sorted(
        f"{word} {n}" for word in ("bad", "good") for n in range(40)
    )
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        assert all(row.prompt != before.prompt for row, before in zip(batch, [batch[-1], *batch[:-1]]))
