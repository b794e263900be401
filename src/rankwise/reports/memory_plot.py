"""Bars of measured memory, each with a mark at the predicted value."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from rankwise.reports.figure import across, group, line, plot, strip_axis, tag
from rankwise.reports.folder import Comparison
from rankwise.reports.numbers import MINUS, byte_size, is_number
from rankwise.reports.scale import Scale, nice_ticks, tick_label

ROW_HEIGHT = 26
GB = 1e9


def memory_scale(comparison: Comparison, limit: float | None = None) -> Scale:
    """From 0, in gigabytes, to the largest bar, mark or limit."""
    values = [limit] if is_number(limit) else []
    for name in comparison.ranked():
        facts = comparison["methods"][name]
        values += [facts[key] for key in ("peak_memory_bytes", "predicted_peak_memory_bytes") if is_number(facts[key])]
    return Scale(0, 1.04 * max(values, default=1.0) / GB, 0, 100)


def memory_row(facts: Mapping[str, float | None], number: int, scale: Scale, limit: float | None = None) -> Markup:
    """One method's bar and mark."""
    measured, predicted = facts["peak_memory_bytes"], facts["predicted_peak_memory_bytes"]
    parts = []
    if is_number(measured):
        bar = tag("rect", x="0", y=5, height=ROW_HEIGHT - 10, width=across(scale(measured / GB)), rx=2, class_="bar")
        parts.append(group(f"m{number}", bar))
    if is_number(predicted):
        x = scale(predicted / GB)
        parts.append(line(x, 1, x, ROW_HEIGHT - 1, "predicted"))
    if is_number(limit):
        parts.append(line(scale(limit / GB), 0, scale(limit / GB), ROW_HEIGHT, "limit"))
    return plot(ROW_HEIGHT, f"measured {byte_size(measured)}, predicted {byte_size(predicted)}", *parts)


def memory_axis(scale: Scale) -> Markup:
    ticks = nice_ticks(0, scale.high, 4)
    *others, last = (tick_label(tick, ticks) for tick in ticks)
    return strip_axis("gigabytes", scale, ticks, [*others, f"{last} GB"])


def prediction_error(facts: Mapping[str, float | None]) -> str:
    """``+3.1 %``: predicted over measured, or nothing where one is missing."""
    measured, predicted = facts["peak_memory_bytes"], facts["predicted_peak_memory_bytes"]
    if not is_number(measured) or not is_number(predicted) or not measured:
        return ""
    error = 100 * (predicted / measured - 1)
    return f"{error:+.1f} %".replace("-", MINUS)
