"""A heat map for each method of how much each layer changed: rows are kinds of modules, columns are layers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from rankwise.reports.figure import across, label, plot, tag
from rankwise.reports.folder import Comparison
from rankwise.reports.naming import layer_and_kind, method_name
from rankwise.reports.numbers import is_number, significant

CELL = 17
LONGEST_NAME = 11


@dataclasses.dataclass(frozen=True)
class Norms:
    """The mean over seeds of the update's norm, by kind of module and layer; of modules of one kind in a layer, as of
    experts, the mean. ``outside`` are modules in no layer.
    """

    method: str
    cells: Mapping[tuple[str, int], float]
    outside: Mapping[str, float]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.cells))

    @property
    def layers(self) -> int:
        return max((layer for _, layer in self.cells), default=-1) + 1

    @property
    def largest(self) -> float:
        return max([*self.cells.values(), *self.outside.values()], default=0.0)


def norms_of(comparison: Comparison, method: str) -> Norms | None:
    found: dict[str, list[float]] = defaultdict(list)
    for run in comparison.finals_of(method):
        for module, norm in (run["update_norms"] or {}).items():
            if is_number(norm):
                found[module].append(norm)
    if not found:
        return None
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    outside: dict[str, float] = {}
    for module, norms in found.items():
        layer, kind = layer_and_kind(module)
        if layer is None:
            outside[module] = fmean(norms)
        else:
            cells[kind, layer] += norms
    return Norms(method, {place: fmean(norms) for place, norms in cells.items()}, outside)


def norms_svg(norms: Norms, number: int, largest: float) -> Markup:
    """Cells as dark as their share of ``largest``, which is the same for all methods."""
    kinds, layers = norms.kinds, max(norms.layers, 1)
    parts = []
    for row, kind in enumerate(kinds):
        name = kind if len(kind) <= LONGEST_NAME else f"{kind[: LONGEST_NAME - 1]}…"
        parts.append(label(0, row * CELL + 12.5, name, "tick", dx=-6, anchor="end"))
        parts += [_cell(norms, kind, layer, row, layers, largest) for layer in range(layers)]
    height = CELL * len(kinds)
    parts += [_layer_label(layer, layers, height) for layer in _shown(layers)]
    heat = tag("g", *parts, class_=f"m{number}")
    return plot(height, f"norms of the updates of {method_name(norms.method)}", heat, below=20, left=76, right=4)


def _cell(norms: Norms, kind: str, layer: int, row: int, layers: int, largest: float) -> Markup:
    value = norms.cells.get((kind, layer))
    if value is None:
        return Markup("")
    share = value / largest if largest else 0.0
    tip = tag("title", f"{kind}, layer {layer}: {significant(value, 3)}")
    width = 100 / layers
    box = {"x": across(layer * width), "width": across(width)}
    return tag("rect", tip, **box, y=row * CELL, height=CELL, class_="cell", fill_opacity=f"{0.06 + 0.94 * share:.3f}")


def _shown(layers: int) -> Sequence[int]:
    """Layers with a label: the first, the last, and one in the middle."""
    return sorted({0, (layers - 1) // 2, layers - 1})


def _layer_label(layer: int, layers: int, height: int) -> Markup:
    anchor = "start" if layer == 0 else "end" if layer == layers - 1 else "middle"
    place = {"start": 0.0, "end": 100.0}.get(anchor, (layer + 0.5) * 100 / layers)
    text = f"layer {layer}" if layer == 0 else str(layer)
    return label(place, height + 15, text, "tick", anchor=anchor)
