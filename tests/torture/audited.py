"""Every command under an audit hook: no pickle, no socket, no process, no writing but to its output; no secret kept.

    python tests/torture/audited.py FOLDER

Prints a JSON line for each command: what was opened to write, and what must not have happened. `test_security.py` runs
it in a process, since hooks stay for its life, with secrets in the environment and empty HOME and cache folders.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_cases import Cases

from in_process import steps_in_this_process
from rankwise.cli import export_proof
from rankwise.compat.system import cache_folder
from rankwise.planning.hardware import idle_process_bytes, import_seconds

PATHS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "open")
FORBIDDEN = ("pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")
FORBIDDEN += ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "webbrowser.open")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# No files of this machine's disks, and kept by no one.
NO_FILES = ("/dev/", "/proc/")
# `platform.processor` asks it for the name of the processor.
ALLOWED = "('uname', ['uname', '-p'], None, None)"
# urllib3 asks so, while it is imported, whether there is IPv6.
ASKED_OF_IPV6 = "('::1', 0)"
# torch makes this empty folder in TMPDIR when it is imported.
OF_TORCH = "torchinductor_"
# Where `export --verify` writes what its server is given; `test_security.py` sees that nothing stays.
SCRATCH = "rankwise-verify-"
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Audited(Cases):
    """Commands that note what they do; ``output`` is the one place where each may write."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.watching = False
        self.allowed: Path | None = None
        self.faults: list[str] = []
        self.events = 0
        sys.addaudithook(self.hook)
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            setattr(module, name, self.noted(f"{module.__name__}.{name}", getattr(module, name)))

    def noted(self, name: str, real: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            if self.watching:
                self.faults.append(name)
            return real(*given, **more)

        return call

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "socket.bind" and str(given[1]) == ASKED_OF_IPV6:
            return
        if event in FORBIDDEN and str(given) != ALLOWED:
            self.faults.append(f"{event} {str(given)[:200]}")
        elif event in PATHS:
            written = given[:1]
            if event == "open":
                mode, flags = given[1], given[2]
                changes = bool(set(str(mode)) & set("wax+")) if isinstance(mode, str) else bool(flags & WRITES)
                written = given[:1] if changes else ()
            elif event in ("os.rename", "os.link", "os.symlink"):
                written = given[:2]
            for place in written:
                self.check(event, place)

    def check(self, event: str, place: Any) -> None:
        if isinstance(place, int):
            # A handle that another call has opened.
            return
        self.events += 1
        path = os.path.abspath(os.fsdecode(place))
        if path.startswith(NO_FILES) or Path(path).is_relative_to(cache_folder()):
            return
        if os.path.dirname(path).startswith(tempfile.gettempdir()) and SCRATCH in path:
            return
        is_folder = event == "os.mkdir" and (os.path.isdir(path) or os.path.basename(path).startswith(OF_TORCH))
        if not is_folder and (self.allowed is None or not self.is_of(Path(path), self.allowed)):
            self.faults.append(f"{event} {path}")

    @staticmethod
    def is_of(path: Path, output: Path) -> bool:
        """Whether it is the output, lies in it, or is its lock or unfinished form beside it."""
        hidden = f"{output.name}."
        top = next((part for part in (path, *path.parents) if part.parent == output.parent), None)
        return top is not None and (top == output or (top.name[0] == "." and top.name.lstrip(".").startswith(hidden)))

    def call(self, words: Sequence[object], fail_at: int = 0) -> tuple[int, str]:
        texts = [str(word) for word in words]
        named = next((option for option in ("--output", "--save") if option in texts), None)
        self.allowed = None if named is None else Path(texts[texts.index(named) + 1])
        self.faults, self.events = [], 0
        before = self.everything()
        self.watching = True
        try:
            code, said = super().call(words)
        finally:
            self.watching = False
        changed = [path for path, state in self.everything().items() if before.get(path) != state]
        gone = [path for path in before if not os.path.lexists(path)]
        outside = [
            path for path in (*changed, *gone) if self.allowed is None or not self.is_of(Path(path), self.allowed)
        ]
        faults = [*dict.fromkeys(self.faults), *(f"changed {path}" for path in outside)]
        print(json.dumps({"command": texts[0], "code": code, "events": self.events, "faults": faults}), flush=True)
        return code, said

    def everything(self) -> dict[str, tuple[int, int]]:
        """What native code writes raises no event, but stays."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                state = path.stat()
                found[str(path)] = (state.st_mtime_ns, state.st_size)
        return found


def main_of(folder: Path) -> None:
    torch.set_num_threads(1)
    # Fills matplotlib's own cache of the machine's fonts, which its first plot would fill.
    import matplotlib.font_manager  # noqa: F401

    # Measured once on a machine, in a process of its own.
    idle_process_bytes()
    import_seconds()
    steps_in_this_process(pytest.MonkeyPatch())
    cases = Audited(folder)
    cases.prepare()
    run, base, rows = folder / "finished", folder / "base", folder / "rows.jsonl"
    for words in (
        ["preview", "--model", base, "--data", rows],
        ["plan", "--model", base, "--memory", "16GB"],
        ["generate", "--adapter", run, "--prompt", "w1", "--max-new-tokens", 2],
        ["inspect", run],
        ["merge", "--adapter", run, "--adapter", run, "--combine", "linear", "--output", folder / "combined"],
        ["merge", "--adapter", folder / "cached", "--output", folder / "onto", "--verify"],
        ["doctor"],
    ):
        cases.must(words)
    learn_otherwise(cases)
    talk(cases)
    serve(cases)


def learn_otherwise(cases: Audited) -> None:
    """Preferences and rewards."""
    pairs = cases.folder / "pairs.jsonl"
    for objective in ("dpo", "kto", "grpo"):
        cases.must(cases.learn(objective, f"by-{objective}"))
    labelled = cases.folder / "labelled.jsonl"
    labelled.write_text("".join(f'{{"text": "w{n} w4", "label": "{n % 2}"}}\n' for n in range(8)))
    cases.must(
        cases.train("by-labels", "--objective", "classify", "--data", str(labelled), "--eval-data", str(labelled))
    )
    cases.must(["predict", "--adapter", cases.folder / "by-labels", "--data", labelled])
    cases.must([*cases.compare("by-pairs"), "--objective", "dpo", "--data", pairs, "--eval-data", pairs])


def talk(cases: Audited) -> None:
    template = cases.folder / "chat.jinja"
    template.write_text(CHAT)
    given = ["--adapter", cases.folder / "finished", "--chat-template", template, "--max-new-tokens", 2]
    sys.stdin = io.StringIO("w1 w2\nw3\n")
    cases.must(["generate", "--chat", *given])


def serve(cases: Audited) -> None:
    """`export --verify` up to the server, which is a program of its own and runs where it is installed."""
    export_proof.prove = lambda *_: None  # type: ignore[assignment,return-value]
    words = cases.export("vllm", "proven", "--verify", "--server-python", sys.executable)
    export_proof.server_python = lambda *_: sys.executable
    cases.must(words)


if __name__ == "__main__":
    main_of(Path(sys.argv[1]).resolve())
