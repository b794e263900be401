"""Draw the pictures of the pages into ``docs/pictures``: methods as boxes, a plan as bars, the losses of a run, the
memory of a step over its course, a comparison with its report.

python docs/_ext/pictures.py                   from the records that are kept there
python docs/_ext/pictures.py --trace           the same, with `step.json` made anew
python docs/_ext/pictures.py --keep FOLDER     the same, with `comparison` taken from the folder of a comparison
python docs/_ext/pictures.py --time FOLDER     the same, with `standing.json` taken from one that had a `--time`

`step.json` holds what the traces of two steps of the plan found. `plan.json` holds what the first command prints, with
the fields that are drawn, `losses.json` the losses that the second one wrote to `metrics.jsonl`, and `comparison` what
the report of the third one is made from:

    rankwise plan --model meta-llama/Llama-3.1-8B --gpu "RTX 4090" --max-length 2048 --batch-size 1
        --method full,lora,dora,qlora,qdora --json
    rankwise train --model demo --data stdlib --eval-data stdlib --eval-limit 64 --max-steps 100 --eval-steps 10
        --batch-size 4 --max-length 256 --products int8 --output runs/curve
    rankwise compare --model demo --data stdlib --methods lora,dora --seeds 2 --learning-rates 6e-4,1.3e-3
        --max-steps 10 --batch-size 4 --eval-steps 10 --eval-limit 16 --output runs/compare

`standing.json` is from the report of this one, given with 12 minutes and again with 8:

    rankwise compare --model demo --data stdlib --methods lora,dora,qlora --max-steps 12 --batch-size 4
        --eval-limit 48 --max-length 128 --time 12m --output runs/standing
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).parents[1] / "pictures"
# A picture has a ground of its own, since a page may be dark where the system is light.
STYLE = (
    "text{font:15px system-ui,sans-serif;fill:#1b2a41;text-anchor:middle}.left{text-anchor:start}"
    ".ground{fill:#fff}.frozen{fill:#dbe4f3;stroke:#7a93bd}.trained{fill:#ffd9a8;stroke:#c77700}"
    ".value{fill:#eef1f5;stroke:#8a94a3}.line{stroke:#5c6b80;stroke-width:1.5;fill:none}.tip{fill:#5c6b80}"
    ".limit{stroke:#c0392b;stroke-width:2;stroke-dasharray:6 4}"
    ".c0{stroke:#7a93bd;stroke-width:2;fill:none}.c1{stroke:#c77700;stroke-width:2;fill:none}.d1{fill:#c77700}"
    ".p0{fill:#7a93bd}.p1{fill:#c77700}.p2{fill:#4c9a8a}.p3{fill:#b07aa1}.p4{fill:#9aa5b1}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eefc}.ground{fill:#131720}"
    ".frozen{fill:#26375a;stroke:#6f8bbd}.trained{fill:#5c3d0e;stroke:#f0a53a}.value{fill:#232a35;stroke:#7d8794}"
    ".line{stroke:#a9b5c6}.tip{fill:#a9b5c6}.limit{stroke:#ff7b6b}}"
)
# The terms of a plan, in the order in which they are stacked.
PARTS = {
    "weights": ("weights", "weights_4bit"),
    "trained": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "logits": ("logits",),
    "other": ("transient", "overhead", "idle"),
}
# The boxes of the pair: x, y, width and height.
A, B = (150, 196, 150, 26), (352, 164, 26, 90)


def method(name: str) -> str:
    """The forward pass of ``lora``, ``dora`` or ``qlora``: x through W, and through A and B, added."""
    gained = name == "dora"
    parts = [_box("value", 16, 96, 24, 100, "x"), _arrow(42, 130, 148, 78), _arrow(42, 160, 148, 208)]
    if name == "qlora":
        parts += [_codes(150, 16), _text(225, 154, "W: 4-bit codes and scales, frozen")]
    else:
        parts += [_box("frozen", 150, 16, 150, 120, "W"), _text(225, 154, "out × in, frozen")]
    parts += [_box("trained", *A, "A"), _text(225, 240, "r × in"), _box("trained", *B, "B"), _text(365, 272, "out × r")]
    parts += [_arrow(302, 209, 350, 209), _arrow(302, 78, 428, 138), _arrow(380, 209, 428, 158), _text(424, 200, "s")]
    parts += [f'<circle class="value" cx="444" cy="148" r="15"/>{_text(444, 153, "+")}']
    if gained:
        parts += [_arrow(460, 148, 500, 148), _box("trained", 502, 98, 30, 100, "g"), _text(517, 216, "gain per row")]
        parts += [_text(530, 40, "g = m / ‖W + s B A‖"), _text(530, 62, "m is trained")]
    end = 534 if gained else 460
    parts += [_arrow(end, 148, end + 42, 148), _box("value", end + 44, 98, 24, 100, "y")]
    return _picture(end + 90, 284, parts)


def plan(record: dict[str, Any]) -> str:
    """Stacked bars, one for each method, in GB, beside the memory of the device."""
    top = 40
    methods: dict[str, Any] = record["methods"]
    most = max(sum(item["breakdown"].values()) for item in methods.values()) / 1e9
    # A bar that is far too long is cut, and its number says how long it is.
    limit = record["hardware"]["memory_bytes"] / 1e9
    scale = 400 / min(most, 1.6 * limit)
    parts = [_text(74 + limit * scale, 18, f"{record['hardware']['name']}: {limit:.1f} GB")]
    for number, (name, item) in enumerate(methods.items()):
        y, x, total = top + number * 36, 74.0, sum(item["breakdown"].values()) / 1e9
        parts.append(f'<text class="left" x="8" y="{y + 19}">{name}</text>')
        for shade, terms in enumerate(PARTS.values()):
            width = min(sum(item["breakdown"][term] for term in terms) / 1e9 * scale, 74 + 400 - x)
            parts.append(f'<rect class="p{shade}" x="{x:.1f}" y="{y}" width="{max(width, 0):.1f}" height="26"/>')
            x += max(width, 0)
        # A number stands behind the line of the limit rather than across it.
        said = f"{total:.1f}" if total * scale <= 400 else f"{total:.1f}, cut"
        beside = limit * scale + 82 if abs(x - 74 - limit * scale) < 44 else x + 6
        parts.append(f'<text class="left" x="{beside:.0f}" y="{y + 19}">{said}</text>')
    bottom = top + len(methods) * 36
    at = 74 + limit * scale
    parts.append(f'<line class="limit" x1="{at:.0f}" y1="26" x2="{at:.0f}" y2="{bottom}"/>')
    return _picture(570, bottom + 38, [*parts, *_legend(bottom + 12)])


def step(record: dict[str, Any]) -> str:
    """The memory of two training steps in GB, part after part: a layer's forward pass, ..., the optimizer."""
    limit, top, bottom = record["memory_bytes"] / 1e9, 44, 264
    scale = (bottom - top) / (1.08 * limit)
    parts = []
    for panel, (name, held) in enumerate(record["steps"].items()):
        left, wide = 44 + 266 * panel, 236 / len(held)
        stacks = [[sum(values[:shade]) / 1e3 for _, *values in held] for shade in range(len(PARTS) + 1)]
        for shade, above in reversed([*enumerate(stacks[1:])]):
            # Each area reaches down to the axis; those drawn later cover it.
            stairs = "".join(f"V{bottom - y * scale:.1f}H{left + wide * i:.1f}" for i, y in enumerate(above, 1))
            parts.append(f'<path class="p{shade}" d="M{left} {bottom}{stairs}V{bottom}Z"/>')
        turn, end = left + wide * [phase for phase, *_ in held].index("backward"), left + 236
        parts.append(f'<path class="line" d="M{left} {bottom}H{end}M{turn:.1f} {bottom}v6"/>')
        parts += [_text((left + turn) / 2, bottom + 20, "forward"), _text((turn + end) / 2, bottom + 20, "backward")]
        parts.append(_text(left + 118, 18, f"{name}: {max(stacks[-1]):.1f} GB"))
    at = bottom - limit * scale
    parts.append(f'<line class="limit" x1="44" y1="{at:.0f}" x2="546" y2="{at:.0f}"/>')
    parts.append(f'<text class="left" x="48" y="{at - 7:.0f}">{record["name"]}</text>')
    parts += [_text(22, bottom - gb * scale + 5, f"{gb}") for gb in (0, 5, 10, 15, 20)]
    parts += [_text(22, at + 5, f"{limit:.0f}"), *_legend(bottom + 36)]
    return _picture(570, bottom + 62, parts)


def losses(record: dict[str, list[list[float]]]) -> str:
    """The training loss as a line, the evaluation loss as points on one, by step."""
    values = [loss for points in record.values() for _, loss in points]
    low, high = min(values) - 0.1, max(values) + 0.1
    last = max(step for points in record.values() for step, _ in points)

    def at(point: list[float]) -> tuple[float, float]:
        return 60 + 470 * point[0] / last, 20 + 200 * (high - point[1]) / (high - low)

    parts = [f'<path class="line" d="M60 20V220H530"/>{_text(295, 262, "step")}{_text(60, 240, "0")}']
    parts += [_text(530, 240, f"{last:.0f}"), _text(30, 34, f"{high:.1f}"), _text(30, 224, f"{low:.1f}")]
    parts += [_text(30, 130, "loss")]
    for number, (name, points) in enumerate(record.items()):
        places = [at(point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="c{number}" points="{path}"/>')
        parts += [f'<circle class="d{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places if number]
        parts.append(f'<line class="c{number}" x1="296" y1="{36 + 24 * number}" x2="328" y2="{36 + 24 * number}"/>')
        parts.append(f'<text class="left" x="336" y="{41 + 24 * number}">{name}</text>')
    return _picture(560, 274, parts)


def traced() -> dict[str, Any]:
    """The record of `step`: the phase of each part of a step, and its highest megabytes for each of PARTS."""
    from rankwise.models import load_skeleton
    from rankwise.planning.extend import layers_path
    from rankwise.planning.plan import make_plan, source_or_shape
    from rankwise.planning.trace import Traced
    from rankwise.planning.workload import PlanSettings, workload_for

    steps: dict[str, list[list[Any]]] = {}
    for name, saves in (("LoRA", False), ("LoRA with checkpointing", True)):
        settings = PlanSettings(
            model="meta-llama/Llama-3.1-8B",
            gpu="RTX 4090",
            method=("lora",),
            max_length=2048,
            batch_size=1,
            gradient_checkpointing=saves,
        )
        plan = make_plan(settings)
        beside = plan.rows[0].estimate.breakdown
        skeleton = load_skeleton(source_or_shape(plan.model)[0])
        model = Traced(
            skeleton, "lora", workload := workload_for(settings, plan.hardware), layers=layers_path(skeleton)
        )
        # What no tensor holds is the same in all parts.
        constant = {term: beside[term] for term in ("overhead", "idle")}
        steps[name] = [
            [
                place.phase,
                *(round(sum((terms | constant).get(term, 0) for term in part) / 1e6) for part in PARTS.values()),
            ]
            for place, terms in model.peaks(workload).items()
        ]
    return {"name": plan.hardware.name, "memory_bytes": plan.hardware.memory_bytes, "steps": steps}


def compared() -> dict[str, str]:
    """The report of the comparison that is kept, its plot of differences as a file of its own, and a standing."""
    from rankwise.reports import page, plots
    from rankwise.reports.comparison import Comparison
    from rankwise.reports.words import method_numbers

    folder = PICTURES / "comparison"
    found = Comparison(json.loads((folder / "report.json").read_text(encoding="utf-8")), folder)
    timed = json.loads((PICTURES / "standing.json").read_text(encoding="utf-8"))
    drawn = {
        "forest.svg": plots.forest(found.differences_from_best()),
        "standing.svg": plots.standing(timed["standings"], method_numbers(timed["methods"]), timed["best"]),
    }
    # In a file of its own a plot has a ground, and the colours of light and dark.
    own = {name: str(plot).replace(">", f">{plots.OWN_STYLE}", 1) + "\n" for name, plot in drawn.items()}
    return own | {"../_static/report.html": page.page(found)}


def keep_standing(folder: Path) -> None:
    """Copy what the plot of the standing over time is made from."""
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    kept = {"standings": document["standings"], "methods": [*document["methods"]]}
    text = json.dumps(kept | {"best": document["recommendation"]["best"]})
    (PICTURES / "standing.json").write_text(f"{text}\n", encoding="utf-8")


def keep(folder: Path) -> None:
    """Copy what the report is made from, without what each run's record repeats and where the model lay."""
    shutil.rmtree(PICTURES / "comparison", ignore_errors=True)
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for run in document["runs"]:
        for name in ("settings", "versions", "device", "data", "base_model", "files"):
            del run[name]
    document["model"]["path"] = None
    for path in [*folder.glob("runs/*/metrics.jsonl"), *folder.rglob("evaluation/*/*.jsonl")]:
        if "best" not in path.parts:
            place = PICTURES / "comparison" / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    (PICTURES / "comparison" / "report.json").write_text(json.dumps(document) + "\n", encoding="utf-8")


def pictures() -> dict[str, str]:
    """Each file's name and its text."""
    drawn = {f"{name}.svg": method(name) for name in ("lora", "dora", "qlora")}
    for draw in (plan, losses, step):
        record = json.loads((PICTURES / f"{draw.__name__}.json").read_text(encoding="utf-8"))
        drawn[f"{draw.__name__}.svg"] = draw(record)
    return drawn | compared()


def _picture(width: float, height: float, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    ground = f'<rect class="ground" width="{width}" height="{height}" rx="8"/>'
    return f"{head}<style>{STYLE}</style>{ground}{''.join(parts)}</svg>\n"


def _legend(y: float) -> list[str]:
    parts = []
    for shade, (x, part) in enumerate(zip((8, 98, 182, 306, 384), PARTS)):
        parts.append(f'<rect class="p{shade}" x="{x}" y="{y}" width="14" height="14"/>')
        parts.append(f'<text class="left" x="{x + 20}" y="{y + 12}">{part}</text>')
    return parts


def _box(shade: str, x: float, y: float, width: float, height: float, name: str) -> str:
    rect = f'<rect class="{shade}" x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>'
    return rect + _text(x + width / 2, y + height / 2 + 5, name)


def _codes(x: float, y: float) -> str:
    """Rows of a packed matrix: codes of sixteen shades, and beside each block its scale."""
    cells = [
        f'<rect class="frozen" x="{x + 16 * column}" y="{y + 20 * row}" width="16" height="20" '
        f'fill-opacity="{(1 + (5 * row + 7 * column) % 16) / 16:.2f}"/>'
        for row in range(6)
        for column in range(8)
    ]
    scales = [f'<rect class="value" x="{x + 134}" y="{y + 20 * row}" width="16" height="20"/>' for row in range(6)]
    return "".join(cells + scales)


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
    along, across = (to_x - x) / length, (to_y - y) / length
    base_x, base_y = to_x - 8 * along, to_y - 8 * across
    tip = (
        f"{to_x:.1f},{to_y:.1f} {base_x - 4 * across:.1f},{base_y + 4 * along:.1f} "
        f"{base_x + 4 * across:.1f},{base_y - 4 * along:.1f}"
    )
    line = f'<line class="line" x1="{x}" y1="{y}" x2="{base_x:.1f}" y2="{base_y:.1f}"/>'
    return f'{line}<polygon class="tip" points="{tip}"/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{text}</text>'


if __name__ == "__main__":
    if "--trace" in sys.argv:
        (PICTURES / "step.json").write_text(json.dumps(traced()) + "\n", encoding="utf-8")
    if "--keep" in sys.argv:
        keep(Path(sys.argv[-1]))
    if "--time" in sys.argv:
        keep_standing(Path(sys.argv[-1]))
    for name, text in pictures().items():
        (PICTURES / name).write_text(text, encoding="utf-8")
