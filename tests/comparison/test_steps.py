"""What a comparison prepares for all runs, and what it measures of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankwise.comparison import steps
from rankwise.comparison.steps import measure, prepare_steps
from tiny_models import tiny_llama

ROWS = [{"prompt": f"{n} and", "completion": f"{n % 3} so"} for n in range(5)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    words = ["<pad>", "<s>", "</s>", "and", "so", *map(str, range(10))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<s>")
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def job(tmp_path: Path, base: Path, method: str | None, **changes: Any) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    nothing = dict.fromkeys(
        (
            "revision",
            "beta",
            "retain",
            "eval_limit",
            "prompt_column",
            "completion_column",
            "chat_template",
            "task_limit",
        )
    )
    found = {"folder": str(tmp_path / str(method)), "model": str(base), "cache": str(tmp_path / "cache")}
    found |= {"eval_data": str(rows), "dtype": "float32", "device": "cpu", "objective": "sft", "max_length": 32}
    more = {"method": method, "trust_remote_code": False, "tasks": [], "task_data": []}
    return {**found, **nothing, **more, **changes}


def test_of_the_base_there_is_its_evaluation_alone(tmp_path: Path, base: Path) -> None:
    measure(job(tmp_path, base, None))
    lines = (tmp_path / "None" / "evaluation" / "perplexity" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(ROWS)


def test_what_must_stay_is_measured_of_the_base_of_preferences_too(tmp_path: Path, base: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "1 and", "chosen": "2 so", "rejected": answer} for answer in ("3", "4")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"objective": "dpo", "eval_data": str(pairs), "retain": str(tmp_path / "rows.jsonl"), "eval_limit": 3}
    measure(job(tmp_path, base, None, **changes))
    place = tmp_path / "None" / "evaluation"
    assert [path.name for path in place.iterdir()] == ["retained"]
    assert len((place / "retained" / "predictions.jsonl").read_text().splitlines()) == 3


def test_each_kind_of_base_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(steps, "fetch_model", lambda *_, **__: None)
    monkeypatch.setattr(steps, "needs_preparation", lambda source, quantization: quantization is not None)
    monkeypatch.setattr(steps, "load_for_training", lambda base, source: loaded.append(base.method))
    common = {"model": "demo", "data": "rows.jsonl", "output": "out", "objective": "sft"}
    prepare_steps({"runs": [{**common, "method": method} for method in ("lora", "dora", "qlora", "qdora", "full")]})
    assert loaded == ["qlora"]
