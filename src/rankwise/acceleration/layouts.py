"""How the rows of a micro-batch lie in memory: padded to one length, end to end, or so with common beginnings once.

Everything is laid out on the host, from lists of token ids, so that nothing waits for a device.

Legend: B rows, L positions of the longest, T tokens that are laid, P scored positions: those before a token of an
answer; R ranges of keys.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rankwise.foreign import Fields

# padded; end to end, without padding; or end to end, where what several rows begin with is laid once.
Layout = Literal["padded", "flat", "shared"]
Ids = Sequence[int]
Inputs = dict[str, Any]


def padded(rows: Sequence[Fields], fills: Mapping[str, int]) -> Inputs:
    """(B, L) of each column of ``fills`` that the rows have, padded on the right, and the mask of their tokens."""
    values = {name: [torch.tensor(row[name]) for row in rows] for name in fills if name in rows[0]}
    values["attention_mask"] = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    return {
        name: pad_sequence(tensors, batch_first=True, padding_value=fills.get(name, 0))
        for name, tensors in values.items()
    }


def end_to_end(rows: Sequence[Ids], lengths: Sequence[int] | None = None) -> Inputs:
    """Rows as one row (1, T), with the bounds between them for attention, and each token's row for short convolutions.

    ``lengths``: of rows that are packed already.
    """
    lengths = [len(row) for row in rows] if lengths is None else lengths
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    numbers = [torch.full((length,), row, dtype=torch.int32) for row, length in enumerate(lengths)]
    return {
        "input_ids": torch.tensor(list(itertools.chain.from_iterable(rows)))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.cat(numbers)[None],
    }


@dataclasses.dataclass(frozen=True)
class KeyRanges:
    """The keys that each query sees, one contiguous range or R disjoint ones: int32 (B, L) or (B, R, L) each."""

    start: Tensor
    end: Tensor

    def to(self, *to: Any, **how: Any) -> KeyRanges:
        return KeyRanges(self.start.to(*to, **how), self.end.to(*to, **how))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """Prompts with their answers, as a model gets them, and where the tokens of answers are scored."""

    # Of a model; where something is laid once, KeyRanges stand for the attention mask.
    inputs: Inputs
    # (P,): each scored position in the inputs, the token after it, and its index in (B, L).
    places: Tensor
    targets: Tensor
    cells: Tensor
    # (B, L): 1 at tokens of answers.
    mask: Tensor
    # All tokens of the rows; those of a common beginning count for each.
    tokens: int

    def to(self, *to: Any, **how: Any) -> Answered:
        """Move to a device like a tensor."""

        def moved(value: Any) -> Any:
            return value.to(*to, **how) if isinstance(value, Tensor | KeyRanges) else value

        inputs = {name: moved(value) for name, value in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, **{name: moved(getattr(self, name)) for name in _TENSORS})


_TENSORS = ("places", "targets", "cells", "mask")


def answered(rows: Sequence[tuple[Ids, Ids]], pad: int, layout: Layout) -> Answered:
    """Lay out (prompt, answer) of each row."""
    ids = [[*prompt, *answer] for prompt, answer in rows]
    L = max(map(len, ids))
    if layout != "padded":
        inputs, slots = laid_once(ids) if layout == "shared" else _apart(ids)
    else:
        inputs = padded([{"input_ids": row} for row in ids], {"input_ids": pad})
        slots = [range(row * L, (row + 1) * L) for row in range(len(ids))]
    # A token without one before it is not scored.
    scored = [
        (row, place)
        for row, (prompt, _) in enumerate(rows)
        for place in range(max(len(prompt), 1) - 1, len(ids[row]) - 1)
    ]
    masks = [(torch.arange(len(row)) >= len(prompt)).long() for row, (prompt, _) in zip(ids, rows)]
    return Answered(
        inputs=inputs,
        places=torch.tensor([slots[row][place] for row, place in scored], dtype=torch.long),
        targets=torch.tensor([ids[row][place + 1] for row, place in scored], dtype=torch.long),
        cells=torch.tensor([row * L + place for row, place in scored], dtype=torch.long),
        mask=pad_sequence(masks, batch_first=True),
        tokens=sum(map(len, ids)),
    )


# Beginnings of fewer tokens, or behind more others, are laid in each row: a token's keys are a range for each of them.
LEAST_SHARED, MOST_ABOVE = 8, 3


@dataclasses.dataclass(frozen=True)
class Part:
    """Positions [first, last) of ``rows``, which have the same tokens there, behind the parts ``above``."""

    rows: tuple[int, ...]
    first: int
    last: int
    above: tuple[int, ...]


def parts_of(rows: Sequence[Ids]) -> list[Part]:
    """The common beginnings of several rows, and what is left of each row."""
    parts: list[Part] = []

    def divide(members: Sequence[int], first: int, above: tuple[int, ...]) -> None:
        own = [list(rows[member]) for member in members]
        last = common_length(min(own), max(own))
        if len(members) == 1 or (last - first >= LEAST_SHARED and len(above) < MOST_ABOVE):
            parts.append(Part((*members,), first, last, above))
            first, above = last, (*above, len(parts) - 1)
        branches: dict[int, list[int]] = {}
        for member, row in zip(members, own):
            # Rows that end here are alone; no token has a negative number.
            branches.setdefault(row[last] if last < len(row) else -1 - member, []).append(member)
        for branch in branches.values():
            if first < len(rows[branch[0]]):
                divide(branch, first, above)

    divide(range(len(rows)), 0, ())
    return parts


def laid_tokens(parts: Sequence[Part]) -> int:
    return sum(part.last - part.first for part in parts)


def beginnings_in_words(rows: Sequence[Ids], apart: str | None) -> str | None:
    """What these rows begin with in common, and ``apart``, why it is laid in each of them; None without any."""
    parts, total = parts_of(rows), sum(map(len, rows))
    shared = [part for part in parts if len(part.rows) > 1]
    if not shared:
        return None
    if len(shared) == 1:
        (part,) = shared
        words = f"common beginning: {part.last:,} tokens of {len(part.rows)} rows laid"
        return f"{words} once" if apart is None else f"{words} in each: {apart}"
    words = f"common beginnings of {len(rows)} rows"
    if apart is None:
        return f"{words}: {laid_tokens(parts):,} tokens laid in the place of {total:,}"
    return f"{words}, {total - laid_tokens(parts):,} of {total:,} tokens, laid in each: {apart}"


def _apart(rows: Sequence[Ids]) -> tuple[Inputs, list[Sequence[int]]]:
    """Rows end to end, and the place of each token of every row."""
    starts = itertools.accumulate(map(len, rows), initial=0)
    return end_to_end(rows), [range(start, start + len(row)) for start, row in zip(starts, rows)]


def laid_once(rows: Sequence[Ids]) -> tuple[Inputs, list[Sequence[int]]]:
    """Rows end to end, each common beginning once; and the place of each token of every row.

        beginning | rest of row 0 | rest of row 1
         x_0 x_1    x_2 x_3 x_4     y_2 y_3

    A token sees the beginnings of its row and its own part up to itself: R ranges of keys, some of which are empty.
    """
    parts = parts_of(rows)
    if all(len(part.rows) == 1 for part in parts):
        return _apart(rows)
    begins = [*itertools.accumulate((part.last - part.first for part in parts), initial=0)]
    slots: list[Sequence[int]] = [[] for _ in rows]
    for part, begin, end in zip(parts, begins, begins[1:]):
        for row in part.rows:
            slots[row] = [*slots[row], *range(begin, end)]
    starts, ends = torch.zeros(2, 1, 1 + max(len(part.above) for part in parts), begins[-1], dtype=torch.int32)
    for part, begin, end in zip(parts, begins, begins[1:]):
        for depth, above in enumerate((*part.above, len(parts))):
            is_own = above == len(parts)
            starts[0, depth, begin:end] = begin if is_own else begins[above]
            ends[0, depth, begin:end] = torch.arange(begin, end) + 1 if is_own else begins[above + 1]
    inputs = {
        "input_ids": torch.tensor([token for part in parts for token in rows[part.rows[0]][part.first : part.last]]),
        "position_ids": torch.cat([torch.arange(part.first, part.last) for part in parts]),
    }
    return {**{name: value[None] for name, value in inputs.items()}, "attention_mask": KeyRanges(starts, ends)}, slots


def common_length(a: Ids, b: Ids) -> int:
    """The length of the common prefix of ``a`` and ``b``."""
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return min(len(a), len(b))
