"""``rw.train``, ``rw.plan``, ``rw.compare``, ``rw.evaluate`` and ``rw.batches``; the command line does the same."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import rankwise as rw
from in_process import steps_in_this_process
from rankwise.cli.main import COMMANDS
from rankwise.errors import ConfigError, DataError, Interrupted
from rankwise.training import run as run_module
from rankwise.training.objectives import Demonstrations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning"),
]

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(30)]
HELD_OUT = [{"prompt": f"What is -{n}?", "completion": f"It is -{n}."} for n in range(4)]
SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "r": 2, "max_length": 64, "quiet": True}


@pytest.fixture
def train(model_folder: Path, tmp_path: Path) -> Any:
    def call(name: str = "run", **changes: Any) -> Any:
        given = {"model": model_folder, "data": ROWS, "eval_data": HELD_OUT, "output": tmp_path / name}
        return rw.train(**{**given, **SHORT, **changes})

    return call


def weights(folder: Path) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("name", ["train", "plan", "compare", "evaluate"])
def test_keywords_are_the_options_of_the_command(name: str) -> None:
    (command,) = (one for one in COMMANDS if one.name == name)
    parameters = inspect.signature(getattr(rw, name)).parameters
    own = {"tokenizer", "on_step", "on_evaluation", "on_save", "quiet"}
    assert set(parameters) - own == set(command.settings.model_fields)
    usual = command.settings.defaults()
    for option, field in command.settings.model_fields.items():
        default = parameters[option].default
        assert default is inspect.Parameter.empty if field.is_required() else default == usual[option]


def test_a_run_is_that_of_the_command_and_shows_itself(train: Any, rankwise: Any, tmp_path: Path) -> None:
    run = train()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ("--model", run.record.settings["model"], "--data", tmp_path / "rows.jsonl", "--max-steps", 4, "--r", 2)
    done = rankwise("train", *command, "--batch-size", 4, "--max-length", 64, "--output", tmp_path / "command")
    assert done.code == 0, done.stderr
    assert weights(run.adapter) == weights(tmp_path / "command")
    assert run.loss == run.record.eval_loss == run.metrics[-1]["eval_loss"]
    assert run.frame()["step"].tolist() == [line["step"] for line in run.metrics]
    for shown in (repr(run), run._repr_html_()):
        assert f"{run.loss:.4f} on the evaluation data" in shown
    assert "</svg>" in run._repr_html_()
    assert "</svg>" not in repr(run)


def test_a_finished_run_answers(train: Any) -> None:
    run = train()
    answers = run.compare("What is 3?", max_new_tokens=4)
    assert answers.keys() == {"tuned", "base"}
    assert run.generate("What is 3?", max_new_tokens=4) == answers["tuned"]
    assert run.generate("What is 3?", max_new_tokens=4, temperature=2.0) != answers["tuned"]
    assert rw.adapter_config(run.model).r == 2
    with pytest.raises(ConfigError, match="RW103.*--max-new-tokens is 0"):
        run.generate("What is 3?", max_new_tokens=0)


def test_a_model_in_memory_is_adapted_itself_and_measured(train: Any, model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = rw.load_model(model_folder, dtype=torch.float32)
    before = rw.evaluate(
        model=model, tokenizer=tokenizer, task="perplexity", data=HELD_OUT, output=tmp_path / "a", quiet=True
    )
    run = train(model=model, tokenizer=tokenizer)
    assert run.model is model
    assert run.generate("What is 3?", max_new_tokens=4) == run.compare("What is 3?", max_new_tokens=4)["tuned"]
    after = rw.evaluate(
        model=model, tokenizer=tokenizer, task="perplexity", data=HELD_OUT, output=tmp_path / "b", quiet=True
    )
    assert before.metrics[0]["model"] == "model"
    assert before.metrics[0]["loss"] == pytest.approx(run.record.initial_eval_loss, rel=1e-4)
    assert after.metrics[0]["loss"] == pytest.approx(run.loss, rel=1e-4)
    assert f"{after.metrics[0]['loss']:.4f}" in after._repr_html_()


def test_a_full_fine_tuning_answers_with_its_own_model(train: Any) -> None:
    run = train(method="full", dtype="float32", r=16)
    assert isinstance(run.generate("What is 3?", max_new_tokens=4), str)
    assert not hasattr(run.model, "rankwise_adapters")


def test_runs_after_another_are_those_of_processes_of_their_own(train: Any, model_folder: Path, tmp_path: Path) -> None:
    """Whatever the user drew at random before; and nothing is drawn from the user's generators."""
    train("first", lora_dropout=0.1, method="dora")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = train("second", lora_dropout=0.1)
    assert torch.rand(1) == expected
    given = {"model": str(model_folder), "data": ROWS, "eval_data": HELD_OUT, "output": str(tmp_path / "alone")}
    code = f"import rankwise as rw; rw.train(**{ ({**given, **SHORT, 'lora_dropout': 0.1})!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert weights(found.adapter) == weights(tmp_path / "alone")


def test_memory_is_given_back(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a run that failed, whose error a notebook keeps."""
    held: list[Any] = []
    make_loop = run_module.make_loop

    def made(*given: Any, **named: Any) -> Any:
        loop = make_loop(*given, **named)
        held.append(weakref.ref(loop.model))
        return loop

    monkeypatch.setattr(run_module, "make_loop", made)
    train()
    with pytest.raises(Interrupted) as kept:
        train("stopped", on_step=lambda info: os.kill(os.getpid(), signal.SIGINT) if info.step == 2 else None)
    assert kept.value is not None
    assert [model() for model in held] == [None, None]


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_interrupted_cell_goes_on(in_memory: bool, train: Any, model_folder: Path, tmp_path: Path) -> None:
    own = dict(zip(("model", "tokenizer"), rw.load_model(model_folder))) if in_memory else {}
    straight = train("straight", lora_dropout=0.1, **own)
    if in_memory:
        rw.remove_adapter(own["model"])
    interrupt = {"on_step": lambda info: os.kill(os.getpid(), signal.SIGINT) if info.step == 2 else None}
    with pytest.raises(Interrupted, match="RW540"):
        train(lora_dropout=0.1, **interrupt, **own)
    run = rw.train(output=tmp_path / "run", data=ROWS, eval_data=HELD_OUT, resume=True, quiet=True, **own)
    assert weights(run.adapter) == weights(straight.adapter)


def test_a_metric_of_ones_own_and_an_early_end(train: Any) -> None:
    def measure(evaluation: Any) -> dict[str, float]:
        if evaluation.step == 2:
            raise StopIteration
        return {"words": 3.0}

    run = train(on_evaluation=measure, eval_steps=1)
    assert run.record.steps == 2
    assert [line.get("words") for line in run.metrics if "eval_loss" in line] == [3.0, 3.0, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rte": 1}, "RW103.*learning-rte is not an option.*learning-rate"),
        ({"r": 0}, "RW103.*--r is 0"),
        ({"devices": 2}, "RW117.*torchrun"),
        ({"tokenizer": "a tokenizer"}, "RW112.*tokenizer goes with a model in memory"),
        ({"model": torch.nn.Linear(1, 1)}, "RW103: model is a Linear; give a name"),
        ({"learning_rate": torch.nn.Linear(1, 1)}, "RW103: --learning-rate is a Linear: give a number above 0"),
        ({"on_step": 3}, "RW103: on_step is 3; give a function"),
        ({"on_evaluation": lambda found: found.loss}, "RW103: on_evaluation returned [0-9.]+; return numbers by names"),
        ({"on_evaluation": lambda found: {"eval_loss": 1.0}}, "RW103: on_evaluation returned eval_loss, which the run"),
    ],
)
def test_mistakes_are_those_of_the_command(changes: Any, said: str, train: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        train(**changes)


def test_a_plan_has_a_row_for_each_method(model_folder: Path, plan: Any) -> None:
    made = rw.plan(model=model_folder, method="lora,qdora", batch_size=4, max_length=64)
    assert [row["method"] for row in made.rows] == ["lora", "qdora"]
    document = plan("--method", "lora,qdora", "--json").document
    assert [row["peak_bytes"] for row in made.rows] == [one["peak_bytes"] for one in document["methods"].values()]
    assert made.settings["method"] == document["recommendation"]["method"]
    for shown in (repr(made), made._repr_html_()):
        assert "lora" in shown
        assert "take" in shown


def test_a_comparison_has_its_verdicts(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any
) -> None:
    steps_in_this_process(monkeypatch)
    given = {**SHORT, "model": model_folder, "output": tmp_path / "out", "seeds": 1, "learning_rates": 0.01}
    found = rw.compare(methods="lora,qdora", data=Dataset.from_list(ROWS), eval_data=HELD_OUT, **given)
    assert [item["verdict"] for item in found.verdicts] == ["cannot tell"]
    assert found.best in ("lora", "qdora")
    assert found.document["methods"].keys() == {"lora", "qdora"}
    assert (found.adapter / "adapter_config.json").is_file()
    assert "cannot tell" in repr(found)
    assert "cannot tell" in found._repr_html_()
    with pytest.raises(DataError, match="RW202.*not DataFrame"):
        rw.compare(data=(run := train()).frame(), **given)
    with pytest.raises(ConfigError, match="RW112.*give its name"):
        rw.compare(data=ROWS, **{**given, "model": run.model})


def test_what_is_measured_in_memory_is_as_it_is(train: Any, tmp_path: Path) -> None:
    run = train()
    given = {"model": run.model, "task": "perplexity", "data": HELD_OUT, "output": tmp_path / "e", "quiet": True}
    with pytest.raises(ConfigError, match="RW115"):
        rw.evaluate(**given)
    with pytest.raises(ConfigError, match="RW112: --adapter, --dtype"):
        rw.evaluate(**given, tokenizer=run.tokenizer, adapter=run.adapter, dtype="float32")
    with pytest.raises(ConfigError, match="RW112: rows in memory are for"):
        rw.evaluate(**{**given, "task": "arc_easy"}, tokenizer=run.tokenizer)
    active = rw.evaluate(**given, tokenizer=run.tokenizer).metrics[0]["loss"]
    assert active == pytest.approx(run.loss, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_those_of_a_run(packing: bool, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of each step, in order, with their labels; and a loop over them learns what the run learned."""
    seen: list[torch.Tensor] = []
    collate = Demonstrations.collate

    def noted(self: Any, rows: Any) -> Any:
        seen.append(torch.cat([torch.tensor(row["labels"]) for row in rows]))
        return collate(self, rows)

    monkeypatch.setattr(Demonstrations, "collate", noted)
    run = train(seed=3, packing=packing, max_steps=6, products="bfloat16")
    found = list(rw.batches(ROWS, run.tokenizer, batch_size=4, max_length=64, seed=3, epochs=2, packing=packing))
    # The model was probed before.
    assert len(found) >= 6
    for labels, batch in zip(seen[-6:], found):
        assert labels[labels != -100].tolist() == batch["labels"][batch["labels"] != -100].tolist()
        assert batch["input_ids"].shape == batch["labels"].shape
    rw.optimize_for_training(run.model)
    assert run.model.train()(**found[0]).loss > 0
    with pytest.raises(ConfigError, match="RW115: tokenizer is a str"):
        rw.batches(ROWS, "demo")
    with pytest.raises(ConfigError, match="RW103: batch_size and epochs must be at least 1"):
        rw.batches(ROWS, run.tokenizer, batch_size=0, epochs=0)
    with pytest.raises(ConfigError, match="RW101: config is a dict of builtins; give"):
        rw.add_adapter(run.model, {"r": 8})  # type: ignore[arg-type]


def test_a_caller_is_checked_by_mypy_strict(tmp_path: Path) -> None:
    """``py.typed``: names, results and callbacks have types."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "caller.py").write_text(
        "import rankwise as rw\n"
        'config = rw.LoraConfig(r=8, task_type="CAUSAL_LM")\n'
        'run = rw.train(model="demo", data="d", output="o", on_step=lambda step: print(step.loss))\n'
        "loss: float | None = run.loss\n"
        'answer: str = run.generate("Hello")\n'
        'rows: list[dict[str, object]] = rw.plan(model="demo").rows\n'
        'best: str = rw.compare(model="demo", data="d", output="o").best\n'
        'first = next(rw.batches([{"text": "a"}], run.tokenizer))["labels"].shape\n'
    )
    out, err, code = api.run(
        ["--strict", "--no-error-summary", "--ignore-missing-imports", str(tmp_path / "caller.py")]
    )
    assert (out, err, code) == ("", "", 0)
