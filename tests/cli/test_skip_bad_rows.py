"""Bad rows in `preview`, which shows the good ones, and in `train`, which leaves out as many as it was told to."""

import json

import pytest

LINES = [
    {"prompt": "What is 0?"},
    *({"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(1, 9)),
    {"prompt": "What is 9?", "completion": "It is 9.", "tools": [{"name": "f"}]},
]


@pytest.fixture
def bad_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def test_a_preview_shows_good_rows_and_names_bad_ones(model_folder, bad_rows, rankwise):
    done = rankwise("preview", "--model", model_folder, "--data", bad_rows)
    assert done.code == 0
    assert "[[It is 1.</s>]]" in done.stdout
    assert "8 rows" in done.stdout
    assert "bad rows    bad.jsonl, line 1: expected text in `completion`, found no such field" in done.stdout
    assert "bad rows    bad.jsonl, line 10: the chat template leaves out `tools` (RW221)" in done.stdout
    assert "`train` stops without --skip-bad-rows 2" in done.stdout
    assert done.stderr.count("warning RW223") == 2
    document = rankwise("preview", "--model", model_folder, "--data", bad_rows, "--json").document
    assert document["row"]["index"] == 1
    assert [item["code"] for item in document["data"]["skipped"]] == ["RW203", "RW221"]


def test_a_preview_of_a_bad_row_says_what_is_wrong(model_folder, bad_rows, rankwise):
    for row, code in ((0, "RW203"), (9, "RW221"), (10, "RW217")):
        done = rankwise("preview", "--model", model_folder, "--data", bad_rows, "--row", row)
        assert done.code == 2
        assert f"error {code}: bad.jsonl" in done.stderr


def test_train_leaves_out_as_many_as_it_was_told_to(model_folder, bad_rows, rankwise, tmp_path):
    output = tmp_path / "run"
    command = ["train", "--model", model_folder, "--data", bad_rows, "--eval-data", bad_rows, "--output", output]
    command += ["--max-steps", 1, "--r", 2, "--batch-size", 2]
    for count, code in ((0, "RW203"), (1, "RW221")):
        for words in (command, ["preview", "--model", model_folder, "--data", bad_rows]):
            done = rankwise(*words, "--skip-bad-rows", count)
            assert done.code == 2
            assert f"error {code}: bad.jsonl, line " in done.stderr
            assert f"--skip-bad-rows {count + 1}" in done.stderr
        assert not output.exists()
    assert rankwise(*command, "--skip-bad-rows", 2).code == 0
    data = json.loads((output / "run.json").read_text(encoding="utf-8"))["data"]
    for part in data.values():
        assert (part["rows"], part["skipped_rows"]) == (8, 2)
        assert [item["row"] for item in part["skipped"]] == ["bad.jsonl, line 1", "bad.jsonl, line 10"]
    lines = [json.loads(line) for line in (output / "skipped_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["set"], line["code"]) for line in lines] == [
        ("train", "RW203"),
        ("train", "RW221"),
        ("eval", "RW203"),
        ("eval", "RW221"),
    ]
    bad_rows.write_text("".join(json.dumps(line) + "\n" for line in LINES[1:9]), encoding="utf-8")
    assert rankwise(*command, "--overwrite").code == 0
    assert not (output / "skipped_rows.jsonl").exists()


def test_tools_that_the_template_ignores_are_refused(model_folder, rankwise, tmp_path):
    path = tmp_path / "tools.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": messages, "tools": [{"name": "f"}]}) + "\n", encoding="utf-8")
    model, data = ("--model", model_folder), ("--data", path)
    for command in (
        ("preview", *model, *data),
        ("train", *model, *data, "--output", tmp_path / "run"),
        ("evaluate", *model, *data, "--task", "perplexity", "--output", tmp_path / "evaluation"),
    ):
        done = rankwise(*command)
        assert done.code == 2
        assert "error RW221: tools.jsonl, line 1: the chat template leaves out `tools`." in done.stderr
