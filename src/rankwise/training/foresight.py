"""What a run tells a memory plan, and what the plan may answer. The command line connects the two."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

IGNORED = -100
ROWS_AT_ONCE = 10_000


@dataclasses.dataclass(frozen=True)
class LongestBatch:
    """The micro-batch that needs most memory: the longest rows together, padded to the longest of them."""

    rows: int
    tokens: int
    # Of the longest row, after truncation.
    trained_share: float
    # Of rows * tokens, in the loss.


class Foresight(Protocol):
    """A memory plan that looks at a run before it starts. Either call may raise and so refuse the run."""

    def before_loading(self) -> None:
        """Nothing of the model is in memory yet."""

    def before_training(self, batch: LongestBatch) -> int | None:
        """Everything is loaded and encoded. Gives the peak to expect, as the run's own meter will count it."""


def longest_batch(dataset: Any, batch_size: int) -> LongestBatch:
    """The longest ``batch_size`` rows of an encoded data set (``input_ids``, ``labels``)."""
    import numpy as np

    lengths = _lengths(dataset)
    longest = np.argsort(lengths)[::-1][:batch_size]
    tokens = int(lengths[longest[0]])
    labels = dataset.select(longest.tolist())["labels"]
    trained = sum(label != IGNORED for row in labels for label in row)
    return LongestBatch(len(longest), tokens, min(1.0, max(trained, 1) / (len(longest) * tokens)))


def longest_row(dataset: Any) -> int:
    """Tokens of the longest row of an encoded data set."""
    return int(_lengths(dataset).max())


def _lengths(dataset: Any) -> Any:
    """Tokens of every row."""
    import numpy as np
    import pyarrow.compute as pc

    columns = dataset.select_columns(["input_ids"]).with_format("arrow")
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in columns.iter(ROWS_AT_ONCE)])
