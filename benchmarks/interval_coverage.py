"""How often verdicts of a comparison are false, and how often a detectable effect is found, in simulated comparisons.

    python benchmarks/interval_coverage.py

writes ``benchmarks/results/interval_coverage.md``, and with ``--looks`` ``looks.md``. Each of m methods has S seeds on
n rows in G clusters:

    loss[m, s, i] = 2 + gap[m] + seed[m, s] + method x row[m, i] + rest[m, s, i]

with method x row effects of mean 0, their signs opposite for even and odd m. All verdicts come from ``compare_all``,
the detectable effect from ``minimum_detectable_effect`` with the spreads of 100 pilot comparisons. What ``--time`` runs
next comes from ``conclusions`` and ``next_seeds``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import results
from scipy import stats

from rankwise.comparison.results import conclusions
from rankwise.comparison.statistics import ALPHA, LOOKS, minimum_detectable_effect, paired_by_example, pooled
from rankwise.comparison.verdicts import Scores, Spreads, compare_all, next_seeds
from rankwise.methods import METHODS
from rankwise.records import write_text

ROWS, LEVEL = 300, 2.0
SEED_SD, ROW_SD, REST_SD = 0.002, 0.1, 0.05
PILOTS = 100
SIGMA = 1.3
# Of the lognormal distribution; its skewness is 13.


@dataclasses.dataclass(frozen=True)
class Cell:
    effects: str
    clusters: str = "300"
    seeds: int = 5
    methods: int = 2
    weighted: bool = False
    # By tokens, 3 to 60 a row.
    shared: float = 0.0
    # Part of the effects' variance that all rows of a cluster share.
    seed_sd: float = SEED_SD


SKEWED = "lognormal"
CELLS = (
    *(Cell("Gaussian", seeds=seeds) for seeds in (2, 3, 5, 10)),
    *(Cell("Gaussian", clusters) for clusters in ("100", "20", "20 Zipf")),
    Cell("Gaussian", "100", weighted=True, shared=0.5),
    *(Cell("Gaussian", "100", seeds, methods=4) for seeds in (3, 5)),
    *(Cell("t, 3 degrees", clusters) for clusters in ("300", "20")),
    *(Cell(SKEWED, clusters) for clusters in ("300", "100", "20", "20 Zipf")),
    *(Cell(SKEWED, "20 Zipf", seeds) for seeds in (2, 3, 10)),
    *(Cell(SKEWED, clusters, methods=4) for clusters in ("100", "20 Zipf")),
    *(Cell(SKEWED, clusters, weighted=True) for clusters in ("100", "20 Zipf")),
    *(Cell(SKEWED, clusters, shared=0.5) for clusters in ("100", "20", "20 Zipf")),
)


def cluster_of_row(clusters: str) -> list[int]:
    """(n,) numbers; Zipf: the g-th largest cluster has 1 / g of the rows of the largest."""
    count = int(clusters.split()[0])
    shares = 1 / np.arange(1, count + 1) if "Zipf" in clusters else np.ones(count)
    ends = np.round(np.cumsum(shares) / shares.sum() * ROWS).astype(int)
    return np.searchsorted(ends, np.arange(ROWS), side="right").tolist()


def effects(draw: np.random.Generator, cell: Cell, size: int) -> np.ndarray:
    """Of mean 0 and standard deviation 1."""
    if cell.effects == SKEWED:
        square = math.exp(SIGMA**2)
        return (draw.lognormal(0, SIGMA, size) - math.sqrt(square)) / math.sqrt((square - 1) * square)
    return draw.standard_t(3, size) / math.sqrt(3) if cell.effects.startswith("t") else draw.standard_normal(size)


def simulated(draw: np.random.Generator, cell: Cell, gap: float) -> dict[str, Scores]:
    """The second half of the methods is worse by ``gap``, or better where that is negative."""
    clusters = cluster_of_row(cell.clusters)
    weights = draw.integers(3, 60, ROWS).astype(float) if cell.weighted else np.ones(ROWS)
    found = {}
    for number in range(cell.methods):
        own = math.sqrt(1 - cell.shared) * effects(draw, cell, ROWS)
        own = own + math.sqrt(cell.shared) * effects(draw, cell, max(clusters) + 1)[clusters]
        losses = LEVEL + gap * (number >= cell.methods // 2) + (-1) ** number * ROW_SD * own
        losses = losses + draw.normal(0, cell.seed_sd, (cell.seeds, 1)) + draw.normal(0, REST_SD, (cell.seeds, ROWS))
        values = dict(enumerate(np.average(losses, axis=1, weights=weights).tolist()))
        ids = [str(index) for index in range(ROWS)]
        found[str(number)] = Scores(
            values=values,
            examples=dict(enumerate(losses.tolist())),
            ids=ids,
            weights=weights.tolist(),
            clusters=clusters,
        )
    return found


def examples_of(scores: Scores) -> np.ndarray:
    return np.array([scores.examples[seed] for seed in sorted(scores.examples)])


def students_is_false(scores: dict[str, Scores]) -> bool:
    """Whether the best is apart from another by Student's t with G - 1 degrees and no correction for skewness."""
    best, *others = sorted(scores.values(), key=mean_of)
    return any(_students_level(best, other) < ALPHA / len(others) for other in others)


def _students_level(a: Scores, b: Scores) -> float:
    d, w, clusters = examples_of(a) - examples_of(b), np.array(a.weights) / np.mean(a.weights), np.array(a.clusters)
    delta = d @ w / ROWS
    u = np.stack([np.bincount(clusters, weights=row) for row in w * (d - delta[:, None])]) / ROWS
    S, G = u.shape
    V_rest = G / S * np.sum((u - u.mean(0)) ** 2) / ((S - 1) * (G - 1))
    V_seed, V_rows = delta.var(ddof=1) / S, max(0.0, G / (G - 1) * np.sum(u.mean(0) ** 2) - V_rest)
    levels = np.array([ALPHA, ALPHA / 3])
    half = np.sqrt(stats.t.isf(levels / 2, S - 1) ** 2 * V_seed + stats.t.isf(levels / 2, G - 1) ** 2 * V_rows)
    # The two levels that are asked for: of one comparison and of three.
    return 0.0 if abs(delta.mean()) > half[1] else ALPHA / 2 if abs(delta.mean()) > half[0] else 1.0


def verdicts(scores: dict[str, Scores], margin: float) -> list[tuple[bool, str]]:
    """Of every pair with the best mean: whether its methods are of different halves, and the verdict."""
    found = compare_all("eval_loss", scores, higher_is_better=False, relative_margin=margin / LEVEL)
    half, best = len(scores) // 2, min(scores, key=lambda name: mean_of(scores[name]))
    told = [item for item in found if best in (item["a"], item["b"])]
    return [((int(item["a"]) < half) != (int(item["b"]) < half), item["verdict"]) for item in told]


def mean_of(scores: Scores) -> float:
    return float(np.mean(list(scores.values.values())))


def measured(cell: Cell, times: int) -> list[str]:
    """Shares in per cent: false "better" by Student's t and by ours, false "equivalent" at the margin, effect found."""
    draw = np.random.default_rng(0)
    pilots = [simulated(draw, cell, 0.0) for _ in range(PILOTS)]
    options = {"weights": pilots[0]["0"].weights, "clusters": pilots[0]["0"].clusters}
    pilot = pooled(
        [paired_by_example(examples_of(one["0"]), examples_of(one["1"]), **options) for one in pilots], cell.seeds
    )
    error = pilot.standard_error
    assert error is not None
    students, different, equivalent, found = [], [], [], []
    for number in range(times):
        scores = simulated(draw, cell, 0.0)
        students.append(students_is_false(scores))
        different.append(any(said in ("better", "worse") for _, said in verdicts(scores, 1e-9)))
        if number % 2:
            continue
        margin = 6 * error * (cell.seeds if cell.seeds < 4 else 1)
        # The margin is a share of the mean of all methods, which lies between the halves.
        at_margin = verdicts(simulated(draw, cell, margin), margin / (1 + margin / 2 / LEVEL))
        equivalent.append(any(apart and said == "equivalent" for apart, said in at_margin))
        # Skewed effects make it harder to tell on one side, so both are asked, by turns.
        sign = 1 if number % 4 else -1
        effect = minimum_detectable_effect(
            pilot.parts, comparisons=cell.methods - 1, margin=error, skewness=pilot.skewness
        )
        assert effect is not None
        right = "better" if sign > 0 else "worse"
        found += [said == right for apart, said in verdicts(simulated(draw, cell, sign * effect), error) if apart]
    return [f"{100 * np.mean(shares):.1f}" for shares in (students, different, equivalent, found)]


# --- comparisons that look (--time) ---

# Seeds at which the time is over, steps of a search as a share of a run, and the share of methods whose best rate lies
# at the edge: these try one more in a whole run.
OVER, SEARCH, EDGES = 21, 0.25, 1 / 3
LOOKING = (
    Cell("Gaussian"),
    Cell("Gaussian", seed_sd=0.02),
    *(Cell("Gaussian", "100", methods=4, seed_sd=sd) for sd in (SEED_SD, 0.02)),
    Cell("Gaussian", "20 Zipf", methods=4),
    Cell("t, 3 degrees", "20"),
    *(Cell(SKEWED, clusters, methods=methods) for clusters in ("100", "20", "20 Zipf") for methods in (2, 4)),
    Cell(SKEWED, "20 Zipf", weighted=True),
    Cell(SKEWED, "20 Zipf", methods=4, seed_sd=0.02),
    *(Cell(SKEWED, clusters, shared=0.5) for clusters in ("100", "20", "20 Zipf")),
)


def first(scores: dict[str, Scores], seeds: dict[str, int], looks: tuple[list[str], ...]) -> dict[str, Scores]:
    """The first seeds of each method, as a comparison that looks has them, or one that does not."""
    return {name: dataclasses.replace(scores[name].first(count), looks=looks) for name, count in seeds.items()}


def concluded(scores: dict[str, Scores], margin: float) -> tuple[dict, Spreads]:
    facts = {"ranges": {}, "trainable_parameters": None, "alone": False, "learning_rate_at_edge": False}
    methods = {
        name: {**facts, "mean": {"eval_loss": mean_of(item)}, "seeds": len(item.values), "retained": None}
        for name, item in scores.items()
    }
    spreads = Spreads(scores, metric="eval_loss", margin=margin / LEVEL)
    return conclusions(methods, {"eval_loss": scores}, {"eval_loss": False}, spreads, {}), spreads


@dataclasses.dataclass
class Looked:
    """Verdicts against the best at any look, the runs, and whether it was decided."""

    told: set[tuple[str, str, str]]
    runs: float
    decided: bool


def looked(draw: np.random.Generator, cell: Cell, scores: dict[str, Scores], margin: float, *, late: bool) -> Looked:
    """A comparison until it is decided, no seed would decide it, or the time is over; ``late`` adds half of the methods
    only then.
    """
    names, edges = list(scores), draw.random(len(scores)) < EDGES
    for name in itertools.compress(names, edges):
        # The better of two rates, at both of which the method is as good.
        other = draw.normal(mean_of(scores[name]), math.hypot(cell.seed_sd, REST_SD / math.sqrt(ROWS)))
        less = min(0.0, other - scores[name].values[0])
        scores[name].values[0] += less
        scores[name].examples[0] = [loss + less for loss in scores[name].examples[0]]
    calls = (names[::2], names[1::2]) if late else (names,)
    seeds: dict[str, int] = {}
    found = Looked(set(), SEARCH * len(names) + sum(edges), False)
    for number in range(len(calls)):
        seeds |= dict.fromkeys(calls[number], LOOKS[0])
        following = seeds
        while following and max(following.values()) <= OVER:
            seeds |= following
            now = first(scores, seeds, calls[: number + 1])
            conclusion, spreads = concluded(now, margin)
            told = conclusion["recommendation"]
            pairs = [item for item in conclusion["differences"] if told["best"] in (item["a"], item["b"])]
            found.told |= {(item["a"], item["b"], item["verdict"]) for item in pairs}
            found.decided = told["decided"]
            following = next_seeds(conclusion, now, spreads, seeds)
    found.runs += sum(seeds.values())
    return found


def named(scores: dict[str, Scores], gap: float) -> dict[str, Scores]:
    """The first method better than the others by ``gap``; under names that ``conclusions`` knows."""
    found = {}
    for name, (number, item) in zip(METHODS, enumerate(scores.values())):
        more = gap * (number > 0)
        values = {seed: value + more for seed, value in item.values.items()}
        examples = {seed: [loss + more for loss in losses] for seed, losses in item.examples.items()}
        found[name] = dataclasses.replace(item, values=values, examples=examples)
    return found


def looking(cell: Cell, times: int) -> list[str]:
    """Wrong verdicts in per cent, runs as a share of the fixed design's, and how often each decides."""
    draw, best = np.random.default_rng(0), next(iter(METHODS))
    fixed, long = (dataclasses.replace(cell, seeds=seeds) for seeds in (LOOKS[0], OVER))
    pilots = [simulated(draw, fixed, 0.0) for _ in range(PILOTS)]
    options = {"weights": pilots[0]["0"].weights, "clusters": pilots[0]["0"].clusters}
    pilot = pooled([paired_by_example(*map(examples_of, (one["0"], one["1"])), **options) for one in pilots], LOOKS[0])
    error = pilot.standard_error
    assert error is not None
    effect = minimum_detectable_effect(pilot.parts, comparisons=cell.methods - 1, margin=error, skewness=pilot.skewness)
    assert effect is not None

    def apart(told: Looked) -> bool:
        return any(said in ("better", "worse") for _, _, said in told.told)

    counts = [look for look in LOOKS if look <= OVER]
    different, late, equivalent, runs, decided, by_seeds = [], [], [], [], [], []
    for number in range(times):
        different.append(apart(looked(draw, cell, named(simulated(draw, long, 0.0), 0.0), 1e-9, late=False)))
        late.append(apart(looked(draw, cell, named(simulated(draw, long, 0.0), 0.0), 1e-9, late=True)))
        if number % 2:
            continue
        margin = 6 * error
        told = looked(draw, cell, named(simulated(draw, long, 0.0), margin), margin / (1 + margin / LEVEL), late=False)
        equivalent.append(any(best in (a, b) and said == "equivalent" for a, b, said in told.told))
        scores = named(simulated(draw, long, 0.0), effect)
        plain = [first(scores, dict.fromkeys(scores, count), ()) for count in counts]
        by_seeds.append([concluded(one, error)[0]["recommendation"]["decided"] for one in plain])
        told = looked(draw, cell, scores, error, late=False)
        runs.append(told.runs)
        decided.append(told.decided)
    shares = [float(np.mean(found)) for found in (different, late, equivalent, decided)]
    fixed_shares = np.mean(by_seeds, axis=0)
    equal = next((count for count, share in zip(counts, fixed_shares) if share >= shares[-1]), OVER)
    ratio = np.median(runs) / (cell.methods * (3 + equal - 1 + EDGES))
    found = [f"{100 * share:.1f}" for share in (*shares, fixed_shares[0])]
    return [*found, f"{np.median(runs):.1f}", str(equal), f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000, help="simulated comparisons a row; half for some columns")
    parser.add_argument("--looks", action="store_true", help="simulate --time, and write looks.md")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    rows = []
    for cell in LOOKING if given.looks else CELLS:
        clusters = cell.clusters + (", shared" if cell.shared else "") + (", tokens" if cell.weighted else "")
        facts = [cell.effects, clusters, f"{cell.seed_sd:g}" if given.looks else str(cell.seeds), str(cell.methods)]
        rows.append([*facts, *(looking if given.looks else measured)(cell, given.times)])
        print(*rows[-1], sep="  ", flush=True)
    headings = ["method x row effects", "clusters", "sd of seeds" if given.looks else "seeds", "methods"]
    if given.looks:
        headings += ["false better or worse", "the same, methods added", "false equivalent", "decides"]
        headings += ["3 fixed seeds decide", "runs", "fixed seeds that decide as often", "runs / theirs"]
    else:
        headings += ["false better or worse, Student's t", "false better or worse", "false equivalent", "effect found"]
    title, about = ("with looks", ABOUT_LOOKS) if given.looks else ("", ABOUT)
    lines = [
        f"# How often verdicts are false {title}".strip(),
        "",
        f"`{results.command()}`, rankwise {results.commit()}",
        "",
    ]
    lines += [about.format(times=given.times), "", *results.table(headings, rows)]
    write_text(given.output / ("looks.md" if given.looks else "interval_coverage.md"), "\n".join(lines) + "\n")


ABOUT = """In per cent of {times} simulated comparisons of 300 rows (half as many in the last two columns), through the
functions that `rankwise compare` uses.

- **False better or worse**: methods without a difference, and one is called worse than the one with the best mean. The
  goal is 5 for two methods; of more, the correction only promises that a given one is called worse in at most 5.
  *Student's t* is an interval of clustered errors with G - 1 degrees of freedom, without a correction of skewness.
- **False equivalent**: methods that differ from the best one by exactly the margin, and one is called equivalent.
- **Effect found**: the methods differ by what `minimum_detectable_effect` gives for these spreads; the goal is 80.

*Zipf*: the g-th largest cluster has 1 / g of the rows of the largest. *Shared*: half of the effects' variance is common
to the rows of a cluster. *Tokens*: rows weigh 3 to 60. The lognormal distribution has a sigma of 1.3."""


ABOUT_LOOKS = """In per cent of {times} simulated comparisons with `--time` of 300 rows (half as many in the columns
from *false equivalent* on), through the functions that `rankwise compare` uses, up to 21 seeds. A
search costs 0.25 runs; a third of the methods try one more rate in a whole run and keep the better
one. Methods that are worse get no more seeds.

- **False better or worse**: methods without a difference, and at some look one is called worse than the one with the
  best mean. *Methods added*: half of them take part only after the others were done. The goal is 5.
- **False equivalent**: the best method is ahead by exactly the margin, and at some look one is called equivalent to
  it.
- **Decides**: the best method is ahead by the smallest difference that three fixed seeds find, and at the end it is
  decided; beside it, how often three fixed seeds decide the same comparisons.
- **Runs**: the median until it stops, and that as a share of the runs of the fixed design (three rates, one more for
  a third of the methods) with the fewest seeds that decides as often.

The settings are those of [the fixed design's page](interval_coverage.md); the standard deviation of the seeds is
0.002 there, where the spread over rows dominates, and 0.02 in the rows of this table where that over seeds does."""


if __name__ == "__main__":
    main()
