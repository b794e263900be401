"""Every layout and file kind, and what is said about bad ones."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_files import jsonl, refusal

from rankwise.data import read_rows, rows_from_records, warn_of_overlap
from rankwise.errors import DataError, RankwiseWarning

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
ANSWER = CHAT["messages"][1]
CALL = {"function": {"name": "f", "arguments": {}}}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": (CHAT, {"kind": "chat", "messages": tuple(CHAT["messages"])}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": "1"},
        {"kind": "chat", "messages": tuple(CHAT["messages"])},
    ),
    "prompt": ({"prompt": "a", "completion": " b"}, {"kind": "prompt", "prompt": "a", "completion": " b"}),
    "response": ({"prompt": "a", "response": "b"}, {"kind": "prompt", "prompt": "a", "completion": "b"}),
    "prompt messages": (
        {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
        {"kind": "chat", "messages": tuple(CHAT["messages"]), "first_trained": 1},
    ),
    "alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3", "answer": "3"},
        {"kind": "prompt", "prompt": "add\n\n1 2", "completion": "3"},
    ),
    "alpaca without input": (
        {"instruction": "add", "input": "", "output": "3"},
        {"prompt": "add", "completion": "3"},
    ),
    "dolly": (
        {"instruction": "add", "context": "1 2", "response": "3", "category": "x"},
        {"prompt": "add\n\n1 2", "completion": "3"},
    ),
    "question": ({"question": "1+2", "answer": "3"}, {"prompt": "1+2", "completion": "3"}),
    "e2e": ({"mr": "name[A]", "ref": "A it is."}, {"prompt": "name[A]\n", "completion": "A it is."}),
    "text": ({"text": "once"}, {"kind": "text", "text": "once"}),
    "messages win": ({**CHAT, "prompt": "hi", "completion": "x"}, {"kind": "chat"}),
    "parts": (
        {"messages": [CHAT["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]},
        {"messages": tuple(CHAT["messages"])},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_told_by_their_columns(tmp_path: Path, layout: str) -> None:
    record, expected = LAYOUTS[layout]
    [row] = read_rows(jsonl(tmp_path / "rows.jsonl", record))
    assert {name: getattr(row, name) for name in expected} == expected
    assert row.place == "rows.jsonl, line 1"


def write(path: Path, records: list[dict[str, str]]) -> None:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        content = path.read_bytes()
    elif kind == "json":
        content = json.dumps(records, indent=1).encode()
    elif kind == "txt":
        content = "".join(f"{record['mr']}||{record['ref']}\n" for record in records).encode()
    elif kind == "jsonl":
        content = "\n".join(json.dumps(record) for record in records).encode()
    else:
        mark = "," if kind == "csv" else "\t"
        content = "".join(f"{a}{mark}{b}\n" for a, b in [("mr", "ref"), *(r.values() for r in records)]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, packed: str) -> None:
    path = tmp_path / f"rows.{kind}{packed}"
    write(path, [{"mr": "name[A]", "ref": "Ä it is."}, {"mr": "name[B]", "ref": "B."}])
    rows = read_rows(str(path))
    assert [(row.prompt, row.completion) for row in rows] == [("name[A]\n", "Ä it is."), ("name[B]\n", "B.")]
    assert not rows.uses_template
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["json", "json.gz", "parquet"])
def test_rows_without_a_line_of_their_own_are_counted(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    assert f"rows.{kind}, row 2: expected text in `completion`, found null" in refusal(path)


def test_lines_are_the_files_own(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text('prompt,completion\n"two\nlines",a\n\nb,c\n"d",\n', encoding="utf-8")
    assert "rows.csv, line 6: expected text in `completion`, found an empty string" in refusal(table)
    table.write_text('prompt,completion\n"two\nlines",a\n\nb,c\n', encoding="utf-8")
    assert [row.line for row in read_rows(table)] == [2, 5]
    array = tmp_path / "rows.json"
    array.write_text('[\n {"text": "a"}, {"text": "b"},\n\n {"text":\n "c"},\n {"text": {}}]', encoding="utf-8")
    assert "rows.json, row 4: expected text in `text`, found the object '{}'" in refusal(array)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "a"}, "expected text in `completion`, found no such field (fields: `prompt`)"),
        ({"prompt": "a", "completion": None}, "found null"),
        ({"prompt": "a", "completion": " \n"}, "found only white space"),
        ({"prompt": True, "completion": "a"}, "expected text in `prompt`, found the truth value 'True'"),
        ({"prompt": "a", "completion": float("nan")}, "expected text in `completion`, found the number 'nan'"),
        ({"prompt": "a", "completion": ["b"]}, "found the list"),
        ({"prompt": "a", "completion": "b\ud800"}, "found half a surrogate pair (\\ud800)"),
        ({"text": "of another kind"}, "expected text in `prompt`, found no such field (fields: `text`)"),
    ],
)
def test_a_bad_row_is_named_by_line(tmp_path: Path, record: object, complaint: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, record)
    message = refusal(path)
    assert message.startswith("RW203: rows.jsonl, line 2: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "expected a list of messages in `messages`, found the list '[]'"),
        ("hi", "expected a list of messages"),
        (["hi"], "message 1 of `messages`, found 'hi'"),
        ([{"role": "bot", "content": "x"}], "as `role` of message 1 of `messages`, found 'bot'"),
        ([{"role": "user", "content": "x"}], "expected at least one `assistant` message"),
        ([CHAT["messages"][0], {"role": "assistant", "content": ""}], "expected text in `content` of message 2"),
        ([{"role": "user", "content": [{"type": "image"}]}], "expected text in `content` of message 1"),
        ([{"role": "user", "content": 3}], "expected text in `content` of message 1"),
        ([{"role": "user", "content": None}, ANSWER], "message 1 of `messages`, found null"),
        ([{"role": "user", "content": None, "tool_calls": [CALL]}, ANSWER], "message 1 of `messages`, found null"),
        ([CHAT["messages"][0], {"role": "assistant", "content": None, "tool_calls": []}], "message 2 of `messages`"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, ANSWER], "half a surrogate pair"),
        (
            [*CHAT["messages"], {**ANSWER, "tool_calls": "f()"}],
            "expected a list of objects in `tool_calls` of message 3",
        ),
        ([*CHAT["messages"], {**ANSWER, "tool_calls": [{"f": 1}]}], "expected the `name` of a function in tool call 1"),
    ],
)
def test_a_bad_message_is_named(tmp_path: Path, messages: object, complaint: str) -> None:
    message = refusal(jsonl(tmp_path / "rows.jsonl", CHAT, {"messages": messages}))
    assert message.startswith("RW203: rows.jsonl, line 2: ")
    assert complaint in message


def test_a_chat_row_may_call_tools(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    # TRL takes the JSON of the list too: a table has no column for schemas of different fields.
    for given in (tools, json.dumps(tools)):
        record = {"messages": [CHAT["messages"][0], call], "tools": given}
        [row] = read_rows(jsonl(tmp_path / "rows.jsonl", record))
        assert row.messages[1]["tool_calls"] == call["tool_calls"]
        assert row.tools == tuple(tools)
    for nothing in (None, [], "", "[]", "null"):
        assert read_rows(jsonl(tmp_path / "rows.jsonl", CHAT | {"tools": nothing}))[0].tools is None
    for given, found in (
        ("[{", "invalid JSON"),
        ('{"name": "f"}', "the object"),
        (["f"], "the list"),
        (3, "the number"),
    ):
        assert f"found {found}" in refusal(jsonl(tmp_path / "rows.jsonl", CHAT | {"tools": given}))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_numbers_are_read_as_a_csv_holds_them(tmp_path: Path, kind: str) -> None:
    records = [{"prompt": f"{n} + {n}", "completion": 2 * n} for n in range(3)]
    path = jsonl(tmp_path / f"rows.{kind}", *records)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert [row.completion for row in read_rows(path)] == ["0", "2", "4"]
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\n0 + 0,0\n", encoding="utf-8")
    assert read_rows(table)[0].completion == "0"


def test_numbers_in_named_and_optional_columns_are_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"q": "a", "label": 1})
    [row] = read_rows(path, prompt_column="q", completion_column="label")
    assert row.completion == "1"
    [row] = read_rows(jsonl(tmp_path / "rows.jsonl", {"instruction": "double", "input": 0, "output": 0.5}))
    assert (row.prompt, row.completion) == ("double\n\n0", "0.5")


def test_many_bad_rows_make_one_message(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": }\n' + '{"text": ""}\n' * 5, encoding="utf-8")
    message = refusal(path)
    assert "line 2: expected one JSON object a line, found invalid JSON (Expecting value at column 10)" in message
    assert "line 3, line 4: expected text in `text`, found an empty string" in message
    assert "and 3 more of 7 rows" in message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_is_not_nested_without_end(name: str, tmp_path: Path) -> None:
    row = '{"text": "a", "note": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]", encoding="utf-8")
    assert "nested too deeply" in refusal(tmp_path / name)


BAD_FILES: dict[str, tuple[str, bytes, str, str]] = {
    "no bytes": ("rows.jsonl", b"", "RW204", "holds no rows"),
    "a header only": ("rows.csv", b"mr,ref\n", "RW204", "holds no rows"),
    "latin-1": ("rows.csv", "mr,ref\nCafé,x\n".encode("latin1"), "RW205", "byte 0xe9 in line 2; convert it"),
    "utf-16": ("rows.csv", "mr,ref\nCafé,x\n".encode("utf-16"), "RW205", "iconv -f latin1 -t utf-8 rows.csv"),
    "unknown extension": ("rows.docx", b"x", "RW202", ".docx is not a kind of data file"),
    "truncated gzip": ("rows.csv.gz", gzip.compress(b"mr,ref\n" * 99)[:-9], "RW206", "cut short or no gzip file"),
    "no parquet": ("rows.parquet", b"PAR1 not really", "RW206", "as parquet"),
    "a cut array": ("rows.json", b'[{"text": "a"},\n {"text": "b"}', "RW206", "expected a JSON array"),
    "an array in lines": ("rows.jsonl", b'[{"text": "a"}]', "RW206", "name it .json"),
    "an open quote": ("rows.csv", b'mr,ref\na,"b\nc,d\n', "RW206", "check the quotes"),
    "too many columns": ("rows.csv", b"mr,ref\na,b\nc,d,e\n", "RW203", "line 3: expected 2 columns (mr, ref), found 3"),
    "one odd text line": ("rows.txt", b"a||b\nc||d\ne\n", "RW203", "line 3: expected text in `ref`"),
    "unknown columns": ("rows.csv", b"a,b\n1,2\n", "RW207", "has the columns `a`, `b`"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_makes_one_clear_error(tmp_path: Path, case: str) -> None:
    name, content, code, complaint = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{code}: ")
    assert complaint in message
    assert name in message


def test_missing_files_are_not_taken_for_hub_names(tmp_path: Path) -> None:
    for name in ("nothing.csv", "a/b/c", "./nothing", str(tmp_path / "nothing.jsonl.gz")):
        assert refusal(name).startswith("RW201: there is no file or folder")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_header_says_what_parts_a_table(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'\nprompt{mark}completion\n"a, b; c\td"{mark}"1,5\nx"\n', encoding="utf-8")
    assert [(row.prompt, row.completion) for row in read_rows(path)] == [("a, b; c\td", "1,5\nx")]


def test_a_mark_in_quotes_parts_no_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"text"\n"a; b"\n', encoding="utf-8")
    assert [row.text for row in read_rows(path)] == ["a; b"]
    path.write_text('"a;b"\nc\n', encoding="utf-8")
    assert "has the columns `a;b`" in refusal(path)
    path.write_bytes(b"x" * 200_000 + b"\rb\n")
    assert refusal(path).startswith("RW207: ")


def test_named_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"q": "a", "a": "b", "text": "c"})
    [row] = read_rows(path, prompt_column="q", completion_column="a")
    assert (row.kind, row.prompt, row.completion) == ("prompt", "a", "b")
    assert "give both" in refusal(path, prompt_column="q")
    assert "has no column `x`; its columns are `q`, `a`, `text`" in refusal(
        path, prompt_column="q", completion_column="x"
    )


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("mr,ref\r\na,b\r\n", encoding="utf-8-sig", newline="")
    assert read_rows(tmp_path / "rows.csv")[0].completion == "b"


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    assert len(read_rows(jsonl(tmp_path / "rows.json", {"text": "a"}, {"text": "b"}))) == 2


def test_overlap_ignores_case_and_white_space() -> None:
    train = rows_from_records([(1, {"prompt": "a", "completion": " b"}), (2, {"prompt": "c", "completion": "d"})], "t")
    evaluation = rows_from_records(
        [(1, {"prompt": "A", "completion": "  B"}), (2, {"prompt": "c", "completion": "x"})], "e"
    )
    with pytest.warns(RankwiseWarning, match=r"RW218: 1 of 2 .* \(e, line 1 is t, line 1\)"):
        assert warn_of_overlap(train, evaluation) == 1


@pytest.mark.parametrize(("count", "more"), [(5, ""), (20, "; and 15 more")])
def test_of_many_rows_in_both_sets_some_are_named(count: int, more: str) -> None:
    rows = rows_from_records([(n, {"text": f"row {n}"}) for n in range(1, count + 1)], "rows")
    with pytest.warns(RankwiseWarning) as told:
        assert warn_of_overlap(rows, rows) == count
    last = min(count, 5)
    assert f"rows, line {last} is rows, line {last}{more});" in str(told[0].message)


def test_the_shared_files_are_recognised(shared: Path) -> None:
    expected = {
        "e2e/testset_w_refs.csv": (4693, "E2E (mr, ref)"),
        "e2e/lora_format/train.txt.gz": (42061, "E2E (mr, ref)"),
        "instruction/alpaca_en_demo.json": (999, "Alpaca (instruction, input, output)"),
        "instruction/dolly_hhrlhf_train_small.jsonl": (1000, "prompt and response"),
        "instruction/dummy_conversation.json": (500, "chat (conversations)"),
        "instruction/wikisql": (1000, "text (text)"),
        "commonsense/boolq": (9427, "Alpaca (instruction, input, output)"),
        "gsm8k/train.jsonl": (7473, "question and answer"),
    }
    for name, (count, layout) in expected.items():
        rows = read_rows(shared / name)
        assert (len(rows), rows.format) == (count, layout)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"context": "Paris is big.", "question": "where?", "answer": "Paris", "id": 7}, "`context` in 1 of 1 rows"),
        ({"prompt": "a", "completion": "b", "system": "Be brief.", "source": "web"}, "`system` in 1 of 1 rows"),
        ({"text": "a", "meta": {"language": "en"}}, "`meta` in 1 of 1 rows"),
        ({"prompt": [CHAT["messages"][0]], "completion": "x", "history": [["a", "b"]]}, "`history` in 1 of 1 rows"),
    ],
)
def test_columns_that_are_not_read_are_named(record: dict[str, Any], named: str) -> None:
    with pytest.warns(RankwiseWarning) as told:
        rows_from_records([(1, record)], "rows.jsonl")
    [message] = [str(item.message) for item in told]
    assert message.startswith("RW227: rows.jsonl is read as ")
    assert f"({named})" in message


@pytest.mark.parametrize(
    "record", [CHAT, {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
)
def test_a_system_column_is_the_first_message(record: dict[str, Any]) -> None:
    system = {"role": "system", "content": "Be brief."}
    [row] = rows_from_records([(1, {**record, "system": "Be brief."})], "rows.jsonl")
    assert row.messages == (system, *CHAT["messages"])
    with pytest.raises(DataError, match=r"RW203: .* expected `system` or a system message, found both"):
        rows_from_records([(1, {"messages": [system, *CHAT["messages"]], "system": "x"})], "rows.jsonl")


@pytest.mark.parametrize("excluded", [{"weight": 0}, {"train": False}, {"training": False}])
def test_an_answer_that_is_not_to_be_trained_on_is_a_bad_row(excluded: dict[str, Any]) -> None:
    turns = [CHAT["messages"][0], {**ANSWER, **excluded}, *CHAT["messages"]]
    with pytest.raises(DataError, match=r"RW203: .* found message 2 of `messages` with `(weight` 0|train.*` false)"):
        rows_from_records([(1, {"messages": turns})], "rows.jsonl")
    kept = dict.fromkeys(excluded, 1)
    [row] = rows_from_records([(1, {"messages": [turns[0], {**ANSWER, **kept}]})], "rows.jsonl")
    assert row.messages == tuple(CHAT["messages"])


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,completion\na,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"RW207: .*rows\.csv has two columns `completion`; rename or remove one"):
        read_rows(path)


@pytest.mark.parametrize("saved", [False, True])
def test_nulls_that_fill_up_objects_of_a_table_are_left_out(saved: bool, tmp_path: Path) -> None:
    """A column has one type, so that each function gets the fields of the others."""
    tools = [{"name": name, "parameters": {name: {"type": "string"}}} for name in ("a", "b")]
    calls = [{"name": name, "arguments": {name: "1"}} for name in ("a", "b")]
    record = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "hm", "tool_calls": calls}]}
    table = pyarrow.Table.from_pylist([{**record, "tools": tools}])
    if saved:
        datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    else:
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    [row] = read_rows(tmp_path / ("saved" if saved else "rows.parquet"))
    assert (list(row.tools or ()), row.messages[1]["tool_calls"]) == (tools, calls)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([2**57], pyarrow.timestamp("ms")),
        pyarrow.Array.from_buffers(
            pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
        ),
    ],
)
def test_a_parquet_value_that_python_cannot_hold_names_its_column(column: pyarrow.Array, tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "when": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"RW206: cannot read the column `when` of .*rows\.parquet: "):
        read_rows(tmp_path / "rows.parquet")
