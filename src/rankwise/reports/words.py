"""Names of methods and metrics, and the verdicts of a comparison in sentences: the one place that turns their fields
into words, at each rendering.

``document`` is the content of ``report.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from rankwise.config import VARIANTS
from rankwise.foreign import Fields
from rankwise.methods import METHODS, method_of
from rankwise.reports.comparison import EVAL_LOSS, unit_of
from rankwise.reports.numbers import (
    byte_size,
    capital,
    duration,
    estimate,
    listed,
    percent,
    plural,
    rate,
    significant,
    visible,
)
from rankwise.serving import refusing

METRICS = {
    "eval_loss": "Evaluation loss",
    "retained.loss": "Retained loss",
    "perplexity.loss": "Loss",
    "perplexity.perplexity": "Perplexity",
    "preference.reward_accuracy": "Reward accuracy",
    "preference.reward_margin": "Reward margin",
    "labels.accuracy": "Accuracy",
    "labels.f1": "F1",
    "labels.mcc": "Matthews' correlation",
    "labels.pearson": "Pearson's correlation",
}
# The most methods that a sentence names; of more it gives the number.
MOST_NAMED = 5
# {cost: predicates of one method and of several that cost more than METHOD}.
COSTS = {
    "wall_seconds": ("takes longer than {}", "take longer than {}"),
    "peak_memory_bytes": ("needs more memory than {}", "need more memory than {}"),
    "trainable_parameters": ("trains more parameters than {}", "train more parameters than {}"),
    "servers": (f"is refused by {refusing('dora')}", f"are refused by {refusing('dora')}"),
    "mean": ("costs the same and has the worse mean", "cost the same and have the worse mean"),
}
NO_TIME = "runs took place side by side or only once, so their times are not compared"


def method_name(method: str) -> str:
    """``lora+pissa`` -> LoRA (PiSSA); ``qlora+pissa+plus`` -> QLoRA (PiSSA, LoRA+)."""
    if method == "lora+plus":
        return "LoRA+"
    _, *words = method.split("+")
    variants = ", ".join(VARIANTS[word][0] if word in VARIANTS else visible(word) for word in words)
    return visible(method_of(method).words) + (f" ({variants})" if words else "")


def long_name(method: str) -> str:
    """The name in a sentence: ``LoRA``, ``full fine-tuning``."""
    return "full fine-tuning" if method_of(method).trains_all else method_name(method)


def method_numbers(methods: Iterable[str]) -> dict[str, int]:
    """A number for each method, which chooses its colour and shape. Those of our own and of LoRA+ never change."""
    fixed = (*METHODS, "lora+plus")
    found = {name: number for number, name in enumerate(fixed) if name in methods}
    free = (number for number in itertools.count() if number not in [*found.values()])
    return found | {name: next(free) for name in methods if name not in fixed}


def metric_name(metric: str) -> str:
    """``eval_loss`` -> Evaluation loss; ``e2e.BLEU`` -> BLEU on e2e."""
    if metric in METRICS:
        return METRICS[metric]
    task, _, figure = metric.partition(".")
    return visible(f"{figure} on {task}" if figure else metric)


def metric_in_sentence(metric: str) -> str:
    """``evaluation loss``, ``BLEU on e2e``: the name in a sentence. A task's own metric keeps its capitals."""
    return METRICS[metric].lower() if metric in METRICS else metric_name(metric)


def last_part(name: object) -> str:
    """The last component of a path of any system or of a hub id; a name without components is unchanged."""
    return PurePath(str(name).replace("\\", "/")).name or str(name)


def standing(found: Fields, metric: str) -> str:
    """``LoRA 0.2842, DoRA +0.0021 ± 0.0054 (cannot tell)``: the best so far, and the others' differences from it."""
    best, methods = found["recommendation"]["best"], found["methods"]
    told = [f"{method_name(best)} {significant(methods[best]['mean'][metric], 4)}"]
    for item in found["differences"]:
        if item["metric"] == metric and best in (item["a"], item["b"]):
            sign, name = (1, item["a"]) if item["b"] == best else (-1, item["b"])
            interval = item["interval"] and sorted(sign * bound for bound in item["interval"])
            verdict = methods[name]["verdict"]
            words = verdict["verdict"] if verdict["p_value"] is not None or verdict["verdict"] == "not tuned" else ""
            figures = " ".join(estimate(sign * item["difference"], interval, signed=True)).strip()
            told.append(f"{method_name(name)} {figures}{words and f' ({words})'}")
    return ", ".join(told)


# --- verdicts ---


def heading(document: Fields) -> str:
    """``LoRA`` or ``Not decided``."""
    found = document["recommendation"]
    return capital(long_name(found["method"])) if found["decided"] else "Not decided"


def headline(document: Fields) -> str:
    """The recommendation and its reasons."""
    sentences = [*_constant(document), *_verdicts(document), *_retained(document), *_open(document), *_costs(document)]
    sentences += [*_untuned(document), *_deciding(document["recommendation"])]
    return " ".join(f"{capital(sentence)}." for sentence in sentences)


def detectable(effect: Fields, unit: str) -> str:
    """``0.014 nats per token (1.1 %)``; empty if nothing could be seen."""
    absolute, relative = effect["absolute"], effect["relative"]
    share = "" if relative is None else percent(relative)
    return share if absolute is None else f"{significant(absolute, 2)} {unit} ({share})".replace("  ", " ")


def smallest_found(effect: Fields) -> str:
    """What a comparison that goes on will see."""
    size = detectable(effect, f"of {visible(effect['metric'])}")
    return f"Smallest difference that 80 % of such comparisons find: {size}, as runs vary that are finished."


def named(names: Sequence[str]) -> str:
    return listed(map(long_name, names)) if len(names) <= MOST_NAMED else f"{len(names)} methods"


def _of(document: Fields, verdict: str) -> list[str]:
    """The methods with this verdict."""
    return [name for name, item in document["methods"].items() if (item["verdict"] or {}).get("verdict") == verdict]


def _constant(document: Fields) -> list[str]:
    """Of answers that are labels: that no method is better than one answer to all rows."""
    metric = document["primary_metric"]
    if "labels" not in document["base"]["tasks"]:
        return []
    figures = document["base"]["tasks"]["labels"]["metrics"]
    value = figures["loss" if metric == EVAL_LOSS else metric.removeprefix("labels.")]
    sign = -1 if metric == EVAL_LOSS else 1
    means = [sign * item["mean"][metric] for item in document["methods"].values() if metric in item["mean"]]
    if max(means) > sign * value:
        return []
    return [
        f"no method is better than the same answer to every row ({metric_in_sentence(metric)} {significant(value, 4)})"
    ]


def _verdicts(document: Fields) -> list[str]:
    """What is known of the recommended method."""
    found, methods = document["recommendation"], document["methods"]
    method, best = found["method"], found["best"]
    about = f"{long_name(method)}{_figures(methods[method], document['primary_metric'])}"
    others = [name for name, item in methods.items() if item["verdict"] and name != best]
    equals = [name for name in found["equals"] if name != method]
    if not others:
        told = "is the only method with a result"
    elif not found["decided"]:
        least = f"it costs the least of those not shown to differ from {long_name(best)}, the best so far"
        told = "is what to take meanwhile: " + ("it is the best so far" if method == best else least)
    elif method != best:
        told = f"counts as equal to {long_name(best)}, the best one"
    elif equals:
        told = f"counts as equal to {named(equals)}"
    else:
        edges = any(methods[name]["learning_rate_at_edge"] for name in others)
        told = "is the best of the tuned methods" if edges else "is the best one"
    worse, better = _of(document, "worse"), _of(document, "better")
    better = [name for name in better if name not in found["forgot"]]
    sentences = [about + " " + told]
    if worse:
        is_are = "is" if len(worse) == 1 else "are"
        sentences.append(f"{named(worse)} {is_are} worse than {long_name(best)}")
    if better:
        sentences.append(f"{named(better)}, for comparison only, {'is' if len(better) == 1 else 'are'} better")
    failed, runs = methods[method]["failed"], methods[method]["failed"] + methods[method]["seeds"]
    return sentences + ([f"{failed} of the {runs} runs of {long_name(method)} failed"] if failed else [])


def _retained(document: Fields) -> list[str]:
    """Which methods lost too much on the retained rows, or else what the recommended one kept of it."""
    found, methods = document["recommendation"], document["methods"]
    own = methods[found["method"]]["retained"]
    if own is None:
        return []
    if forgot := found["forgot"]:
        told = listed(stayed(name, methods[name]["retained"]) for name in forgot)
        margin, is_are = percent(own["margin"] / own["base"]), "is" if len(forgot) == 1 else "are"
        over = f"{is_are} not recommended over {named(found['kept'])}, which kept theirs"
        return [f"{told}, more than the {margin} of --retain-margin, and {over}"]
    return [stayed(found["method"], own)]


def stayed(method: str, kept: Fields) -> str:
    """``LoRA kept its level on the retained rows``, ``DoRA lost 8.1 % on ...``: by the rise of the loss."""
    said = {
        "kept": "{} kept its level on the retained rows",
        "lost": f"{{}} lost {percent(kept['difference'] / kept['base'])} on the retained rows",
        "cannot tell": "it is unclear whether {} kept its level on the retained rows",
    }
    return said[kept["verdict"]].format(long_name(method))


def _open(document: Fields) -> list[str]:
    """What the comparison could have seen, and which methods it could not tell apart."""
    found, effect = document["recommendation"], document["minimum_detectable_effect"]
    unsure = [name for name in found["open"] if name in _of(document, "cannot tell")]
    size = detectable(effect, unit_of(document))
    seen = f"the comparison could detect a difference of {size} with 80 % power"
    seen = seen if size else "the comparison is too small to detect any difference"
    if not unsure:
        return [seen] if sum(item["verdict"] is not None for item in document["methods"].values()) > 1 else []
    margin = f"differences from {percent(found['margin'])} on count (--margin)"
    return [f"the runs cannot tell {named(unsure)} from {long_name(found['best'])}: {seen}, and {margin}"]


def _costs(document: Fields) -> list[str]:
    found, methods = document["recommendation"], document["methods"]
    said = []
    for item in found["costs"]:
        predicate = COSTS[item["cost"]][len(item["methods"]) > 1]
        said.append(f"{named(item['methods'])} {predicate.format(long_name(item['than']))}")
    equal = [found["best"], *found["equals"]]
    if said and not all("wall_seconds" in methods[name]["costs"] for name in equal):
        said.append(NO_TIME)
    return said


def _untuned(document: Fields) -> list[str]:
    names = [name for name, item in document["methods"].items() if item["verdict"] and item["learning_rate_at_edge"]]
    if not names:
        return []
    subject, their = ("is", "its best rate lies") if len(names) == 1 else ("are", "their best rates lie")
    better = [name for name in names if name in document["recommendation"]["open"]]
    more = f", and {named(better)} may be better" if better else ""
    return [f"{named(names)} {subject} not tuned: {their} at the edge of those tried{more}"]


def _deciding(found: Fields) -> list[str]:
    """The run that would decide; its command is shown by itself."""
    if found["decided"]:
        return []
    run = found["deciding"]
    if run is None:
        return []
    rates = f", also at {listed(map(rate, run['learning_rates']))}" if run["learning_rates"] else ""
    size = f"{plural(run['seeds'], 'seed')} and {plural(run['rows'], 'evaluation row')}"
    what = f"{named(run['methods'])} on {size}{rates}, {plural(run['runs'], 'more run')}"
    if run["is_longer"]:
        return [f"no number of seeds or rows that is proposed would decide it; runs of twice the steps may: {what}"]
    return [f"the cheapest run that would decide it: {what}"]


def _figures(item: Fields, metric: str) -> str:
    quality = f"{metric_in_sentence(metric)} {significant(item['mean'][metric], 4)}"
    return f" ({quality}, {byte_size(item['peak_memory_bytes'])}, {duration(item['wall_seconds'])} a run)"
