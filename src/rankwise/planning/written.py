"""GRPO's generation before a step: its peak memory on fake tensors, and real generation for measurements."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache, PreTrainedModel

from rankwise.acceleration import give_back_freed_memory
from rankwise.acceleration.generation import (
    Decoding,
    Generator,
    Prompt,
    batches_that_fit,
    cache_bytes_per_token,
    drawn,
)
from rankwise.acceleration.scoring import window_of
from rankwise.constants import CACHE_BYTES
from rankwise.planning.step import Enter, autocast_dtype
from rankwise.planning.workload import Workload

# A phase whose memory no run takes.
UNCOUNTED = "uncounted"


def write_a_token(model: PreTrainedModel, method: str, workload: Workload, enter: Enter) -> None:
    """Run the pass over the prompts and that of the last token, in one of which generation has its peak.

    The pass that fills the cache up to the last token happens in no run, so it is in the phase ``UNCOUNTED``.
    """
    rows = workload.written
    if workload.device_type == "cpu":
        rows = min(rows, max(1, CACHE_BYTES // (cache_bytes_per_token(model) * workload.max_length)))
    with _writing(model, method, workload):
        enter("generation")
        _draw(model, min(workload.prompts, rows), workload.prompt_tokens, DynamicCache(config=model.config))
        cache = DynamicCache(config=model.config)
        enter(UNCOUNTED)
        _draw(model, rows, workload.max_length - 1, cache)
        enter("generation")
        _draw(model, rows, 1, cache)


def write_answers(model: PreTrainedModel, method: str, workload: Workload) -> None:
    """Generate answers of full length to random prompts."""
    asked = torch.randint(3, 100, (workload.prompts, workload.prompt_tokens)).tolist()
    prompts = [
        Prompt(tuple(asked[number % len(asked)]), repeat=number // len(asked)) for number in range(workload.written)
    ]
    new_tokens = max(1, workload.max_length - workload.prompt_tokens)
    decoding = Decoding(new_tokens, frozenset(), temperature=1.0, to_train_on=True)
    give_back_freed_memory()
    with _writing(model, method, workload):
        for batch in batches_that_fit(model, prompts, decoding):
            Generator(model, decoding).answers([prompts[index] for index in batch])
    give_back_freed_memory()


@contextmanager
def _writing(model: PreTrainedModel, method: str, workload: Workload) -> Iterator[None]:
    dtype, training = autocast_dtype(method, workload), model.training
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(model.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        yield
    model.train(training)


def _draw(model: PreTrainedModel, rows: int, tokens: int, cache: DynamicCache) -> None:
    """Compute ``tokens`` new positions of each row after those in the cache, and draw the next token."""
    before = cache.get_seq_length()
    mask = torch.ones(rows, before + tokens, dtype=torch.long)
    if before and window_of(model) is None:
        # Prompts differ in length, so that a token has a mask, for which keys and values are copied to every head.
        mask = mask.bool()[:, None, None]
    known = inspect.signature(model.forward).parameters
    given = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in known:
        given["logits_to_keep"] = 1
    output = model(
        input_ids=torch.ones(rows, tokens, dtype=torch.long),
        attention_mask=mask,
        position_ids=torch.arange(before, before + tokens).expand(rows, -1),
        **given,
    )
    logits = output.logits[:, -1].float()
    drawn(torch.softmax(logits / 1.0, -1), torch.rand(rows))
