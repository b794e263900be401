"""Options, paths and settings files that cannot be meant: one coded line, and nothing written."""

from __future__ import annotations

import os

import pytest

from rankwise.cli.main import main
from rankwise.verbs.output import shortened


@pytest.fixture
def said(rankwise, model_folder, rows_file, tmp_path, monkeypatch):
    """The one line of a refused ``train`` with good input, of which a test spoils one."""
    monkeypatch.chdir(tmp_path)

    def call(**changed) -> str:
        given = {"model": model_folder, "data": rows_file, "output": tmp_path / "run", "max-steps": 1, **changed}
        done = rankwise("train", *(part for key, value in given.items() for part in (f"--{key}", value)))
        assert done.code == 2, done.stderr
        assert not (tmp_path / "run").exists()
        return done.stderr.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_settings_file_that_does_not_say_one_thing(content, reason, said, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    line = said(config=tmp_path / "run.yaml")
    assert line.startswith("error RW102: ")
    assert reason in line


@pytest.mark.parametrize("option", ["output", "model", "data"])
@pytest.mark.parametrize("path", ["loop", "x" * 300])
def test_a_path_that_leads_nowhere(option, path, said, tmp_path):
    os.symlink("loop", tmp_path / "loop")
    assert said(**{option: path}).startswith("error RW")


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 2**32), ("batch-size", 10**20), ("epochs", 1e300), ("rank-pattern", "q_proj=99999999999")],
)
def test_numbers_have_bounds(option, value, said):
    assert said(**{option: value}).startswith(f"error RW103: --{option} is ")


def test_a_long_message_is_cut_in_the_middle():
    message = "bad: " + "; ".join(f"layer {index} is missing" for index in range(100_000)) + "; get it again."
    short = shortened(message)
    assert len(short) < 4100
    assert short.startswith("bad: layer 0")
    assert short.endswith("; get it again.")
    assert shortened("short") == "short"


def test_control_characters_do_not_reach_the_terminal(capsys):
    assert main(["inspect", "no\x1b[31mred"]) == 2
    assert "\x1b[31m" not in capsys.readouterr().err


def test_names_that_are_no_utf8_are_shown_with_escapes(rankwise, tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    done = rankwise("inspect", tmp_path, "--json")
    assert done.code == 2
    assert "caf\\udce9" in done.stdout
