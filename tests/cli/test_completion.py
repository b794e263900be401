"""Completion in the shell, by typer: commands, options and choices, without a heavy library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = (
    "import sys, atexit\n"
    "def light(): assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'\n"
    "atexit.register(light)\n"
    "from rankwise.cli.main import main\n"
    "sys.exit(main())"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rankwise train --learning", "--learning-rate"),
        ("rankwise export --for lla", "llama.cpp"),
    ],
)
def test_the_shell_is_told_what_may_follow(words, expected):
    last = str(len(words.split()) - 1)
    done = python(_RANKWISE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=last)
    assert done.stdout.split() == [expected]
    assert "heavy" not in done.stderr


def test_the_script_for_the_shell_is_typers():
    done = python("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "complete -o default -F _rankwise_completion rankwise" in done.stdout


def test_help_says_how_to_install_it(rankwise):
    assert "--install-completion" in rankwise("--help").stdout
