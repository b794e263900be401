"""Public names are few and exported on purpose."""

from __future__ import annotations

import subprocess
import sys

import rankwise


def test_the_list_is_complete_and_every_name_loads():
    assert set(rankwise.__all__) == set(rankwise._HOMES)
    assert rankwise.__all__ == sorted(rankwise.__all__)
    for name in rankwise.__all__:
        assert getattr(rankwise, name) is not None


def test_dir_lists_the_public_names_although_they_load_on_first_use():
    code = "import rankwise; print(*dir(rankwise))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(listed) >= {*rankwise.__all__, "ops", "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(rankwise, "no_such_thing")


def test_import_does_no_work():
    code = "import sys, rankwise; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
