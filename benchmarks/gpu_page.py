"""The page of `gpu.py`: what its jobs found, in tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contenders
import results
from gpu_jobs import Job

from rankwise.records import write_text

# Multiples of the floor for the 8B shape on an H100 with 8,192 tokens, DoRA's step against LoRA's, MB saved per token,
# and tokens per second against the peers'.
GOAL_MULTIPLE = {"lora": 1.40, "dora": 1.48, "qlora": 1.45, "qdora": 1.55}
GOAL_DORA = 1.07
GOAL_SAVED_MB = {"lora": 3.1, "dora": 3.6}
GOAL_SPEED = {"peft": 1.5, "unsloth": 1.1}
NAMES = {"ours": "ours", "peft": "PEFT", "unsloth": "Unsloth"}

Done = dict[str, Any]
Found = list[tuple[Job, Done]]


def publish(content: dict[str, Any], output: Path) -> list[str]:
    """Write and print the page; gives the checks that failed."""
    done = [(Job.of(one["job"]), one["found"]) for one in content["jobs"].values()]
    failed = failed_checks(done)
    text = "\n".join(markdown(content["about"], done, failed)) + "\n"
    write_text(output / "gpu.md", text)
    print(text)
    return failed


def failed_checks(done: Found) -> list[str]:
    """What was found wrong, and the groups that could not be checked."""
    failed = []
    for job, found in done:
        if job.kind == "check":
            failed += found.get("failed", []) + ([f"{job.what}: {found['note']}"] if found.get("note") else [])
    return failed


def said(job: Job, found: Done) -> str:
    """One job in a line."""
    text = found.get("note", "")
    if job.kind == "check" and not text:
        text = "; ".join([f"{found['passed']} comparisons passed", *(f"FAILED: {line}" for line in found["failed"])])
    if found.get("step_ms") is not None:
        text = f"{found['step_ms']:.1f} ms, {_multiple(found):.2f} of the floor"
    return f"{job.key}: {text or 'done'}"


def markdown(about: Done, done: Found, failed: list[str]) -> list[str]:
    passed = sum(found.get("passed", 0) for _, found in done)
    checks = f"{passed} comparisons with float64 passed, {len(failed)} failed"
    timed = [(job, found) for job, found in done if job.kind in ("model", "layer")]
    return [
        f"# Training steps on {about['card']}",
        "",
        *results.where_from([about]),
        f"CUDA {about['cuda']}. {checks}{''.join(f'; FAILED: {line}' for line in failed)}.",
        "",
        f"bfloat16, r = {contenders.R} on all linear layers, no recomputation, random weights; goals (one H100, 8B, "
        "8,192 tokens) in brackets. `loop`: a plain loop, every token a label; `padded` and `packed`: as `rankwise "
        "train` runs a step, half of the tokens scored. The floor is all frozen products, forward and backward.",
        "",
        *results.table(HEADINGS, [_cells(job, found) for job, found in timed if found.get("step_ms") is not None]),
        "",
        *_against(timed),
        *_four_bits(done),
        *[f"- {job.key}: {found['note']}." for job, found in timed if found.get("note")],
    ]


HEADINGS = ["shape", "tokens", "step", "method", "side", "step ms", "with AdamW", "floor ms", "floor TFLOP/s"]
HEADINGS += ["step / floor", "tokens/s", "saved MB/token", "peak GB", "SM MHz", "W limit"]


def _cells(job: Job, found: Done) -> list[str]:
    # The goals were set for the plain loop of our own.
    is_goal = (job.what, job.form, job.side, job.batch * job.length) == ("Llama 8B", "loop", "ours", 8192)
    saved = found.get("saved_bytes_per_token")
    card = found.get("card_after", {})
    return [
        *(job.what, f"{job.batch} x {job.length}", job.form, job.method, NAMES[job.side]),
        *(results.number(found[key]) for key in ("step_ms", "with_optimizer_ms", "floor_ms")),
        results.number(found.get("floor_tflops"), 0),
        results.judged(_multiple(found), GOAL_MULTIPLE[job.method] if is_goal else None, at_most=True),
        results.number(found.get("tokens_per_second"), 0),
        results.judged(
            None if saved is None else saved / 1e6, GOAL_SAVED_MB.get(job.method) if is_goal else None, at_most=True
        ),
        results.number(None if found.get("peak_bytes") is None else found["peak_bytes"] / 1e9, 1),
        results.number(card.get("sm_mhz"), 0),
        results.number(card.get("power_limit_w"), 0),
    ]


def _multiple(found: Done) -> float:
    return float(found["step_ms"] / found["floor_ms"])


def _against(timed: Found) -> list[str]:
    """Our DoRA beside our LoRA, and our speed beside the peers', of rows that differ in nothing else."""
    steps = {(job.what, job.batch, job.length, job.form, job.method, job.side): found for job, found in timed}
    lines = []
    for place, found in steps.items():
        if found.get("step_ms") is None:
            continue
        *where, method, side = place
        name = f"{where[0]}, {where[1]} x {where[2]}, {where[3]}"
        lora = steps.get((*where, "lora", side), {})
        if method == "dora" and side == "ours" and lora.get("step_ms"):
            ratio = _multiple(found) / _multiple(lora)
            goal = GOAL_DORA if where[0] == "Llama 8B" else None
            lines.append(f"- {name}: our DoRA takes {results.judged(ratio, goal, at_most=True, digits=3)} of our LoRA.")
        ours = steps.get((*where, method, "ours"), {})
        if side in GOAL_SPEED and ours.get("step_ms"):
            ratio = ours["tokens_per_second"] / found["tokens_per_second"]
            goal = GOAL_SPEED[side] if where[0] == "Llama 8B" else None
            judged = results.judged(ratio, goal, at_most=False)
            lines.append(f"- {name}, {method}: {judged} of {NAMES[side]}'s tokens per second.")
    return [*lines, ""] if lines else []


def _four_bits(done: Found) -> list[str]:
    import gpu_four_bits

    for job, found in done:
        if job.kind == "four-bits" and "rows" in found:
            rows = [gpu_four_bits.Row(**row) for row in found["rows"]]
            speed = f"a copy reaches {found['copy_bytes_per_second'] / 1e9:.0f} GB/s."
            return [f"The 4-bit kernels alone; {speed}", "", gpu_four_bits.table(rows), ""]
    return []
