"""Encode rows with images to token ids with the model's processor and TRL's collator, which later makes the batches.

The processor replaces each image by the number of tokens that the model reads for it, so a row's length is known only
after its images are read. Each image is read once before training, and again for each batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rankwise.constants import IGNORED
from rankwise.data.bad_rows import NEVER
from rankwise.data.encoding import Encoded, EncodedRow, Encoder, RowEncoder, encode_by
from rankwise.data.rows import Problem, Row, Rows
from rankwise.errors import ConfigError, DataError, one_line
from rankwise.foreign import Fields

if TYPE_CHECKING:
    from datasets import Dataset


class ImageEncoder:
    """Tokenizes rows with images, as `RowEncoder` does rows of text."""

    def __init__(self, rows: Rows, processor: Any, chat_template: str | None) -> None:
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        if not hasattr(processor, "image_processor"):
            raise ConfigError(
                "RW184",
                f"{rows.source} holds images, and the model has no processor for them; take a vision model, or remove "
                "the column of images.",
            )
        if chat_template is not None:
            processor.chat_template = chat_template
        if not processor.chat_template:
            raise DataError(
                "RW210",
                f"{rows.source} holds images, and the processor has no chat template; give the model's own with "
                "--chat-template FILE.",
            )
        self.tokenizer = processor.tokenizer
        whose = "the one given" if chat_template else "the processor's"
        self.template = f"chat template ({whose}), with images"
        self.left_out: Counter[str] = Counter()
        self._collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    def stop_ids(self) -> set[int]:
        """The special tokens. An answer is text, so special tokens after it come from the template."""
        return set(self.tokenizer.all_special_ids)

    def try_encode(self, rows: Sequence[Row], max_length: int | None = None) -> Iterator[EncodedRow | Problem]:
        """Encode each row, or say why it cannot be."""
        import jinja2

        for row in rows:
            try:
                batch = self._collate(list(image_dataset([row])))
            except (OSError, ValueError, jinja2.TemplateError) as error:
                yield Problem(row.source, row.line, row.counted_in, "RW203", one_line(error))
                continue
            ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
            yield EncodedRow(ids, [label != IGNORED for label in labels], split=False, length=len(ids))


def encoder_of(rows: Rows, tokenizer: Any, chat_template: str | None) -> Encoder:
    """The encoder of rows of this kind; ``tokenizer`` is a processor where they hold images."""
    return (ImageEncoder if rows.kind == "images" else RowEncoder)(rows, tokenizer, chat_template)


def encode_images(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    chat_template: str | None = None,
    name: str = "train",
    skip_bad_rows: int | None = NEVER,
) -> Encoded:
    """``encode_rows`` for rows with images and the processor ``tokenizer``. The data set also holds the rows for TRL's
    collator.
    """
    import datasets

    encoder = ImageEncoder(rows, tokenizer, chat_template)
    encoded, kept = encode_by(encoder, rows, max_length=max_length, name=name, skip_bad_rows=skip_bad_rows)
    return Encoded(datasets.concatenate_datasets([encoded.dataset, image_dataset(kept)], axis=1), encoded.report)


def image_dataset(rows: Sequence[Row]) -> Dataset:
    """The columns for TRL's collator; an image is read when its row is accessed."""
    from datasets import Dataset, Features, Image, List, Value

    turns = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    columns: dict[str, list[list[Fields]]] = {
        "images": [[{"path" if isinstance(image, str) else "bytes": image} for image in row.images] for row in rows],
        "prompt": [list(row.messages[:-1]) for row in rows],
        "completion": [list(row.messages[-1:]) for row in rows],
    }
    features = Features({"images": List(Image(mode="RGB")), "prompt": turns, "completion": turns})
    return Dataset.from_dict(columns, features=features)
