"""Learning from rewards: as trl with PEFT, on one model, resumable to the bit; whatever is wrong is one error."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_rows import WORDS, Recorder, storage_bytes
from transformers import PreTrainedTokenizerFast

import rankwise as rw
from rankwise.acceleration import optimize_for_training
from rankwise.adapters import adapter_parameters, add_adapter
from rankwise.data.encoding import RowEncoder
from rankwise.errors import Interrupted, RankwiseError
from rankwise.lora_config import LoraConfig
from rankwise.objectives import OBJECTIVES
from rankwise.records import load_record, read_metrics
from rankwise.training.batches import KEY, Batch, MicroBatch
from rankwise.training.grpo import Reward, RewardedAnswers
from rankwise.training.losses import advantages
from rankwise.training.objectives import Scoring
from rankwise.training.run import train
from tables import thinned
from tiny_models import tiny_llama

REWARDS = """
def many(completions, **kwargs):
    return [len(set(text.split())) / 8 for text in completions]

def none(completions, **kwargs):
    return [0.0 for _ in completions]

def wrong(completions, **kwargs):
    return [1.0]

def unscored(completions, **kwargs):
    return [None for _ in completions]
"""
WIDTH = 4
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def write_prompts(path: Path, count: int = 6) -> Path:
    rows = [{"prompt": f"{WORDS[7 * i % 90]} {WORDS[11 * i % 90]}", "answer": f"#### {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(tokenizer: PreTrainedTokenizerFast, count: int) -> tuple[list[str], Dataset]:
    """Prompts as text, and as rows."""
    prompts = [" ".join(WORDS[(7 * i + 3 * j) % 90] for j in range(2 + i % 3)) for i in range(count)]
    rows = [
        {"input_ids": tokenizer(prompt)["input_ids"], "asked": json.dumps({"prompt": prompt, "columns": {}})}
        for prompt in prompts
    ]
    return prompts, Dataset.from_list(rows)


def told(prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """In the place of generation: one to six tokens that depend on the prompt and on its turn."""
    seen: Counter[tuple[int, ...]] = Counter()
    answers = []
    for ids in map(tuple, prompt_ids):
        draw = random.Random(f"{ids} {seen[ids]}")
        answers.append([draw.randrange(4, 94) for _ in range(draw.randrange(0, 6))] + [2])
        seen[ids] += 1
    return answers


def count_words(completions: Sequence[str], **_: Any) -> list[float]:
    return [sum(int(word[1:]) for word in text.split()) % 7 / 7 for text in completions]


def objective_of(tokenizer: Any, *, fast: bool = True, flat: bool = False, **changed: Any) -> RewardedAnswers:
    """Two prompts a step, four answers to each, in two micro-batches."""
    model = changed.pop("model", None) or tiny_llama()
    torch.manual_seed(7)
    add_adapter(model, changed.pop("lora", LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)))
    if fast:
        optimize_for_training(model)
    return RewardedAnswers(
        scoring=Scoring(model, "flat" if flat else "padded", temperature=0.8),
        rows=asked(tokenizer, 6)[1],
        eval_rows=None,
        pad=0,
        decode=partial(tokenizer.batch_decode, skip_special_tokens=True),
        rewards=[Reward("count_words", "count_words", count_words)],
        weights=[1.0],
        stop_ids=frozenset({2}),
        size=WIDTH,
        asked=2,
        group=WIDTH,
        longest=6,
        seed=3,
        **changed,
    )


def theirs(tokenizer: Any, folder: Path, adapter: dict[str, torch.Tensor], **changed: Any) -> Any:
    """trl's trainer over PEFT's model with the same adapter."""
    import peft
    from trl import GRPOConfig, GRPOTrainer

    arguments = {
        "use_cpu": True,
        "per_device_train_batch_size": WIDTH,
        "gradient_accumulation_steps": 2,
        "num_generations": WIDTH,
        "max_completion_length": 6,
        "temperature": 0.8,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    trainer = GRPOTrainer(
        model=tiny_llama(),
        reward_funcs=count_words,
        args=GRPOConfig(str(folder), **arguments, **changed),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": asked(tokenizer, 6)[0]}),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    for key, value in adapter.items():
        trainer.model.get_parameter(key.replace(".weight", ".default.weight")).data.copy_(value)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    return trainer


def step_of(objective: RewardedAnswers) -> list[Batch]:
    batches = [objective.collate([objective.rows[row] for row in rows]) for rows in objective.order(0)[:2]]
    return objective.prepare(batches, 0)


@thinned(
    {
        "loss_type": OBJECTIVES["grpo"].losses,
        "beta": [0.2, 0.0],
        "fast,flat": [(True, True), (True, False), (False, False)],
    }
)
@pytest.mark.filterwarnings("ignore")
def test_losses_and_gradients_are_those_of_trl(
    fast: bool, flat: bool, beta: float, loss_type: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda _, ids, *__, **___: (told(ids), None))
    monkeypatch.setattr(RewardedAnswers, "written", lambda _, rows, *__: told([row["input_ids"] for row in rows]))
    mine = objective_of(tokenizer, fast=fast, flat=flat, loss_type=loss_type, beta=beta)
    model = mine.scoring.model.train()
    batches = step_of(mine)
    found = [mine.loss(model, batch) for batch in batches]
    targets = sum(batch[KEY].targets for batch in batches)
    loss = sum(one.sum for one in found) / targets
    loss.backward()
    adapter = adapter_parameters(model)

    other = theirs(tokenizer, tmp_path, adapter, loss_type=loss_type, beta=beta)
    prompts = asked(tokenizer, 6)[0]
    order = [row for rows in mine.order(0)[:2] for row in rows]
    whole = other._generate_and_score_completions([{"prompt": prompts[row]} for row in order])
    parts = split_tensor_dict(whole, 2)
    expected = sum(other._compute_loss(other.model, part) for part in parts)
    expected.backward()
    advantage = torch.cat([batch["advantages"] for batch in batches])
    torch.testing.assert_close(advantage, whole["advantages"], **TOLERANCE)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    for key, value in adapter.items():
        grad = other.model.get_parameter(key.replace(".weight", ".default.weight")).grad
        torch.testing.assert_close(value.grad, grad, **TOLERANCE)
    assert max(float(value.grad.abs().max()) for value in adapter.values()) > 1e-3
    figures, logged = batches[0]["figures"], other._metrics["train"]
    for ours, name in (("reward", "reward"), ("completion_tokens", "completions/mean_length")):
        total, weight = figures[ours]
        assert total / weight == pytest.approx(logged[name][-1], rel=1e-6)
    if beta:
        sums = [float(sum(one.figures["kl"][part] for one in found)) for part in (0, 1)]
        counts = [float(part["completion_mask"].sum()) for part in parts]
        mean = sum(kl * count for kl, count in zip(logged["kl"], counts, strict=True)) / sum(counts)
        assert sums[0] / sums[1] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5)])
def test_answers_without_a_score_teach_nothing(weights: tuple[float, float], tokenizer: Any) -> None:
    """As in trl, where each reward scores some of the answers only."""
    from trl.trainer.utils import nanstd

    nan, objective = math.nan, objective_of(tokenizer)
    objective.weights = weights
    rewards = objective._weighted(
        [[1.0, nan], [nan, 3.0], [nan, nan], [0.5, 2.0], [nan, nan], [nan, nan], [nan, nan], [1, nan]]
    )
    torch.testing.assert_close(rewards[:2], torch.tensor([weights[0], 3 * weights[1]]))
    groups = rewards.view(2, WIDTH)
    expected = (groups - groups.nanmean(1, keepdim=True)) / (nanstd(groups, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(advantages(rewards, WIDTH), expected.nan_to_num().flatten())
    assert advantages(rewards, WIDTH)[[2, 4, 5, 6, 7]].tolist() == [0] * 5


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_no_second_base_appears(four_bit: bool, tokenizer: Any) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=64)
    if four_bit:
        rw.quantize(model, rw.Nf4Config())
    # Others' models may still be alive.
    before = storage_bytes()
    objective = objective_of(tokenizer, model=model, lora=LoraConfig(r=1, init_lora_weights=False), beta=0.2)
    for batch in step_of(objective):
        objective.loss(model, batch).sum.backward()
    adapter = sum(value.nbytes for value in adapter_parameters(model).values())
    assert storage_bytes() - before - adapter < 0.02 * sum(value.nbytes for value in model.parameters())


@pytest.mark.parametrize(
    "changed",
    [
        {"lora": LoraConfig(r=4, use_dora=True, lora_dropout=0.1, init_lora_weights=False)},
        {"flat": True},
        {"fast": False},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_it_writes_and_learns_in_turn(changed: dict[str, Any], tokenizer: Any) -> None:
    """What generation leaves behind in layers must not keep gradients away."""
    objective = objective_of(tokenizer, beta=0.2, **changed)
    model = objective.scoring.model.train()
    for _ in range(2):
        for batch in step_of(objective):
            objective.loss(model, batch).sum.backward()
        assert model.training
        assert all(value.grad.any() for value in adapter_parameters(model).values())
        model.zero_grad()


# --- whole runs ---


@pytest.fixture
def rewarded(settings: Any, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Any:
        (tmp_path / "rewards.py").write_text(REWARDS)
        given = {
            "objective": "grpo",
            "data": str(write_prompts(tmp_path / "prompts.jsonl")),
            "eval_data": None,
            "eval_steps": None,
            "save_steps": 2,
            "reward": [f"{tmp_path}/rewards.py:many"],
            "num_generations": 4,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "max_completion_length": 8,
            "max_steps": 6,
            "beta": 0.05,
        }
        return settings(**{**given, **changes})

    return make


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["lora", "qdora"])
def test_an_interrupted_run_goes_on_to_the_same_bits(method: str, rewarded: Any, tmp_path: Path) -> None:
    """Past the end of an epoch, whose prompts are shuffled anew; what is drawn for answers too."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    given = {"method": method, "lora_dropout": 0.1, "logging_steps": 1}
    train(rewarded(output=straight, **given))
    with pytest.raises(Interrupted):
        train(rewarded(output=stopped, **given), Recorder(stop_at=5))
    train(rewarded(output=stopped, **given, resume=True))
    assert adapter_of(straight) == adapter_of(stopped)
    lines = [[line["reward"] for line in read_metrics(folder) if "reward" in line] for folder in (straight, stopped)]
    assert lines[0] == lines[1]


def test_a_run_says_what_it_was_rewarded_for(rewarded: Any, tmp_path: Path) -> None:
    watcher = Recorder()
    specs = [f"{tmp_path}/rewards.py:many", "length=4"]
    record = train(rewarded(reward=specs, reward_weights=[1.0, 0.5], logging_steps=1), watcher)
    assert record.status == "finished"
    assert load_record(tmp_path / "run").objective == "grpo"
    assert record.data["train"]["rewards_sha256"]
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(lines) == 6
    for line in lines:
        assert line["reward"] == pytest.approx(line["reward_many"] + 0.5 * line["reward_length"], abs=1e-5)
        assert {"kl", "equal_rewards", "completion_tokens", "cut_completions"} <= line.keys()
    assert [info.figures["reward"] for info in watcher.steps] == pytest.approx([line["reward"] for line in lines])
    assert record.examples_per_second


def test_evaluations_give_the_reward_of_greedy_answers(rewarded: Any, tmp_path: Path) -> None:
    held_out = str(write_prompts(tmp_path / "held-out.jsonl", 5))
    given = {"reward": [f"{tmp_path}/rewards.py:many", "length=4"], "reward_weights": [1.0, 0.5]}
    record = train(rewarded(eval_data=held_out, eval_steps=3, save_steps=None, **given))
    evaluations = [line for line in read_metrics(tmp_path / "run") if line.get("eval_loss") is not None]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    for line in evaluations:
        assert line["eval_reward"] == pytest.approx(-line["eval_loss"])
        assert line["eval_reward"] == pytest.approx(line["eval_reward_many"] + 0.5 * line["eval_reward_length"])
    best = min(evaluations[1:], key=lambda line: line["eval_loss"])
    assert record.kept_step == best["step"]
    assert record.kept_because == "highest reward of 2 evaluations"
    plain = tmp_path / "plain"
    train(rewarded(output=plain))
    train(rewarded(output=tmp_path / "watched", eval_data=held_out, eval_steps=2))
    rewards = [[x["reward"] for x in read_metrics(f) if "reward" in x] for f in (plain, tmp_path / "watched")]
    assert rewards[0] == rewards[1], "evaluations may not change a run"


def test_the_plan_knows_how_many_answers_an_evaluation_writes(rewarded: Any) -> None:
    """One to each prompt, though a step writes fewer; of many at most those that are written together."""
    prompts = {"input_ids": [[1] * count for count in (3, 5, 4)]}

    def largest(rows: Dataset | None) -> MicroBatch | None:
        objective: Any = RewardedAnswers.__new__(RewardedAnswers)
        objective.scoring = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")))
        objective.eval_rows, objective.longest = rows, 6
        return RewardedAnswers.largest_evaluation(objective)

    assert largest(Dataset.from_dict(prompts)) == MicroBatch(3, 11, 6 / 11)
    assert largest(Dataset.from_dict({"input_ids": 50 * prompts["input_ids"]})) == MicroBatch(64, 11, 6 / 11)
    assert largest(None) is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no reward": ({"reward": None}, "RW770"),
    "an unknown reward": ({"reward": ["correct"]}, "RW770"),
    "a function that is not there": ({"reward": ["FILE:absent"]}, "RW771"),
    "a wrong count": ({"reward": ["FILE:wrong"]}, "RW774"),
    "no score at all": ({"reward": ["FILE:unscored"]}, "RW774"),
    "answers of one prompt in two steps": ({"num_generations": 3}, "RW112"),
    "more weights than rewards": ({"reward_weights": [1.0, 2.0]}, "RW112"),
    "no room for prompts": ({"max_completion_length": 16}, "RW112"),
    "fewer prompts than a step asks": ({"batch_size": 32}, "RW775"),
    "a reference for full fine-tuning": ({"method": "full"}, "RW112"),
    "no prompt that fits": ({"max_completion_length": 15}, "RW214"),
    "an unknown loss": ({"loss_type": "sigmoid"}, "RW763"),
    "an option of another objective": ({"packing": True}, "RW112"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_error(case: str, rewarded: Any, tmp_path: Path) -> None:
    changes, code = BAD[case]
    if changes.get("reward"):
        changes = {"reward": [spec.replace("FILE", f"{tmp_path}/rewards.py") for spec in changes["reward"]]}
    with pytest.raises(RankwiseError) as caught:
        train(rewarded(**changes))
    assert caught.value.code == code


def test_another_reward_does_not_continue_a_run(rewarded: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(rewarded(), Recorder(stop_at=2))
    given = rewarded(resume=True)
    (tmp_path / "rewards.py").write_text(REWARDS.replace("/ 8", "/ 9"))
    with pytest.raises(RankwiseError, match="--reward") as caught:
        train(given)
    assert caught.value.code == "RW508"


@pytest.mark.parametrize(("steps", "warnings"), [(2, 0), (11, 1)])
def test_rewards_that_are_all_equal_are_said(steps: int, warnings: int, rewarded: Any, tmp_path: Path) -> None:
    """After some steps."""
    watcher = Recorder()
    train(rewarded(reward=[f"{tmp_path}/rewards.py:none"], max_steps=steps, beta=None), watcher)
    assert watcher.warnings.count("RW778") == warnings
    assert all(info.grad_norm == 0 for info in watcher.steps)


def test_rewards_before_a_stop_are_not_called_equal(rewarded: Any, tmp_path: Path) -> None:
    """They differ until the file ``learned`` is there, as it is once the run is resumed."""
    text = "import pathlib\ndef once(completions, **_):\n    factor = 1 - pathlib.Path(LEARNED).exists()\n"
    text += "    return [factor * place for place, _ in enumerate(completions)]"
    (tmp_path / "once.py").write_text(text.replace("LEARNED", repr(str(tmp_path / "learned"))))
    given = rewarded(reward=[f"{tmp_path}/once.py:once"], max_steps=11, beta=None)
    with pytest.raises(Interrupted):
        train(given, Recorder(stop_at=2))
    (tmp_path / "learned").touch()
    watcher = Recorder()
    train(given.model_copy(update={"resume": True}), watcher)
    assert "RW778" not in watcher.warnings


def test_prompts_are_written_as_in_training(rewarded: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Messages and texts, with the right answer where the data hold one."""
    from rankwise.data import read_rows
    from rankwise.data.objectives import PROMPTS

    layouts: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": "w1 w2", "completion": "w3"},
        "question": {"question": "w1 w2", "answer": "w3"},
        "instruction": {"instruction": "w1", "input": "w2", "output": "w3"},
        "alone": {"prompt": "w1 w2", "solution": "w3", "level": 2},
    }
    for name, row in layouts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        asked_rows, trained_rows = read_rows(path, formats=PROMPTS), None
        columns = asked_rows[0].columns
        assert columns is not None
        assert columns.get("answer", columns.get("solution")) == "w3"
        if name == "alone":
            assert columns["level"] == 2
            continue
        trained_rows = read_rows(path)
        ids = [RowEncoder(rows, tokenizer, None).encode([rows[0]])[0] for rows in (asked_rows, trained_rows)]
        prompts = [row.ids[: row.trained.index(True)] for row in ids]
        assert prompts[0] == prompts[1]


def test_conversations_end_before_the_answer(tmp_path: Path) -> None:
    from rankwise.data import read_rows
    from rankwise.data.objectives import PROMPTS

    user, assistant = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}
    path = tmp_path / "chat.jsonl"
    answered = {"answer": "w3"}
    for row in ({"messages": [user, assistant]}, {"messages": [user], **answered}, {"prompt": [user], **answered}):
        path.write_text(json.dumps(row) + "\n")
        [found] = read_rows(path, formats=PROMPTS)
        assert found.columns is not None
        assert found.columns["answer"] == "w3"
        assert found.messages[: found.first_trained] == (user,)
    path.write_text(json.dumps({"messages": [assistant]}) + "\n")
    with pytest.raises(RankwiseError) as caught:
        read_rows(path, formats=PROMPTS)
    assert caught.value.code == "RW203"


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("q", "a"), {"q": "2+2", "a": 4, "answer": "4"}),
        (("q", "gone"), "RW207: asked.jsonl has the columns"),
        ((None, "a"), "RW207: --completion-column goes with --prompt-column"),
    ],
)
def test_a_named_completion_is_the_right_answer(columns: Any, found: Any, tmp_path: Path) -> None:
    from rankwise.data import read_rows
    from rankwise.data.objectives import prompt_formats

    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"q": "2+2", "a": 4, "answer": "of another question"}))
    if isinstance(found, dict):
        [row] = read_rows(path, formats=prompt_formats(*columns))
        assert row.columns == found
    else:
        with pytest.raises(RankwiseError, match=found):
            read_rows(path, formats=prompt_formats(*columns))


def test_a_continued_adapter_is_its_own_reference(settings: Any, rewarded: Any, tmp_path: Path) -> None:
    sft = tmp_path / "sft"
    train(settings(output=sft, eval_data=None, eval_steps=None))
    train(rewarded(adapter=str(sft), beta=0.1, logging_steps=1))
    kl = [line["kl"] for line in read_metrics(tmp_path / "run") if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-4
