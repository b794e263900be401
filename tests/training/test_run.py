"""``train`` from settings to a run folder, on a tiny model in a folder and rows in a file."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from training_rows import Recorder, snapshot, write_rows

from rankwise.adapters import load_adapter
from rankwise.errors import ConfigError, DataError, InputError, Interrupted, RankwiseWarning, RunError, warn
from rankwise.models import load_model
from rankwise.records import load_record, read_metrics
from rankwise.reports.plots import loss_svg
from rankwise.training import products, setup, step
from rankwise.training.learning import evaluation_steps_of
from rankwise.training.objectives import Demonstrations
from rankwise.training.run import _told_warnings, train
from rankwise.training.watch import StepClock, StepInfo
from tables import thinned

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")


def test_packing_is_refused_where_rows_would_see_each_other(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "flattening_obstacle", lambda model: "a row changes the next one")
    with pytest.raises(ConfigError, match="RW112: --packing would let rows see each other: a row changes"):
        train(settings(packing=True))


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_run_folder_has_everything_and_no_pickle(method: str, settings: Any, tmp_path: Path) -> None:
    watcher = Recorder()
    record = train(settings(method=method), watcher)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert {weights, "run.json", "metrics.jsonl", "loss.svg", "README.md", "tokenizer.json", "checkpoints"} <= names
    assert [p for p in folder.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}] == []
    assert record == load_record(folder)
    assert record.status == "finished"
    assert record.steps == 8
    assert record.kept_step in (4, 8)
    assert record.eval_loss is not None
    assert record.initial_eval_loss is not None
    assert record.eval_loss < record.initial_eval_loss
    assert record.peak_memory_bytes
    assert record.peak_memory_bytes > 10_000_000
    assert [info.step for info in watcher.steps] == list(range(1, 9))
    assert len(watcher.evaluations) == 3
    lines = list(read_metrics(folder))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 8]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8]
    # B starts at zero, and a full fine-tuning has none.
    assert all(line["b_norm"] > 0 if method != "full" else "b_norm" not in line for line in lines if "loss" in line)
    assert watcher.phases == ["Reading data", "Loading the model", "Encoding data", "Training", "Saving"]


def test_the_record_says_whether_the_step_is_fast(settings: Any) -> None:
    ways: list[dict[str, Any]] = [{}, {"fast": False}]
    found = [train(settings(max_steps=1, overwrite=True, **changes)).device["acceleration"] for changes in ways]
    assert found[1] == "off (--no-fast)"
    assert "off" not in found[0]


@pytest.mark.parametrize(("steps", "logged"), [(1, [1]), (7, [1, 2, 3, 4, 5, 6, 7]), (25, [1, *range(2, 26, 2), 25])])
def test_a_short_run_has_a_curve(steps: int, logged: list[int], settings: Any, tmp_path: Path) -> None:
    train(settings(max_steps=steps, logging_steps=None, eval_data=None, eval_steps=None))
    lines = list(read_metrics(tmp_path / "run"))
    assert [line["step"] for line in lines if line.get("loss") is not None] == logged


@pytest.mark.parametrize(
    ("steps", "rows", "eval_rows", "evaluated"),
    [
        (30, 8, 256, [30]),
        (38, 8, 24, [8, 16, 24, 32, 38]),
        (200, 8, 256, [100, 200]),
        (1000, 8, 256, range(100, 1001, 100)),
    ],
    ids=str,
)
def test_evaluations_take_a_fifth_of_a_run_at_most(steps: int, rows: int, eval_rows: int, evaluated: Any) -> None:
    interval = evaluation_steps_of(steps, rows, eval_rows)
    assert [*range(interval, steps, interval), steps] == list(evaluated)


@pytest.mark.parametrize(("changes", "evaluated"), [({}, [0, 8]), ({"early_stopping": 9}, range(9))], ids=str)
def test_a_run_evaluates_as_often_as_it_can_afford_and_counts_it_in_the_time_left(
    changes: Any, evaluated: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepClock, "seconds_left", lambda self, steps: 0.0)
    watcher = Recorder()
    train(settings(eval_steps=None, **changes), watcher)
    assert [step for step, _, _ in watcher.evaluations] == list(evaluated)
    assert all(info.seconds_left > 0 for info in watcher.steps)


def test_full_fine_tuning_in_mixed_precision(settings: Any) -> None:
    record = train(settings(method="full", dtype="bfloat16"))
    assert record.eval_loss < record.initial_eval_loss
    assert record.device["dtype"] == "bfloat16"


def test_final_adapter_computes_the_recorded_evaluation_loss(settings: Any, tmp_path: Path) -> None:
    """A later reader, without the loop, finds the loss that run.json promises."""
    given = settings()
    record = train(given)
    model, tokenizer = load_model(given.model, dtype=torch.float32)
    load_adapter(model, tmp_path / "run", trainable=False)
    model.eval()
    total = count = 0
    for line in Path(given.eval_data).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, completion = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in row)
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        total -= log_p[len(prompt) - 1 :].sum().item()
        count += len(completion) + 1
    assert record.eval_loss == pytest.approx(total / count, rel=1e-5)


def test_best_checkpoint_is_kept_and_named(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation rows that contradict the training rows: the more it learns, the worse, so an early step is kept."""
    lines = [json.dumps({"prompt": f"w{i} w{i + 1} ", "completion": "w50 w50 w50"}) + "\n" for i in range(4)]
    (tmp_path / "other.jsonl").write_text("".join(lines))
    monkeypatch.setattr("rankwise.training.session.loss_svg", loss_svg)
    record = train(settings(eval_data=str(tmp_path / "other.jsonl"), max_steps=20, eval_steps=2, learning_rate=0.03))
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    best = min((step for step in losses if step > 0), key=losses.__getitem__)
    assert record.kept_step == best != 20
    assert record.kept_because == "lowest loss of 10 evaluations"
    assert record.eval_loss == losses[best]
    kept = safetensors.torch.load_file(tmp_path / "run" / "checkpoints" / f"step-{best}" / "adapter_model.safetensors")
    final = safetensors.torch.load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert kept.keys() == final.keys()
    assert all(torch.equal(kept[key], final[key]) for key in kept)
    assert f"kept: step {best}" in (tmp_path / "run" / "loss.svg").read_text()


def test_interrupted_run_resumes_to_the_same_bits(settings: Any, straight_run: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="--resume") as stopped:
        train(settings(lora_dropout=0.1), Recorder(stop_at=3, number=signal.SIGTERM))
    assert stopped.value.exit_code == 130
    assert load_record(tmp_path / "run").status == "interrupted"
    record = train(settings(lora_dropout=0.1, resume=True))
    assert record.status == "finished"
    folders = (straight_run, tmp_path / "run")
    one, other = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)
    figures = [
        [(line["step"], line.get("eval_loss")) for line in read_metrics(folder) if "eval_loss" in line]
        for folder in folders
    ]
    assert figures[0] == figures[1]


def test_interrupt_at_an_evaluation_step_evaluates_after_resuming(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(), Recorder(stop_at=4))
    assert 4 not in {line["step"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    train(settings(resume=True))
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line] == [0, 4, 8]


def test_resumed_metrics_have_each_step_once(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(), Recorder(stop_at=5))
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    train(settings(resume=True))
    lines = list(read_metrics(tmp_path / "run"))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 8]
    assert all(line["loss"] < 9 for line in lines if "loss" in line)


def test_early_stopping_stops(settings: Any) -> None:
    record = train(
        settings(learning_rate=0.3, lr_scheduler_type="constant", max_steps=60, eval_steps=2, early_stopping=2)
    )
    assert record.steps is not None
    assert record.steps < 60
    assert record.kept_step == record.steps - 4
    assert "RW527" in {warning["code"] for warning in record.warnings}


BAD: dict[str, tuple[dict[str, Any], type[InputError], str]] = {
    "unknown optimizer": ({"optimizer": "adamw_torchh"}, ConfigError, "adamw_torch"),
    "unknown schedule": ({"lr_scheduler_type": "linaer"}, ConfigError, "linear"),
    "no optimizer of ours": ({"optimizer": "adam8bit"}, ConfigError, "adamw_bnb_8bit"),
    "early stopping without evaluation": (
        {"eval_data": None, "eval_steps": None, "early_stopping": 2},
        ConfigError,
        "--eval-data",
    ),
    "fp16 on a cpu": ({"dtype": "float16"}, ConfigError, "bfloat16"),
    "no such data": ({"data": "nowhere.jsonl"}, DataError, "nowhere"),
    "target matches nothing": ({"target_modules": ("no_proj",)}, InputError, "no_proj"),
    "no such model": ({"model": "no/such/model.gguf"}, InputError, "no/such"),
}


@thinned({"case": list(BAD), "overwrite": [False, True]})
def test_bad_input_writes_nothing(case: str, overwrite: bool, settings: Any, tmp_path: Path) -> None:
    changes, kind, says = BAD[case]
    if overwrite:
        train(settings(max_steps=1))
    before = snapshot(tmp_path / "run")
    with pytest.raises(kind, match=says) as caught:
        train(settings(**changes, overwrite=overwrite))
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path / "run") == before
    assert (tmp_path / "run").exists() == overwrite


def test_chat_rows_without_a_template_are_refused_before_the_weights_are_read(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_for_training", lambda *_: pytest.fail("loaded"))
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="RW210"):
        train(settings(data=str(tmp_path / "chat.jsonl")))


def test_existing_run_is_refused_then_overwritten(settings: Any, tmp_path: Path) -> None:
    train(settings(max_steps=2))
    before = snapshot(tmp_path / "run")
    with pytest.raises(RunError, match="--resume") as caught:
        train(settings())
    assert caught.value.code == "RW502"
    assert snapshot(tmp_path / "run") == before
    (tmp_path / "run" / "notes.md").write_text("mine")
    record = train(settings(overwrite=True, method="dora"))
    assert record.method == "dora"
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-4", "step-8"}


def test_resume_names_every_changed_setting(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(), Recorder(stop_at=2))
    with pytest.raises(RunError, match=r"--r was 4 and is 8.*--learning-rate was 0.01 and is 0.02") as caught:
        train(settings(resume=True, r=8, learning_rate=0.02, logging_steps=1, save_steps=2))
    assert "logging" not in caught.value.message
    watcher = Recorder()
    with pytest.raises(RunError, match=r"--eval-data was '.*eval.jsonl' and is not given") as caught:
        train(settings(resume=True, eval_data=None, eval_steps=None), watcher)
    assert (caught.value.code, watcher.phases) == ("RW507", [])
    write_rows(tmp_path / "other.jsonl", 41)
    with pytest.raises(RunError, match="--data") as caught:
        train(settings(resume=True, data=str(tmp_path / "other.jsonl")))
    assert caught.value.code == "RW508"


def test_constant_schedule_may_be_continued(settings: Any, tmp_path: Path) -> None:
    train(settings(lr_scheduler_type="constant", max_steps=4))
    record = train(settings(lr_scheduler_type="constant", max_steps=8, resume=True))
    train(settings(lr_scheduler_type="constant", max_steps=8, output=tmp_path / "straight"))
    assert record.steps == 8
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "checkpoints" / "step-8" / "adapter_model.safetensors")
        for name in ("straight", "run")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_resumed_run_keeps_the_products_that_it_chose(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, watcher = {"lr_scheduler_type": "constant"}, Recorder()
    monkeypatch.setattr(products, "LARGEST_SHARE", 9.0)
    monkeypatch.setattr(step, "eight_bit_pays", lambda like: True)
    before = train(settings(**given, max_steps=2))
    assert before.products == "int8"
    # Another machine.
    monkeypatch.setattr(step, "eight_bit_pays", lambda like: False)
    after = train(settings(**given, max_steps=4, resume=True), watcher)
    assert (after.products, after.products_measured) == ("int8", before.products_measured)
    assert "frozen products: int8 (as before)" in watcher.notes


def test_a_long_run_ends_in_the_bases_dtype(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is resumed in its last quarter."""
    whole, ending, folders = Recorder(), Recorder(), [tmp_path / "ending", tmp_path / "run"]
    train(settings(products="int8"), whole)
    monkeypatch.setattr(products, "LONG_RUN", 8)
    record = train(settings(products="int8", output=folders[0]), ending)
    losses = [[info.loss for info in watcher.steps] for watcher in (whole, ending)]
    assert record.steps == 8
    assert record.eight_bit_steps == 6
    assert losses[0][:6] == losses[1][:6]
    assert losses[0][6] != losses[1][6]
    assert "frozen products: float32 from step 7 on, to undo the bias of 8 bits" in ending.notes
    with pytest.raises(Interrupted):
        train(settings(products="int8", overwrite=True), Recorder(stop_at=7))
    train(settings(products="int8", resume=True))
    one, other = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_reference_keeps_the_products_of_all_steps() -> None:
    assert products.eight_bit_steps(100, 0.0) == 75
    assert products.eight_bit_steps(100, 0.1) is None
    assert products.eight_bit_steps(99, 0.0) is None


def test_products_are_named_by_their_dtype(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "eight_bit_pays", lambda like: False)
    train(settings(dtype="float32", max_steps=1), watcher := Recorder())
    assert [note.split()[2] for note in watcher.notes if note.startswith("frozen products")] == ["float32"]


def test_a_run_counts_the_seconds_since_the_command_began(settings: Any) -> None:
    seconds = train(settings(max_steps=1), began=time.monotonic() - 1000).wall_seconds
    assert seconds is not None
    assert 1000 < seconds < 2000


def test_a_lengthened_run_follows_the_schedule_of_its_new_length(settings: Any, tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "cosine", "learning_rate": 0.01, "warmup_steps": 0}
    train(settings(**given, max_steps=4))
    straight, watcher = Recorder(), Recorder()
    train(settings(**given, max_steps=10, output=tmp_path / "straight"), straight)
    record = train(settings(**given, max_steps=10, resume=True), watcher)
    assert (record.status, record.steps, record.settings["max_steps"]) == ("finished", 10, 10)
    assert watcher.phases.count("Training, resuming from step 4") == 1
    assert [(info.step, info.total, info.learning_rate) for info in watcher.steps] == [
        (info.step, 10, info.learning_rate) for info in straight.steps[4:]
    ]
    rate = straight.steps[4].learning_rate
    said = next(text for text in map(str, record.warnings) if "RW544" in text)
    assert "from 4 to 10 steps: from step 4 on" in said
    assert f"schedule of 10 steps, at {rate:.3g} instead of 0." in said


def test_the_first_step_of_a_lengthened_run_is_taken(settings: Any, tmp_path: Path) -> None:
    """The optimizer comes from a checkpoint whose rate had come to 0."""
    train(settings(max_steps=4))
    train(settings(max_steps=5, resume=True))
    one, other = (
        safetensors.torch.load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "adapter_model.safetensors")
        for step in (4, 5)
    )
    assert not any(torch.equal(one[key], other[key]) for key in one if "lora_B" in key)


def test_an_interrupted_run_is_lengthened_by_epochs(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(max_steps=None, epochs=0.5), Recorder(stop_at=2))
    watcher = Recorder()
    record = train(settings(max_steps=None, epochs=1.5, resume=True), watcher)
    assert record.steps == watcher.steps[0].total > 3
    assert watcher.steps[0].step == 3
    assert "RW544" in watcher.warnings


@pytest.mark.parametrize(("schedule", "steps", "least"), [("linear", 7, 8), ("constant", 3, 4)])
def test_a_run_is_not_shortened_below(schedule: str, steps: int, least: int, settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(lr_scheduler_type=schedule), Recorder(stop_at=4))
    before = snapshot(tmp_path / "run")
    with pytest.raises(RunError, match=f"resumed with {least} steps or more") as caught:
        train(settings(lr_scheduler_type=schedule, max_steps=steps, resume=True))
    assert caught.value.code == "RW507"
    assert snapshot(tmp_path / "run") == before


def test_resuming_a_finished_run_changes_nothing(settings: Any, tmp_path: Path) -> None:
    train(settings())
    before = snapshot(tmp_path / "run")
    with pytest.warns(RankwiseWarning, match="nothing to resume"):
        record = train(settings(resume=True))
    assert record.status == "finished"
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("watched", [False, True])
def test_a_warning_is_told_once(watched: bool) -> None:
    watcher, told = Recorder(), []
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with _told_warnings(watcher if watched else None, told):
            for _ in range(2):
                warn("RW527", "stopped early")
    assert [warning["code"] for warning in told] == ["RW527"]
    assert watcher.warnings == ["RW527"] * watched
    assert len(shown) == 1 - watched


def test_damaged_checkpoint_is_said_and_the_older_one_used(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(save_total_limit=3), Recorder(stop_at=6))
    damaged = tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    watcher = Recorder()
    train(settings(resume=True, save_total_limit=3), watcher)
    assert "RW515" in watcher.warnings
    assert watcher.steps[0].step == 5


def test_exploding_loss_stops_with_the_step(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="step") as caught:
        train(settings(learning_rate=1e30, max_grad_norm=0.0, lr_scheduler_type="constant", optimizer="sgd"))
    assert caught.value.code == "RW530"
    assert load_record(tmp_path / "run").status == "failed"


def test_an_evaluation_without_numbers_says_what_to_do(settings: Any) -> None:
    with pytest.raises(RunError, match="RW530: after step 1 .* lower --learning-rate"):
        train(settings(learning_rate=1e30, max_grad_norm=0.0, max_steps=1, lr_scheduler_type="constant"))


@pytest.mark.parametrize(("rate", "warns"), [(1.0, True), (1e-3, False)])
def test_without_evaluations_a_risen_loss_is_told(rate: float, warns: bool, settings: Any) -> None:
    given = {"eval_data": None, "eval_steps": None, "logging_steps": 1, "target_modules": ["lm_head"]}
    told = train(settings(**given, learning_rate=rate, lr_scheduler_type="constant")).warnings
    assert any("ended far above its start" in one["message"] for one in told) == warns


def test_second_interrupt_ends_at_once_and_the_last_checkpoint_stays(settings: Any, tmp_path: Path) -> None:
    class Twice(Recorder):
        def step(self, info: StepInfo) -> None:
            if info.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        train(settings(save_steps=2), Twice())
    assert caught.value.code == "RW541"
    assert load_record(tmp_path / "run").status == "interrupted"
    assert train(settings(save_steps=2, resume=True)).status == "finished"


def test_interrupt_during_the_first_evaluation_starts_anew_on_resume(settings: Any, tmp_path: Path) -> None:
    class AtPhase(Recorder):
        def phase(self, text: str) -> None:
            if text == "Training":
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(settings(), AtPhase())
    assert caught.value.code == "RW542"
    watcher = Recorder()
    assert train(settings(resume=True), watcher).status == "finished"
    assert "RW510" in watcher.warnings
    assert watcher.steps[0].step == 1


def test_interrupt_during_a_later_evaluation_saves_the_step(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = Demonstrations.evaluate, []

    def interrupted(self: Demonstrations, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *given)

    monkeypatch.setattr(Demonstrations, "evaluate", interrupted)
    # No checkpoint is due at step 4.
    with pytest.raises(Interrupted, match="stopped after step 4 of 8 and saved it"):
        train(settings(save_steps=7))
    assert (tmp_path / "run" / "checkpoints" / "step-4").is_dir()


@pytest.mark.parametrize(("limit", "expected"), [(None, 256), (0, 1000), (10, 10), (5000, 1000)])
def test_rows_of_an_evaluation(limit, expected):
    from rankwise.data import limited, rows_from_records

    rows = rows_from_records([(line, {"text": f"row {line}"}) for line in range(1, 1001)], "rows")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = limited(rows, limit)
    assert len(chosen) == expected
    assert [item.message.code for item in said] == (["RW528"] if limit is None else [])
    if limit is None:
        # The last of each quarter's 64 rows is near its end.
        assert [row.line for row in chosen][63::64] == [247, 497, 747, 997]
