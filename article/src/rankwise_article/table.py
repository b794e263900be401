"""The article's table 1, E2E: one run after another, each kept as it ends, and the page of them.

A run is a row of ``STATE/settings.toml`` and a seed. It trains (``rankwise train``), describes all test meanings
greedily (``rankwise evaluate --task e2e``), and leaves in ``STATE/runs/METHOD-SEED``

    run.json      settings, losses, memory, versions, the five scores
    outputs.txt   one text for each meaning, in the order of testset_w_refs.csv; the official scorer reads it
    scores.tsv    for each meaning METEOR, ROUGE_L, CIDEr, and the counts from which BLEU and NIST of any sample follow

Adapters stay in WORK. A run that was killed goes on where it stopped. Speeds are measured apart from the runs, which
may share the machine with other work, into ``STATE/speed.json``. ``table_page.py`` makes the page.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from rankwise.errors import DataError
from rankwise.foreign import JsonObject
from rankwise.records import write_bytes
from rankwise_article.table_page import Runs, bars, page
from rankwise_article.table_plot import picture
from rankwise_article.table_runs import DEV, TEST, TRAIN, carry_out, measure_speeds, unfinished


def table(
    state: Path, data: Path, work: Path, *, runs: int, times: bool = False, model: str | None = None
) -> JsonObject:
    """Run the next ``runs`` unfinished runs, with ``times`` measure the methods' speed, and make ``STATE/README.md``
    and ``bleu.svg`` from all that have finished. ``model`` is where the one that the settings name lies, if elsewhere.

    Raises DataError (RA250) if ``data`` lacks a file of E2E, RunError (RA262) where a command fails.
    """
    if absent := [name for name in (TRAIN, DEV, TEST) if not (data / name).is_file()]:
        raise DataError("RA250", f"{data} holds no {', '.join(absent)}; give the folder of E2E's files.")
    settings = tomllib.loads((state / "settings.toml").read_text(encoding="utf-8"))
    settings["train"]["model"] = model or settings["train"]["model"]
    for method, seed in unfinished(state, settings)[:runs]:
        carry_out(state, settings, data, work, method, seed)
        _write_page(state, settings, data)
    if times:
        measure_speeds(state, settings, data, work)
    _write_page(state, settings, data)
    return {"left": [f"{method}-{seed}" for method, seed in unfinished(state, settings)]}


def _write_page(state: Path, settings: JsonObject, data: Path) -> None:
    runs = Runs(state / "runs")
    write_bytes(state / "README.md", page(runs, state, settings, data).encode())
    write_bytes(state / "bleu.svg", picture(bars(runs), settings["page"]["model"]).encode())
