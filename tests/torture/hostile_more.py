"""More readers of `hostile.py`: reward files, and what verbs read of folders that other verbs have written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_reader import Draw, Reader, damaged

from damage import cut, damaged_json, damaged_lines, damaged_safetensors, damaged_yaml, with_another_byte
from data.tiny_tokenizers import CHATML, byte_tokenizer
from rankwise.cli.conversations import read_conversations
from rankwise.cli.settings import ExportSettings, GenerateSettings, MergeSettings
from rankwise.comparison import stages
from rankwise.comparison.matrix import Cell
from rankwise.comparison.settings import CompareSettings
from rankwise.data import rows_from_records
from rankwise.data.encoded_cache import encode_rows_once
from rankwise.evaluation.journal import Journal
from rankwise.evaluation.judge import JudgeCache
from rankwise.evaluation.loading import template_of
from rankwise.evaluation.record import Example, TaskResult, load_result
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.options import Settings
from rankwise.planning import calibration
from rankwise.planning.settings import PlanSettings
from rankwise.records import RunRecord
from rankwise.reports.board import find, overview, run_panels
from rankwise.settings_file import read_settings
from rankwise.training.objectives.rewards import read_rewards

Write = Callable[[Draw, Path], None]


def more_readers(folder: Path) -> dict[str, Reader]:
    return {
        "rewards": Reader(write_reward, read_reward),
        "other settings": Reader(write_settings, read_other_settings),
        "conversations": Reader(write_conversations, read_given),
        **_of_evaluations(),
        **_of_runs(folder),
    }


# --- rewards: the file is code by design, and what it does wrong is what a user does wrong ---

BODIES = (
    *("return [1.0 for _ in completions]", "return [1 / 0]", "yield from (1.0 for _ in completions)", "yield 1 / 0"),
    *("return float('nan')", "return [10 ** 400] * len(completions)", "return {'a': 1}", "return None", "return 3.0"),
    *("raise SystemExit", "raise SystemExit(0)", "raise Odd", "return [Odd()] * len(completions)", "return 'abc'"),
    *("return [[1.0]] * len(completions)", "return [True, None, '2.5'][: len(completions)]", "return prompts"),
    *("return [torch.ones(2)] * 3", "return torch.ones(3)", "return [float('inf')] * 3", "assert False"),
    *(
        "return itertools.count()",
        "return f(completions)",
        "import no_such_module",
        "return completions[9]",
        "return [object()] * 3",
    ),
    *("return ['nan'] * 3", "raise ValueError('\\n\\n')", "return [b'1'] * 3", "return iter([1, 2, 3])"),
)
PARAMETERS = ("completions, **kwargs", "completions", "prompts, completions", "**kwargs", "*given", "completions, /")
PARAMETERS += ("completions, other", "", "completions=None, completion_ids=(), **kwargs")
STARTS = (
    *("", "import no_such_module", "raise SystemExit(3)", "raise KeyError('x')", "def (", "1 / 0", "\0", "\xff"),
    *("# -*- coding: klingon -*-", "x = '\\ud800'", "(" * 300, "def __getattr__(name): raise ValueError(name)"),
    *("__spec__ = None", "del __name__", "import sys; sys.modules[__name__] = None", "f = max", "f = int", "f = 3"),
    *("from __future__ import braces", "return", "from . import x", "class f: pass", "async def f(completions): 1 / 0"),
)
SPECS = ("{}:g", "{}:", ":f", "{}:__class__", "{}:f.g", "{}x:f", "{}", "missing.py:f")
SPECS += ("answer", "format=(", "format=", "format=a{{99999999999}}", "length=0", "length=-1", "length=" + "9" * 5000)
SPECS += ("length=٣", "length=²", "answer=3", "=", "", "format=(?P<a>x)(?P<a>y)", "{}:f:f", "\ud800.py:f", "\0.py:f")


def write_reward(draw: Draw, place: Path) -> None:
    start = draw.choice(STARTS) if draw.random() < 0.3 else ""
    kind = draw.choice(["def", "def", "def", "async def"])
    function = f"{kind} f({draw.choice(PARAMETERS)}):\n    {draw.choice(BODIES)}\n"
    odd = "class Odd(Exception):\n    def __str__(self): raise ValueError('no text')\n"
    content = f"import itertools, torch\n{odd}{start}\n{function}".encode()
    if start == "\xff":
        content = content.replace("\xff".encode(), b"\xff")
    if draw.random() < 0.1:
        content = draw.choice([cut, with_another_byte])(draw, content)
    (place / "reward.py").write_bytes(content)
    spec = ("{}:f" if draw.random() < 0.6 else draw.choice(SPECS)).format(place / "reward.py")
    (place / "spec.json").write_text(json.dumps([spec, *(["length=4"] if draw.random() < 0.2 else [])]))


def read_reward(place: Path) -> None:
    given: dict[str, Any] = {"prompts": ["p", "q", "r"], "completions": ["a", "b 7", "c"]}
    given |= {"completion_ids": [[1], [2, 3], []], "answer": ["1", "#### 7", "8"], "trainer_state": object()}
    for reward in read_rewards(json.loads((place / "spec.json").read_text())):
        values = reward(**given)
        assert len(values) == 3
        assert all(value is None or isinstance(value, float) for value in values)


# --- settings and prompts ---

SETTINGS: dict[str, tuple[type[Settings], dict[str, object]]] = {
    "compare": (CompareSettings, {"model": "m", "data": "d", "methods": "lora,dora", "learning-rates": "1e-4,2e-4"}),
    "evaluate": (EvaluateSettings, {"adapter": "[a, b]", "task": "perplexity", "batch-size": 4, "data": "rows.jsonl"}),
    "export": (ExportSettings, {"adapter": "a", "for": "vllm", "rank": 4}),
    "generate": (GenerateSettings, {"adapter": "a", "prompt": "x", "temperature": 0.5, "stop": "[a]"}),
    "merge": (MergeSettings, {"adapter": "[a, b]", "weights": "[0.5, 0.5]", "combine": "linear"}),
    "plan": (PlanSettings, {"model": "m", "memory": "16GB", "method": "qlora", "max-length": 512}),
}


def write_settings(draw: Draw, place: Path) -> None:
    verb = draw.choice(sorted(SETTINGS))
    content = "".join(f"{key}: {value}\n" for key, value in SETTINGS[verb][1].items()).encode()
    damaged(content, f"{verb}.yaml", damaged_yaml)(draw, place)


def read_other_settings(place: Path) -> None:
    path = next(place.iterdir())
    kind = SETTINGS[path.stem][0]
    read_settings(kind, path, {"output": place / "out"} if "output" in kind.model_fields else {})


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "p"}]
ASKED: tuple[Any, ...] = (
    MESSAGES,
    {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"prompt": "q"},
    "text",
)


def write_conversations(draw: Draw, place: Path) -> None:
    asked = draw.choice(ASKED)
    if draw.random() < 0.5:
        content = damaged_lines(draw, b"".join(json.dumps(asked).encode() + b"\n" for _ in range(3)))
        name = "asked.jsonl"
    else:
        content, name = damaged_json(draw, json.dumps([asked, asked]).encode()), "asked.json"
    (place / f"{draw.choice(['messages', 'prompts'])}.{name}").write_bytes(content)


def read_given(place: Path) -> None:
    path = next(place.iterdir())
    option = "messages" if path.name.startswith("messages") else "prompt_file"
    read_conversations(GenerateSettings.model_validate({"adapter": place, option: path, "system": "s"}))


# --- what an evaluation leaves ---


def _of_evaluations() -> dict[str, Reader]:
    numbers = {"metrics": {"loss": 1.5}, "higher_is_better": {"loss": False}, "standard_errors": {"loss": 0.1}}
    whole = {"task": "perplexity", "model": "m", "adapter": "a", "primary": "loss", "count": 2, "wall_seconds": 1.0}
    versions = {"settings": {"batch_size": 4}, "data_sha256": "0" * 64, "versions": {"torch": "2"}}
    result = json.dumps(TaskResult(**{**whole, **numbers, **versions}).to_json()).encode()
    example = Example("1", "q", "a", {"loss": 1.5, "tokens": 3}, ["a"], "text 1", {"likelihoods": [0.5, -1.0]})
    lines = (json.dumps(example.to_json()).encode() + b"\n") * 3
    reply = b'{"key": "0", "reply": "7"}\n' * 3
    return {
        "results": Reader(damaged(result, "result.json", damaged_json), load_result),
        "predictions": Reader(damaged(lines, "predictions.jsonl", damaged_lines), Journal),
        "judge's replies": Reader(
            damaged(reply, "replies.jsonl", damaged_lines), lambda place: JudgeCache(place / "replies.jsonl")
        ),
    }


# --- what runs and comparisons leave, and caches ---


def _of_runs(folder: Path) -> dict[str, Reader]:
    known: dict[str, Any] = {"settings": {"model": "m", "max_steps": 4, "chat_template": "t.jinja"}}
    known |= {"data": {"train": {"rows": 3, "source": "d"}}, "device": {"type": "cpu"}, "status": "running"}
    known |= {"predicted_peak_memory_bytes": 10**9, "warnings": [{"code": "RW1", "message": "x"}]}
    record = json.dumps(RunRecord("lora", 0, **known).to_json()).encode()
    facts = {"train_seconds": 1.0, "tokens_per_second": 9.0, "peak_memory_bytes": 10**8, "grad_norm": 1.0}
    steps = [{"step": n, "loss": 1.5, "sample": "x", "b_norm": 0.1, **facts} for n in range(1, 4)]
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in [*steps, {"step": 3, "eval_loss": 1.4}])
    config = json.dumps({"chat_template": CHATML, "model_max_length": 10**30}).encode()
    job = stages.Job("train", Cell("lora", 1e-4, 0))
    error = {"code": "RW530", "message": "x"}
    outcome = {"status": "failed", "seconds": 1.5, "error": error, "again": False, "cannot_run": True}
    machine = {"methods": {"lora": {"flops_per_second": 1e9}}, "date": "today", "threads": 2, "torch": "2"}
    timings = json.dumps({"schema": calibration.SCHEMA, "machines": {"cpu, float32": machine}}).encode()
    rows = rows_from_records([(1, {"prompt": "q", "completion": "a"})], "rows.jsonl")
    tokenizer = byte_tokenizer()

    def cached(place: Path) -> object:
        return encode_rows_once(rows, tokenizer, cache=place, max_length=64, chat_template=None, name="train")

    (folder / "cache").mkdir()
    cached(folder / "cache")
    (stored,) = (folder / "cache").iterdir()
    encoded = stored.read_bytes()

    def board(draw: Draw, place: Path) -> None:
        (place / "run").mkdir()
        (place / "run" / "run.json").write_bytes(record)
        (place / "run" / "metrics.jsonl").write_bytes(lines)
        if draw.random() < 0.5:
            damaged(record, "run.json", damaged_json)(draw, place / "run")
        else:
            damaged(lines, "metrics.jsonl", damaged_lines)(draw, place / "run")

    def show(place: Path) -> None:
        runs, _ = find(place)
        run_panels(runs)
        overview(runs)

    def template(draw: Draw, place: Path) -> None:
        (place / "run.json").write_bytes(record)
        if draw.random() < 0.6:
            damaged(config, "tokenizer_config.json", damaged_json, with_another_byte)(draw, place)
        else:
            damaged(CHATML.encode(), "chat_template.jinja", cut, with_another_byte)(draw, place)

    def step(draw: Draw, place: Path) -> None:
        path = stages.beside(job.name(place), ".json")
        path.parent.mkdir()
        damaged(json.dumps(outcome).encode(), path.name, damaged_json)(draw, path.parent)

    def timing(draw: Draw, place: Path) -> None:
        (place / "rankwise").mkdir()
        damaged(timings, calibration.FILE, damaged_json)(draw, place / "rankwise")

    def read_timing(place: Path) -> None:
        os.environ["XDG_CACHE_HOME"] = str(place)
        # What `measured_pace` reads whatever the machine.
        calibration._read()

    return {
        "board": Reader(board, show, share=0.2),
        "run's template": Reader(template, lambda place: template_of([place])),
        "outcomes": Reader(step, lambda place: stages.outcome_of(job, place)),
        "encoded rows": Reader(damaged(encoded, stored.name, damaged_safetensors), cached, share=0.1),
        "timings": Reader(timing, read_timing),
    }
