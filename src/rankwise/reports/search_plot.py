"""The search of ``--learning-rate auto`` as one self-contained SVG: the loss at each rate, a line for each round."""

from __future__ import annotations

import itertools
import math

from rankwise.records import RateSearch
from rankwise.reports.figure import Frame, document, dot, group, label, marker
from rankwise.reports.numbers import plural, rate, significant
from rankwise.reports.scale import spread, value_range

TOP, HEIGHT = 78, 260
LABEL_GAP = 17


def search_svg(search: RateSearch, title: str) -> str:
    """Rates on a logarithmic axis; a ring marks the chosen one. Rates that diverged have no point."""
    rounds = [
        (steps, [(math.log10(trial["learning_rate"]), trial["loss"]) for trial in trials])
        for steps, trials in itertools.groupby(search["trials"], key=lambda trial: trial["steps"])
    ]
    shown = [(steps, sorted((x, loss) for x, loss in points if loss is not None)) for steps, points in rounds]
    # A rate that all but diverges would flatten the others: its point stands at the top.
    top = 2 * min((loss for _, points in shown for _, loss in points), default=1.0)
    rates = sorted({x for _, points in rounds for x, _ in points})
    frame = Frame.of(
        value_range(rates, air=0.05), value_range([min(y, top) for _, points in shown for _, y in points]), HEIGHT
    )
    parts = [frame.grid(5), frame.base(rates, [rate(10**x) for x in rates])]
    heights = spread([frame.y(min(points[-1][1], top)) for _, points in shown], LABEL_GAP, 0, HEIGHT)
    for number, ((steps, points), height) in enumerate(zip(shown, heights)):
        parts.append(
            group(
                f"m{number % 8}",
                frame.curve([(x, min(y, top)) for x, y in points], "evaluation"),
                *(
                    marker(
                        number, frame.x(x), round(frame.y(min(y, top)), 1), tip=f"{rate(10**x)}: {significant(y, 4)}"
                    )
                    for x, y in points
                ),
                label(frame.x(points[-1][0]), height + 4, plural(steps, "step"), "name halo", dx=10),
            )
        )
    chosen = [(x, y) for x, y in shown[-1][1] if abs(x - math.log10(search["chosen"])) < 1e-9]
    parts += [group("m1", dot(frame.x(x), round(frame.y(y), 1), 9, "ring")) for x, y in chosen]
    rows = plural(search["rows"], "training row")
    caption = f"loss on {rows} that the short runs did not see; chosen: {rate(search['chosen'])}"
    return document(TOP, HEIGHT, title, caption, *parts)
