"""A mixture and "all-linear": ``plan`` and ``train`` say what is left out, with options that work as they stand."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tiny_models import tiny_moe

DEEPSEEK = {
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
OPTION = re.compile(r"--target-parameters (\S+?)[.;,]?(?=\s|$)")


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v2"])
def mixture(request, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder)
    tiny_moe(request.param, vocab_size=259, **(DEEPSEEK if request.param == "deepseek_v2" else {})).save_pretrained(
        folder
    )
    return folder


def test_train_says_it_and_takes_what_it_says(rankwise, mixture, rows_file, tmp_path):
    command = ["train", "--model", mixture, "--data", rows_file, "--max-steps", 1, "--r", 2, "--device", "cpu"]
    done = rankwise(*command, "--method", "qlora", "--block-size", 32, "--output", tmp_path / "a")
    assert done.code == 0, done.stderr
    assert done.stderr.count("warning RW422") == 1
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [item["code"] for item in record["warnings"]].count("RW422") == 1
    assert "stacked experts without an adapter" in (tmp_path / "a" / "README.md").read_text()
    (option,) = OPTION.findall(done.stderr)
    for method in ("lora", "qlora"):
        options = ["--method", method, "--target-parameters", option, "--output", tmp_path / method]
        again = rankwise(*command, *options, *(["--block-size", 32] if method == "qlora" else []))
        assert again.code == 0, again.stderr
        assert "RW422" not in again.stderr


def test_the_plan_says_it(rankwise, mixture):
    exact = [] if "mixtral" in str(mixture) else ["--exact"]
    done = rankwise("plan", "--model", mixture, "--max-length", 16, "--method", "qlora", *exact)
    assert done.code == 0, done.stderr
    assert done.stderr.count("warning RW422") == 1
    said = " ".join(done.stdout.split())
    assert "adapters on all linear layers reach no stacked expert" in said
    assert "attention alone" not in said
    (option,) = OPTION.findall(done.stderr)
    done = rankwise(
        "plan", "--model", mixture, "--max-length", 16, "--method", "qlora", *exact, "--target-parameters", option
    )
    assert done.code == 0, done.stderr
    assert "RW422" not in done.stderr
    assert "attention alone" not in " ".join(done.stdout.split())
