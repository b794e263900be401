"""The judge's client against a real HTTP server on this machine that misbehaves on demand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rankwise.errors import DataError, RankwiseWarning
from rankwise_article.judge import JudgeClient, judge_answers, parse_marks
from rankwise_article.scores import relative_score

QUESTIONS = [(str(n), f"Question {n}?") for n in (1, 2)]
A = [(f"a{n}", f"first system on {n}") for n in (1, 2)]
B = [(f"b{n}", f"second system on {n}") for n in (1, 2)]


class Judge(ThreadingHTTPServer):
    """Answers by ``behave(number of the request, its body)`` -> (status, text) or None to say nothing."""

    daemon_threads = True

    def __init__(self, behave: Callable[[int, dict], tuple[int, str] | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave = behave
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.busy = self.busiest = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            number = len(self.server.bodies)
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        answer = self.server.behave(number, body)
        with self.server.lock:
            self.server.busy -= 1
        if answer is None:
            self.connection.close()
            return
        status, text = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


def said(text: str | None) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Judge]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    judges = []

    def start(behave: Callable[[int, dict], tuple[int, str] | None]) -> Judge:
        judges.append(Judge(behave))
        threading.Thread(target=judges[-1].serve_forever, daemon=True).start()
        return judges[-1]

    yield start
    for judge in judges:
        judge.shutdown()
        judge.server_close()


def client(judge: Judge, **settings: object) -> JudgeClient:
    defaults = {"pause_seconds": 0.001, "timeout_seconds": 20.0}
    return JudgeClient(judge.url, "a-judge", **defaults | settings)


def first_mark_by_place(_: int, body: dict) -> tuple[int, str]:
    """8 for the first system and 6 for the second, in either order."""
    prompt = body["messages"][0]["content"]
    return said("8 6\nfine" if prompt.index("first system") < prompt.index("second system") else "6 8\nfine")


def test_both_orders_are_rated_and_the_rows_score(serve, tmp_path):
    judge = serve(first_mark_by_place)
    seen = []
    rows = judge_answers(
        *(QUESTIONS, A, B),
        client=client(judge, key="secret"),
        kept=tmp_path / "judge.jsonl",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(row["answer1_id"], row["answer2_id"], row["score"]) for row in rows] == [
        ("a1", "b1", [8.0, 6.0]),
        ("a2", "b2", [8.0, 6.0]),
        ("b1", "a1", [6.0, 8.0]),
        ("b2", "a2", [6.0, 8.0]),
    ]
    assert relative_score(rows, {"a1", "a2"}).to_json() == {
        "reference_first": 75.0,
        "system_first": 75.0,
        "mean": 75.0,
        "failed": 0,
    }
    assert len({row["review_id"] for row in rows}) == 4
    assert seen[-1] == (4, 4)
    assert judge.keys == ["Bearer secret"] * 4
    assert judge.bodies[0]["model"] == "a-judge"
    assert "secret" not in (tmp_path / "judge.jsonl").read_text() + repr(client(judge, key="secret"))


def test_nothing_is_asked_twice(serve, tmp_path):
    judge = serve(first_mark_by_place)
    path = tmp_path / "judge.jsonl"
    once = judge_answers(QUESTIONS, A, B, client=client(judge), kept=path)
    again = judge_answers(QUESTIONS, A, B, client=client(judge), kept=path)
    assert once == again
    assert len(judge.bodies) == 4
    judge_answers(QUESTIONS, A, B, client=client(judge, temperature=0.5), kept=path)
    assert len(judge.bodies) == 8


def test_a_reply_counts_for_the_endpoint_that_gave_it(serve, tmp_path):
    first, second = serve(lambda *_: said("8 6")), serve(lambda *_: said("3 4"))
    kept = tmp_path / "judge.jsonl"
    marks = [
        [r["score"] for r in judge_answers(QUESTIONS, A, B, client=client(judge), kept=kept)]
        for judge in (first, second, first)
    ]
    assert marks == [[[8, 6]] * 4, [[3, 4]] * 4, [[8, 6]] * 4]
    assert (len(first.bodies), len(second.bodies)) == (4, 4)


def test_equal_requests_are_sent_once(serve, tmp_path):
    judge = serve(lambda *_: said("7 7"))
    same = [("b1", A[0][1])]
    ratings = judge_answers(QUESTIONS[:1], A[:1], same, client=client(judge), kept=tmp_path / "judge.jsonl")
    assert len(judge.bodies) == 1
    assert [rating["score"] for rating in ratings] == [[7, 7], [7, 7]]


@pytest.mark.parametrize(
    "trouble",
    [
        (500, "oops"),
        (429, "slow down"),
        (503, ""),
        None,
    ],
)
def test_trouble_is_retried(trouble, serve, tmp_path):
    judge = serve(lambda number, _: trouble if number <= 2 else said("9 8"))
    kept = tmp_path / "judge.jsonl"
    ratings = judge_answers(QUESTIONS[:1], A[:1], B[:1], client=client(judge, concurrency=1), kept=kept)
    assert [rating["score"] for rating in ratings] == [[9, 8], [9, 8]]
    assert len(judge.bodies) == 4


@pytest.mark.parametrize(
    ("trouble", "reason", "asked"),
    [
        ((500, ""), "status 500", 6),
        ((200, "<html>"), "no chat completion", 2),
        ((200, '{"choices": []}'), "no chat completion", 2),
        (None, "answer", 6),
        (said("hm"), "no two marks", 2),
        (said(None), "no two marks", 2),
    ],
)
def test_what_stays_troubled_is_recorded_as_failed(trouble, reason, asked, serve, tmp_path):
    judge = serve(lambda *_: trouble)
    with pytest.warns(RankwiseWarning, match="RA243: 2 of 2") as caught:
        ratings = judge_answers(
            *(QUESTIONS[:1], A[:1], B[:1]),
            client=client(judge, attempts=3),
            kept=tmp_path / "judge.jsonl",
        )
    assert reason in str(caught[0].message)
    assert [rating["score"] for rating in ratings] == [[-1, -1]] * 2
    assert len(judge.bodies) == asked


def test_a_time_out_is_retried_and_paid_replies_are_kept(serve, tmp_path):
    hang = threading.Event()

    def behave(number: int, _: dict) -> tuple[int, str] | None:
        if number == 1:
            hang.wait(30)
            return None
        return said("5 4")

    judge = serve(behave)
    kept = tmp_path / "judge.jsonl"
    settings = {"timeout_seconds": 0.5, "concurrency": 1}
    ratings = judge_answers(QUESTIONS[:1], A[:1], B[:1], client=client(judge, **settings), kept=kept)
    hang.set()
    assert [rating["score"] for rating in ratings] == [[5, 4], [5, 4]]
    asked = len(judge.bodies)
    kept = tmp_path / "judge.jsonl"
    assert judge_answers(QUESTIONS[:1], A[:1], B[:1], client=client(judge, **settings), kept=kept) == ratings
    assert len(judge.bodies) == asked


def test_useless_replies_are_not_paid_for_again(serve, tmp_path):
    judge = serve(lambda *_: said("hm"))
    for _ in range(2):
        with pytest.warns(RankwiseWarning, match="RA243"):
            judge_answers(
                *(QUESTIONS[:1], A[:1], B[:1]),
                client=client(judge, attempts=2),
                kept=tmp_path / "judge.jsonl",
            )
    assert len(judge.bodies) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusing_endpoint_stops_at_once(status, serve, tmp_path):
    judge = serve(lambda *_: (status, "no"))
    with pytest.raises(DataError, match=str(status)) as caught:
        judge_answers(QUESTIONS, A, B, client=client(judge, concurrency=1), kept=tmp_path / "judge.jsonl")
    assert caught.value.code == "RA245"
    assert len(judge.bodies) == 1


def test_another_refusal_is_not_repeated(serve, tmp_path):
    judge = serve(lambda *_: (400, "too long"))
    with pytest.warns(RankwiseWarning, match="status 400"):
        judge_answers(QUESTIONS[:1], A[:1], B[:1], client=client(judge), kept=tmp_path / "judge.jsonl")
    assert len(judge.bodies) == 2


def test_no_more_requests_at_once_than_allowed(serve, tmp_path):
    def slowly(*_: object) -> tuple[int, str]:
        time.sleep(0.05)
        return said("5 5")

    judge = serve(slowly)
    questions = [(str(n), f"q{n}") for n in range(6)]
    answers = [[(f"{name}{n}", f"{name}{n}") for n in range(6)] for name in "ab"]
    judge_answers(questions, *answers, client=client(judge, concurrency=2), kept=tmp_path / "judge.jsonl")
    assert len(judge.bodies) == 12
    assert judge.busiest <= 2


def test_a_killed_run_pays_only_for_the_rest(serve, tmp_path):
    release = threading.Event()

    def behave(number: int, body: dict) -> tuple[int, str] | None:
        if number == 3 and not release.is_set():
            release.wait(60)
            return None
        return said("5 5")

    judge = serve(behave)
    path = tmp_path / "judge.jsonl"
    script = (
        "import sys; from pathlib import Path; from rankwise_article.judge import *\n"
        "n = (1, 2)\n"
        "judge_answers([(str(i), f'Question {i}?') for i in n],"
        " [(f'a{i}', f'first system on {i}') for i in n],"
        " [(f'b{i}', f'second system on {i}') for i in n],"
        " client=JudgeClient(sys.argv[1], 'a-judge', concurrency=1), kept=Path(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, judge.url, str(path)])
    try:
        deadline = time.monotonic() + 60
        while len(judge.bodies) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    release.set()
    assert len(judge.bodies) == 3
    # A line cut short by the kill is not a reply.
    with path.open("ab") as file:
        file.write(b'\n{"key": "0123", "rep')
    ratings = judge_answers(QUESTIONS, A, B, client=client(judge), kept=path)
    assert len(judge.bodies) == 5
    assert all(rating["score"] == [5, 5] for rating in ratings)
    judge_answers(QUESTIONS, A, B, client=client(judge), kept=path)
    assert len(judge.bodies) == 5


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        ("9 8.5\nBoth are good.", (9, 8.5)),
        ("**8 9**", (8, 9)),
        ("8/10, 9/10", (8, 9)),
        ("<think>3 or 4?</think>\n7 6\n", (7, 6)),
        ("8\n9", None),
        ("-1 -1", None),
        ("11 3", None),
        ("The marks are 8 and 9.", None),
        ("", None),
    ],
)
def test_marks_are_a_line_of_their_own(reply, marks):
    assert parse_marks(reply) == marks


def test_texts_with_placeholders_stay_as_they_are():
    text = JudgeClient("http://localhost", "m").request("{answer_1}", "{answer_2}", "{}")["messages"][0]["content"]
    assert [text.count(kept) for kept in ("{answer_1}", "{answer_2}", "{}")] == [1, 1, 1]
