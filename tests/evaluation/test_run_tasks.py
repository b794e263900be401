"""Whole evaluations on a tiny model: what they leave behind, that they resume, and what they equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.acceleration.generation import Decoding
from rankwise.adapters import add_adapter, save_adapter
from rankwise.data.rows import Row
from rankwise.errors import ConfigError, DataError, RankwiseWarning, RunError
from rankwise.evaluation import run
from rankwise.evaluation.engine import template_of
from rankwise.evaluation.record import Example, TaskResult, read_examples
from rankwise.evaluation.run import Evaluation, Observer, variants_of
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.evaluation.tasks.base import Question, with_room, write_answers
from rankwise.evaluation.tasks.rows import _example
from rankwise.lora_config import LoraConfig
from rankwise.records import RunRecord
from small_engines import byte_engine, byte_model, nobody, save_byte_model, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that change what the model says."""
    folders = []
    for seed, dora in ((1, False), (2, True)):
        tuned = byte_model()
        torch.manual_seed(seed)
        add_adapter(tuned, LoraConfig(r=2, init_lora_weights=False, use_dora=dora))
        tuned.name_or_path = str(model)
        folders.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        save_adapter(tuned, folders[-1])
    return folders


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "rows.jsonl", [{"prompt": f"Is {n % 4}? ", "completion": "Yes " * n} for n in range(1, 13)]
    )


def settings(model: Path, task: str, data: Path | str, output: Path, **more: Any) -> EvaluateSettings:
    given = {"model": str(model), "task": task, "data": str(data), "output": output, "dtype": "float32", **more}
    return EvaluateSettings.model_validate(given)


class SilentObserver:
    def phase(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int) -> None: ...

    def result(self, label: str, result: TaskResult) -> None: ...


def evaluate_all(given: EvaluateSettings, observer: Observer | None = None) -> Evaluation:
    return run.evaluate(given, observer or SilentObserver())


def evaluate(given: EvaluateSettings, observer: Observer | None = None) -> list[TaskResult]:
    """The result of every task, on the base and each adapter."""
    return [result for _, result in evaluate_all(given, observer).results]


def test_perplexity_is_the_loss_of_the_labels(model: Path, rows: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankwise.data import encode_rows, read_rows

    [result] = evaluate(settings(model, "perplexity", rows, tmp_path / "out"))
    encoded = encode_rows(read_rows(rows), AutoTokenizer.from_pretrained(model), max_length=1024).dataset
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = count = 0.0
    for row in encoded:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = reference(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
        scored = int((labels[:, 1:] != -100).sum())
        total, count = total + loss * scored, count + scored
    assert result.metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    examples = list(read_examples(tmp_path / "out" / "perplexity" / "predictions.jsonl"))
    assert [example.id for example in examples] == [str(n) for n in range(12)]
    assert sum(example.scores["tokens"] for example in examples) == count
    # Four different prompts, each with three completions.
    assert result.clusters == 4
    assert result.count == 12


TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def test_a_run_is_asked_with_its_own_template_from_any_folder(model: Path, tmp_path: Path, monkeypatch):
    from rankwise.config import TrainSettings
    from rankwise.training.run import train

    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    data = write_lines(tmp_path / "chat.jsonl", [{"messages": messages}] * 4)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path / "here")
    given = {"model": str(model), "data": str(data), "eval_data": str(data), "output": tmp_path / "run", "r": 2}
    record = train(
        TrainSettings.model_validate(
            given | {"chat_template": "chat.jinja", "max_steps": 1, "batch_size": 2, "dtype": "float32"}
        )
    )
    monkeypatch.chdir(tmp_path)
    asked = {"adapter": str(tmp_path / "run"), "task": "perplexity", "data": str(data), "output": tmp_path / "out"}
    [result] = evaluate(EvaluateSettings.model_validate(asked))
    assert result.metrics["loss"] == pytest.approx(record.eval_loss, rel=1e-5)


def run_with(folder: Path, given: str | None, stored: str | None) -> Path:
    """A run folder as far as templates go."""
    folder.mkdir()
    RunRecord(method="lora", seed=0, settings={"chat_template": given}).save(folder)
    if stored is not None:
        (folder / "chat_template.jinja").write_text(stored)
    return folder


def test_runs_with_different_templates_are_refused(tmp_path: Path):
    first = run_with(tmp_path / "first", "a.jinja", "A")
    second = run_with(tmp_path / "second", "b.jinja", "B")
    same = run_with(tmp_path / "same", None, "A")
    lost = run_with(tmp_path / "lost", "a.jinja", None)
    elsewhere = tmp_path
    assert template_of([]) is template_of([same]) is template_of([elsewhere]) is None
    assert template_of([first]) == template_of([same, first, elsewhere]) == "A"
    # As `export` and PEFT leave it: a template and no record.
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "chat_template.jinja").write_text("B")
    assert template_of([tmp_path / "exported"]) == "B"
    for other in (second, tmp_path / "exported"):
        with pytest.raises(ConfigError, match="RW151.*chat template.*--chat-template"):
            template_of([first, other])
    with pytest.raises(DataError, match="RW211.*lost"):
        template_of([lost])


def test_an_answer_leaves_room_for_its_prompt(tmp_path: Path):
    engine = byte_engine()
    engine.model.config.max_position_embeddings = 40
    questions = [Question(str(n), tuple(range(60, 75 + n)), f"prompt {n}") for n in range(2)]
    seen = []

    def finish(question: Question, text: str) -> Example:
        seen.append(len(text))
        return Example(id=question.id, prompt=question.prompt, prediction=text)

    decoding = Decoding(max_new_tokens=64, stop_ids=frozenset())
    with pytest.warns(RankwiseWarning, match="RW256.*answers end at 24 tokens instead of 64") as told:
        write_answers(engine, questions, decoding, tmp_path, nobody, task="t", finish=finish)
    assert len(told) == 1
    assert max(seen) > 0


@pytest.mark.parametrize(
    ("positions", "longest", "asked", "tokens"),
    [(100, 30, 70, 70), (100, 30, 80, 70), (100, 90, 200, 50), (1, 5, 9, 1)],
)
@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
def test_an_answer_is_as_long_as_the_prompt_lets_it_or_half(positions, longest, asked, tokens):
    decoding = Decoding(max_new_tokens=asked, stop_ids=frozenset())
    assert with_room(decoding, positions, longest, "t").max_new_tokens == tokens


def test_a_finished_evaluation_is_read_and_not_done_again(model: Path, rows: Path, tmp_path: Path, monkeypatch):
    given = settings(model, "perplexity", rows, tmp_path / "out")
    [first] = evaluate(given)
    monkeypatch.setattr("rankwise.evaluation.run.load_as_trained", lambda *_, **__: pytest.fail("loaded the model"))
    assert [json.dumps(first.to_json())] == [json.dumps(result.to_json()) for result in evaluate(given)]


def test_the_same_weights_with_other_settings_are_another_model(model: Path, rows: Path, tmp_path: Path):
    copied = shutil.copytree(model, tmp_path / "model")
    evaluate(settings(copied, "perplexity", rows, tmp_path / "out"))
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(RunError, match="RW570.*model_settings_sha256 was"):
        evaluate(settings(copied, "perplexity", rows, tmp_path / "out"))


def test_several_adapters_stand_beside_their_base(model: Path, adapters: list[Path], rows: Path, tmp_path: Path):
    together = evaluate_all(settings(model, "perplexity", rows, tmp_path / "out", adapter=[str(a) for a in adapters]))
    labels = [label for label, _ in together.results]
    assert labels == ["base", *(adapter.name for adapter in adapters)]
    alone = [
        evaluate(settings(model, "perplexity", rows, tmp_path / f"alone{n}", adapter=[str(a)] if a else []))[0]
        for n, a in enumerate([None, *adapters])
    ]
    losses = [result.metrics["loss"] for _, result in together.results]
    assert losses == pytest.approx([result.metrics["loss"] for result in alone], rel=1e-6)
    assert len(set(losses)) == 3
    assert (tmp_path / "out" / "base" / "perplexity" / "result.json").is_file()
    found = {(d.a, d.b): d for d in together.differences}
    assert len(found) == 3
    last = found[labels[2], labels[1]]
    assert last.difference == pytest.approx(losses[2] - losses[1])
    assert last.interval[0] < last.difference < last.interval[1]
    stored = json.loads((tmp_path / "out" / "differences.json").read_text())
    assert [item["difference"] for item in stored] == [d.difference for d in together.differences]


def test_adapters_of_different_bases_are_refused(adapters: list[Path], rows: Path, tmp_path: Path):
    config = json.loads((adapters[1] / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    given = {"adapter": [str(adapters[0]), str(other)], "task": "perplexity", "data": str(rows)}
    with pytest.raises(ConfigError, match="RW151.*elsewhere"):
        evaluate(EvaluateSettings.model_validate(given))


def test_adapters_get_labels_of_their_own():
    labels = [variant.label for variant in variants_of([Path("/a/run"), Path("/b/run"), Path("/c/base")], None)]
    assert labels == ["base", "run", "run-2", "base-2"]
    assert [variant.label for variant in variants_of([Path("/a/run")], None)] == ["run"]
    assert [variant.label for variant in variants_of([], False)] == ["base"]


def test_without_an_output_a_folder_is_named_by_the_settings(model: Path, rows: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = settings(model, "perplexity", rows, tmp_path).model_copy(update={"output": None})
    first = evaluate_all(given).folder
    assert first.parent == Path("evaluations")
    assert evaluate_all(given).folder == first
    assert evaluate_all(given.model_copy(update={"limit": 2})).folder != first


def test_a_link_in_the_place_of_a_task_is_refused(model: Path, rows: Path, tmp_path: Path):
    evaluate(settings(model, "perplexity", rows, tmp_path / "others"))
    before = (tmp_path / "others" / "perplexity" / "result.json").read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "perplexity").symlink_to(tmp_path / "others" / "perplexity", target_is_directory=True)
    with pytest.raises(RunError, match="RW554"):
        evaluate(settings(model, "perplexity", rows, tmp_path / "out", overwrite=True, limit=2))
    assert (tmp_path / "others" / "perplexity" / "result.json").read_bytes() == before


def test_an_overwriting_cut_off_keeps_no_old_answers(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cut off at each removal: the same command without --overwrite is refused or gives the new result."""
    new = settings(model, "perplexity", rows, tmp_path / "out", max_length=8)
    [fresh] = evaluate(settings(model, "perplexity", rows, tmp_path / "fresh", max_length=8))
    for at_call in range(3):
        evaluate(settings(model, "perplexity", rows, tmp_path / "out", overwrite=True))
        with monkeypatch.context() as patch:
            calls, real = iter(range(at_call)), Path.unlink
            patch.setattr(Path, "unlink", lambda path, **named: _cut(real, calls, path, **named))  # noqa: B023
            with pytest.raises(KeyboardInterrupt):
                evaluate(new.model_copy(update={"overwrite": True}))
        with pytest.raises(RunError, match="RW570"):
            evaluate(new)
    [found] = evaluate(new.model_copy(update={"overwrite": True}))
    assert found.metrics == fresh.metrics


def _cut(real: Any, calls: Any, *args: Any, **named: Any) -> Any:
    if next(calls, None) is None:
        raise KeyboardInterrupt
    return real(*args, **named)


def test_a_text_that_is_cut_for_show_says_so():
    row = Row(kind="prompt", source="rows.jsonl", line=1, prompt="a" * 600, completion="b" * 501)
    example = _example(row, 0, {}, [-1.0])
    assert example.prompt.endswith("a… (100 more characters)")
    assert example.references[0].endswith("b… (1 more characters)")
