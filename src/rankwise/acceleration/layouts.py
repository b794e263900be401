"""How the rows of a micro-batch lie in memory: padded to one length, end to end, or pairs around their common prompt.

Everything is laid out on the host, from lists of token ids, so that nothing waits for a device.

Legend: B rows, L positions of the longest, T tokens of all rows, P scored positions: those before a token of an answer.
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

# padded; end to end, without padding; or end to end with the common prompt of rows i and i + B / 2, a pair of answers,
# once.
Layout = Literal["padded", "flat", "pairs"]
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
    """The keys that each query sees, one contiguous range: int32 (B, L) each."""

    start: Tensor
    end: Tensor

    def to(self, *to: Any, **how: Any) -> KeyRanges:
        return KeyRanges(self.start.to(*to, **how), self.end.to(*to, **how))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """Prompts with their answers, as a model gets them, and where the tokens of answers are scored."""

    # Of a model; in the layout of pairs, KeyRanges stand for the attention mask.
    inputs: Inputs
    # (P,): each scored position in the inputs, the token after it, and its index in (B, L).
    places: Tensor
    targets: Tensor
    cells: Tensor
    # (B, L): 1 at tokens of answers.
    mask: Tensor
    # All tokens of the rows; those of a common prompt count for each.
    tokens: int

    def to(self, *to: Any, **how: Any) -> Answered:
        """Move to a device like a tensor."""

        def moved(value: Any) -> Any:
            return value.to(*to, **how) if isinstance(value, Tensor | KeyRanges) else value

        inputs = {name: moved(value) for name, value in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, **{name: moved(getattr(self, name)) for name in _TENSORS})


_TENSORS = ("places", "targets", "cells", "mask")


def answered(rows: Sequence[tuple[Ids, Ids]], pad: int, layout: Layout) -> Answered:
    """Lay out (prompt, answer) of each row. Of pairs, the first half are the first answers."""
    ids = [[*prompt, *answer] for prompt, answer in rows]
    L = max(map(len, ids))
    if layout == "pairs":
        inputs, slots = _around_prompts(ids, [len(prompt) for prompt, _ in rows])
    elif layout == "flat":
        starts = itertools.accumulate(map(len, ids), initial=0)
        inputs, slots = end_to_end(ids), [range(start, start + len(row)) for start, row in zip(starts, ids)]
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


def _around_prompts(ids: Sequence[list[int]], prompts: Sequence[int]) -> tuple[Inputs, list[Sequence[int]]]:
    """Pairs end to end, each prompt once; and the place of each token of every row.

        first answer, reversed | prompt | second answer
                       y_2 y_1   x_1 x_2   z_1 z_2

    So each token sees one range of keys: a token of the first answer from itself to the end of the prompt, any other
    from the beginning of the prompt to itself. ``prompts``: the lengths of the prompts.
    """
    half, taken, positions = len(ids) // 2, list[int](), list[int]()
    starts, ends = list[int](), list[int]()
    slots: list[Sequence[int]] = [()] * len(ids)
    for row, (first, second) in enumerate(zip(ids[:half], ids[half:])):
        # A row without a prompt begins with a token that is not scored.
        shared = min(common_length(first, second), max(1, min(prompts[row], prompts[row + half])))
        begin, middle = len(taken), len(taken) + len(first) - shared
        taken += [*reversed(first[shared:]), *first[:shared], *second[shared:]]
        positions += [*range(len(first) - 1, shared - 1, -1), *range(len(second))]
        starts += [*range(begin, middle), *[middle] * len(second)]
        ends += [*[middle + shared] * (middle - begin), *range(middle + 1, middle + 1 + len(second))]
        slots[row] = [*range(middle, middle + shared), *range(middle - 1, begin - 1, -1)]
        slots[row + half] = range(middle, middle + len(second))
    seen = KeyRanges(*(torch.tensor(ends_of, dtype=torch.int32)[None] for ends_of in (starts, ends)))
    inputs = {
        "input_ids": torch.tensor(taken)[None],
        "position_ids": torch.tensor(positions)[None],
        "attention_mask": seen,
    }
    return inputs, slots


def common_length(a: Ids, b: Ids) -> int:
    """The length of the common prefix of ``a`` and ``b``."""
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return min(len(a), len(b))
