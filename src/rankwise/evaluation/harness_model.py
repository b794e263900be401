"""`Engine` as a model of lm-evaluation-harness. Imported only where that package is needed.

Texts become ids exactly as in the harness' own HFLM. The engine then scores and answers the requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rankwise.acceleration.generation import Decoding, Prompt
from rankwise.acceleration.scoring import Target, members_of, target_of
from rankwise.evaluation.engine import Engine
from rankwise.evaluation.record import Responses, json_sha256
from rankwise.evaluation.tasks.base import Tell, fitting, with_room, writer
from rankwise.foreign import Fields

# HFLM's default length of an answer.
NEW_TOKENS = 256
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-evaluation-harness has no types
    """``responses`` keeps every answer on disk, so that a request is computed once."""

    def __init__(self, engine: Engine, responses: Responses, tell: Tell) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.responses = responses
        self.tell = tell

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.engine.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if add_special_tokens is None and not string.startswith(str(self.tokenizer.decode(self.prefix_token_id))):
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        # rankwise shows the progress.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        keys = [json_sha256(["loglikelihood", context, continuation]) for _, context, continuation in requests]
        pairs = {key: (context, continuation) for key, (_, context, continuation) in zip(keys, requests)}
        targets = {key: target_of(*pair, self.max_length) for key, pair in pairs.items()}
        self._score(targets)
        found = [self.responses.known[key] for key in keys]
        return [(float(total), bool(greedy)) for total, greedy in found]

    def _score(self, targets: Mapping[str, Target]) -> None:
        keys, chosen = list(targets), list(targets.values())
        known = self.responses.known
        self.tell(sum(key in known for key in keys), len(keys))
        for rows in self.engine.scorer.plan(chosen):
            if all(keys[member] in known for member in members_of(rows)):
                continue
            scores = self.engine.scorer.score_batch(rows, chosen)
            self.responses.append({keys[i]: [score.total, score.greedy] for i, score in scores.items()})
            self.tell(sum(key in known for key in keys), len(keys))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            list(
                map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length,
                        context_len=1,
                    ),
                )
            )
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([(None, *window) for group in windows for window in group]))
        return [math.fsum(next(scores)[0] for _ in group) for group in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        repeats = _repeats(requests)
        keys = [json_sha256(["generate_until", *request.args, repeat]) for request, repeat in zip(requests, repeats)]
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        done = 0
        for group in groups.values():
            prompts = [Prompt(tuple(self.tok_encode(requests[i].args[0])), repeats[i]) for i in group]
            self._generate(requests[group[0]].args[1], prompts, [keys[i] for i in group], done, len(requests))
            done += len(group)
        return [str(self.responses.known[key]) for key in keys]

    def _generate(self, asked: Fields, prompts: Sequence[Prompt], keys: Sequence[str], before: int, total: int) -> None:
        decoding = self._decoding(asked)
        if decoding.max_new_tokens >= self.max_length:
            # HFLM fails here. In other cases it shortens the prompt to make room for the answer, and so does this.
            longest = max(len(prompt.ids) for prompt in prompts)
            decoding = with_room(decoding, self.max_length, longest, "lm-evaluation-harness")
        prompts = fitting(self.engine, prompts, decoding, "lm-evaluation-harness")
        write, known = writer(self.engine, prompts, decoding), self.responses.known
        for batch in self.engine.batches(prompts, decoding):
            if not all(keys[index] in known for index in batch):
                self.responses.append({keys[index]: text for index, (text, _) in zip(batch, write(batch))})
            self.tell(before + sum(key in known for key in keys), total)

    def _decoding(self, asked: Fields) -> Decoding:
        until = asked.get("until") or []
        end = self.tokenizer.decode(self.eot_token_id)
        stops = [until] if isinstance(until, str) else [*until, end]
        length = next((asked[name] for name in LENGTH_NAMES if asked.get(name) is not None), NEW_TOKENS)
        temperature = float(asked.get("temperature") or 0.0) if asked.get("do_sample") is not False else 0.0
        return Decoding(
            max_new_tokens=int(length),
            stop_ids=self.engine.stop_ids(),
            stop_strings=tuple(filter(None, stops)),
            num_beams=int(asked.get("num_beams") or 1),
            temperature=temperature,
            top_p=float(asked.get("top_p") or 1.0),
        )


def _repeats(requests: Sequence[Instance]) -> list[int]:
    """How often each request occurred before. A repeated request gets a new sample."""
    seen: dict[str, int] = {}
    found = []
    for request in requests:
        text = json.dumps(request.args, sort_keys=True, default=str)
        found.append(seen.get(text, 0))
        seen[text] = seen.get(text, 0) + 1
    return found
