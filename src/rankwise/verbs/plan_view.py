"""A plan on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rankwise.constants import LONG_RUN, MOST_ROUNDED_ONCE
from rankwise.methods import method_of
from rankwise.objectives import OBJECTIVES
from rankwise.planning.advice import disk_words, mapped_weights, peak_words, verdict_of, with_rounded
from rankwise.planning.hardware import CARDS
from rankwise.planning.speed import NOMINAL_CARD, eight_bits_share
from rankwise.planning.workload import DTYPE_BYTES
from rankwise.reports.numbers import byte_size, duration, plural
from rankwise.verbs.output import Output, light_table

if TYPE_CHECKING:
    from rankwise.planning import MemoryEstimate, Workload
    from rankwise.planning.plan import MethodRow, Plan
    from rankwise.planning.real_steps import Check

# Column -> terms of the breakdown. "trained": adapters (in ``full``: nothing), gradients and optimizer states.
PARTS: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights_4bit", "weights"),
    "trained": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "logits": ("logits",),
    "transient": ("transient",),
    "overhead": ("overhead",),
    "idle": ("idle",),
}
VERDICT_STYLES = {"fits": "green", "tight": "yellow", "from disk": "yellow", "too big": "red"}
APPLE = (
    "an Apple GPU has none of our kernels, and none was measured: the step is counted as PyTorch's own, 4-bit weights "
    "are made dense in every pass (RW608), and bitsandbytes' optimizers are refused (RW116)."
)
LABEL = 12


def show(plan: Plan, command: str | None, output: Output, *, why: bool) -> None:
    """Print everything for people, ``why`` the reasons too; with ``--json`` it goes to stderr."""
    for line in heading(plan):
        output.line(line)
    output.line()
    output.console.print(table(plan))
    output.line()
    unplanned = [(f"{item.method}:", f"cannot be planned: {item.code}: {item.message}") for item in plan.unplanned]
    advice = [*recommendation_lines(plan, command), *(reason_lines(plan) if why else [])]
    print_lines([*advice, *unplanned, *change_lines(plan), *footnotes(plan, why=why)], output)


def heading(plan: Plan) -> Iterator[str]:
    work, hardware = plan.workload, plan.hardware
    note = f" ({hardware.note})" if hardware.note else ""
    each = " each" if hardware.sharers > 1 else ""
    many = "" if work.devices == 1 else f"{work.devices} {'processes of' if each else 'x'} "
    yield f"{plan.model} on {many}{hardware.name}: {byte_size(hardware.memory_bytes)}{each}{note}"
    parts = [
        f"batch {work.batch_size} x {work.max_length:,} tokens",
        *([f"accumulation {plan.accumulation}"] if plan.accumulation > 1 else []),
        *(["packed"] if work.packing else []),
        work.dtype,
        f"r {work.r} on {_targets(work)}",
        work.optimizer,
        *(["gradient checkpointing"] if work.gradient_checkpointing else []),
        *(["activation offloading"] if work.activation_offloading else []),
        *([] if work.fast or plan.hardware.device_type == "mps" else ["not fast"]),
        *([f"{work.strategy} (a device's share)"] if work.devices > 1 else []),
    ]
    yield ", ".join(parts)


def _targets(work: Workload) -> str:
    named = [work.target_modules] if isinstance(work.target_modules, str) else [*(work.target_modules or ())]
    return ",".join([*named, *(work.target_parameters or ())])


def table(plan: Plan) -> Table:
    """One row for each method. Sizes share one unit, which is in the head."""
    largest = max(row.estimate.peak_bytes for row in plan.rows)
    unit, unit_name = (1e9, "GB") if largest >= 0.5e9 else (1e6, "MB")
    result = light_table(gap=1)
    result.add_column(f"in {unit_name}", no_wrap=True)
    for column in ("weights", "trained", "activ.", "logits", "other", "idle", "peak"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("verdict", no_wrap=True)
    result.add_column("largest", justify="right", no_wrap=True)
    result.add_column("whole run" if plan.run_tokens else "tokens/s", justify="right", no_wrap=True)
    for row in plan.rows:
        result.add_row(*_cells(row, plan, unit))
    for item in plan.unplanned:
        result.add_row(item.method, *["-"] * 7, Text("not planned", style="red"), "-", "-")
    return result


def _cells(row: MethodRow, plan: Plan, unit: float) -> list[Text | str]:
    *parts, transient, overhead, idle = grouped(row.estimate.breakdown).values()
    figures = [_figure(size, unit) for size in (*parts, transient + overhead, idle)]
    peak = Text(_figure(row.estimate.peak_bytes, unit), style="bold")
    recommended = row.estimate.method == plan.recommendation.method
    name = Text(row.estimate.method, style="bold" if recommended else "")
    pace = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    time = pace if row.seconds is None else duration(row.seconds)
    return [name, *figures, peak, _verdict(row, unit), _largest(row, plan), time]


def _verdict(row: MethodRow, unit: float) -> Text:
    over = f"{_figure(-row.spare_bytes, unit)} over"
    return Text(over if row.verdict == "too big" else row.verdict, style=VERDICT_STYLES[row.verdict])


def _largest(row: MethodRow, plan: Plan) -> str:
    """Batch x length: the largest batch at this length; where not one row fits, the longest single row."""
    if row.max_batch_size:
        return f"{row.max_batch_size}x{plan.workload.max_length}"
    return f"1x{row.longest_row_tokens}" if row.longest_row_tokens else "-"


def change_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """``batch 4 -> 2: -3.1 GB, +9 % time: fits``, each change by itself."""
    if plan.changes:
        yield "", ""
    label = f"{plan.changes_of}:"
    for change in plan.changes:
        sign = "-" if change.saved_bytes >= 0 else "+"
        ending = "still too big" if change.verdict == "too big" else change.verdict
        yield label, f"{change.label}: {sign}{byte_size(abs(change.saved_bytes))}, {change.time_words}: {ending}"
        label = ""


def recommendation_lines(plan: Plan, command: str | None) -> Iterator[tuple[str, str]]:
    advice = plan.recommendation
    if advice.method is None or command is None:
        work = advice.workload
        yield (
            "nothing",
            f"fits: the smallest run ({advice.estimate.method}, batch {work.batch_size} x {work.max_length:,}, every "
            f"saving on) takes {byte_size(advice.estimate.peak_bytes)}, {byte_size(advice.missing_bytes)} more than "
            f"there is. Take a smaller model, or {larger_card(advice.estimate)}.",
        )
        return
    yield "take", f"{advice.method}, {settings_sentence(plan)}"
    if plan.rate is not None:
        yield "", f"learning rate {plan.rate}"
    if advice.is_tight:
        most = byte_size(advice.estimate.most_bytes)
        yield "tight", f"nothing smaller fits: with its error the peak may reach {most}, and memory may run out."
    yield "run", command
    yield from (("serve" if index == 0 else "", text) for index, text in enumerate(advice.serving))


def reason_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    for index, rule in enumerate(plan.recommendation.reasons):
        yield "because" if index == 0 else "", f"{rule.reason} [{rule.source}]"


def larger_card(estimate: MemoryEstimate) -> str:
    """The GPU with the least memory that holds this run with its error."""
    enough = [card for card in CARDS if card.usable_bytes >= estimate.most_bytes and not card.name.startswith("Apple")]
    if not enough:
        return "several GPUs"
    smallest = min(enough, key=lambda card: card.usable_bytes)
    return f"a larger GPU: the smallest in the table that holds it is {smallest.name} ({smallest.memory_gib:g} GiB)"


def settings_sentence(plan: Plan) -> str:
    advice = plan.recommendation
    work, chosen = advice.workload, advice.settings
    times = chosen["gradient_accumulation"]
    accumulated = f" x {times} accumulated" if times > 1 else ""
    parts = [f"batch {work.batch_size}{accumulated}, {work.max_length:,} tokens a row"]
    if not method_of(advice.estimate.method).trains_all:
        parts.append(f"r {work.r} on {_targets(work)}")
    parts.append(f"gradient checkpointing {'on' if work.gradient_checkpointing else 'off'}")
    if work.activation_offloading:
        parts.append("activation offloading on")
    parts.append(work.optimizer)
    own, pace = advice.estimate, advice.tokens_per_second
    time = "" if pace is None else f", {pace:,.0f} tokens/s"
    if advice.seconds is not None:
        time = f", {duration(advice.seconds)} for the whole run"
    return f"{', '.join(parts)}: {peak_words(own)}{time}, {own.trainable_parameters:,} parameters trained"


def footnotes(plan: Plan, *, why: bool) -> Iterator[tuple[str, str]]:
    yield "", ""
    if plan.recommendation.reasons and not why:
        yield "because", "--why prints the reasons, with their sources"
    if plan.unreached is not None:
        yield "shape", f"of {plan.model} as built in: {plan.unreached}"
    error = max(row.estimate.error for row in plan.rows)
    rows = "Every row is taken to be full."
    if plan.counted_rows is not None:
        rows = f"The batch is the largest of {plural(plan.counted_rows, 'row')}; time is that of their mean."
    yield "peak", f"idle process + training; the training part may err by ±{100 * error:.0f} %. {rows}"
    mapped = [mapped_weights(row.estimate, "cpu") for row in plan.rows if row.verdict == "from disk"]
    if mapped:
        yield (
            "from disk",
            (
                "fits without the base's weights, which a CPU maps from files and reads again in each step: up to "
                f"{byte_size(max(mapped))}, {disk_words(max(mapped), plan.disk_bytes_per_second)}."
            ),
        )
    if plan.pace_basis is None:
        yield (
            "time",
            "no speed is known of this device; changes in time count operations and bytes at the ratio of an "
            f"{NOMINAL_CARD}.",
        )
    else:
        yield "time", plan.pace_basis
    share = min(eight_bits_share(row.estimate.method, plan.workload) for row in plan.rows)
    if plan.workload.products == "auto" and share < 1:
        has_reference = OBJECTIVES[plan.workload.objective].beta > 0
        ending = "" if has_reference else f", and in the last quarter of {LONG_RUN} steps or more,"
        yield (
            "8 bits",
            "times hold if train's measurement on the model and its first rows admits 8-bit products of frozen "
            f"weights; else{ending} adapters' steps take {1 / share:.1f} times as long, with the same peak.",
        )
        yield from rounded_lines(plan)
    if plan.hardware.device_type == "cuda" and any(method_of(row.estimate.method).four_bits for row in plan.rows):
        yield "", "4-bit weights are made dense anew in every pass: what that takes is calibrated on published steps."
    if plan.workload.devices > 1:
        yield "devices", "sizes are one device's share; time counts all of them and no communication between them."
        yield from network_lines(plan)
    if plan.hardware.device_type == "mps":
        yield "device", APPLE
    if plan.hardware.kind == "card":
        yield "GPU", f"{plan.hardware.source}; its memory is what torch can take of it"
    seen: dict[str, list[str]] = {}
    for row in plan.rows:
        for note in row.estimate.notes:
            seen.setdefault(note, []).append(row.estimate.method)
    for note, methods in seen.items():
        yield "note", note if len(methods) == len(plan.rows) else f"{', '.join(methods)}: {note}"


def rounded_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Where rounded weights are kept between passes. Not every weight of the base is rounded."""
    dense = [row for row in plan.rows if eight_bits_share(row.estimate.method, plan.workload) < 1]
    dense = [row for row in dense if not method_of(row.estimate.method).four_bits]
    if not dense or plan.workload.sequences * plan.workload.max_length > MOST_ROUNDED_ONCE:
        return
    more = dense[0].estimate.breakdown["weights"] // DTYPE_BYTES[plan.workload.dtype]
    larger = [with_rounded(row.estimate, more) for row in dense]
    fit = [each.method for each in larger if verdict_of(each, plan.hardware.memory_bytes) == "fits"]
    where = f"which fits with {', '.join(fit)}" if fit else "for which there is no room"
    yield "", f"in passes this short, dense weights are rounded once and kept: at most {byte_size(more)} more, {where}."


def network_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """The bytes that a step sends, and the bandwidth from which on sending them takes no extra time."""
    label = "network"
    for row in plan.rows:
        needed = row.network_bytes_per_second
        hidden = "" if needed is None else f", hidden behind the computation from {byte_size(needed)}/s on"
        yield label, f"{row.estimate.method}: a device sends {byte_size(row.network_bytes)} in a step{hidden}"
        label = ""


def grouped(breakdown: Mapping[str, int]) -> dict[str, int]:
    """The breakdown by the table's columns."""
    return {column: sum(breakdown.get(term, 0) for term in terms) for column, terms in PARTS.items()}


def check_lines(check: Check) -> Iterator[tuple[str, str]]:
    """Predicted against measured."""
    where = "torch's allocator" if check.device_type == "cuda" else "growth of the process's anonymous memory"
    yield "", ""
    yield (
        "check",
        f"{check.method}, three real steps here ({check.device_type}, random weights): predicted "
        f"{byte_size(check.predicted_bytes)}, measured {byte_size(check.measured_bytes)} ({where}): "
        f"{check.error:+.1%}".replace("%", " %"),
    )
    seconds = sorted(check.step_seconds)[len(check.step_seconds) // 2]
    yield "", f"a step took {seconds:.2f} s"


def print_lines(lines: Iterable[tuple[str, str]], output: Output) -> None:
    """Labels, and wrapped text beside them. A command is one line, so that it can be copied."""
    for label, text in lines:
        if label == "run":
            output.line(f"{label:<{LABEL}}{text}")
            continue
        width = max(40, min(output.console.width, 110) - LABEL)
        for index, line in enumerate(textwrap.wrap(text, width, break_on_hyphens=False) or [""]):
            output.line(f"{label if index == 0 else '':<{LABEL}}{line}".rstrip())


def _figure(size_bytes: float, unit: float) -> str:
    value = size_bytes / unit
    if unit == 1e6 or value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
