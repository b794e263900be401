"""Answers that are labels: every kind of label and method trains, and files and logits are PEFT's."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as sklearn
from transformers import AutoModel, AutoModelForSequenceClassification, BertForMaskedLM

from conftest import make_tokenizer
from rankwise.adapters import load_adapter
from rankwise.adapters.folder import labels_of
from rankwise.cli import export as export_verb
from rankwise.cli import predict, preview
from rankwise.config import TrainSettings
from rankwise.errors import RankwiseError
from rankwise.evaluation.engine import LoadOptions, load_as_trained
from rankwise.export.merged import merge_to_folder
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Labels, measures
from rankwise.models import ModelSource, load_model
from rankwise.records import RunRecord
from rankwise.training.run import train
from rankwise.verbs.output import Output
from rankwise.verbs.settings import ExportSettings, PredictSettings, PreviewSettings
from tiny_models import tiny_bert, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::Warning")
BASES = {"decoder": tiny_llama, "encoder": tiny_bert}
KINDS: dict[str, tuple[Any, ...]] = {SINGLE: ("no", "yes"), SEVERAL: (["a"], ["a", "b"]), NUMBER: (0.5, 2)}
IDS = torch.tensor([[5, 6, 7, 8]])


def write(path: Path, labels: tuple[Any, ...], count: int = 32) -> Path:
    """Texts that begin with w0 have the first label, those that begin with w1 the second."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join([f"w{place % 2}", *(f"w{draw.randrange(2, 90)}" for _ in range(3))]), "label": label}
        for place, label in enumerate(labels[place % len(labels)] for place in range(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def make(base: str = "decoder", kind: str = SINGLE, name: str = "run", **changes: Any) -> RunRecord:
        folder = tmp_path / base
        if not folder.exists():
            BASES[base]().save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        rows = str(write(tmp_path / f"{kind}.jsonl", KINDS[kind]))
        given = {"model": str(folder), "data": rows, "eval_data": rows, "output": tmp_path / name, "r": 4}
        given |= {"objective": "classify", "max_steps": 24, "batch_size": 8, "learning_rate": 2e-2, "max_length": 16}
        given |= {"device": "cpu", "dtype": "float32", "lora_alpha": 8, **changes}
        return train(TrainSettings.model_validate(given))

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def plain(folder: Path, count: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=count)


@pytest.mark.parametrize(("base", "method"), [("decoder", "dora"), ("encoder", "lora")])
def test_peft_reads_our_folders_and_we_read_those_of_peft(base: str, method: str, run: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    record = run(base, method=method)
    assert record.eval_rewards["accuracy"] == 1
    ours = load_as_trained(str(tmp_path / base), [tmp_path / "run"], LoadOptions(labels=True)).model
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path / base, 2), tmp_path / "run")
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    merge_to_folder(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(logits(merged), logits(ours), atol=1e-5, rtol=0)

    targets = ["q_proj"] if base == "decoder" else ["query"]
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=targets, use_dora=method == "dora", init_lora_weights=False
    )
    made = peft.get_peft_model(plain(tmp_path / base, 3), config)
    made.save_pretrained(tmp_path / "peft")
    source = ModelSource(
        kind="folder", name=base, path=tmp_path / base, base_model=base, labels=labels_of(tmp_path / "peft")
    )
    model = load_model(source)[0]
    load_adapter(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), logits(made), atol=1e-5, rtol=0)


def export(run: Path, target: str, **more: Any) -> dict[str, Any]:
    """The document of `rankwise export` to the folder ``served`` beside the run."""
    given = ExportSettings.model_validate({"adapter": run, "for": target, "output": run.with_name("served"), **more})
    return export_verb.run(given, Output(as_json=True))


@pytest.mark.parametrize(("base", "target"), [("decoder", "vllm"), ("encoder", "peft")])
def test_an_export_holds_the_head(base: str, target: str, run: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run(base, max_steps=3, use_rslora=True)
    told = export(tmp_path / "run", target)
    ours = load_as_trained(str(tmp_path / base), [tmp_path / "run"], LoadOptions(labels=True)).model
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path / base, 2), tmp_path / "served")
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    assert labels_of(tmp_path / "served") == Labels(("no", "yes"))
    said = '"problem_type": "single_label' if target == "vllm" else "AutoModelForSequenceClassification"
    assert said in told["commands"][0]


@pytest.mark.parametrize(
    ("base", "method", "target", "code"),
    [("encoder", "lora", "vllm", "RW730"), ("decoder", "lora", "ollama", "RW112")],
)
def test_what_no_server_takes_is_refused(
    base: str, method: str, target: str, code: str, run: Any, tmp_path: Path
) -> None:
    run(base, method=method, max_steps=1)
    with pytest.raises(RankwiseError) as error:
        export(tmp_path / "run", target)
    assert error.value.code == code
    assert not (tmp_path / "served").exists()


def test_a_prepared_base_is_kept_without_its_head(run: Any, tmp_path: Path) -> None:
    given = {"method": "qlora", "max_steps": 3, "cache": tmp_path / "cache"}
    losses = [run(name=name, **given).eval_loss for name in ("first", "second")]
    assert losses[0] == losses[1] == run(name="third", method="qlora", max_steps=3, mmap=False).eval_loss
    assert len(list((tmp_path / "cache").glob("base-*/model.safetensors"))) == 1


def test_a_config_without_padding_is_told_of_it(run: Any, tmp_path: Path) -> None:
    """Where the base is prepared too, in a folder without a tokenizer."""
    tiny_llama(pad_token_id=None).save_pretrained(tmp_path / "decoder")
    make_tokenizer().save_pretrained(tmp_path / "decoder")
    assert run(method="qlora", block_size=32, max_steps=1, cache=tmp_path / "cache").status == "finished"


@pytest.mark.parametrize(("base", "method"), [("decoder", "qlora"), ("encoder", "qdora")])
def test_fast_and_plain_steps_agree(base: str, method: str, run: Any) -> None:
    records = [run(base, method=method, name=str(fast), fast=fast, max_steps=3) for fast in (True, False)]
    assert records[0].eval_loss == pytest.approx(records[1].eval_loss, rel=1e-4)


@pytest.mark.parametrize("kind", [SEVERAL, NUMBER])
def test_several_labels_and_numbers_are_learned_merged_and_predicted(kind: str, run: Any, tmp_path: Path) -> None:
    record = run("decoder", kind, max_steps=60)
    assert record.eval_loss < 0.2 * record.initial_eval_loss
    merge_to_folder(tmp_path / "run", tmp_path / "merged")
    answers = []
    for model in ({"adapter": tmp_path / "run"}, {"model": str(tmp_path / "merged")}):
        given = PredictSettings(data=record.settings["data"], dtype="float32", **model)
        answers.append(predict.run(given, Output(as_json=True)))
    assert answers[0]["measures"] == pytest.approx(record.eval_rewards, rel=1e-4)
    for one, other in zip(answers[0]["predictions"], answers[1]["predictions"]):
        assert one["label"] == pytest.approx(other["label"], abs=1e-4)


def test_a_continued_run_keeps_the_head(run: Any, tmp_path: Path) -> None:
    first = run()
    again = run(name="again", adapter=tmp_path / "run", max_steps=1, learning_rate=1e-6)
    assert again.initial_eval_loss == pytest.approx(first.eval_loss, rel=1e-5)
    with pytest.raises(RankwiseError, match="answers with no, yes") as error:
        run("decoder", NUMBER, name="other", adapter=tmp_path / "run")
    assert error.value.code == "RW764"


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        (("a", "a"), "RW214"),
        (("a", 1), "RW203"),
        (("a", None), "RW203"),
        (("a", {}), "RW203"),
        ((0.5, 4e5), "RW203"),
    ],
)
def test_labels_that_cannot_be_learned(labels: tuple[Any, ...], code: str, run: Any, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError) as error:
        run(data=str(write(tmp_path / "bad.jsonl", labels)))
    assert error.value.code == code
    assert not (tmp_path / "run").exists()


def test_unknown_labels_and_heads_of_others_are_refused(run: Any, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="known labels .no, yes., found 'maybe'"):
        run(eval_data=str(write(tmp_path / "other.jsonl", ("no", "maybe"))))
    run(method="full", max_steps=1)
    source = ModelSource(kind="folder", name="run", path=tmp_path / "run", base_model="run")
    with pytest.raises(RankwiseError, match="has a head for the labels no, yes") as error:
        load_model(dataclasses.replace(source, labels=Labels(("a", "b"))))
    assert error.value.code == "RW308"
    with pytest.raises(RankwiseError, match="answers with labels"):
        load_model(source)


def test_a_base_without_a_pooler_gets_one_as_the_message_says(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    BertForMaskedLM(tiny_bert().config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(RankwiseError, match="RW308.* without the pooler .*--modules-to-save pooler"):
        run("encoder")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    run("encoder", modules_to_save="pooler", max_steps=2)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    pooler = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    assert not torch.equal(saved["base_model.model.bert.pooler.dense.weight"], pooler)


def test_text_is_not_written_with_labels(run: Any, tmp_path: Path) -> None:
    run(max_steps=1)
    with pytest.raises(RankwiseError, match="rankwise predict"):
        load_as_trained(str(tmp_path / "decoder"), [tmp_path / "run"], LoadOptions())


def test_texts_beyond_the_learned_positions_are_cut(run: Any, tmp_path: Path) -> None:
    run("encoder", max_steps=1)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "w1 " * 80}))
    given = PredictSettings(adapter=tmp_path / "run", data=str(tmp_path / "long.jsonl"), max_length=100)
    assert len(predict.run(given, Output(as_json=True))["predictions"]) == 1


def test_preview_counts_labels(run: Any, tmp_path: Path) -> None:
    run(max_steps=1)
    data = write(tmp_path / "rows.jsonl", ("a", "a", "b"), 30)
    given = PreviewSettings(model=str(tmp_path / "decoder"), data=str(data), objective="classify")
    assert preview.run(given, Output(as_json=True))["labels"]["counts"] == {"a": 20, "b": 10}


def test_whole_numbers_in_floats_are_classes(run: Any, tmp_path: Path) -> None:
    rows = [str(write(tmp_path / name, labels)) for name, labels in (("f.jsonl", (0.0, 1.0)), ("i.jsonl", (1, 0)))]
    run(data=rows[0], eval_data=rows[1], max_steps=1)
    assert labels_of(tmp_path / "run") == Labels(("0", "1"))
    found = predict.run(PredictSettings(adapter=tmp_path / "run", data=rows[0]), Output(as_json=True))
    assert {row["label"] for row in found["predictions"]} <= {"0", "1"}


def test_measures_are_those_of_sklearn() -> None:
    draw = random.Random(0)
    one, other = ([draw.randrange(3) for _ in range(50)] for _ in range(2))
    found = measures(one, other, SINGLE)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(one, other))
    assert found["f1"] == pytest.approx(sklearn.f1_score(one, other, average="macro"))
    assert found["mcc"] == pytest.approx(sklearn.matthews_corrcoef(one, other))
    assert measures([1.0, 2.0, 4.0], [2.0, 4.0, 8.0], NUMBER) == {"pearson": pytest.approx(1)}
