"""Answers that repeat themselves up to the limit of new tokens, and what the losses of their run say about it."""

from __future__ import annotations

from pathlib import Path

from rankwise.cli.output import Output
from rankwise.cli.words import printable
from rankwise.records import read_metrics, record_of
from rankwise.reports.numbers import plural

# The longest phrase that is looked for, how often it must stand at the end, and the characters that this must fill.
PHRASE, TIMES, FILLED = 120, 4, 40
# A loss has settled if it ends below SHARE of the first one and, in the second half of the run, keeps SETTLED of its
# value. It has jumped if it was ever FAR_ABOVE the first one.
SHARE, SETTLED, FAR_ABOVE = 0.5, 0.95, 1.5


def repeated(text: str) -> str | None:
    """The word or short phrase that ``text`` repeats up to its end, which may cut the last one; None without one."""
    for size in range(1, PHRASE + 1):
        end = text[-max(TIMES * size, FILLED) :]
        if len(end) >= max(TIMES * size, FILLED) and end[size:] == end[:-size]:
            # From the beginning of a word.
            return (2 * end[:size])[end[:size].find(" ") + 1 :][:size].strip()
    return None


def cause(adapter: Path, *, base_too: bool) -> str:
    """Why an adapter's answers repeat themselves, as far as the losses beside it tell, and what to do.

    ``base_too``: the base's answers do so, too.
    """
    if base_too:
        return "the base repeats itself too; sample with --temperature 0.7"
    record, lines = record_of(adapter), list(read_metrics(adapter))
    kind = next((name for name in ("eval_loss", "loss") if sum(line.get(name) is not None for line in lines) > 1), None)
    if record is None or record.objective != "sft" or kind is None:
        return "an adapter that repeats itself was trained too little, or its run diverged; see its losses"
    losses = [line[kind] for line in lines if line.get(kind) is not None]
    first, middle, last = losses[0], losses[len(losses) // 2], losses[-1]
    if kind == "eval_loss" and record.eval_loss is not None:
        last = record.eval_loss
    went = f"its {'evaluation' if kind == 'eval_loss' else 'training'} loss went from {first:.2f} to {last:.2f}"
    if max(losses) > FAR_ABOVE * first or last >= first:
        return f"the run diverged: {went}, and up to {max(losses):.2f}; train with a lower --learning-rate"
    if SETTLED * middle <= last <= SHARE * first:
        return f"{went} and settled; ask in the form of the training rows, or sample with --temperature 0.7"
    return f"the run was too short: {went}; raise --max-steps or --epochs, or --learning-rate (auto finds one)"


def note_cut(output: Output, tokens: int, phrase: str | None, which: str = "the answer") -> None:
    how = "not at a stop token" if phrase is None else f"repeating {printable(phrase)!r}"
    output.note(f"{which} ended at the limit of {plural(tokens, 'token')} (--max-new-tokens), {how}")
