"""Targets that are not in the model: one answer from ``train``, ``plan`` and ``compare``, before any work."""

from __future__ import annotations

import json

import pytest

IN_VAIN = ("--target-modules", "q_proj,nope", "--modules-to-save", "lm_haed")


@pytest.fixture
def call(rankwise, model_folder, rows_file, tmp_path):
    def command(name, *options):
        given = ["--model", model_folder]
        if name != "plan":
            given += ["--data", rows_file, "--output", tmp_path / "out", "--max-steps", 1, "--device", "cpu"]
        return rankwise(name, *given, *(["--methods", "lora,full"] if name == "compare" else []), *options)

    return command


@pytest.mark.parametrize("name", ["train", "plan", "compare"])
def test_targets_in_vain_end_every_command(call, tmp_path, name):
    done = call(name, *IN_VAIN)
    assert done.code == 2
    assert "RW401" in done.stderr
    assert "'nope'" in done.stderr
    assert "'lm_haed'" in done.stderr
    assert "did you mean lm_head?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_settings_in_vain_are_said_once(call, tmp_path):
    for name in ("train", "plan"):
        done = call(name, "--exclude-modules", "v_porj")
        assert done.code == 0
        assert done.stderr.count("warning RW420") == 1
        assert "did you mean v_proj" in done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [item["code"] for item in record["warnings"]].count("RW420") == 1
