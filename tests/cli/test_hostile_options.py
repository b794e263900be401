"""Options and settings files that no one means well: one coded line, at once, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankwise.cli.main import VERBS, main
from rankwise.cli.output import shortened


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
        ("seed: !!int x", "invalid literal"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("? [a, b]\n: 1", "unhashable"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("max-length: 8\nmax_length: 9", "twice"),
    ],
)
def test_a_settings_file_that_does_not_say_one_thing(content, reason, said, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    line = said(config=tmp_path / "run.yaml")
    assert line.startswith("error RW102: ")
    assert reason in line


@pytest.mark.parametrize(
    "content", ['sample-prompt: "a\\0b"', 'sample-prompt: "\\ud800"', 'rank-pattern: {"\\ud800": 2}']
)
def test_half_a_character_in_a_settings_file(content, said, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    assert said(config=tmp_path / "run.yaml").startswith("error RW104: ")


@pytest.mark.parametrize("option", ["output", "model", "data", "sample-prompt", "config", "chat-template"])
@pytest.mark.parametrize("value", ["a\0b", "caf\udce9"])
def test_half_a_character_on_the_command_line(option, value, said):
    assert said(**{option: value}).startswith(f"error RW104: --{option} holds ")


@pytest.mark.parametrize("option", ["output", "model", "data", "eval-data", "chat-template"])
@pytest.mark.parametrize(
    "path", ["loop", "loop/x", "dangling", "dangling/x", "x" * 300, "y/" * 3000, "pipe.jsonl", "zero"]
)
def test_a_path_that_leads_nowhere(option, path, said, tmp_path):
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("/dev/zero", tmp_path / "zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert said(**{option: path}).startswith(f"error RW105: --{option} ")


def test_a_home_of_nobody(said):
    assert said(model="~no-such-user-here/model").startswith("error RW105: --model ")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 2**32),
        ("batch-size", 10**20),
        ("batch-size", 10**9),
        ("gradient-accumulation", 10**12),
        ("max-length", 10**12),
        ("r", 10**9),
        ("epochs", 1e300),
        ("lora-alpha", 1e300),
        ("rank-pattern", "q_proj=99999999999"),
        ("alpha-pattern", "q_proj=1e300"),
        ("layers-to-transform", -1),
        ("max-steps", "9" * 5000),
    ],
)
def test_numbers_have_bounds(option, value, said):
    assert said(**{option: value}).startswith(f"error RW103: --{option} is ")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_number_of_every_verb_has_an_upper_bound(verb):
    """A field without one reaches torch, NumPy or a file name with 10^20."""
    without = {"length_penalty", "block_size", "memory", "memory_budget"}
    # A power, one of few values that are checked, and sizes of memory, which have a bound of their own.
    for name, field in verb.settings.model_fields.items():
        kind = str(field.annotation)
        if name not in without and ("int" in kind or "float" in kind) and "Literal" not in kind:
            bounds = str(field.metadata) + kind
            assert "Le(" in bounds or "Lt(" in bounds or "le=" in bounds, name


def test_a_long_message_is_cut_and_lies_whole_in_a_file():
    message = "bad: " + "; ".join(f"layer {index} is missing" for index in range(100_000)) + "; get it again."
    short = shortened(message)
    assert len(short) < 1000
    assert "layer 18 is missing; ... and 99,981 more; get it again." in short
    path = Path(short.partition("[whole: ")[2].removesuffix("]"))
    assert path.read_text() == message
    path.unlink()
    assert shortened("short") == "short"


def test_a_long_value_keeps_both_ends_of_its_message(rankwise, tmp_path):
    done = rankwise("inspect", tmp_path, "--model", "x" * 10**6 + "!", "--json")
    assert len(done.stderr) < 3000
    assert len(done.stdout) < 3000
    assert "characters, more than the file system takes" in done.document["error"]["message"]


def test_control_characters_do_not_reach_the_terminal(capsys):
    assert main(["inspect", "no\x1b[31mred"]) == 2
    assert "\x1b[31m" not in capsys.readouterr().err


def test_names_that_are_no_utf8_are_shown_with_escapes(rankwise, tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    done = rankwise("inspect", tmp_path, "--json")
    assert done.code == 2
    assert "caf\\udce9" in done.stdout
