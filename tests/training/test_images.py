"""Rows with images: trl's collator, adapters on the language side, losses equal to trl and PEFT."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from training_rows import WORDS, Recorder, write_rows

import rankwise as rw
from rankwise.cli.main import main
from rankwise.data import encode_rows, read_rows
from rankwise.errors import ConfigError, DataError, Interrupted, RankwiseWarning
from rankwise.export.merged import merge_to_folder
from rankwise.planning import Workload, estimate
from rankwise.records import read_metrics
from rankwise.training.run import train

Image = pytest.importorskip("PIL.Image", reason="images are read by Pillow; install the extra `vision`")
TEXT: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def idefics3(folder: Path, tokenizer: Any) -> None:
    """SmolVLM-Instruct's shape: four tokens an image."""
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    )
    eyes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**eyes, "image_size": 56, "patch_size": 14},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def qwen2_5_vl(folder: Path, tokenizer: Any) -> None:
    """As many tokens an image as it has pixels."""
    pytest.importorskip("torchvision", reason="the processor of videos needs it; install the extra `vision`")
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    template = TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    eyes = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={**eyes, "fullatt_block_indexes": [1]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


FAMILIES = {"idefics3": idefics3, "qwen2_5_vl": qwen2_5_vl}


@pytest.fixture(params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    FAMILIES[request.param](tmp_path / request.param, tokenizer)
    return tmp_path / request.param


@pytest.fixture
def one(tmp_path: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    idefics3(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def write_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Images of noise in two shapes."""
    draw = torch.Generator().manual_seed(seed)
    (folder / "images").mkdir(exist_ok=True)
    names = []
    for number in range(count):
        pixels = torch.randint(256, (56 + 28 * (number % 2), 56, 3), generator=draw, dtype=torch.uint8)
        names.append(f"images/{seed}-{number}.png")
        Image.fromarray(pixels.numpy()).save(folder / names[-1])
    return names


def rows_of(names: list[str], seed: int = 0) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, name in enumerate(names):
        words = [WORDS[int(index)] for index in torch.randint(len(WORDS), (8,), generator=draw)]
        question = [{"type": "image"}, {"type": "text", "text": " ".join(words[: 2 + 4 * (number % 2)])}]
        answer = [{"type": "text", "text": " ".join(words[5:])}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"images": [name], "messages": messages})
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def given(tmp_path: Path, settings: Any) -> Any:
    """Settings of a run with images; training and evaluation rows lie in the test's folder."""
    for name, count, seed in (("train", 12, 0), ("eval", 5, 1)):
        write_lines(tmp_path / f"seen-{name}.jsonl", rows_of(write_images(tmp_path, count, seed), seed))

    def make(**changes: Any) -> Any:
        data = {"data": str(tmp_path / "seen-train.jsonl"), "eval_data": str(tmp_path / "seen-eval.jsonl")}
        return settings(**{**data, "max_length": 64, "logging_steps": 1, **changes})

    return make


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_losses_equal_trl_and_peft(method: str, seeing: Path, given: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")
    import trl

    model, _ = rw.load_model(str(seeing), dtype=torch.float32)
    torch.manual_seed(1)
    with pytest.warns(RankwiseWarning, match="RW177"):
        rw.add_adapter(model, rw.LoraConfig(r=4, use_dora=method == "dora"))
    rw.save_adapter(model, tmp_path / "start")
    run = given(model=str(seeing), method=method, adapter=tmp_path / "start", max_steps=5, batch_size=2, eval_data=None)
    run = run.model_copy(update={"eval_steps": None})
    record = train(run)
    assert "fused" in record.device["acceleration"]
    ours = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]

    lines = [json.loads(line) for line in (tmp_path / "seen-train.jsonl").read_text().splitlines()]
    rows = [
        {
            "images": [str(tmp_path / name) for name in line["images"]],
            "prompt": line["messages"][:1],
            "completion": line["messages"][1:],
        }
        for line in lines
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    base = transformers.AutoModelForImageTextToText.from_pretrained(seeing, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=run.learning_rate,
        logging_steps=1,
        seed=run.seed,
        data_seed=run.seed,
        max_length=64,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        lr_scheduler_type=run.lr_scheduler_type,
        warmup_steps=run.warmup_steps,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        theirs,
        arguments,
        train_dataset=dataset,
        processing_class=transformers.AutoProcessor.from_pretrained(seeing),
    )
    trainer.train()
    expected = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(expected) == 5
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_run_trains_the_language_side_and_merges(seeing: Path, given: Any, tmp_path: Path) -> None:
    """The merged model, loaded by transformers, answers an image as the adapted one does."""
    with pytest.warns(RankwiseWarning, match="RW177"):
        record = train(given(model=str(seeing)))
    assert record.eval_loss < record.initial_eval_loss
    assert "padded" in record.device["rows"]
    names = [name.removeprefix("base_model.model.") for name in load_file(tmp_path / "run/adapter_model.safetensors")]
    assert names
    assert not [name for name in names if "language_model" not in name and "text_model" not in name]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "run")
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    inputs = processor(images=[Image.open(tmp_path / "images/0-1.png")], text=[text], return_tensors="pt")
    adapted, _ = rw.load_model(str(seeing))
    plain = adapted(**inputs).logits
    rw.load_adapter(adapted, tmp_path / "run")
    merge_to_folder(tmp_path / "run", tmp_path / "merged", model=str(seeing))
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (adapted(**inputs).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["checkpointing", "plain operators", "--no-fast", "4 bits"])
def test_other_ways_to_compute(way: str, one: Path, given: Any, tmp_path: Path) -> None:
    run = {"model": str(one), "max_steps": 3, "eval_data": None}
    changes = {"checkpointing": {"gradient_checkpointing": True}, "--no-fast": {"fast": False}}
    settings = given(**run).model_copy(update={"eval_steps": None})
    fast = train(settings)
    other = settings.model_copy(update={"output": tmp_path / "other", **changes.get(way, {})})
    if way == "4 bits":
        assert train(other.model_copy(update={"method": "qlora"})).train_loss == pytest.approx(
            fast.train_loss, rel=0.05
        )
        return
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if way == "plain operators":
            patch.setattr("rankwise.training.objectives.images.COMPARED", ("qwen2_5_vl",))
        record = train(other)
    assert record.train_loss == pytest.approx(fast.train_loss, rel=1e-4)
    assert any("RW186" in str(item.message) for item in said) == (way == "plain operators")
    assert ("off" in record.device["acceleration"]) == (way in ("plain operators", "--no-fast"))


def test_a_stopped_run_goes_on_to_the_bit(one: Path, given: Any, tmp_path: Path) -> None:
    straight = train(given(model=str(one), output=tmp_path / "straight", lora_dropout=0.1))
    settings = given(model=str(one), lora_dropout=0.1)
    with pytest.raises(Interrupted):
        train(settings, Recorder(stop_at=4))
    resumed = train(settings.model_copy(update={"resume": True}))
    assert (resumed.eval_loss, resumed.train_loss) == (straight.eval_loss, straight.train_loss)


def test_all_forms_of_the_rows_are_the_same(one: Path, given: Any, tmp_path: Path) -> None:
    """Parts or plain texts, messages or prompt and completion, one image or a list, a path or the bytes of a file."""
    lines = [json.loads(line) for line in (tmp_path / "seen-train.jsonl").read_text().splitlines()]
    asked = [line["messages"][0]["content"][1]["text"] for line in lines]
    answers = [line["messages"][1]["content"][0]["text"] for line in lines]
    plain = [
        {"image": line["images"][0], "prompt": question, "completion": answer}
        for line, question, answer in zip(lines, asked, answers)
    ]
    split = [
        {"images": line["images"], "prompt": line["messages"][:1], "completion": line["messages"][1:]} for line in lines
    ]
    stored = datasets.Dataset.from_list([{**row, "image": str(tmp_path / row["image"])} for row in plain])
    stored.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    sources = [
        tmp_path / "seen-train.jsonl",
        write_lines(tmp_path / "plain.jsonl", plain),
        write_lines(tmp_path / "split.jsonl", split),
        tmp_path / "rows.parquet",
    ]
    losses = set()
    for number, source in enumerate(sources):
        changes = {"data": str(source), "output": tmp_path / f"run-{number}", "max_steps": 2, "eval_data": None}
        run = given(model=str(one), **changes).model_copy(update={"eval_steps": None})
        losses.add(train(run).train_loss)
    assert len(losses) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"images": []}, "found 1 for 0"),
    ({"images": ["images/nowhere.png"]}, "nowhere.png"),
    ({"images": ["rows.jsonl"]}, "cannot identify image"),
    ({"images": [3]}, "expected paths or bytes"),
    ({"messages": [{"role": "user", "content": "w1"}]}, "expected one `assistant` message"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "w1"}]}, "video"),
    ({"tools": [{"name": "f"}]}, "expected no `tools`"),
    *(
        ({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", **change}]}, said)
        for change, said in (
            ({"content": [{"type": "text", "text": "w2"}, {"type": "image"}]}, "text alone in the answer"),
            ({"weight": 0}, "only answers to train on, found the answer with `weight` 0"),
            ({"reasoning_content": "w3"}, "no `reasoning_content` in message 2"),
            ({"tool_calls": [{"name": "f"}]}, "no `tool_calls` in message 2"),
        )
    ),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=str)
def test_bad_rows_are_named(change: dict[str, Any], said: str, one: Path, given: Any, tmp_path: Path) -> None:
    rows = rows_of(write_images(tmp_path, 3, seed=2), 2)
    write_lines(tmp_path / "rows.jsonl", [rows[0], {**rows[1], **change}, rows[2]])
    with pytest.raises(DataError, match=f"RW203.*rows.jsonl, line 2: .*{said}"):
        train(given(model=str(one), data=str(tmp_path / "rows.jsonl")))


def test_named_columns_bring_their_images(tmp_path: Path) -> None:
    row = {"image": "images/a.png", "q": "w1", "a": 4}
    [found] = read_rows(write_lines(tmp_path / "rows.jsonl", [row]), prompt_column="q", completion_column="a")
    same = {"image": "images/a.png", "prompt": "w1", "completion": 4}
    [usual] = read_rows(write_lines(tmp_path / "usual.jsonl", [same]))
    assert (found.kind, found.messages, found.images) == ("images", usual.messages, usual.images)
    assert found.images == (str(tmp_path / "images/a.png"),)


@pytest.mark.parametrize("names", [("question", "answer"), ("q", "a")])
def test_images_that_come_later_are_not_passed_over(names: tuple[str, str], tmp_path: Path) -> None:
    text = dict(zip(names, ("w1", "w2")))
    path = write_lines(tmp_path / "rows.jsonl", [text, {**text, "image": "a.png"}])
    named = {"prompt_column": "q", "completion_column": "a"} if "q" in names else {}
    with pytest.warns(RankwiseWarning, match=r"RW227: .*`image` in 1 of 2 rows"):
        assert len(read_rows(path, **named)) == 2


REFUSED: list[dict[str, Any]] = [
    {"packing": True},
    {"learning_rate": "auto"},
    {"new_tokens": "<call>"},
    {"sample_prompt": "w1"},
    {"method": "full"},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_options_that_look_at_tokens_alone_are_refused(changes: dict[str, Any], one: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="RW183"):
        train(given(model=str(one), **changes))


def test_what_reads_text_refuses_images(
    one: Path, given: Any, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    seen = given(model=str(one))
    rows = read_rows(seen.data)
    with pytest.raises(ConfigError, match="RW182"):
        encode_rows(rows, tokenizer, max_length=64)
    with pytest.raises(ConfigError, match="RW182"):
        train(seen.model_copy(update={"objective": "dpo"}))
    with pytest.raises(ConfigError, match="RW184"):
        train(seen.model_copy(update={"model": str(model_folder)}))
    with pytest.raises(ConfigError, match="RW183"):
        train(seen.model_copy(update={"eval_data": str(write_rows(tmp_path / "text.jsonl", 4))}))
    (one / "preprocessor_config.json").unlink(missing_ok=True)
    (one / "processor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="RW185"):
        train(seen)


def test_rows_that_images_fill_are_left_out(one: Path, given: Any) -> None:
    with pytest.warns(RankwiseWarning, match="RW216"):
        record = train(given(model=str(one), max_length=15, dry_run=True))
    assert record.data["train"]["dropped_rows"] == 6


def test_a_preview_counts_the_tokens_of_an_image(one: Path, given: Any, capsys: Any) -> None:
    main(["preview", "--model", str(one), "--data", given().data])
    shown = capsys.readouterr().out
    assert "<image> x 4" in shown
    assert "0-0.png" in shown
    assert "[[" in shown


def test_a_plan_counts_the_tower_and_its_images(one: Path) -> None:
    model, _ = rw.load_model(str(one))
    with pytest.warns(RankwiseWarning, match="RW177"):
        trained = rw.add_adapter(model, rw.LoraConfig(r=4)).trainable_parameters
    workload = Workload(batch_size=2, max_length=32, r=4, device_type="cpu", dtype="float32")
    for exact in (False, True):
        without = estimate(str(one), "lora", workload, exact=exact)
        assert without.trainable_parameters == trained
        # An image of 4 tokens is 56 x 56 pixels.
        shown = estimate(str(one), "lora", dataclasses.replace(workload, image_tokens=4), exact=exact)
        assert shown.peak_bytes - without.peak_bytes >= 2 * 3 * 56 * 56 * 4
