"""``--objective grpo`` on the command line: prompts are shown, answered and rewarded; what is refused has a reason."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from rankwise.records import load_record, read_metrics

OPTIONS = ["--objective", "grpo", "--method", "lora", "--r", 2, "--max-steps", 2, "--batch-size", 4, "--device", "cpu"]
OPTIONS += ["--num-generations", 2, "--max-completion-length", 6, "--max-length", 96, "--learning-rate", 0.01]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1} #### {n + 1}"}
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(rankwise, model_folder, prompts, tmp_path):
    def call(*more):
        return rankwise(
            "train", "--model", model_folder, "--data", prompts, "--output", tmp_path / "run", *OPTIONS, *more
        )

    return call


def test_a_prompt_is_shown_up_to_the_answer(rankwise, model_folder, prompts):
    command = ("preview", "--objective", "grpo", "--model", model_folder, "--data", prompts, "--max-length", 64)
    done = rankwise(*command, "--row", 3, "--max-completion-length", 8)
    assert done.code == 0, done.stderr
    assert "user: What is 3 + 1?" in done.stdout
    assert done.stdout.rstrip().endswith("assistant:")
    assert "[[" not in done.stdout
    assert "the answer is the model's" in done.stdout
    assert "8 rows" in done.stdout


def test_a_run_shows_its_rewards(train, tmp_path):
    done = train("--reward", "answer", "--reward", "length=3", "--reward", "format=\\d", "--beta", 0.1)
    assert done.code == 0, done.stderr
    assert "reward " in done.stdout
    assert "KL " in done.stdout
    assert "answer tokens " in done.stdout
    assert "on the training prompts" in done.stdout
    record = load_record(tmp_path / "run")
    assert record.objective == "grpo"
    assert record.settings["reward"] == ["answer", "length=3", "format=\\d"]
    assert record.predicted_peak_memory_bytes
    card = (tmp_path / "run" / "README.md").read_text()
    assert "format=\\\\d" in card


def test_a_resumed_run_takes_no_python_file_from_its_folder(train, rankwise, tmp_path):
    """A run folder may come from elsewhere; code runs on explicit request alone."""
    (tmp_path / "rewards.py").write_text("def short(completions):\n    return [-len(text) for text in completions]\n")
    given = ("--reward", f"{tmp_path}/rewards.py:short")
    done = train(*given)
    assert done.code == 0, done.stderr
    resume = ("train", "--resume", "--output", tmp_path / "run", "--max-steps", 3)
    refused = rankwise(*resume)
    assert refused.code == 2
    assert "RW770" in refused.stderr
    assert "pass it again" in refused.stderr
    done = rankwise(*resume, *given)
    assert done.code == 0, done.stderr
    assert load_record(tmp_path / "run").steps == 3
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["--use-vllm"], "RW120", ["no such option: --use-vllm"]),
        (["--reward", "none.py:right"], "RW771", ["no file none.py"]),
        (["--reward", "answer", "--temperature", 0], "RW103", ["temperature"]),
        (["--reward", "answer", "--objective", "sft"], "RW112", ["--reward", "--num-generations"]),
    ],
)
def test_what_is_refused_has_a_reason(train, given, code, words):
    done = train(*given)
    assert done.code == 2
    assert code in done.stderr
    assert all(word in " ".join(done.stderr.split()) for word in words)


FIGURES = ("loss", "reward", "reward_length", "kl", "entropy", "completion_tokens", "eval_reward", "tokens")


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("bnpo", marks=pytest.mark.long)])
def test_two_processes_answer_and_learn_as_one_does(loss_type, several, model_folder, prompts, tmp_path):
    """Groups of four over processes of two rows, epochs of four steps, evaluations of an odd number of prompts."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(prompts.read_text().splitlines(keepends=True)[:5]))
    given = ["train", "--model", model_folder, "--data", prompts, "--eval-data", held_out, "--eval-steps", 3, *OPTIONS]
    given += ["--reward", "length=4", "--reward", r"format=\d", "--beta", 0.1, "--num-generations", 4]
    given += ["--gradient-accumulation", 2, "--max-steps", 6, "--logging-steps", 1, "--dtype", "float32"]
    given += ["--lr-scheduler-type", "constant", "--ignore-plan", "--loss-type", loss_type]
    folders = tmp_path / "one", tmp_path / "two"
    for count, folder in enumerate(folders, 1):
        done = several.run(count, [*given, "--batch-size", 4 // count, "--output", folder])
        assert done.codes == [0] * count, done.stderr
    one, two = map(list, map(read_metrics, folders))
    for name in FIGURES:
        expected, found = ([line[name] for line in lines if name in line] for lines in (one, two))
        assert len(expected) == 3 if name == "eval_reward" else 6
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert len({line["completion_tokens"] for line in one if "loss" in line}) > 1
    learnt = [safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders]
    for name, value in learnt[0].items():
        torch.testing.assert_close(learnt[1][name], value, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--strategy", "fsdp"], "RW112: --objective grpo does not go with --strategy fsdp"),
        (["--num-generations", 3], "RW112: A step has --batch-size 4 x --gradient-accumulation 1 x 2 processes = 8"),
    ],
)
def test_what_several_processes_cannot_learn_is_refused(given, words, several, model_folder, prompts, tmp_path):
    command = ["train", "--model", model_folder, "--data", prompts, "--output", tmp_path / "run", *OPTIONS]
    done = several.run(2, [*command, "--reward", "answer", *given])
    assert 0 not in done.codes
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_what_does_not_train_is_not_planned(rankwise, model_folder):
    command = ("plan", "--model", model_folder, "--memory", "24GB", "--objective", "grpo", "--devices", 2)
    command = (*command, "--method", "lora")
    assert rankwise(*command, "--strategy", "ddp").code == 0
    refused = rankwise(*command, "--strategy", "fsdp")
    assert refused.code == 2
    assert "RW112: --objective grpo does not go with --strategy fsdp" in " ".join(refused.stderr.split())


def test_the_plan_counts_the_answers(rankwise, model_folder):
    """With few activations, keys and values of many answers are the most that a step holds."""
    command = ["plan", "--model", model_folder, "--method", "lora", "--memory", "24GB", "--max-length", 512, "--json"]
    command += ["--batch-size", 1, "--gradient-accumulation", 64, "--gradient-checkpointing"]
    plain, written = (rankwise(*command, "--objective", objective).document for objective in ("sft", "grpo"))
    peaks = [document["methods"]["lora"]["peak_bytes"] for document in (plain, written)]
    # Two layers of two heads of 8, keys and values, in 16 bits.
    assert peaks[1] - peaks[0] > 0.5 * 64 * 512 * (2 * 2 * 2 * 8) * 2
    assert written["methods"]["lora"]["phase"] == "generation"
    assert written["command"].endswith("--data D --reward R --output O")
