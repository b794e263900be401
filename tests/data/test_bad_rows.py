"""Up to so many bad rows are left out, counted and named; one more is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizers import byte_tokenizer

from rankwise.data import encode_rows, preview_row, read_rows
from rankwise.errors import DataError, RankwiseWarning

GOOD = '{"prompt": "a", "completion": "b"}'
REFUSED = '{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}'
LINES = ['{"prompt": 1}', GOOD, '{"other": "x"}', "not json", GOOD, REFUSED, GOOD]
# Of the four that can be read, the sixth has tools, which the template does not write.
READ, ALL = 3, 4


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_bad_rows_are_left_out_up_to_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *LINES)
    with pytest.warns(
        RankwiseWarning, match=r"RW223: 3 of 7 rows of rows\.jsonl are left out: rows\.jsonl, line 1: exp"
    ):
        rows = read_rows(path, skip_bad_rows=ALL)
    assert [row.line for row in rows] == [2, 5, 6, 7]
    with pytest.warns(
        RankwiseWarning, match=r"RW223: 1 of 4 rows of rows\.jsonl are left out: rows\.jsonl, line 6: the"
    ):
        report = encode_rows(rows, byte_tokenizer(), max_length=64, skip_bad_rows=ALL).report
    assert (report.rows, report.skipped_rows) == (3, 4)
    assert [(item["row"], item["code"]) for item in report.skipped] == [
        ("rows.jsonl, line 1", "RW203"),
        ("rows.jsonl, line 3", "RW203"),
        ("rows.jsonl, line 4", "RW203"),
        ("rows.jsonl, line 6", "RW221"),
    ]
    assert report.skipped[0]["why"] == "expected text in `completion`, found no such field (fields: `prompt`)"


def test_one_bad_row_more_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *LINES)
    with pytest.raises(DataError) as caught:
        read_rows(path, skip_bad_rows=READ - 1)
    message = str(caught.value)
    assert message.startswith("RW203: rows.jsonl, line 1: expected text in `completion`, found no such field")
    assert message.endswith(
        "(--skip-bad-rows 2). Correct or remove these rows, or have `train` leave them out with --skip-bad-rows 3."
    )
    with pytest.warns(RankwiseWarning):
        rows = read_rows(path, skip_bad_rows=READ)
    with pytest.raises(DataError, match=r"RW221: rows\.jsonl, line 6: .* --skip-bad-rows 4\."):
        encode_rows(rows, byte_tokenizer(), max_length=64, skip_bad_rows=READ)


def test_where_there_is_no_option_none_is_advised(tmp_path: Path) -> None:
    """``evaluate`` and ``compare`` read without it."""
    path = write(tmp_path / "rows.jsonl", *LINES)
    with pytest.raises(DataError, match=r"RW203: rows\.jsonl, line 1: .* Correct or remove these rows\.$"):
        read_rows(path)
    rows = read_rows(write(tmp_path / "rows.jsonl", *LINES[4:]))
    with pytest.raises(DataError, match=r"RW221: rows\.jsonl, line 2: .* or take it out of the rows\.$"):
        encode_rows(rows, byte_tokenizer(), max_length=64)
    (tmp_path / "rows.jsonl").unlink()
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, GOOD, "bad")
    with pytest.raises(DataError, match=r"RW203: a\.jsonl, line 2: .*Correct or remove these rows\.$"):
        read_rows(tmp_path)


def test_without_a_good_row_nothing_is_left_out(tmp_path: Path) -> None:
    for lines, code in ((["not json", "[]"], "RW203"), (['{"prompt": "", "completion": "b"}'], "RW203")):
        with pytest.raises(DataError, match=rf"{code}: rows\.jsonl, line 1: .*Correct or remove these rows\.$"):
            read_rows(write(tmp_path / "rows.jsonl", *lines), skip_bad_rows=None)
    rows = read_rows(write(tmp_path / "rows.jsonl", LINES[5]))
    with pytest.raises(DataError, match=r"RW221: .*or take it out of the rows\.$"):
        encode_rows(rows, byte_tokenizer(), max_length=64, skip_bad_rows=None)


def test_the_files_of_a_folder_share_the_number(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, GOOD, "bad", GOOD)
    with pytest.raises(DataError, match=r"RW203: b\.jsonl, line 2: .*\(--skip-bad-rows 1\)\. .*--skip-bad-rows 2\.$"):
        read_rows(tmp_path, skip_bad_rows=1)
    with pytest.warns(RankwiseWarning):
        rows = read_rows(tmp_path, skip_bad_rows=2)
    assert [problem.index for problem in rows.problems] == [1, 4]
    assert preview_row(rows, 5, byte_tokenizer(), max_length=64).place == "b.jsonl, line 3"
