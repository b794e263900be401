"""``rw.batches``: the micro-batches that a run would see, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.errors import ConfigError
from rankwise.verbs.settings import check_tokenizer


def batches(
    data: Any,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    seed: int = 0,
    epochs: int = 1,
    packing: bool = False,
    chat_template: str | Path | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    skip_bad_rows: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """The tensors that ``model(**batch)`` takes, for each micro-batch of a run of ``rw.train`` over demonstrations.

    ``data``: as of ``rw.train``, also a ``datasets.Dataset`` or a list of dicts. Rows and their order are those of a
    run with this ``seed``; the labels of prompts and padding are -100. With ``packing`` rows lie end to end, (1, T),
    for a model after ``optimize_for_training``.

    Raises, at the call, DataError as a run does, and ConfigError: RW103 a number below 1, RW115 no tokenizer.
    """
    from rankwise.acceleration.layouts import Layout
    from rankwise.data import encode_rows, read_rows, read_template
    from rankwise.training.batches import laid_out, packed, shuffled

    check_tokenizer(tokenizer)
    numbers = {"batch_size": batch_size, "max_length": max_length, "epochs": epochs}
    if small := [name for name, number in numbers.items() if number < 1]:
        raise ConfigError("RW103", f"{' and '.join(small)} must be at least 1.")
    template = None if chat_template is None else read_template(Path(chat_template))
    rows = read_rows(
        data, prompt_column=prompt_column, completion_column=completion_column, skip_bad_rows=skip_bad_rows
    )
    encoded = encode_rows(
        rows, tokenizer, max_length=max_length, chat_template=template, skip_bad_rows=skip_bad_rows
    ).dataset
    encoded = packed(encoded, max_length, seed) if packing else encoded
    layout: Layout = "flat" if packing else "padded"
    # As a run does for a tokenizer without a padding token.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    orders = (shuffled(len(encoded), batch_size, seed + epoch) for epoch in range(epochs))
    steps = (laid_out([encoded[row] for row in rows], int(pad or 0), layout) for part in orders for rows in part)
    return (batch for batch, _ in steps)
