"""Table 1: finished runs are kept with all that their intervals need, and the page says no more than they do."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from rankwise.foreign import read_json
from rankwise.records import write_json
from rankwise_article import table_runs
from rankwise_article.bleu_nist import mteval_statistics
from rankwise_article.table_page import (
    Runs,
    Score,
    _differences,
    _sentence,
    _speed_words,
    bars,
    page,
    read_run,
    verdict,
)
from rankwise_article.table_plot import picture
from rankwise_article.table_runs import chosen_rate, scores_file, unfinished

STATE = Path(__file__).parents[1] / "table"
SETTINGS = tomllib.loads((STATE / "settings.toml").read_text(encoding="utf-8"))
REFERENCES = [[f"the pub {n} is cheap and near the river", f"a cheap pub called {n}"] for n in range(40)]


def keep(folder: Path, method: str, seed: int, wrong: int):
    """A finished run, ``wrong`` of whose 40 texts are bad. Returns its statistics."""
    texts = [f"{n} {n} {n} is" if (n + seed) % 40 < wrong else f"the pub {n} is near the river" for n in range(40)]
    statistics = mteval_statistics(texts, REFERENCES)
    good = np.array([0.2 if text.endswith("is") else 0.6 for text in texts])
    (folder / f"{method}-{seed}").mkdir(parents=True)
    figures = {"trainable_parameters": 10, "total_parameters": 1000, "peak_memory_bytes": 9, "frozen_bytes": 4}
    figures |= {"device": {"acceleration": "off" if method == "prefix" else "on"}}
    scores = {"METEOR": float(good.mean()) + 0.1}
    write_json(folder / f"{method}-{seed}" / "run.json", {"method": method, "seed": seed, "scores": scores, **figures})
    (folder / f"{method}-{seed}" / "outputs.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    rows = {name: good.tolist() for name in ("METEOR", "ROUGE_L", "CIDEr")}
    (folder / f"{method}-{seed}" / "scores.tsv").write_text(scores_file(statistics, rows), encoding="utf-8")
    return statistics


def test_a_kept_run_gives_the_scores_of_any_sample(tmp_path: Path):
    statistics = keep(tmp_path, "lora", 0, wrong=5)
    run, rows = read_run(tmp_path / "lora-0"), np.array([3, 3, 9, 21])
    for name, scale in (("bleu", 100), ("nist", 1)):
        for sample in (None, rows):
            expected = scale * getattr(statistics, name)(sample)
            assert run.score(name.upper(), sample) == pytest.approx(expected, rel=1e-6)
    assert run.score("METEOR") == pytest.approx(100 * run.record["scores"]["METEOR"])


def test_verdicts_follow_from_intervals(tmp_path: Path):
    for seed in range(3):
        keep(tmp_path, "lora", seed, wrong=4 + seed)
        keep(tmp_path, "full", seed, wrong=30)
        keep(tmp_path, "dora", seed, wrong=4 + seed)
    keep(tmp_path, "qlora", 0, wrong=4)
    runs = Runs(tmp_path)
    differences = {method: runs.score(method, "BLEU", "lora") for method in ("full", "dora", "qlora")}
    assert {method: verdict(score) for method, score in differences.items() if score} == {
        "full": "worse",
        "dora": "equivalent",
        "qlora": "open: 1 of 3 seeds",
    }
    assert [verdict(Score(value, 0.5, 3)) for value in (0.2, 1.2, 0.9, -0.9)] == [
        "equivalent",
        "better",
        "better",
        "worse",
    ]
    assert verdict(Score(0.4, 0.9, 3)) == "cannot tell"


def test_full_fine_tuning_is_compared_with_by_the_same_pairs(tmp_path: Path):
    for seed in range(3):
        keep(tmp_path, "lora", seed, wrong=4 + seed)
        keep(tmp_path, "full", seed, wrong=30)
    runs, methods = Runs(tmp_path), ["full", "lora"]
    assert _sentence(runs, methods, "full") == "Better than full fine-tuning: LoRA."
    above, below = (_differences(runs, methods, against)[4].split(" | ") for against in ("full", "lora"))
    assert above[1].replace("+", "-") == below[1]
    assert above[3].rstrip(" |").split(", ") == below[3].rstrip(" |").split(", ")[::-1]


def test_a_rate_beside_the_default_must_be_clearly_better():
    rates = [1e-3, 3e-3]
    assert chosen_rate(rates, {"1.0e-03": 1.30, "3.0e-03": 1.29}, 0.02) == 1e-3
    assert chosen_rate(rates, {"1.0e-03": 1.30, "3.0e-03": 1.20}, 0.02) == 3e-3


def test_speeds_are_medians_of_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called = []

    def train(settings, method, rows, data, run, **options):
        called.append(method)
        run.mkdir()
        speed = len(called) * (10 if method == "full" else 1)
        write_json(run / "run.json", {"examples_per_second": speed, "device": {"name": "cpu", "threads": 2}})

    monkeypatch.setattr(table_runs, "train_by", train)
    monkeypatch.setattr(table_runs, "train_rows", lambda *given: None)
    table_runs.measure_speeds(tmp_path, {"rows": 8, "methods": {"lora": {}, "full": {}}}, tmp_path, tmp_path)
    assert called == ["lora", "full"] * 3
    assert read_json(tmp_path / table_runs.SPEED)["examples_per_second"] == {"lora": 3, "full": 40}
    assert "(cpu, threads: 2)" in _speed_words(tmp_path)


def test_the_page_is_fresh(shared: Path):
    runs = Runs(STATE / "runs")
    written = (STATE / "README.md").read_text(encoding="utf-8")
    assert written == page(runs, STATE, SETTINGS, shared / "e2e"), "run make table"
    # Outlines depend on the version of matplotlib.
    drawn = [
        re.findall('aria-label="(.*?)"', text)
        for text in ((STATE / "bleu.svg").read_text(), picture(bars(runs), SETTINGS["page"]["model"]))
    ]
    assert drawn[0] == drawn[1], "run make table"
    finished = {path.name for path in (STATE / "runs").glob("[!.]*")}
    wanted = {f"{method}-{seed}" for seed in SETTINGS["seeds"] for method in SETTINGS["methods"]}
    assert finished <= wanted
    assert len(unfinished(STATE, SETTINGS)) == len(wanted - finished)
