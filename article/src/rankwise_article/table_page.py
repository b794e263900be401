"""The page of the article's table 1, from whatever runs have finished.

The interval of a method's score has two parts. Meanings: a bootstrap over the test meanings, the same resamples for
every run. Seeds: the variance between a method's seeds, pooled over the methods. With z and t the 97.5 % quantiles,

    half width = sqrt((z s_meanings)^2 + (t s_seeds)^2 / seeds)        a difference of two methods has 2 s_seeds^2

METEOR of a corpus is not a mean; its resamples are those of the mean, moved to the corpus' score.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, t

from rankwise.foreign import JsonObject, read_json
from rankwise_article.bleu_nist import MtevalStatistics
from rankwise_article.e2e_scores import METRICS, read_references
from rankwise_article.table_plot import Bar
from rankwise_article.table_runs import COUNTS, ROUNDS, SPEED, TEST, TIMED_STEPS, chosen_rate

RESAMPLES, LEVEL = 500, 0.975
# BLEU points (of 100) within which two methods are equivalent, and the fewest seeds of a verdict.
MARGIN, SEEDS = 1.0, 3
REFERENCE, FULL, EIGHT_BITS = "lora", "full", "-int8"
NAMES = {
    "full": "full fine-tuning", "bottleneck": "bottleneck (Houlsby)", "prefix": "prefix", "lora": "LoRA",
    "dora": "DoRA", "qlora": "QLoRA", "qdora": "QDoRA", "lora-int8": "LoRA (8 bits)", "dora-int8": "DoRA (8 bits)",
    "qlora-int8": "QLoRA (8 bits)", "qdora-int8": "QDoRA (8 bits)",
}  # fmt: skip
DIFFERENCES = ("| method | BLEU | verdict | won, tied, lost |", "|---|---|---|---|")
SCALES = {"BLEU": 100, "METEOR": 100, "ROUGE_L": 100, "NIST": 1, "CIDEr": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    method: str
    seed: int
    record: JsonObject
    statistics: MtevalStatistics
    # METEOR, ROUGE_L and CIDEr of each meaning.
    per_example: Mapping[str, np.ndarray]
    outputs: Sequence[str]

    def score(self, name: str, rows: np.ndarray | None = None) -> float:
        """The metric of the meanings ``rows`` (indices, may repeat), or of all."""
        if name in ("BLEU", "NIST"):
            return SCALES[name] * float(getattr(self.statistics, name.lower())(rows))
        values = self.per_example[name]
        mean = float(values.mean() if rows is None else values[rows].mean())
        moved = self.record["scores"][name] - float(values.mean()) if name == "METEOR" else 0.0
        return SCALES[name] * (mean + moved)


@dataclasses.dataclass(frozen=True)
class Score:
    value: float
    half_width: float
    seeds: int


class Runs:
    """All finished runs, and their scores on the same resamples."""

    def __init__(self, folder: Path) -> None:
        self.all = [read_run(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir()]
        count = len(self.all[0].outputs) if self.all else 0
        random = np.random.default_rng(0)
        resamples = [random.integers(0, count, count) for _ in range(RESAMPLES)]
        self.resampled = {
            (run.method, run.seed, name): np.array([run.score(name, rows) for rows in resamples])
            for run in self.all
            for name in METRICS
        }

    def of(self, method: str) -> dict[int, Run]:
        return {run.seed: run for run in self.all if run.method == method}

    def seed_deviation(self, name: str) -> tuple[float, int]:
        """(deviation between seeds, degrees of freedom), pooled over the methods with two seeds and more."""
        groups = [[run.score(name) for run in self.of(method).values()] for method in {run.method for run in self.all}]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
        return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)

    def score(self, method: str, name: str, against: str | None = None) -> Score | None:
        """The method's mean over its seeds; with ``against``, how far it lies above that method, on common seeds."""
        runs = self.of(method)
        seeds = [seed for seed in runs if against is None or seed in self.of(against)]
        if not seeds:
            return None
        value = statistics.fmean(runs[seed].score(name) for seed in seeds)
        resamples = np.mean([self.resampled[method, seed, name] for seed in seeds], axis=0)
        if against is not None:
            value -= statistics.fmean(self.of(against)[seed].score(name) for seed in seeds)
            resamples = resamples - np.mean([self.resampled[against, seed, name] for seed in seeds], axis=0)
        deviation, freedom = self.seed_deviation(name)
        of_seeds = float(t.ppf(LEVEL, freedom)) * deviation if freedom else 0.0
        of_meanings = float(norm.ppf(LEVEL) * resamples.std(ddof=1))
        both = of_meanings**2 + (1 if against is None else 2) * of_seeds**2 / len(seeds)
        return Score(value, math.sqrt(both), len(seeds))


def read_run(folder: Path) -> Run:
    with (folder / "scores.tsv").open(encoding="utf-8") as lines:
        header, *rows = csv.reader(lines, delimiter="\t")
    columns = {name: np.array(values, float) for name, values in zip(header, zip(*rows))}
    counts: dict[str, Any] = {}
    for name in COUNTS:
        found = np.stack([values for key, values in columns.items() if key.rstrip("_12345") == name], 1)
        found = found[:, 0] if found.shape[1] == 1 else found
        counts[name] = found if name == "information" else found.astype(np.int64)
    record = read_json(folder / "run.json")
    outputs = (folder / "outputs.txt").read_text(encoding="utf-8").splitlines()
    method, seed = folder.name.rsplit("-", 1)
    return Run(
        method=method,
        seed=int(seed),
        record=record,
        statistics=MtevalStatistics(**counts),
        per_example=columns,
        outputs=outputs,
    )


def verdict(difference: Score) -> str:
    """What a difference in BLEU to another method says."""
    low, high = difference.value - difference.half_width, difference.value + difference.half_width
    if difference.seeds < SEEDS:
        return f"open: {difference.seeds} of {SEEDS} seeds"
    if -low < MARGIN and high < MARGIN:
        return "equivalent"
    return "better" if low > 0 else "worse" if high < 0 else "cannot tell"


def bars(runs: Runs) -> list[Bar]:
    """The rows of the picture, best first: the reference method and those that share a seed with it."""
    found = []
    for method in NAMES:
        gap, score = runs.score(method, "BLEU", REFERENCE), runs.score(method, "BLEU")
        if gap and score:
            width = 0.0 if method == REFERENCE else gap.half_width
            found.append(Bar(NAMES[method], score.value, gap.value, width, _peak(runs, method)))
    return sorted(found, key=lambda bar: -bar.bleu)


def _peak(runs: Runs, method: str) -> int:
    return max(run.record["peak_memory_bytes"] for run in runs.of(method).values())


def page(runs: Runs, state: Path, settings: JsonObject, data: Path) -> str:
    methods = [method for method in NAMES if runs.of(method)]
    usual = [method for method in methods if not method.endswith(EIGHT_BITS)]
    wanted = len(settings["seeds"]) * len(settings["methods"])
    lines = [
        f"# The article's table 1, measured: E2E on {settings['page']['model']}",
        "",
        f"**{len(runs.all)} of {wanted} runs.** {_sentence(runs, usual, REFERENCE)} "
        f"{_sentence(runs, methods, FULL)}".rstrip(),
        "",
        "![BLEU of each method against LoRA's](bleu.svg)",
        "",
        *_scores(runs, methods, _speed(state).get("examples_per_second", {})),
        "",
        f"BLEU, METEOR and ROUGE-L are times 100. ± is a 95 % interval: {RESAMPLES:,} resamples of the test meanings, "
        "and, once a method has two seeds, the variance between seeds, pooled over the methods. Memory is the peak of "
        f"the training process, the largest of the seeds; *frozen* is what the base takes of it. {_speed_words(state)} "
        f"{_plain_words(runs, methods)}".rstrip(),
        "",
        *_differences(runs, usual, REFERENCE),
        *_differences(runs, methods, FULL),
        *_eight_bits(runs, methods),
        f"Differences in BLEU on common seeds, paired by meaning. *Equivalent*: the interval lies within {MARGIN:g} "
        f"BLEU. A verdict needs {SEEDS} seeds. *Won* counts meanings by ROUGE-L, all common seeds together.",
        "",
        *_how(state, settings),
        "",
        *_examples(runs, usual, data),
    ]
    return "\n".join(lines)


def _against(runs: Runs, methods: Sequence[str], against: str) -> dict[str, Score]:
    """How far each other method's BLEU lies above that of ``against``."""
    return {m: score for m in methods if m != against and (score := runs.score(m, "BLEU", against))}


def _sentence(runs: Runs, methods: Sequence[str], against: str) -> str:
    told = {method: verdict(score) for method, score in _against(runs, methods, against).items()}
    parts = [
        f"{word} {NAMES[against]}: {', '.join(NAMES[method] for method in told if told[method] == key)}"
        for key, word in (
            ("better", "better than"),
            ("equivalent", "equivalent to"),
            ("worse", "worse than"),
            ("cannot tell", "not decided against"),
        )
        if key in told.values()
    ]
    opened = ", ".join(NAMES[method] for method, word in told.items() if word.startswith("open"))
    rest = f"Too few seeds for a verdict against {NAMES[against]}: {opened}." if opened else ""
    return " ".join(filter(None, ["; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "." if parts else "", rest]))


def _speed(state: Path) -> JsonObject:
    return read_json(state / SPEED) if (state / SPEED).is_file() else {}


def _speed_words(state: Path) -> str:
    """What the column of speeds holds, which were not measured in the runs."""
    if not (device := _speed(state).get("device")):
        return "Speeds are not measured yet."
    return (
        f"Examples a second are those of training, measured apart from the runs with nothing else on the machine "
        f"({device['name']}, threads: {device['threads']}): medians of {ROUNDS} times {TIMED_STEPS} steps, "
        f"the methods taking turns (`python -m rankwise_article table article/{state.name} --data FOLDER --runs 0 "
        "--times`)."
    )


def _plain_words(runs: Runs, methods: Sequence[str]) -> str:
    """Which methods' memory and speed say little, since rankwise's fused layers do not support them."""
    plain = [NAMES[m] for m in methods if next(iter(runs.of(m).values())).record["device"]["acceleration"] == "off"]
    words = (
        f"For {' and '.join(plain)} rankwise neither fuses layers nor leaves out padding, so that their memory and "
        "speed say little about the methods."
    )
    return words if plain else ""


def _scores(runs: Runs, methods: Sequence[str], speed: Mapping[str, float]) -> list[str]:
    lines = [
        "| method | seeds | trained | BLEU | NIST | METEOR | ROUGE-L | CIDEr | memory | frozen | examples/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        of = list(runs.of(method).values())
        scores = [runs.score(method, name) for name in METRICS]
        trained = of[0].record["trainable_parameters"]
        frozen = max(run.record["frozen_bytes"] for run in of)
        cells = [
            NAMES[method], str(len(of)), f"{trained / 1e6:.2f}M ({trained / of[0].record['total_parameters']:.1%})",
            *(f"{s.value:.{1 if SCALES[n] == 100 else 2}f} ± {s.half_width:.{1 if SCALES[n] == 100 else 2}f}"
              for n, s in zip(METRICS, scores) if s),
            f"{_peak(runs, method) / 1e9:.2f} GB", f"{frozen / 1e9:.2f} GB",
            f"{speed[method]:.1f}" if method in speed else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _differences(runs: Runs, methods: Sequence[str], against: str) -> list[str]:
    rows = [_difference(runs, method, against, score) for method, score in _against(runs, methods, against).items()]
    return [f"## Against {NAMES[against]}", "", *DIFFERENCES, *rows, ""] if rows else []


def _eight_bits(runs: Runs, methods: Sequence[str]) -> list[str]:
    """Each method with its frozen products in 8 bits, against itself in bfloat16."""
    pairs = [(method, method.removesuffix(EIGHT_BITS)) for method in methods if method.endswith(EIGHT_BITS)]
    scores = [(method, usual, runs.score(method, "BLEU", usual)) for method, usual in pairs]
    rows = [_difference(runs, method, usual, score) for method, usual, score in scores if score]
    return ["## 8 bits against bfloat16", "", *DIFFERENCES, *rows, ""] if rows else []


def _difference(runs: Runs, method: str, against: str, score: Score) -> str:
    seeds = [seed for seed in runs.of(method) if seed in runs.of(against)]
    gaps = np.concatenate([_gaps(runs, method, seed, against) for seed in seeds])
    counts = f"{(gaps > 0).sum()}, {(gaps == 0).sum()}, {(gaps < 0).sum()}"
    return f"| {NAMES[method]} | {score.value:+.1f} ± {score.half_width:.1f} | {verdict(score)} | {counts} |"


def _gaps(runs: Runs, method: str, seed: int, against: str = REFERENCE) -> np.ndarray:
    """ROUGE-L above that of ``against``, for each meaning."""
    return runs.of(method)[seed].per_example["ROUGE_L"] - runs.of(against)[seed].per_example["ROUGE_L"]


def _how(state: Path, settings: JsonObject) -> list[str]:
    train = settings["train"]
    lines = [
        "## How",
        "",
        f"{settings['page']['base']} All methods start from weights that were once rounded to 4 bits, which may hide a "
        f"part of what QLoRA costs. {settings['page']['products']} Each run trains one epoch on {settings['rows']:,} "
        f"rows, spread evenly over E2E's 42,061, in batches of {train['batch_size']}, "
        "and then describes all 630 test meanings greedily. LoRA's paper trains GPT-2 Medium on all rows for five "
        "epochs and searches with 10 beams, so its BLEU (70.4) is no target for ours. Low-rank adapters are on all "
        "linear layers with r = 4, alpha = 2 r. [settings.toml](settings.toml) says the rest.",
        "",
    ]
    if (state / "rates.json").is_file():
        losses = read_json(state / "rates.json")
        search = settings["search"]
        lines += [
            f"Rates are {settings['page']['rate']}, checked by "
            f"runs of {search['steps']} steps (seed 0, evaluation loss). Another rate is taken if its loss is "
            f"lower by more than {search['margin']:.0%}. {settings['page']['shared']}",
            "",
            "| method | rate: loss | taken |",
            "|---|---|---|",
        ]
        for method, tried in losses.items():
            rates = search["rates"][method]
            if len(tried) == len(rates):
                told = ", ".join(f"{float(rate):g}: {loss:.3f}" for rate, loss in sorted(tried.items(), key=_rate_of))
                lines.append(f"| {NAMES[method]} | {told} | {chosen_rate(rates, tried, search['margin']):g} |")
        lines.append("")
    return [
        *lines,
        "The next unfinished run, and this page; a run that was killed goes on where it stopped:",
        "",
        f"    {settings['page']['command']}",
        "",
        "Each folder of [runs](runs) has the record, the 630 texts in the order of `testset_w_refs.csv`, and for each "
        "meaning METEOR, ROUGE-L, CIDEr and the counts of which BLEU and NIST are made. The official scorer reads the "
        "texts; ours equals it to four decimals:",
        "",
        f"    python -m rankwise_article score e2e --predictions article/{state.name}/runs/lora-0/outputs.txt \\",
        "        --references FOLDER/testset_w_refs.csv",
    ]


def _rate_of(item: tuple[str, float]) -> float:
    return float(item[0])


def _examples(runs: Runs, methods: Sequence[str], data: Path) -> list[str]:
    """For each method the meaning that it wins and the one that it loses by most against LoRA, at the first seed."""
    meanings = list(read_references(data / TEST).items())
    lines = [
        "## Won and lost",
        "",
        "For each method the meanings at which its ROUGE-L lies furthest above and below LoRA's, at the first common "
        "seed, without those shown already: extremes, not typical texts.",
    ]
    shown: set[int] = set()
    for method in methods:
        seeds = [seed for seed in runs.of(method) if seed in runs.of(REFERENCE)]
        if method == REFERENCE or not seeds:
            continue
        ranked = np.argsort(_gaps(runs, method, seeds[0]), kind="stable").tolist()
        ours, theirs = runs.of(method)[seeds[0]].outputs, runs.of(REFERENCE)[seeds[0]].outputs
        for word, order in (("wins", ranked[::-1]), ("loses", ranked)):
            number = next(number for number in order if number not in shown)
            shown.add(number)
            lines += [
                "",
                f"**{NAMES[method]} {word}**: {meanings[number][0]}",
                "",
                f"- {NAMES[method]}: {ours[number]}",
                f"- {NAMES[REFERENCE]}: {theirs[number]}",
                f"- one of {len(meanings[number][1])} references: {meanings[number][1][0]}",
            ]
    return [*lines, ""] if len(lines) > 3 else []
