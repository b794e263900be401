"""A data set of random ids, small enough to train on in a second, exactly."""

from __future__ import annotations

import random

from datasets import Dataset

WORDS = [f"w{index}" for index in range(90)]


def encoded_rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 4 to 12 ids whose first two are the prompt and whose last is the stop token 2."""
    draw = random.Random(seed)
    ids = [[1, *(draw.randrange(4, 94) for _ in range(draw.randrange(3, 10))), 2] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})
