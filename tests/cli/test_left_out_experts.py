"""A mixture and "all-linear": ``plan`` and ``train`` say what is left out, with options that work as they are."""

from __future__ import annotations

import json
import re

import pytest

from tiny_models import save_with_tokenizer, tiny_moe

OPTION = re.compile(r"--target-parameters (\S+?)[.;,]?(?=\s|$)")


@pytest.fixture(scope="module")
def mixture(model_folder, tmp_path_factory):
    model = tiny_moe("deepseek_v2", vocab_size=259)
    return save_with_tokenizer(model, model_folder, tmp_path_factory.mktemp("mixture"))


def test_train_says_it_and_takes_what_it_says(rankwise, mixture, rows_file, tmp_path):
    command = ["train", "--model", mixture, "--data", rows_file, "--max-steps", 1, "--r", 2, "--device", "cpu"]
    done = rankwise(*command, "--method", "qlora", "--block-size", 32, "--output", tmp_path / "a")
    assert done.code == 0, done.stderr
    assert done.stderr.count("warning RW422") == 1
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [item["code"] for item in record["warnings"]].count("RW422") == 1
    assert "stacked experts without an adapter" in (tmp_path / "a" / "README.md").read_text()
    (option,) = OPTION.findall(done.stderr)
    again = rankwise(*command, "--target-parameters", option, "--output", tmp_path / "b")
    assert again.code == 0, again.stderr
    assert "RW422" not in again.stderr


def test_the_plan_says_it(rankwise, mixture):
    plan = ("plan", "--model", mixture, "--max-length", 16, "--method", "qlora", "--why")
    done = rankwise(*plan)
    assert done.code == 0, done.stderr
    assert done.stderr.count("warning RW422") == 1
    said = " ".join(done.stdout.split())
    assert "adapters on all linear layers reach no stacked expert" in said
    assert "attention alone" not in said
    (option,) = OPTION.findall(done.stderr)
    done = rankwise(*plan, "--target-parameters", option)
    assert done.code == 0, done.stderr
    assert "RW422" not in done.stderr
    assert "attention alone" not in " ".join(done.stdout.split())
