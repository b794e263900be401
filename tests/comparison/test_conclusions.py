"""The end of a comparison: what is recommended, what is no result, and what is warned of."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from fake_comparison import compare, given, starts

from rankwise.errors import RunError

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning"),
    pytest.mark.usefixtures("quick_steps", "real_stages"),
]


def test_the_recommended_settings_are_those_of_the_best_run_in_their_usual_order(tmp_path: Path):
    found: Any = compare(**given(tmp_path, methods="lora,full", learning_rates="2e-4", seeds=1))
    text = (tmp_path / "out" / found["recommendation"]["config"]).read_text()
    settings = yaml.safe_load(text)
    assert list(settings)[:2] == ["model", "data"]
    assert (settings["method"], settings["max-steps"]) == ("full", 6)
    assert Path(settings["output"]).parent == tmp_path / "out"


def test_the_run_that_would_decide_continues_the_comparison_as_it_says(tmp_path: Path):
    first: Any = compare(**given(tmp_path, methods="lora,dora"))
    wanted = first["recommendation"]["deciding"]
    assert not first["recommendation"]["decided"]
    words = shlex.split(wanted["command"])[2:]
    options = {name.strip("-").replace("-", "_"): value for name, value in zip(words[::2], words[1::2])}
    before = len(starts(tmp_path / "out"))
    found: Any = compare(**options)
    assert len(starts(tmp_path / "out")) - before == wanted["runs"] > 0
    assert found["methods"]["lora"]["seeds"] == wanted["seeds"]
    effects = [item["minimum_detectable_effect"]["relative"] for item in (found, first)]
    assert effects[0] < effects[1]


def test_no_run_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(RunError) as caught:
        compare(**given(tmp_path, methods="prefix", learning_rates="2e-4"))
    assert caught.value.code == "RW584"
    assert "RW181" in caught.value.message


def test_options_without_effect_and_a_single_evaluation_row_are_said(tmp_path: Path):
    changes = {"methods": "lora", "learning_rates": "2e-4", "task_limit": 5, "eval_limit": 1}
    found: Any = compare(**given(tmp_path, **changes))
    assert [(item["code"], item["message"].partition(":")[0]) for item in found["warnings"]] == [
        ("RW529", "--task-limit"),
        ("RW585", "one evaluation row gives no verdicts on eval_loss; give more --eval-data."),
    ]


def test_runs_without_a_finite_figure_are_named(tmp_path: Path):
    options = given(tmp_path, methods="lora", learning_rates="2e-4")
    first: Any = compare(**options)
    runs = [tmp_path / "out" / run["folder"] for run in first["runs"]]
    for folder in runs:
        file = folder / "evaluation" / "perplexity" / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"loss": float("nan")}}))
        if folder == runs[0]:
            found: Any = compare(**options)
            assert (
                "RW589",
                f"{folder.name} trained, but has no finite eval_loss, so it does not count in its mean.",
            ) in [(item["code"], item["message"]) for item in found["warnings"]]
    with pytest.raises(RunError, match="RW589: no run has a finite value of --metric eval_loss"):
        compare(**options)


def test_runs_of_different_hardware_or_data_are_named(tmp_path: Path):
    options = given(tmp_path, methods="lora,full", learning_rates="2e-4", seeds=1)
    compare(**options)
    for number, file in enumerate(sorted((tmp_path / "out" / "runs").glob("*/run.json"))):
        device, data = {"name": "x86_64", "threads": 2 - number}, {"train": {"sha256": f"of version {number}"}}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"device": device, "data": data}))
    found: Any = compare(**options)
    told = {item["code"]: item["message"] for item in found["warnings"]}
    assert "different hardware (x86_64, threads: 1; x86_64, threads: 2)" in told["RW595"]
    assert "the train data changed between the runs" in told["RW591"]
