"""Strangers are refused, whatever they send; pages run no script but their own."""

from __future__ import annotations

import asyncio
import base64
import hashlib

import pytest

from excise.page.guard import Guard

TOKEN = "tok-en_123"
PAGE = b"<html><script>let a = 1;</script><script src='x.js'></script></html>"


async def inner(scope, receive, send):
    """Answers with a page in two parts, and says what it was asked for."""
    scope["asked"].append((scope["root_path"], scope["path"]))
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = [(b"content-type", b"text/html; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": PAGE[:20], "more_body": True})
    await send({"type": "http.response.body", "body": PAGE[20:]})


def ask(path=f"/{TOKEN}/", host="127.0.0.1:8000", kind="http", query=b"", **headers):
    """Return the messages of the answer, and what reached the application behind."""
    asked, sent = [], []
    lines = [(b"host", host.encode())] * (host is not None) if host else []
    lines += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "headers": lines, "query_string": query, "asked": asked}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(inner, 8000, TOKEN)(scope, None, send))
    return sent, asked


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000"])
def test_the_whole_address_is_let_through(host):
    sent, asked = ask(host=host, origin=f"http://{host}")
    assert sent[0]["status"] == 200
    assert asked == [(f"/{TOKEN}", f"/{TOKEN}/")]
    assert b"".join(m["body"] for m in sent[1:]) == PAGE


REFUSED = [
    {"path": "/"},
    {"path": ""},
    {"path": "/tok-en_12/"},
    {"path": "/tok-en_1234/"},
    {"path": f"/x/../{TOKEN}/"},
    {"path": f"//{TOKEN}/"},
    {"path": "/?token=" + TOKEN},
    {"path": f"/{TOKEN.upper()}/"},
    {"path": "/t\xf6k\ud800/"},
    {"path": f"/{TOKEN}/" + "a" * 5000},
    {"query": b"a" * 5000},
    {"host": "evil.example:8000"},
    {"host": "127.0.0.1"},
    {"host": "127.0.0.1:8001"},
    {"host": "127.0.0.1:8000.evil.example"},
    {"host": ""},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "https://127.0.0.1:8000"},
    {"origin": "http://127.0.0.1:8001"},
    {"x_forwarded_prefix": "/'onload='"},
]


@pytest.mark.parametrize("what", REFUSED, ids=str)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_everything_else_is_refused(what, kind):
    sent, asked = ask(kind=kind, **what)
    assert asked == []
    if kind == "websocket":
        assert sent == [{"type": "websocket.close", "code": 1008}]
    else:
        assert sent[0]["status"] in (400, 403, 414, 421)
        assert TOKEN.encode() not in sent[1]["body"]


def test_two_hosts_are_refused():
    sent, asked = ask(Host="evil.example")
    assert (sent[0]["status"], asked) == (421, [])


def test_only_a_pages_own_scripts_run_in_it():
    headers = dict(ask()[0][0]["headers"])
    policy = headers[b"content-security-policy"].decode()
    own = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    scripts = next(p for p in policy.split("; ") if p.startswith("script-src"))
    assert scripts == f"script-src 'self' 'unsafe-eval' 'sha256-{own}'"
    for part in (
        "default-src 'none'",
        "connect-src 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ):
        assert part in policy
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert headers[b"x-content-type-options"] == b"nosniff"
