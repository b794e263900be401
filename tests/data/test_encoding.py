"""What is trained on: properties over formats and tokenizers of different habits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import (
    CHATML,
    CLOSED,
    ENDED_TWICE,
    MARKED,
    MARKED_BEYOND,
    UNSTABLE,
    WITH_BOS,
    WITHOUT_STOP,
    byte_tokenizer,
    char_tokenizer,
    sentencepiece_tokenizer,
)
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rankwise.data import Rows, encode_rows, preview_row, read_template, rows_from_records
from rankwise.data.encoding import RowEncoder
from rankwise.errors import ConfigError, DataError, RankwiseWarning
from tables import thinned

# Writes a number of its own in front of each answer, so that none stands as another one does.
SAYS_ITS_NUMBER = CHATML.replace("<|im_start|>{{ message", "<|im_start|>{{ loop.index0 }} {{ message").replace(
    "<|im_start|>assistant", "<|im_start|>{{ messages|length }} assistant"
)

WITH_CALLS = CHATML.replace(
    "message.content }}", "message.content }}{{ message.tool_calls|tojson if message.tool_calls }}"
)

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte": byte_tokenizer,
    "byte, bos": lambda: byte_tokenizer(bos=True, chat_template=WITH_BOS),
    "byte, pad is eos": lambda: byte_tokenizer(pad_token="<|im_end|>"),
    "byte, marked": lambda: byte_tokenizer(chat_template=MARKED),
    "sentencepiece": sentencepiece_tokenizer,
    "python": char_tokenizer,
}


def rows(*records: dict[str, Any]) -> Rows:
    return rows_from_records(list(enumerate(records, 1)), "rows.jsonl")


def chat(*contents: str, first: str = "user") -> dict[str, Any]:
    roles = [first, "assistant" if first == "user" else "user"] * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)]}


ROWS = {
    "chat": rows(chat("is it high?", "yes", "and near?", "no, not near"), chat("no?", "no")),
    "prompt": rows({"prompt": "the rating is", "completion": " high"}, {"prompt": "a", "completion": "b\nc"}),
    "alpaca": rows({"instruction": "the answer", "input": "is", "output": "yes"}),
    "e2e": rows({"mr": "name[pub]", "ref": "the pub near the river"}),
    "text": rows({"text": "the answer is yes"}),
}


def trained_text(tokenizer: PreTrainedTokenizerBase, example: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("habit", TOKENIZERS)
def test_labels_are_ids_and_end_in_a_stop_token(habit: str, kind: str) -> None:
    tokenizer = TOKENIZERS[habit]()
    encoded = encode_rows(ROWS[kind], tokenizer, max_length=512)
    stop = (
        tokenizer.convert_tokens_to_ids("<|im_end|>") if "chat" in encoded.report.template else tokenizer.eos_token_id
    )
    for example in encoded.dataset:
        assert len(example["input_ids"]) == len(example["labels"])
        assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"]))
        assert [label for label in example["labels"] if label != -100][-1] == stop
    assert encoded.report.stop_token_rows == encoded.report.rows == len(ROWS[kind])
    assert encoded.report.tokens == sum(map(len, encoded.dataset["input_ids"]))
    assert encoded.report.trained_tokens == sum(
        label != -100 for labels in encoded.dataset["labels"] for label in labels
    )


@pytest.mark.parametrize("habit", TOKENIZERS)
def test_only_the_assistant_is_trained_on(habit: str) -> None:
    tokenizer = TOKENIZERS[habit]()
    first, second = encode_rows(ROWS["chat"], tokenizer, max_length=512).dataset
    assert trained_text(tokenizer, first).split() == ["yes<|im_end|>no,", "not", "near<|im_end|>"]
    assert trained_text(tokenizer, second) == "no<|im_end|>"


@pytest.mark.parametrize("habit", TOKENIZERS)
def test_the_ids_are_those_of_the_tokenizers_own_template(habit: str) -> None:
    tokenizer = TOKENIZERS[habit]()
    for row, example in zip(ROWS["chat"], encode_rows(ROWS["chat"], tokenizer, max_length=512).dataset):
        messages = [dict(message) for message in row.messages]
        assert example["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("habit", TOKENIZERS)
@pytest.mark.parametrize("kind", ["prompt", "e2e", "chat"])
def test_generation_starts_from_the_untrained_beginning(habit: str, kind: str) -> None:
    tokenizer = TOKENIZERS[habit]()
    example = encode_rows(ROWS[kind], tokenizer, max_length=512).dataset[0]
    start = next(place for place, label in enumerate(example["labels"]) if label != -100)
    row = ROWS[kind][0]
    if kind == "e2e":
        prompt = tokenizer(row.prompt)["input_ids"]
    else:
        first = dict(row.messages[0]) if kind == "chat" else {"role": "user", "content": row.prompt}
        prompt = tokenizer.apply_chat_template([first], add_generation_prompt=True, return_dict=False)
    assert example["input_ids"][:start] == prompt


@pytest.mark.parametrize("habit", ["byte, pad is eos", "python"])
def test_padding_is_never_in_the_loss(habit: str) -> None:
    tokenizer = TOKENIZERS[habit]()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = encode_rows(ROWS["chat"], tokenizer, max_length=512).dataset
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(list(dataset))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    stops = (batch["input_ids"] == tokenizer.eos_token_id) & ~padding
    assert torch.equal((batch["labels"] == tokenizer.eos_token_id).sum(1), torch.tensor([2, 1]))
    assert (stops.sum(1) > 2).any()


def test_a_bos_token_is_written_once() -> None:
    tokenizer = byte_tokenizer(bos=True, chat_template=WITH_BOS)
    for kind, data in ROWS.items():
        for example in encode_rows(data, tokenizer, max_length=512).dataset:
            assert example["input_ids"].count(1) == 1, kind
            assert (example["input_ids"][0], example["labels"][0]) == (1, -100), kind


def test_a_token_across_the_border_is_split() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    data = rows({"prompt": "near the riv", "completion": "er of"})
    encoded = encode_rows(data, tokenizer, max_length=64)
    prompt = tokenizer("near the riv")["input_ids"]
    assert tokenizer("near the river of")["input_ids"][: len(prompt)] != prompt
    [example] = encoded.dataset
    assert example["input_ids"][: len(prompt)] == prompt
    assert trained_text(tokenizer, example) == "er of<|im_end|>"


def test_a_stop_token_in_the_text_is_not_doubled() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    for record in ({"prompt": "a", "completion": "b<|im_end|>"}, {"text": "ab<|im_end|>"}):
        [example] = encode_rows(rows(record), tokenizer, max_length=64).dataset
        assert example["labels"].count(tokenizer.eos_token_id) == 1


def test_without_a_template_prompts_are_concatenated_and_chats_refused() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    report = encode_rows(ROWS["prompt"], tokenizer, max_length=64).report
    assert report.template == "no template: prompt + completion"
    encoded = encode_rows(ROWS["alpaca"], tokenizer, max_length=64)
    assert encoded.report.template == "no template: prompt + '\\n' + completion"
    assert tokenizer.decode(encoded.dataset[0]["input_ids"]) == "the answer\n\nis\nyes<|im_end|>"
    with pytest.raises(
        DataError, match=r"RW210: rows\.jsonl holds chat messages and the tokenizer has no chat template"
    ):
        encode_rows(ROWS["chat"], tokenizer, max_length=64)
    assert encode_rows(ROWS["chat"], tokenizer, max_length=64, chat_template=CHATML).report.template == (
        "chat template (the one given)"
    )


def test_e2e_never_takes_the_template() -> None:
    tokenizer = byte_tokenizer()
    [example] = encode_rows(ROWS["e2e"], tokenizer, max_length=64).dataset
    assert tokenizer.decode(example["input_ids"]) == "name[pub]\nthe pub near the river<|im_end|>"
    assert trained_text(tokenizer, example) == "the pub near the river<|im_end|>"


def test_a_template_without_a_stop_token_gets_the_tokenizers() -> None:
    tokenizer = byte_tokenizer(chat_template=WITHOUT_STOP, eos_token="</s>")
    [example] = encode_rows(rows(chat("no?", "no")), tokenizer, max_length=256).dataset
    assert tokenizer.decode(example["input_ids"]) == "user: no?\nassistant: no\n</s>"
    assert trained_text(tokenizer, example) == "no\n</s>"


def test_a_template_that_closes_the_conversation_is_understood() -> None:
    tokenizer = byte_tokenizer(chat_template=CLOSED)
    [example] = encode_rows(ROWS["chat"][:1], tokenizer, max_length=256).dataset
    assert trained_text(tokenizer, example) == "yes<|im_end|>no, not near<|im_end|>"
    assert tokenizer.decode(example["input_ids"]).endswith("<|im_end|>\n</s>")


def test_the_stop_token_is_the_templates_not_the_tokenizers() -> None:
    tokenizer = byte_tokenizer(eos_token="</s>")
    encoded = encode_rows(rows(chat("no?", "no")), tokenizer, max_length=256)
    assert trained_text(tokenizer, encoded.dataset[0]) == "no<|im_end|>"
    assert encoded.report.stop_token_rows == 1


@pytest.mark.parametrize("template", [ENDED_TWICE, ENDED_TWICE.replace("content }}{% if", "content }}\n{% if")])
def test_of_several_special_tokens_the_last_one_ends_an_answer(template: str) -> None:
    tokenizer = byte_tokenizer(chat_template=template, eos_token="</s>")
    encoded = encode_rows(ROWS["chat"][:1], tokenizer, max_length=256)
    answers = trained_text(tokenizer, encoded.dataset[0]).replace("\n", "")
    assert answers == "yes<|im_end|></s>no, not near<|im_end|></s>"
    assert RowEncoder(ROWS["chat"], tokenizer, None).stop_ids() == {tokenizer.eos_token_id}


def test_a_templates_own_marks_win() -> None:
    tokenizer = byte_tokenizer(chat_template=MARKED_BEYOND)
    [example] = encode_rows(ROWS["chat"][:1], tokenizer, max_length=256).dataset
    assert trained_text(tokenizer, example) == "yes<|im_end|>\n</s>no, not near<|im_end|>\n</s>"


@pytest.mark.parametrize(
    ("template", "record", "code", "complaint"),
    [
        (
            UNSTABLE,
            chat("a", "long", "b", "c"),
            "RW212",
            "rows.jsonl, line 1: what the chat template writes up to message 2",
        ),
        (CHATML, chat("hi", "b", "c", first="assistant"), "RW212", "the first message is the assistant's"),
        (
            "{{ raise_exception('no system role') }}",
            chat("a", "b"),
            "RW211",
            "line 1: the chat template refuses it: no system",
        ),
        ("{{ messages[0].content + 1 }}", chat("a", "b"), "RW211", "line 1: the chat template refuses it"),
        ("{{ bos_token }}", {"prompt": "a", "completion": "b"}, "RW221", "leaves out the `content` of message 1"),
        (CHATML.replace("message.content", "''"), chat("a", "b"), "RW221", "leaves out the `content` of message 2"),
        (
            CHATML + "{% generation %}{% endgeneration %}x",
            {"prompt": "a", "completion": "b"},
            "RW212",
            "rows.jsonl, line 1: the chat template marks no",
        ),
    ],
)
def test_a_template_that_cannot_serve_is_refused(
    template: str, record: dict[str, Any], code: str, complaint: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode_rows(rows(record), byte_tokenizer(chat_template=template), max_length=256)
    assert caught.value.code == code
    assert complaint in caught.value.message
    assert "\n" not in caught.value.message


def test_truncation_is_counted_and_said() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    data = rows(
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 20},
        {"prompt": "a" * 20, "completion": "b"},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoded = encode_rows(data, tokenizer, max_length=10)
    report = encoded.report
    assert (report.rows, report.truncated_rows, report.dropped_rows, report.stop_token_rows) == (2, 1, 1, 1)
    assert (report.longest, report.median_length) == (22, 22)
    assert max(map(len, encoded.dataset["input_ids"])) == 10
    messages = [str(item.message) for item in caught if issubclass(item.category, RankwiseWarning)]
    assert messages[0].startswith("RW215: 1 of 3 rows of rows.jsonl were cut at --max-length 10")
    assert messages[1].startswith("RW216: 1 of 3 rows of rows.jsonl were left out")


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match=r"RW214: none of the 2 rows of rows\.jsonl"):
        encode_rows(ROWS["prompt"], byte_tokenizer(), max_length=4)


def test_no_tokenizer_and_no_stop_token_are_errors() -> None:
    with pytest.raises(ConfigError, match="RW115"):
        encode_rows(ROWS["prompt"], None, max_length=64)
    with pytest.raises(DataError, match="RW213"):
        encode_rows(ROWS["text"], byte_tokenizer(eos_token=None), max_length=64)


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(*(chat("no?" * n, "yes" * n) for n in range(1, 8)))
    once = encode_rows(data, byte_tokenizer(), max_length=512)
    monkeypatch.setattr("rankwise.data.encoding.ROWS_PER_BATCH", 2)
    again = encode_rows(data, byte_tokenizer(), max_length=512)
    assert list(once.dataset) == list(again.dataset)
    assert once.report == again.report


@thinned({"habit": list(TOKENIZERS), "kind": list(ROWS)})
def test_a_preview_shows_what_is_encoded(habit: str, kind: str) -> None:
    tokenizer = TOKENIZERS[habit]()
    preview = preview_row(ROWS[kind], 0, tokenizer, max_length=512)
    [example] = encode_rows(ROWS[kind][:1], tokenizer, max_length=512).dataset
    assert list(preview.ids) == example["input_ids"]
    assert "".join(segment.text for segment in preview.segments) == tokenizer.decode(example["input_ids"])
    assert preview.trained_tokens == sum(label != -100 for label in example["labels"])
    assert (preview.line, preview.truncated, preview.stop_token) == (1, False, True)
    assert all(one.trained != other.trained for one, other in zip(preview.segments, preview.segments[1:]))


def test_a_preview_shows_truncation_too() -> None:
    preview = preview_row(ROWS["prompt"], 0, byte_tokenizer(), max_length=3)
    assert (preview.tokens, preview.trained_tokens, preview.trained_share, preview.truncated) == (3, 0, 0, True)
    with pytest.raises(DataError, match=r"RW217: rows\.jsonl has no row 2; its 2 rows count from 0"):
        preview_row(ROWS["prompt"], 2, byte_tokenizer(), max_length=3)


def test_read_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED, encoding="utf-8")
    assert read_template(path) == MARKED
    looped = "{% for m in messages %}{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% continue %}{% endfor %}"
    path.write_text(looped, encoding="utf-8")
    assert read_template(path) == looped
    path.write_text("a\n{% for %}", encoding="utf-8")
    with pytest.raises(DataError, match=r"RW211: the chat template .*chat.jinja, line 2"):
        read_template(path)
    with pytest.raises(DataError, match="RW211: cannot read"):
        read_template(tmp_path / "nothing.jinja")
