"""No command opens a pickle, a socket or a file that is not its own; no record, log, card or page holds a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.cli.main import COMMANDS

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SECRET = "hf_SecretOfTheEnvironment0123456789"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "GH_TOKEN")
# Commands and how often `audited.py` calls them.
AUDITED = {"train": 6, "merge": 3, "evaluate": 1, "export": 4, "compare": 2, "preview": 1, "plan": 2, "generate": 2}
AUDITED |= {"inspect": 1, "doctor": 1, "predict": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audited")


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, object]]:
    homes = {name: folder / "homes" / name for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for home in homes.values():
        home.mkdir(parents=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("HF_DATASETS_CACHE", "HF_HUB_CACHE")},
        **{name: str(home) for name, home in homes.items()},
        **dict.fromkeys(SECRETS, SECRET),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    }
    (folder / "work").mkdir()
    command = [sys.executable, str(HERE / "audited.py"), str(folder / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_command_does_what_it_must_not(lines: list[dict[str, object]]) -> None:
    names = [line["command"] for line in lines]
    assert {name: names.count(name) for name in names} == AUDITED
    assert {command.name for command in COMMANDS} == set(AUDITED)
    assert [line for line in lines if line["faults"]] == []
    # The hook sees what they do.
    writers = [line for line in lines if line["command"] in ("train", "merge", "evaluate", "export", "compare")]
    assert all(isinstance(line["events"], int) and line["events"] > 2 for line in writers)


def test_no_secret_of_the_environment_is_kept(lines: list[dict[str, object]], folder: Path) -> None:
    kept = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []
    assert sum(path.name == "run.json" for path in folder.rglob("*")) >= 3


def test_the_folders_of_the_user_stay_empty(lines: list[dict[str, object]], folder: Path) -> None:
    """But for what is kept: prepared bases, traces, references, hashes, figures of the machine, matplotlib's fonts."""
    homes = folder / "homes"
    found = [path.relative_to(homes).as_posix() for path in homes.rglob("*") if path.is_file()]
    kept = tuple(
        f"XDG_CACHE_HOME/rankwise/{name}" for name in ("bases/", "traces/", "reference/", "hashes/", "machine.json")
    )
    assert [path for path in found if "matplotlib/fontlist" not in path and not path.startswith(kept)] == []


def test_records_cards_and_pages_hold_no_rows(lines: list[dict[str, object]], folder: Path) -> None:
    """A row may hold a secret; what is shown to others names the file and its hash alone."""
    row = b"w3 w4"
    shown = ("run.json", "README.md", "metrics.jsonl", "report.json", "report.html", "merge.json")
    found = [path for path in folder.rglob("*") if path.name in shown or path.suffix in (".log", ".svg")]
    assert {path.name for path in found} >= set(shown)
    assert [path for path in found if row in path.read_bytes()] == []
