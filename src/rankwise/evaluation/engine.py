"""The interface between a loaded model and the tasks: scoring, answering, encoding, and batch sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from rankwise.acceleration import optimize_for_training, restore
from rankwise.acceleration.generation import Decoding, Generator, Prompt, batches_that_fit, stop_ids_of
from rankwise.acceleration.scoring import Scorer, loss_scorer
from rankwise.data.encoding import RowEncoder
from rankwise.data.rows import Row, Rows
from rankwise.models.load import table_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Number of tokens in a batch that is scored: enough to keep the device busy.
SCORING_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}


@dataclasses.dataclass
class Engine:
    """Model and tokenizer on their device. ``template`` is Jinja text that replaces the tokenizer's."""

    # A PreTrainedModel that generates, for which transformers has no type.
    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    # Maximum number of sequences in a batch; None: as many as the budget of tokens admits.
    batch_size: int | None = None
    # Whether the training run used rankwise.acceleration, as runs do by default.
    trained_fast: bool = True
    # The autocast dtype of a full fine-tuning, whose weights are float32; None without autocast.
    autocast: torch.dtype | None = None

    @property
    def device_type(self) -> str:
        return str(self.model.device.type)

    @cached_property
    def max_length(self) -> int:
        """The model's context length in tokens: the size of its position table, or the config's value."""
        rows = table_rows(self.model)
        if rows is not None:
            return rows
        config = self.model.config.get_text_config(decoder=True)
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(getattr(config, name, None), int):
                return int(getattr(config, name))
        return 2048

    @property
    def pad(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if self.tokenizer is not None else ()
        return next((token for token in known if token is not None), 0)

    @cached_property
    def scorer(self) -> Scorer:
        budget = SCORING_TOKENS.get(self.device_type, SCORING_TOKENS["cpu"])
        return Scorer(self.model, budget=budget, max_rows=self.batch_size, pad=self.pad)

    @contextlib.contextmanager
    def as_in_training(self) -> Iterator[Scorer]:
        """A scorer that computes losses as the trainer's evaluation did: the same operators and batches."""
        if self.trained_fast:
            optimize_for_training(self.model, keep_memory=False)
        try:
            yield loss_scorer(self.model, max_rows=self.batch_size, autocast=self.autocast)
        finally:
            if self.trained_fast:
                restore(self.model)

    def generator(self, decoding: Decoding) -> Generator:
        return Generator(self.model, decoding, pad=self.pad)

    def batches(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[list[int]]:
        """The indices of the prompts that are answered together."""
        return batches_that_fit(self.model, prompts, decoding, self.batch_size)

    def stop_ids(self, more: Iterable[int | None] = ()) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's, the model's, and ``more``."""
        return stop_ids_of(self.model, self.tokenizer, more)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def encoder(self, rows: Rows) -> RowEncoder:
        """The encoder that turns rows into token ids as training does."""
        return RowEncoder(rows, self.tokenizer, self.template)

    def prompt_ids(self, encoder: RowEncoder, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        """The ids before the first trained one, for prompt-and-completion rows. A trained model answers these."""
        return [tuple(row.ids[: row.trained.index(True)]) for row in encoder.encode(rows)]

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a plain text, with the tokenizer's opening token if it has one."""
        return tuple(self.tokenizer(text)["input_ids"])
