"""The project fits its budget: ``budget.toml`` says what each package may measure (``make budget`` prints it)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "dev" / "budget.py"


def test_the_tree_fits_the_budget():
    spec = importlib.util.spec_from_file_location("budget", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    counting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counting)
    limits = counting.budget()
    over = [
        f"{name}: {figure} {key}, budget {limits.get(name, {}).get(key, 0)}"
        for name, figures in counting.counted().items()
        for key, figure in figures.items()
        if figure > limits.get(name, {}).get(key, 0)
    ]
    assert not over, f"{over}: lower something else in the same commit, or say in budget.toml which user needs the room"
