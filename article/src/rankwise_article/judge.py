"""A judge behind an OpenAI-compatible endpoint rates pairs of answers, in both orders.

A reply is written to disk under the hash of its request before it is used, so no request is paid for twice, even after
kill -9. Failed requests (time-outs, 429, 500, replies without two ratings) are repeated with growing pauses. Then they
are recorded as failed: a rating of (-1, -1), which the score leaves out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rankwise.errors import ConfigError, DataError, warn
from rankwise.evaluation import Lines, text_sha256
from rankwise.foreign import Fields, JsonObject, parse_json
from rankwise_article.vicuna_scores import FAILED

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
# HTTP statuses that every further request would get, too.
WRONG_ADDRESS = {401, 403, 404}
TRY_AGAIN = {408, 409, 425, 429}
LONGEST_PAUSE_SECONDS = 120.0
REPLY_BYTES_LIMIT = 4 << 20


@dataclasses.dataclass(frozen=True)
class Question:
    question_id: int | str
    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    answer_id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Rating:
    """A judge's ratings of two answers; ``score`` is (-1, -1) where it failed."""

    review_id: str
    question_id: int | str
    answer1_id: str
    answer2_id: str
    # The judge's reply, or why there is none.
    text: str
    score: tuple[float, float]
    metadata: Fields

    @property
    def failed(self) -> bool:
        return self.score == FAILED

    def to_json(self) -> JsonObject:
        """A row as ``score vicuna --ratings`` reads it."""
        return {**dataclasses.asdict(self), "score": list(self.score)}


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
    # Pause before the second attempt. It doubles with each attempt, and is at least what the server asks for.
    pause_seconds: float = 1.0
    timeout_seconds: float = 120.0
    concurrency: int = 4

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/]+\S*", self.url):
            raise ConfigError("RA156", f"judge_url is {self.url!r}; give an address such as https://host/v1.")

    @property
    def endpoint(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

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
                entry = parse_json(line, constants=True, halves=True)
                self._replies[entry["key"]] = str(entry["reply"])

    @staticmethod
    def key(endpoint: str, request: Fields, number: int) -> str:
        """SHA-256 of the endpoint, the request, and ``number``: how many unusable replies to it there are already."""
        text = json.dumps([endpoint, request, number], sort_keys=True, ensure_ascii=True)
        return text_sha256(text, 64)

    def get(self, key: str) -> str | None:
        with self._lock:
            return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Store a reply; it is on disk when this returns."""
        with self._lock:
            self._replies[key] = reply
            self._lines.append([{"key": key, "reply": reply}])


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One request: a question with two answers in an order."""

    question: Question
    answers: tuple[Answer, Answer]
    request: Fields


def judge_answers(
    questions: Sequence[Question],
    answers_a: Sequence[Answer],
    answers_b: Sequence[Answer],
    *,
    client: JudgeClient,
    cache: JudgeCache,
    progress: Callable[[int, int], None] | None = None,
) -> list[Rating]:
    """Rate ``answers_a[i]`` against ``answers_b[i]`` for each of N questions, a first and then b first: 2 N ratings.

    ``progress(done, total)`` is called after each. Raises DataError: RA232 different counts, RA245 an endpoint that
    refuses the key or does not exist. Warns (RA243) of ratings that failed.
    """
    if not len(questions) == len(answers_a) == len(answers_b):
        counts = f"{len(questions):,} questions, {len(answers_a):,} and {len(answers_b):,} answers"
        raise DataError("RA232", f"there are {counts}; give one answer of each system to each question.")
    pairs = [_pair(client, *row) for row in zip(questions, answers_a, answers_b)]
    pairs += [_pair(client, *row) for row in zip(questions, answers_b, answers_a)]
    # Equal requests are sent once.
    keys = [JudgeCache.key(client.endpoint, pair.request, 0) for pair in pairs]
    replies = _ask_all(client, cache, dict(zip(keys, pairs)), progress)
    ratings = [_rating(client, pair, *replies[key]) for key, pair in zip(keys, pairs)]
    failed = [rating for rating in ratings if rating.failed]
    if failed:
        warn(
            "RA243",
            f"{len(failed):,} of {len(ratings):,} ratings failed after {client.attempts} attempts each, the first "
            f"because of this: {failed[0].text[:160]}; run the command again to ask for those that got no reply.",
        )
    return ratings


def _pair(client: JudgeClient, question: Question, first: Answer, second: Answer) -> _Pair:
    return _Pair(question, (first, second), client.request(question.text, first.text, second.text))


def _ask_all(
    client: JudgeClient,
    cache: JudgeCache,
    pairs: Mapping[str, _Pair],
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[str, tuple[float, float]]]:
    """{key: (reply, ratings)}. An endpoint that refuses the first request stops the rest."""
    replies: dict[str, tuple[str, tuple[float, float]]] = {}
    stop = threading.Event()
    pool = ThreadPoolExecutor(max_workers=client.concurrency)
    try:
        futures = {key: pool.submit(_ask, client, cache, pair.request, stop) for key, pair in pairs.items()}
        for key, future in futures.items():
            replies[key] = future.result()
            if progress:
                progress(len(replies), len(pairs))
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return replies


def _ask(
    client: JudgeClient, cache: JudgeCache, request: Fields, stop: threading.Event
) -> tuple[str, tuple[float, float]]:
    """The reply and ratings of one request, or the last problem and FAILED."""
    problem = "it was not asked"
    useless = 0
    for attempt in range(client.attempts):
        if stop.is_set():
            break
        # Replies are counted separately from attempts, so that the n-th reply to a request is paid for once.
        key = JudgeCache.key(client.endpoint, request, useless)
        reply = cache.get(key)
        if reply is None:
            try:
                answer = _post(client, request)
            except DataError:
                # Set here and not where the error is reported, since this thread would start the next request first.
                stop.set()
                raise
            reply, problem = answer.reply, answer.problem
            if reply is not None:
                cache.put(key, reply)
            elif not answer.try_again:
                break
        marks = parse_marks(reply) if reply is not None else None
        if reply is not None and marks is not None:
            return reply, marks
        if reply is not None:
            useless += 1
            problem = f"the reply holds no two marks: {' '.join(reply.split())[:120]!r}"
            continue
        if attempt == client.attempts - 1 or stop.wait(_pause(client, attempt, answer)):
            break
    return problem, FAILED


def _pause(client: JudgeClient, attempt: int, answer: _Answer) -> float:
    """The pause before the next attempt. It doubles each time and is spread, so that parallel requests separate."""
    pause = client.pause_seconds * 2**attempt * random.uniform(0.5, 1.0)
    return min(max(pause, answer.wait_seconds), LONGEST_PAUSE_SECONDS)


def parse_marks(reply: str) -> tuple[float, float] | None:
    """The two numbers of the first line that holds two numbers from 0 to 10 and nothing else."""
    for found in MARKS.finditer(reply):
        marks = float(found[1]), float(found[2])
        if max(marks) <= HIGHEST_MARK:
            return marks
    return None


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The result of one HTTP request: a reply, or a problem and whether another attempt may help."""

    reply: str | None = None
    problem: str = ""
    try_again: bool = True
    wait_seconds: float = 0.0


def _post(client: JudgeClient, request: Fields) -> _Answer:
    import http.client
    import urllib.error
    import urllib.request

    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {client.key}"} if client.key else {})
    message = urllib.request.Request(client.endpoint, json.dumps(request).encode(), headers)
    try:
        with urllib.request.urlopen(message, timeout=client.timeout_seconds) as response:
            return _content(response.read(REPLY_BYTES_LIMIT))
    except urllib.error.HTTPError as error:
        return _refusal(client, error.code, error.headers.get("Retry-After"))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return _Answer(problem=f"{client.endpoint} did not answer ({reason or type(error).__name__})")


def _content(body: bytes) -> _Answer:
    try:
        content = parse_json(body, constants=True, halves=True)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return _Answer(problem=f"the endpoint answered no chat completion: {body[:80]!r}")
    return _Answer(reply=content if isinstance(content, str) else "")


def _refusal(client: JudgeClient, status: int, retry_after: str | None) -> _Answer:
    if status in WRONG_ADDRESS:
        remedy = {401: "check the key", 403: "check the key and its rights", 404: "check judge_url and judge_model"}
        raise DataError("RA245", f"{client.endpoint} answered with status {status}; {remedy[status]}.")
    wait = float(retry_after) if retry_after and re.fullmatch(r"\d+(\.\d+)?", retry_after) else 0.0
    again = status in TRY_AGAIN or status >= 500
    return _Answer(problem=f"{client.endpoint} answered with status {status}", try_again=again, wait_seconds=wait)


def _rating(client: JudgeClient, pair: _Pair, reply: str, marks: tuple[float, float]) -> Rating:
    first, second = pair.answers
    ids = json.dumps([pair.question.question_id, first.answer_id, second.answer_id, client.model])
    return Rating(
        review_id=text_sha256(ids, 22),
        question_id=pair.question.question_id,
        answer1_id=first.answer_id,
        answer2_id=second.answer_id,
        text=reply,
        score=marks,
        metadata={"judge": client.model, "temperature": client.temperature, "max_tokens": client.max_tokens},
    )
