"""``python -m rankwise.comparison.prepare JOB.json``: put bases and encoded rows into the cache before the first run.

So a GGUF file is read, quantized and its data tokenized once, also for parallel runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rankwise.comparison.measure import answering
from rankwise.config import TrainSettings
from rankwise.foreign import Fields, JsonObject
from rankwise.models import fetch_model
from rankwise.training.prepared import is_worth_keeping
from rankwise.training.setup import encode_data, load_for_training, quantization_for, read_data


def prepare(job: Fields) -> JsonObject:
    """Fill the cache. ``job["runs"]``: the settings of one run of each method. Returns the kinds of prepared bases."""
    made: list[str] = []
    for given in one_of_each_kind([TrainSettings.model_validate(settings) for settings in job["runs"]]):
        source = fetch_model(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
        if made and not is_worth_keeping(source, quantization_for(given)):
            continue
        loaded = load_for_training(given)
        # Rows of preferences are not cached.
        if not made and given.objective == "sft":
            encode_data(given, loaded.tokenizer, *read_data(given))
        made.append(given.method)
        del loaded
    return {"prepared": made}


def one_of_each_kind(runs: Sequence[TrainSettings]) -> list[TrainSettings]:
    """One run of each kind of base. Runs that start from the same base in the same dtype share it."""
    kinds: dict[tuple[bool, bool], TrainSettings] = {}
    for given in runs:
        kinds.setdefault((quantization_for(given) is not None, given.method == "full"), given)
    return list(kinds.values())


def main(argv: list[str]) -> int:
    return answering(lambda: prepare(json.loads(Path(argv[0]).read_text(encoding="utf-8"))), "preparing")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
