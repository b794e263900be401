"""The picture of table 1: BLEU of each method against LoRA's, with its interval, and the memory of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

from rankwise.reports.plots import STYLE_FILE, colour, svg_of

WIDTH, ROW, FRAME = 640, 34, 96


@dataclasses.dataclass(frozen=True)
class Bar:
    method: str
    bleu: float
    # Of its BLEU and that of the reference method, with half of its 95 % interval.
    difference: float
    half_width: float
    peak_bytes: int


def picture(bars: Sequence[Bar], model: str) -> Markup:
    """A row for each method: a dot at its difference, the paired interval, BLEU and the peak memory as text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=STYLE_FILE):
        figure = Figure(figsize=(WIDTH / 72, (FRAME + ROW * len(bars)) / 72))
        figure.suptitle(f"{model} on E2E: BLEU, r = 4", x=0.01, ha="left")
        axes = figure.subplots()
        for row, bar in enumerate(bars):
            axes.errorbar(bar.difference, row, xerr=bar.half_width, fmt="o", color=colour(0), elinewidth=2, capsize=4)
            axes.annotate(f"{bar.bleu:.1f}", (bar.difference, row), (0, 7), textcoords="offset points", ha="center")
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_yticks(range(len(bars)), [bar.method for bar in bars])
        memory = axes.secondary_yaxis("right")
        memory.set_yticks(range(len(bars)), [f"{bar.peak_bytes / 1e9:.2f} GB" for bar in bars])
        memory.spines["right"].set_visible(False)
        axes.annotate("peak memory", (1, 1), (8, 0), xycoords="axes fraction", textcoords="offset points")
        axes.set(xlabel="BLEU above LoRA's, with its paired 95 % interval", ylim=(len(bars) - 0.4, -0.7))
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        told = ", ".join(f"{bar.method} {bar.bleu:.1f} ({bar.difference:+.1f} ± {bar.half_width:.1f})" for bar in bars)
        return svg_of(figure, f"BLEU on E2E, and above LoRA's: {told}")
