"""``python -m rankwise.comparison.prepare JOB.json``: bases and encoded rows into the cache, before the first run.

So no run pays for reading a GGUF file, quantizing or tokenizing, and runs side by side do not do it twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.comparison.measure import answering
from rankwise.config import TrainSettings
from rankwise.models import fetch_model
from rankwise.training import setup
from rankwise.training.prepared import is_worth_keeping
from rankwise.training.run import quantization_for


def prepare(job: Mapping[str, Any]) -> dict[str, Any]:
    """``job``: ``runs``, the settings of one run of each method. Gives the kinds of base that were made ready."""
    made: list[str] = []
    for given in one_of_each_kind([TrainSettings.model_validate(settings) for settings in job["runs"]]):
        quantization = quantization_for(given)
        source = fetch_model(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
        if made and not is_worth_keeping(source, quantization):
            continue
        loaded = setup.load_for_training(
            given.model,
            method=given.method,
            quantization=quantization,
            dtype=given.dtype,
            device=given.device,
            trust_remote_code=given.trust_remote_code,
            revision=given.revision,
            cache=given.cache,
        )
        if not made:
            _encode(given, loaded)
        made.append(given.method)
        del loaded
    return {"prepared": made}


def one_of_each_kind(runs: Sequence[TrainSettings]) -> list[TrainSettings]:
    """Runs that start from the same base in the same dtype need it once: 4-bit, float32 (full) or 16-bit."""
    kinds: dict[tuple[bool, bool], TrainSettings] = {}
    for given in runs:
        kinds.setdefault((quantization_for(given) is not None, given.method == "full"), given)
    return list(kinds.values())


def _encode(given: TrainSettings, loaded: setup.Loaded) -> None:
    rows, eval_rows, template = setup.read_data(
        train=given.data,
        evaluation=given.eval_data,
        eval_limit=given.eval_limit,
        columns={"prompt_column": given.prompt_column, "completion_column": given.completion_column},
        chat_template=given.chat_template,
    )
    if template is not None:
        loaded.tokenizer.chat_template = template
    setup.encode_data(
        rows, eval_rows, loaded.tokenizer, max_length=given.max_length, template=template, cache=given.cache
    )


def main(argv: list[str]) -> int:
    return answering(lambda: prepare(json.loads(Path(argv[0]).read_text(encoding="utf-8"))), "preparing")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
