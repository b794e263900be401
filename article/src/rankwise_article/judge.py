"""A judge behind an OpenAI-compatible endpoint rates pairs of answers, in both orders.

A reply is written to disk under the hash of its request before it is used, so no request is paid for twice, even after
kill -9. Time-outs, 429 and 5xx are tried again with growing pauses. What then has no reply, and a reply without two
ratings, are recorded as failed: a rating of (-1, -1), which the score leaves out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from rankwise.errors import DataError, warn
from rankwise.evaluation import Lines, text_sha256
from rankwise.foreign import Fields, JsonObject, parse_json

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
FAILED = (-1.0, -1.0)
# HTTP statuses that every further request would get, too, and those that may pass.
WRONG_ADDRESS = {401: "check the key", 403: "check the key and its rights", 404: "check judge_url and judge_model"}
TRY_AGAIN = (408, 409, 425, 429, *range(500, 600))


@dataclasses.dataclass(frozen=True)
class JudgeClient:
    """Address of the judge, and limits on requests."""

    # Base address of the API, such as https://api.openai.com/v1.
    url: str
    model: str
    # Empty for a local server that needs none.
    key: str = dataclasses.field(default="", repr=False)
    temperature: float = 0.0
    max_tokens: int = 1024
    # Requests per rating, the first included.
    attempts: int = 5
    # Pause before the third attempt; it doubles with each attempt.
    pause_seconds: float = 4.0
    timeout_seconds: float = 120.0
    concurrency: int = 4

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

    def session(self) -> requests.Session:
        session = requests.Session()
        again = Retry(
            self.attempts - 1,
            status_forcelist=TRY_AGAIN,
            allowed_methods=None,
            backoff_factor=self.pause_seconds / 2,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))
        session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
        return session


def judge_answers(
    questions: Sequence[Text],
    answers_a: Sequence[Text],
    answers_b: Sequence[Text],
    *,
    client: JudgeClient,
    kept: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[JsonObject]:
    """Rate ``answers_a[i]`` against ``answers_b[i]`` for each of N questions, a first and then b first: 2 N ratings, as
    ``score vicuna --ratings`` reads them. ``kept`` holds the replies, one JSON object a line.

    ``progress(done, total)`` is called after each. Raises DataError (RA245) for an endpoint that refuses the key or
    does not exist. Warns (RA243) of ratings that failed.
    """
    pairs = [*zip(questions, answers_a, answers_b, strict=True), *zip(questions, answers_b, answers_a, strict=True)]
    bodies = [client.request(question[1], first[1], second[1]) for question, first, second in pairs]
    keys = [text_sha256(json.dumps([client.endpoint, body], sort_keys=True), 64) for body in bodies]
    lines, lock, replies = Lines(kept), threading.Lock(), _replies(kept)

    def ask(item: tuple[str, Fields]) -> tuple[str, bool]:
        """The reply to (key, body); or what came in its place, and False."""
        key, body = item
        if key in replies:
            return replies[key], True
        text, is_reply = _post(client, session, body)
        if is_reply:
            with lock:
                lines.append([{"key": key, "reply": text}])
        return text, is_reply

    # Equal requests are sent once.
    waiting, found = list(dict(zip(keys, bodies)).items()), {}
    with client.session() as session, ThreadPoolExecutor(client.concurrency) as pool:
        # The first by itself, so that a wrong address or key stops the work after one request.
        for part in (waiting[:1], waiting[1:]):
            for (key, _), reply in zip(part, pool.map(ask, part)):
                found[key] = reply
                progress(len(found), len(waiting))
    marks = {key: is_reply and parse_marks(text) for key, (text, is_reply) in found.items()}
    failed = [" ".join(found[key][0].split()) for key in keys if not marks[key]]
    if failed:
        warn(
            "RA243",
            f"{len(failed):,} of {len(keys):,} ratings failed, the first by no two marks in {failed[0][:160]!r}; run "
            "the command again to ask for those that got no reply.",
        )
    return [_rating(client, *pair, found[key][0], marks[key] or FAILED) for key, pair in zip(keys, pairs)]


def _replies(kept: Path) -> dict[str, str]:
    """The replies on disk by their keys. The request of a damaged line is sent again."""
    found = {}
    for line in kept.read_bytes().split(b"\n") if kept.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = parse_json(line)
            found[entry["key"]] = str(entry["reply"])
    return found


def _post(client: JudgeClient, session: requests.Session, body: Fields) -> tuple[str, bool]:
    """The judge's reply; or what came in its place, and False. Raises DataError (RA245) for a wrong address."""
    try:
        response = session.post(client.endpoint, json=body, timeout=client.timeout_seconds)
    except requests.RequestException as error:
        return f"no answer ({error})", False
    if response.status_code in WRONG_ADDRESS:
        remedy = WRONG_ADDRESS[response.status_code]
        raise DataError("RA245", f"{client.endpoint} answered with status {response.status_code}; {remedy}.")
    if not response.ok:
        return f"status {response.status_code}", False
    try:
        return str(parse_json(response.content)["choices"][0]["message"]["content"] or ""), True
    except (ValueError, KeyError, IndexError, TypeError):
        return f"no chat completion: {response.text}", False


def parse_marks(reply: str) -> tuple[float, float] | None:
    """The two numbers of the first line that holds two numbers from 0 to 10 and nothing else."""
    for found in MARKS.finditer(reply):
        marks = float(found[1]), float(found[2])
        if max(marks) <= HIGHEST_MARK:
            return marks
    return None


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
