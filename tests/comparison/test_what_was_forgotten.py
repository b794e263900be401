"""``compare --retain``: verdicts, what they change in the recommendation, and what a continued comparison keeps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_comparison import compare, given, starts

from rankwise.errors import ConfigError, DataError
from rankwise.reports.comparison import Comparison
from rankwise.reports.page import page
from rankwise.reports.words import headline
from rankwise.verbs.compare import verdict_lines

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning"),
    pytest.mark.usefixtures("quick_steps", "real_stages"),
]


def retaining(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    stay = tmp_path / "stay.jsonl"
    stay.write_text("".join(json.dumps({"prompt": f"old {n}", "completion": f"known {n}"}) + "\n" for n in range(12)))
    options = {"learning_rates": "2e-4", "seeds": 3, "retain": str(stay)}
    return given(tmp_path, **{**options, **changes})


def test_a_method_that_lost_too_much_is_not_recommended_over_one_that_kept(tmp_path: Path):
    found: Any = compare(**retaining(tmp_path))
    verdicts = {name: item["retained"]["verdict"] for name, item in found["methods"].items()}
    assert verdicts == {"lora": "kept", "dora": "kept", "full": "lost"}
    chosen = found["recommendation"]
    assert (chosen["kept"], chosen["forgot"], chosen["candidates"]) == (["lora", "dora"], ["full"], ["lora", "dora"])
    assert chosen["method"] in ("lora", "dora")
    said = "lost 26 % on the retained rows, more than the 2.0 % of --retain-margin, and is not recommended over LoRA "
    assert f"Full fine-tuning {said}and DoRA, which kept theirs." in headline(found)
    assert "better" not in headline(found)
    # Alone, or within a wide margin, it is what the task alone recommends.
    alone: Any = compare(**retaining(tmp_path, name="alone", methods="full"))
    assert headline(alone).count("Full fine-tuning lost 26 % on the retained rows.") == 1
    wide: Any = compare(**retaining(tmp_path, retain_margin=0.5))
    assert (wide["recommendation"]["method"], wide["recommendation"]["forgot"]) == ("full", [])
    assert "Full fine-tuning kept its level on the retained rows." in headline(wide)


def test_the_report_has_a_column_and_a_plot_and_without_retain_neither(tmp_path: Path):
    comparison = Comparison(compare(**retaining(tmp_path)), tmp_path / "out")
    html = page(comparison)
    assert "Quality against what was lost" in html
    assert "Evaluation loss against loss on the retained rows" in html
    assert "Retained rows</th>" in html
    assert "lost <small>+25.60 % ±\u202f0.49</small>" in html
    told = list(verdict_lines(comparison))
    assert "full fine-tuning lost 26 % on the retained rows: loss +25.60 % ±\u202f0.49" in told
    plain: Any = compare(**given(tmp_path, "plain", learning_rates="2e-4"))
    assert all(item["retained"] is None for item in plain["methods"].values())
    assert plain["recommendation"]["method"] == "full"
    assert "etained rows" not in page(Comparison(plain, tmp_path / "plain"))


def test_a_continued_comparison_keeps_the_base_and_measures_what_it_has_not(tmp_path: Path):
    """First without --retain, then with it, then with another seed, then with other rows."""
    out, folder = tmp_path / "out", tmp_path / "out" / "base" / "evaluation" / "retained"
    compare(**retaining(tmp_path, retain=None, seeds=2, methods="lora,full"))
    first: Any = compare(**retaining(tmp_path, seeds=2, methods="lora,full"))
    assert len(starts(out)) == 4
    assert first["methods"]["full"]["retained"]["verdict"] == "lost"
    os.utime(folder / "result.json", (1, 1))
    more: Any = compare(**retaining(tmp_path, methods="lora,full"))
    assert more["methods"]["lora"]["seeds"] == 3
    assert (folder / "result.json").stat().st_mtime == 1
    options = retaining(tmp_path, methods="lora,full")
    (tmp_path / "stay.jsonl").write_text(json.dumps({"text": "other rows"}) + "\n")
    compare(**options)
    assert (folder / "result.json").stat().st_mtime > 1
    assert len(starts(out)) == 6


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"retain": None, "retain_margin": 0.1}, ConfigError, "RW167: --retain-margin says how much of --retain may"),
        ({"retain_margin": 1.0}, ConfigError, r"RW103: --retain-margin is 1.0: input should be less than 1\.$"),
        ({"retain": "nowhere.jsonl"}, DataError, "RW201"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(changes: Any, error: Any, said: str, tmp_path: Path):
    with pytest.raises(error, match=said):
        compare(**retaining(tmp_path, **changes))
    assert not (tmp_path / "out").exists()
