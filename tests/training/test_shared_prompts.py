"""What several rows of a micro-batch begin with is computed once, and nothing else changes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from training_rows import WORDS, Recorder

import rankwise as rw
from marks import needs_avx2
from precision import assert_as_exact
from rankwise.acceleration import attention, optimize_for_training
from rankwise.acceleration.layouts import KeyRanges, Layout, laid_once, parts_of
from rankwise.config import TrainSettings
from rankwise.constants import IGNORED
from rankwise.errors import ConfigError, RankwiseError
from rankwise.records import load_record, read_metrics
from rankwise.training.batches import KEY
from rankwise.training.objectives import Demonstrations
from rankwise.training.run import train
from tiny_models import tiny_llama

BEGINNING = [*range(3, 23)]
# Two rows of a group, one of another, one that ends with the beginning, one that is there twice, one of its own.
ROWS = [
    [*BEGINNING, *range(30, 42), 50],
    [*BEGINNING, *range(30, 42), 51, 52],
    [*BEGINNING, 60, 61, 62],
    BEGINNING,
    [*BEGINNING, 70],
    [*BEGINNING, 70],
    [80, 81, 82, 83],
]
CASES = {
    "groups": ROWS,
    "one row": ROWS[:1],
    "no common beginning": [[number, *range(30, 42)] for number in range(3, 8)],
    "equal to the last token": [ROWS[0]] * 3,
    "short ones": [[3, 4, 5], [3, 4, 6], [3, 4, 5]],
    "each in the next": [[*range(3, 3 + 10 * count)] for count in range(1, 8)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_each_token_sees_the_tokens_of_its_row_before_it(rows: list[list[int]]) -> None:
    inputs, slots = laid_once(rows)
    ids, positions, keys = inputs["input_ids"][0], inputs["position_ids"][0], inputs.get("attention_mask")
    assert ("cu_seq_lens_q" in inputs) == (keys is None)
    for row, places in zip(rows, slots, strict=True):
        assert ids[places].tolist() == row
        assert positions[places].tolist() == [*range(len(row))]
        for place, slot in enumerate(places if isinstance(keys, KeyRanges) else ()):
            ranges = zip(keys.start[0, :, slot].tolist(), keys.end[0, :, slot].tolist())
            seen = [key for start, end in ranges for key in range(start, end)]
            assert sorted(seen) == sorted(places[: place + 1])


def test_groups_share_their_own_beginnings() -> None:
    parts = parts_of(ROWS)
    assert sum(part.last - part.first for part in parts) == 20 + 12 + 1 + 2 + 3 + 1 + 1 + 4
    assert [part.rows for part in parts if len(part.rows) > 1] == [(0, 1, 2, 3, 4, 5), (0, 1)]


def stirred() -> Any:
    """A fast model with our attention, moved away from its base; in float32 attention is by torch's products."""
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False))
    return model.train()


def trained_dataset(rows: list[list[int]], seed: int = 0) -> Dataset:
    """Rows that train half of their tokens, other ones of a common beginning in each row."""
    draw = random.Random(seed)
    labels = [[IGNORED, *(token if draw.random() < 0.5 else IGNORED for token in row[1:])] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def of_step(model: Any, rows: Dataset, layout: Layout, dtype: torch.dtype) -> list[torch.Tensor]:
    """The loss of a micro-batch and its gradients."""
    model = copy.deepcopy(model).to(dtype)
    attention.register()
    optimize_for_training(model)
    model.set_attn_implementation(attention.NAME)
    objective = Demonstrations(model=model, rows=rows, eval_rows=None, pad=0, size=len(rows), seed=0, layout=layout)
    batch = objective.collate(list(rows))
    loss = objective.loss(model, batch).sum / batch[KEY].targets
    return [loss.detach(), *torch.autograd.grad(loss, list(rw.adapter_parameters(model).values()))]


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_as_near_to_float64_as_those_of_rows_apart(
    rows: list[list[int]], dtype: torch.dtype
) -> None:
    model, data = stirred(), trained_dataset(rows)
    exact = of_step(model, data, "padded", torch.float64)
    shared, apart = (of_step(model, data, layout, dtype) for layout in ("shared", "flat"))
    assert_as_exact(shared, apart, exact, slack=1.5)


def test_the_counts_are_those_of_rows_apart() -> None:
    model, rows = stirred(), trained_dataset(ROWS)
    optimize_for_training(model)
    shared, flat = (
        Demonstrations(model=model, rows=rows, eval_rows=None, pad=0, size=len(rows), seed=0, layout=layout).collate(
            list(rows)
        )[KEY]
        for layout in ("shared", "flat")
    )
    assert (shared.targets, shared.tokens, shared.examples) == (flat.targets, flat.tokens, flat.examples)
    assert shared.wanted is not None


# --- runs ---


@pytest.fixture
def prompted(tmp_path: Path, settings: Any, tokenizer: Any) -> Callable[..., TrainSettings]:
    """Runs in bfloat16, in which rows are laid end to end, over rows with a beginning of 12 words."""

    def make(**changes: Any) -> TrainSettings:
        draw, file = random.Random(0), tmp_path / "rows.jsonl"
        lines = [
            {"prompt": " ".join([*WORDS[:12], *draw.sample(WORDS, 2)]) + " ", "completion": draw.choice(WORDS)}
            for _ in range(24)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if not (tmp_path / "wide").exists():
            # The native attention takes heads of 16.
            tiny_llama(head_dim=16).save_pretrained(tmp_path / "wide")
            tokenizer.save_pretrained(tmp_path / "wide")
        given = {
            "model": str(tmp_path / "wide"),
            "data": str(file),
            "eval_data": None,
            "eval_steps": None,
            "dtype": "bfloat16",
            "batch_size": 4,
        }
        usual = {"max_steps": 6, "logging_steps": 1, "products": "bfloat16", "target_modules": "all-linear"}
        return settings(**{**given, **usual, **changes})

    return make


def notes_of(given: TrainSettings) -> tuple[list[str], str]:
    told = Recorder()
    train(given, told)
    return [note for note in told.notes if "common beginning" in note], load_record(given.output).device["rows"]


needs_flat = pytest.mark.skipif(
    attention.obstacle(torch.bfloat16, torch.zeros(1), 16) is not None, reason="no native attention"
)


@needs_flat
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "laid once"),
        ({"share_prompts": "off"}, "laid in each: --share-prompts off"),
        ({"lora_dropout": 0.1}, "laid in each: dropout draws"),
        ({"lora_dropout": 0.1, "share_prompts": "on"}, "laid once"),
        ({"neftune_noise_alpha": 5.0}, "laid in each: NEFTune"),
        ({"fast": False}, "laid in each: the attention in use"),
    ],
    ids=str,
)
def test_a_run_says_how_common_beginnings_are_laid(changes: dict[str, Any], said: str, prompted: Any) -> None:
    (note,), _ = notes_of(prompted(**changes))
    assert note.startswith("common beginning: 12 tokens of 4 rows")
    assert said in note


@needs_flat
@pytest.mark.parametrize("changes", [{"packing": True}, {"neftune_noise_alpha": 5.0}, {"fast": False}], ids=str)
def test_what_cannot_be_shared_is_refused_where_it_was_asked(changes: dict[str, Any], prompted: Any) -> None:
    with pytest.raises(ConfigError, match="RW112.*--share-prompts on"):
        train(prompted(share_prompts="on", **changes))


@needs_flat
@pytest.mark.parametrize("max_length", [64, 10])
def test_a_run_computes_a_beginning_once_and_learns_the_same(
    max_length: int, prompted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are cut within their beginning."""
    tokens: dict[str, list[int]] = {"auto": [], "off": []}
    losses = {}
    real = Demonstrations.loss
    for name, seen in tokens.items():

        def noted(self: Any, model: Any, batch: Any, seen: list[int] = seen) -> Any:
            seen.append(batch["input_ids"].numel())
            return real(self, model, batch)

        monkeypatch.setattr(Demonstrations, "loss", noted)
        given = prompted(share_prompts=name, output=tmp_path / name, max_length=max_length)
        if max_length < 12:
            # Cut rows need no stop token if they are plain texts.
            rows = [json.loads(line) for line in Path(given.data).read_text(encoding="utf-8").splitlines()]
            texts = "".join(json.dumps({"text": row["prompt"]}) + "\n" for row in rows)
            Path(given.data).write_text(texts, encoding="utf-8")
        losses[name] = train(given).train_loss
    if max_length == 64:
        assert tokens["auto"] == [count - 3 * 12 for count in tokens["off"]]
    assert losses["auto"] == pytest.approx(losses["off"], rel=5e-3)


@needs_avx2
@pytest.mark.parametrize("level", ["avx2"], indirect=True)
def test_losses_in_float32_are_those_of_rows_apart(level: str, prompted: Any, tmp_path: Path) -> None:
    """By the native attention of AVX2, over several steps."""
    losses = []
    for name in ("auto", "off"):
        told = Recorder()
        given = prompted(dtype="float32", share_prompts=name, output=tmp_path / name)
        train(given, told)
        assert any(("laid once" in note) == (name == "auto") for note in told.notes if "common" in note)
        losses.append([line["loss"] for line in read_metrics(given.output)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@needs_flat
def test_a_stopped_run_resumes_to_the_same_bits(prompted: Any, tmp_path: Path) -> None:
    train(prompted(save_steps=2, output=tmp_path / "whole"))
    with pytest.raises(RankwiseError, match="RW540"):
        train(prompted(save_steps=2, output=tmp_path / "parted"), Recorder(stop_at=3))
    train(prompted(save_steps=2, output=tmp_path / "parted", resume=True))
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parted")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
