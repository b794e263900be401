"""A judge behind an OpenAI-compatible endpoint rates pairs of answers, in both orders.

A reply is written to disk under the hash of its request before it is used, so no request is paid for twice, even after
kill -9. Time-outs, 429 and 5xx are tried again with growing pauses. What then has no reply, and a reply without two
ratings, are recorded as failed: a rating of (-1, -1), which the score leaves out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rankwise.errors import ConfigError, DataError, warn
from rankwise.evaluation import Lines, text_sha256
from rankwise.foreign import Fields, JsonObject, parse_json
from rankwise_article.vicuna_scores import FAILED

# (id, text) of a question or of an answer.
Text = tuple[str, str]
PROMPT = """\
Two assistants have answered the same question. Compare their answers.

<question>
{question}
</question>

<answer_1>
{answer_1}
</answer_1>

<answer_2>
{answer_2}
</answer_2>

Give each answer a mark from 1 (useless) to 10 (could not be better). Look at whether it does what was asked, whether \
its statements and its code or calculation are right, and whether it is as detailed as the question needs. Length \
alone earns nothing, and neither does standing first.

Write the two marks on the first line: the mark of answer 1, a space, the mark of answer 2, nothing else. Then say in \
a few sentences why.
"""
MARK = r"\d{1,2}(?:\.\d+)?"
OUT_OF_TEN = r"(?:[ \t]*/[ \t]*10)?"
DECORATION = r"[ \t*_`\"'()\[\]]*"
MARKS = re.compile(rf"^{DECORATION}({MARK}){OUT_OF_TEN}[ \t,;]+({MARK}){OUT_OF_TEN}{DECORATION}\.?\r?$", re.MULTILINE)
HIGHEST_MARK = 10.0
# HTTP statuses that every further request would get, too, and those that may pass.
WRONG_ADDRESS = {401: "check the key", 403: "check the key and its rights", 404: "check judge_url and judge_model"}
TRY_AGAIN = {408, 409, 425, 429}
REPLY_BYTES_LIMIT = 4 << 20


@dataclasses.dataclass(frozen=True)
class JudgeClient:
    """Address of the judge, and limits on requests. Raises ConfigError (RA156) for an address that is not a URL."""

    # Base address of the API, such as https://api.openai.com/v1.
    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    temperature: float = 0.0
    max_tokens: int = 1024
    # Requests per rating, the first included.
    attempts: int = 5
    # Pause before the second attempt; it doubles with each attempt.
    pause_seconds: float = 2.0
    timeout_seconds: float = 120.0
    concurrency: int = 4

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/]+\S*", self.url):
            raise ConfigError("RA156", f"judge_url is {self.url!r}; give an address such as https://host/v1.")

    @property
    def endpoint(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def request(self, question: str, answer_1: str, answer_2: str) -> JsonObject:
        """The body of one request."""
        prompt = PROMPT.format(question=question, answer_1=answer_1, answer_2=answer_2)
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }


def judge_key(variable: str) -> str | None:
    """The key in the environment; None if there is none, because local servers need none."""
    return os.environ.get(variable, "").strip() or None


class JudgeCache:
    """Replies on disk, one JSON object a line, under the hash of their request; safe for threads."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            # The request of a damaged line is sent again.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = parse_json(line)
                self._replies[entry["key"]] = str(entry["reply"])

    def get(self, key: str) -> str | None:
        with self._lock:
            return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Store a reply; it is on disk when this returns."""
        with self._lock:
            self._replies[key] = reply
            self._lines.append([{"key": key, "reply": reply}])


def judge_answers(
    questions: Sequence[Text],
    answers_a: Sequence[Text],
    answers_b: Sequence[Text],
    *,
    client: JudgeClient,
    cache: JudgeCache,
    progress: Callable[[int, int], None] | None = None,
) -> list[JsonObject]:
    """Rate ``answers_a[i]`` against ``answers_b[i]`` for each of N questions, a first and then b first: 2 N ratings, as
    ``score vicuna --ratings`` reads them.

    ``progress(done, total)`` is called after each. Raises DataError (RA245) for an endpoint that refuses the key or
    does not exist. Warns (RA243) of ratings that failed.
    """
    pairs = [*zip(questions, answers_a, answers_b, strict=True), *zip(questions, answers_b, answers_a, strict=True)]
    requests = [client.request(question[1], first[1], second[1]) for question, first, second in pairs]
    keys = [text_sha256(json.dumps([client.endpoint, request], sort_keys=True), 64) for request in requests]
    # Equal requests are sent once.
    (first, request), *rest = dict(zip(keys, requests)).items()
    # By itself, so that a wrong address or key stops the work after one request.
    replies = {first: _reply(client, cache, first, request)}
    with ThreadPoolExecutor(max_workers=client.concurrency) as pool:
        futures = {key: pool.submit(_reply, client, cache, key, request) for key, request in rest}
        for key, future in futures.items():
            replies[key] = future.result()
            if progress:
                progress(len(replies), len(rest) + 1)
    failed = [replies[key][0] for key in keys if replies[key][1] == FAILED]
    if failed:
        warn(
            "RA243",
            f"{len(failed):,} of {len(keys):,} ratings failed, the first because of this: {failed[0][:160]}; run the "
            "command again to ask for those that got no reply.",
        )
    return [_rating(client, *pair, *replies[key]) for key, pair in zip(keys, pairs)]


def _reply(client: JudgeClient, cache: JudgeCache, key: str, request: Fields) -> tuple[str, tuple[float, float]]:
    """The reply and ratings of one request, or the problem and FAILED."""
    reply = cache.get(key)
    if reply is None:
        try:
            reply = _post(client, request)
        except _NoReplyError as error:
            return str(error), FAILED
        cache.put(key, reply)
    marks = parse_marks(reply)
    return (reply, marks) if marks else (f"the reply holds no two marks: {' '.join(reply.split())[:120]!r}", FAILED)


def parse_marks(reply: str) -> tuple[float, float] | None:
    """The two numbers of the first line that holds two numbers from 0 to 10 and nothing else."""
    for found in MARKS.finditer(reply):
        marks = float(found[1]), float(found[2])
        if max(marks) <= HIGHEST_MARK:
            return marks
    return None


class _NoReplyError(Exception):
    """A request that got no reply; the message says why."""


def _post(client: JudgeClient, request: Fields) -> str:
    """The judge's reply. Raises _NoReplyError after all attempts, DataError (RA245) for a wrong address."""
    import http.client
    import urllib.error
    import urllib.request

    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {client.key}"} if client.key else {})
    message = urllib.request.Request(client.endpoint, json.dumps(request).encode(), headers)
    problem = ""
    for attempt in range(client.attempts):
        if attempt:
            time.sleep(client.pause_seconds * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(message, timeout=client.timeout_seconds) as response:
                body = response.read(REPLY_BYTES_LIMIT)
            return str(parse_json(body)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            problem = f"{client.endpoint} answered with status {error.code}"
            if error.code in WRONG_ADDRESS:
                raise DataError("RA245", f"{problem}; {WRONG_ADDRESS[error.code]}.") from None
            if error.code not in TRY_AGAIN and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = f"{client.endpoint} did not answer ({getattr(error, 'reason', error) or type(error).__name__})"
        except (ValueError, KeyError, IndexError, TypeError):
            problem = f"the endpoint answered no chat completion: {body[:80]!r}"
    raise _NoReplyError(problem)


def _rating(
    client: JudgeClient, question: Text, first: Text, second: Text, reply: str, marks: tuple[float, float]
) -> JsonObject:
    return {
        "review_id": text_sha256(json.dumps([question[0], first[0], second[0], client.model]), 22),
        "question_id": question[0],
        "answer1_id": first[0],
        "answer2_id": second[0],
        "text": reply,
        "score": list(marks),
        "metadata": {"judge": client.model, "temperature": client.temperature, "max_tokens": client.max_tokens},
    }
