"""Commands on a disk that fails. `test_disk_faults` runs this file under a preloaded `failing_disk.c`.

    LD_PRELOAD=failing_disk.so python disk_cases.py FOLDER COMMAND:ERROR:STRIDE...

ERROR is a name of errno, `short` for half of a write, or SIGKILL.

Each command is called with its first failing call at 1, 1 + STRIDE, ... while it has so many, or from a later call on
with COMMAND:ERROR:STRIDE:FIRST. Prints what went wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from in_process import steps_in_this_process
from rankwise.cli.main import main
from rankwise.training.checkpoints import check_checkpoint, list_checkpoints
from tiny_models import tiny_llama

REWARD = "def right(completions, **kwargs):\n    return [float(len(text) % 2) for text in completions]\n"
ANSWERS = ("--max-completion-length", 4, "--num-generations", 2)
LASTING = {"ENOSPC", "EDQUOT", "EROFS", "EMFILE"}
# A full disk stays full; what the device failed to do once may work the next time.


class Cases:
    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "made" / "out"
        self.output.parent.mkdir(exist_ok=True)
        self.words = [f"w{index}" for index in range(90)]
        self.library = ctypes.CDLL(None)
        self.error = "ENOSPC"
        self.problems: list[str] = []
        # The record of the run that was there before the command was called.
        self.old_record = b""

    def call(self, words: Sequence[object], fail_at: int = 0) -> tuple[int, str]:
        """Exit code and stderr; ``fail_at`` 0 fails nothing."""
        if fail_at and self.error == "SIGKILL":
            return self.killed(words, fail_at), ""
        said = io.StringIO()
        if fail_at:
            below, last = f"{self.folder}/made/", int(self.error in LASTING)
            self.library.disk_fail(below.encode(), fail_at, getattr(errno, self.error, 0), last)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main([str(word) for word in words])
        finally:
            if fail_at:
                self.seen = self.library.disk_calls()
                self.library.disk_fail(b"", 0, 0, 0)
        return code, said.getvalue()

    def killed(self, words: Sequence[object], at_call: int) -> int:
        """The exit code of a process that is killed at that call, or 0 where it has fewer."""
        child = os.fork()
        if not child:
            self.library.disk_fail(f"{self.folder}/made/".encode(), at_call, -signal.SIGKILL, 0)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os._exit(main([str(word) for word in words]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.seen = at_call if code else at_call - 1
        return code

    def prepare_base(self) -> None:
        """A model of one layer, its tokenizer, and rows."""
        vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *self.words])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        for part in (tiny_llama(num_hidden_layers=1), fast):
            part.save_pretrained(self.folder / "base")
        many = [{"prompt": f"{self.words[n]} ", "completion": self.words[n + 1]} for n in range(80)]
        rows = many[:12]
        words = self.words
        pairs = [{"prompt": f"{words[n]} ", "chosen": words[n + 1], "rejected": words[n + 2]} for n in range(12)]
        marked = [{**row, "label": n % 2 == 0} for n, row in enumerate(rows)]
        for name, made in (("rows", rows), ("many", many), ("pairs", pairs), ("marked", marked)):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        (self.folder / "reward.py").write_text(REWARD)

    def prepare(self) -> None:
        """Besides, a run that was stopped at half its steps, a finished one, and what the commands make of that."""
        self.prepare_base()
        self.must(self.train("finished"))
        shutil.copytree(self.folder / "finished", self.folder / "stopped")
        record = json.loads((self.folder / "stopped" / "run.json").read_text())
        (self.folder / "stopped" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
        shutil.rmtree(self.folder / "stopped" / "checkpoints" / "step-2")
        for name in record["files"]:
            (self.folder / "stopped" / name).unlink()
        self.must(["merge", "--adapter", self.folder / "finished", "--output", self.folder / "merged"])
        self.must(self.evaluate("evaluated"))
        self.must(self.train("cached", "--method", "qlora"))
        for target in ("vllm", "llama.cpp"):
            self.must(self.export(target, target))
        self.must(self.export("vllm", "whole", "--merged"))
        self.must(self.plan("planned"))
        self.must(self.compare("compared"))

    def must(self, words: Sequence[object]) -> None:
        code, said = self.call(words)
        assert code == 0, said

    def train(self, output: str, *more: str) -> list[object]:
        given = {"model": "base", "data": "rows.jsonl", "eval-data": "rows.jsonl", "output": output}
        words = [word for name, value in given.items() for word in (f"--{name}", self.folder / value)]
        length = ["--max-steps", 2, "--save-steps", 1, "--eval-steps", 1, "--batch-size", 2, "--r", 2]
        return ["train", *words, *length, "--device", "cpu", "--dtype", "float32", "--ignore-plan", *more]

    def learn(self, objective: str, output: str, *more: object) -> list[object]:
        """`train` on preferences or rewards, or at a rate that short runs find ("auto")."""
        if objective == "auto":
            data = self.folder / "many.jsonl"
            return self.train(output, "--data", str(data), "--learning-rate", "auto:0.001,0.01", *map(str, more))
        of_rewards = ("--reward", f"{self.folder / 'reward.py'}:right", *ANSWERS) if objective == "grpo" else ()
        data = self.folder / {"dpo": "pairs.jsonl", "kto": "marked.jsonl", "grpo": "rows.jsonl"}[objective]
        # Of an option that is given twice the last one counts.
        given = ("--objective", objective, "--data", data, "--eval-data", data, *of_rewards, *more)
        return self.train(output, *map(str, given))

    def evaluate(self, output: str) -> list[object]:
        given = {"adapter": "finished", "data": "rows.jsonl", "output": output}
        words = [word for name, value in given.items() for word in (f"--{name}", self.folder / value)]
        return ["evaluate", "--task", "perplexity", "--base", "--batch-size", 4, "--device", "cpu", *words]

    def export(self, target: str, output: str, *more: str) -> list[object]:
        return [
            "export",
            "--for",
            target,
            "--adapter",
            self.folder / "finished",
            "--output",
            self.folder / output,
            *more,
        ]

    def compare(self, output: str) -> list[object]:
        given = {"model": "base", "data": "rows.jsonl", "eval-data": "rows.jsonl", "output": output}
        words = [word for name, value in given.items() for word in (f"--{name}", self.folder / value)]
        length = ["--methods", "lora", "--seeds", 1, "--learning-rates", 0.01, "--max-steps", 1, "--batch-size", 4]
        return ["compare", *words, *length, "--r", 2, "--device", "cpu", "--dtype", "float32"]

    def plan(self, output: str) -> list[object]:
        return ["plan", "--model", self.folder / "base", "--memory", "16GB", "--save", self.folder / output]

    def sweep(self, command: str, stride: int, first: int = 1) -> int:
        """The number of the call at which it succeeded."""
        before, words, again, same = COMMANDS[command](self)
        for fail_at in range(first, 5000, stride):
            shutil.rmtree(self.output.parent, ignore_errors=True)
            self.output.parent.mkdir()
            if before is not None:
                shutil.copytree(self.folder / before, self.output)
                self.old_record = (self.output / "run.json").read_bytes()
            code, said = self.call(words, fail_at)
            if self.seen < fail_at:
                return self.seen
            where = f"{command}, {self.error} at call {fail_at}"
            if code == 0 and "trained, but: " not in said:
                # A library or Python tried another way, or again.
                self.check_result(where, same)
            else:
                self.check_failure(where, code, said, again, same)
        raise AssertionError("it never succeeds")

    def check_failure(self, where: str, code: int, said: str, again: Callable[[], Sequence[object]], same: str) -> None:
        said = " ".join(said.split())
        if self.error == "SIGKILL":
            assert code == -signal.SIGKILL, said
        elif code == 0:
            # A comparison says which of its measurements the disk stopped; the same command takes it.
            pass
        elif code != 2 or "RW900" in said or "error RW" not in said:
            self.problems.append(f"{where}: exit code {code}: {said}")
        elif ".partial-" in said or str(self.output.parent) not in said:
            self.problems.append(f"{where}: it does not name the file: {said}")
        self.check_files(where, said)
        code, said = self.call(again())
        if code != 0:
            self.problems.append(f"{where}: then {said}")
        else:
            self.check_result(where, same)

    def check_result(self, where: str, same: str) -> None:
        """As without a failure, and nothing beside it."""
        if not equal(self.output / same.partition("/")[2], self.folder / same):
            self.problems.append(f"{where}: {same} differs")
        strays = [path.name for path in self.output.parent.iterdir() if path.name.startswith(".")]
        strays += [str(path) for path in self.output.rglob(".*")]
        if strays:
            self.problems.append(f"{where}: left {strays}")

    def check_files(self, where: str, said: str) -> None:
        """What is under a final name is whole."""
        if not self.output.is_dir():
            return
        record = self.output / "run.json"
        if record.is_file():
            status = json.loads(record.read_text())["status"]
            is_old = record.read_bytes() == self.old_record
            is_kept = is_old or status in ("failed", "replaced", "interrupted")
            if not is_kept and self.error not in {*LASTING, "SIGKILL"}:
                self.problems.append(f"{where}: the record says {status}")
            knows_how = any(words in said for words in ("--resume", "the same command", "rankwise-lock"))
            if self.error != "SIGKILL" and not knows_how:
                self.problems.append(f"{where}: no advice to resume: {said}")
        for checkpoint in list_checkpoints(self.output):
            check_checkpoint(checkpoint)
        for path in self.output.rglob("*.safetensors"):
            if self.is_final(path):
                load_file(path)
        for path in self.output.rglob("*.json*"):
            if self.is_final(path):
                [json.loads(line) for line in ([path.read_text()] if path.suffix == ".json" else path.open())]

    def is_final(self, path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(self.output).parts)

    def command_after(self, *first: str) -> Sequence[object]:
        status = json.loads((self.output / "run.json").read_text())["status"] if self.has_record() else ""
        if not status:
            return self.train("made/out")
        return self.train("made/out", *(first if status in ("replaced", "finished") and first else ("--resume",)))

    def command_after_cached(self) -> Sequence[object]:
        more = ("--resume",) if self.has_record() else ()
        return self.train("made/out", "--method", "qlora", "--cache", f"{self.folder}/made/cache", *more)

    def has_record(self) -> bool:
        return (self.output / "run.json").is_file()


def equal(one: Path, other: Path) -> bool:
    """The tensors of weights, the numbers of an evaluation or a comparison, the bytes of another file."""
    if one.suffix == ".safetensors":
        ours, theirs = load_file(one), load_file(other)
        return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if one.suffix == ".json":
        ours, theirs = (json.loads(path.read_text()) for path in (one, other))
        if "runs" not in ours:
            return ours["metrics"] == theirs["metrics"]
        return [values(run) for run in ours["runs"]] == [values(run) for run in theirs["runs"]]
    return one.read_bytes() == other.read_bytes()


def values(run: dict[str, Any]) -> tuple[object, ...]:
    return run["id"], run["status"], run["eval_loss"]


ADAPTER = "finished/adapter_model.safetensors"
COMMANDS = {
    "train": lambda case: (None, case.train("made/out"), case.command_after, ADAPTER),
    "resume": lambda case: ("stopped", case.train("made/out", "--resume"), case.command_after, ADAPTER),
    "overwrite": lambda case: (
        "finished",
        case.train("made/out", "--overwrite"),
        lambda: case.command_after("--overwrite"),
        ADAPTER,
    ),
    "merge": lambda case: (
        None,
        words := ["merge", "--adapter", case.folder / "finished", "--output", case.output],
        lambda: words,
        "merged/model.safetensors",
    ),
    "evaluate": lambda case: (
        None,
        case.evaluate("made/out"),
        lambda: case.evaluate("made/out"),
        "evaluated/finished/perplexity/result.json",
    ),
    "export": lambda case: (
        None,
        words := case.export("vllm", "made/out"),
        lambda: words,
        "vllm/adapter_model.safetensors",
    ),
    "gguf": lambda case: (None, words := case.export("llama.cpp", "made/out"), lambda: words, "llama.cpp/adapter.gguf"),
    "whole": lambda case: (
        None,
        words := case.export("vllm", "made/out", "--merged"),
        lambda: words,
        "whole/model.safetensors",
    ),
    "plan": lambda case: (None, words := case.plan("made/out"), lambda: words, "planned"),
    # Its runs are steps of this process, so that their calls fail too.
    "compare": lambda case: (None, words := case.compare("made/out"), lambda: words, "compared/report.json"),
    # What is kept in the cache fails too, and what a failure leaves there is no other result.
    "cache": lambda case: (
        None,
        case.train("made/out", "--method", "qlora", "--cache", f"{case.folder}/made/cache"),
        lambda: case.command_after_cached(),
        "cached/adapter_model.safetensors",
    ),
}


def main_of(folder: Path, specs: Sequence[str]) -> int:
    torch.set_num_threads(1)
    steps_in_this_process(pytest.MonkeyPatch())
    cases, failed = Cases(folder), 0
    if not (cases.folder / "compared").exists():
        cases.prepare()
    # What is imported by now stays; each run collects garbage, which would take half of its time.
    gc.freeze()
    for spec in specs:
        command, cases.error, *numbers = spec.split(":")
        print(f"{spec}: {cases.sweep(command, *map(int, numbers))} calls", flush=True)
        for line in cases.problems:
            print(line, flush=True)
        failed += len(cases.problems)
        cases.problems.clear()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main_of(Path(sys.argv[1]).resolve(), sys.argv[2:]))
