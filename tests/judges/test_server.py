"""Tests of a server as a judge, on a real one of the standard library that behaves and misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from excise.config import JudgeSection
from excise.errors import ConfigError, JudgeError
from excise.judges import server
from excise.judges.rubrics import read_rubric
from excise.judges.server import Server
from excise.judges.verdicts import Exchange, Verdicts

TOKEN = "sk-not-to-be-seen-1234"


class Answering(BaseHTTPRequestHandler):
    """Answers as `way` says, and keeps what it was asked."""

    way, asked, lock = "good", [], threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append((self.path, dict(self.headers), body))
            number = len(self.asked)
        text = body["messages"][0]["content"]
        getattr(self, f"_{self.way}")(text, number)

    def _good(self, text: str, number: int, reply: str | None = None):
        letter = reply or ("A" if "sorry" in text else "B")
        data = {"choices": [{"message": {"content": letter}}], "usage": {"total_tokens": 100}}
        self._send(200, json.dumps(data))

    def _once_bad(self, text: str, number: int):
        if number % 2:
            self._send(503, "busy")
        else:
            self._good(text, number)

    def _thinking(self, text: str, number: int):
        self._good(text, number, "<think>B or A?</think>\n\nA")

    def _nonsense(self, text: str, number: int):
        self._good(text, number, "As a large banana, I would say")

    def _error(self, text: str, number: int):
        self._send(500, f"internal error for {self.headers['Authorization']}\nsecond line")

    def _denied(self, text: str, number: int):
        self._send(401, f"bad key {TOKEN}")

    def _moved(self, text: str, number: int):
        self.send_response(307)
        self.send_header("Location", "http://127.0.0.1:9/v1/chat/completions")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _no_json(self, text: str, number: int):
        self._send(200, "<html>hello</html>")

    def _odd_json(self, text: str, number: int):
        self._send(200, '{"choices": []}')

    def _hang(self, text: str, number: int):
        self.server.stopped.wait(5)

    def _drip(self, text: str, number: int):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.stopped.wait(0.02):
            try:
                self.wfile.write(b" ")
            except OSError:
                return

    def _cut(self, text: str, number: int):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.wfile.flush()
        self.connection.close()

    def _endless(self, text: str, number: int):
        self.send_response(200)
        self.end_headers()
        for _ in range(30):
            self.wfile.write(b" " * 8192)

    def _dies(self, text: str, number: int):
        if number > 6:
            self.connection.close()
        else:
            self._good(text, number)

    def _send(self, status: int, text: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(server, "_PAUSE", 0.01)
    monkeypatch.setattr(server, "_LARGEST", 1 << 16)
    Answering.way, Answering.asked = "good", []
    with Quiet(("127.0.0.1", 0), Answering) as running:
        running.stopped = threading.Event()
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.stopped.set()
        running.shutdown()


def judge(address: str, token: str | None = TOKEN, **section) -> Server:
    given = {"model": "some-judge", "timeout": 0.4, "tries": 2} | section
    rubrics = read_rubric("refusal", grades=False), read_rubric("severity", grades=True)
    return Server(JudgeSection(source=address, **given), *rubrics, "refusing", token)


SOME = [Exchange(f"p {n}", "I am sorry." if n % 3 == 0 else "Of course.") for n in range(10)]
RIGHT = ["shows" if n % 3 == 0 else "answers" for n in range(10)]


def test_it_is_asked_as_openai_is(address: str):
    found = judge(address).verdicts(SOME)
    assert [one.value for one in found] == RIGHT
    path, headers, body = Answering.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert body["model"] == "some-judge"
    assert body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == ["user"]


@pytest.mark.parametrize(("way", "right"), [("once_bad", RIGHT), ("thinking", ["shows"] * 10)])
def test_it_tries_again_and_reads_past_thinking(address: str, way: str, right: list[str]):
    Answering.way = way
    found = judge(address, tries=8).verdicts(SOME)
    assert [one.value for one in found] == right


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("error", r"status 500: internal error for Bearer \*\*\*"),
        ("denied", r"status 401: bad key \*\*\*$"),
        ("moved", "status 307"),
        ("no_json", "is no chat completion: '<html>hello</html>'"),
        ("odd_json", "is no chat completion"),
        ("hang", r"no answer within 0.4 seconds \(2 tries\)"),
        ("drip", "does not come to an end in time"),
        ("cut", "went away"),
        ("endless", "more than 65,536 bytes"),
    ],
)
def test_what_fails_is_one_line_without_the_token(address: str, way: str, said: str):
    Answering.way = way
    begun = time.monotonic()
    with pytest.raises(JudgeError, match=said) as caught:
        judge(address, parallel=2, timeout=9 if way == "endless" else 0.4).verdicts(SOME[:2])
    assert time.monotonic() - begun < 10
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_there_is_one_line():
    with pytest.raises(JudgeError, match="cannot be reached") as caught:
        judge("http://127.0.0.1:9/v1").verdicts(SOME[:1])
    assert "0x" not in str(caught.value)


def test_an_answer_that_is_no_verdict_is_none(address: str):
    Answering.way = "nonsense"
    assert {one.value for one in judge(address).verdicts(SOME)} == {None}
    with pytest.raises(JudgeError, match="were no verdict, such as 'As a large banana"):
        Verdicts(judge(address)).verdicts([Exchange(str(n), "yes") for n in range(30)])


def test_what_was_answered_before_it_went_away_is_kept(address: str, tmp_path):
    Answering.way = "dies"
    first = Verdicts(judge(address, parallel=1))
    first.keep(tmp_path / "verdicts.jsonl")
    with pytest.raises(JudgeError, match="reached"):
        first.verdicts(SOME)
    Answering.way = "good"
    before = len(Answering.asked)
    again = Verdicts(judge(address, parallel=1))
    again.keep(tmp_path / "verdicts.jsonl")
    assert again.verdicts(SOME) == RIGHT
    assert len(Answering.asked) - before == 6  # the first four were stored
    assert TOKEN not in (tmp_path / "verdicts.jsonl").read_text()


def test_cost_has_a_bound(address: str):
    bounded = judge(address, parallel=1, most_tokens=450)
    with pytest.raises(
        JudgeError, match=r"5 requests took 500 tokens, and scores.judge.most_tokens"
    ):
        bounded.verdicts(SOME)
    assert len(Answering.asked) == 5


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://judge.example/v1", "unencrypted"),
        ("https://me:secret@judge.example/v1", "leave user and password out"),
        ("https://judge.example/v1?key=1", "is no address"),
        ("https:///v1", "is no address"),
        ("http://[::1/v1", "is no address"),
        ("https://judge.example:99999/v1", "is no address"),
    ],
)
def test_an_address_that_would_leak_or_lead_nowhere_is_refused(address: str, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        judge(address)
    assert "secret" not in str(caught.value)


def test_it_needs_the_name_of_a_model(address: str):
    with pytest.raises(ConfigError, match=r"scores\.judge\.model"):
        judge(address, model="")
    assert judge("http://localhost:1/v1").name == "some-judge at localhost:1"
