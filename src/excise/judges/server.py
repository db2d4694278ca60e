"""A server with OpenAI's interface as a judge: chat completions, one question at a time, several at once.

The token is in one header, over https or to this machine only, and in nothing else: what a server says is
shown without it. Redirects are not followed, and proxies and passwords of the environment not looked at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from excise.config import JudgeSection
from excise.errors import ConfigError, JudgeError, first_line
from excise.judges.rubrics import Rubric
from excise.judges.verdicts import Exchange, Opinion
from excise.prompts.chat_template import after_thinking
from excise.reading import parse_json
from excise.visible import one_line

_LARGEST = 1 << 20  # bytes of a reply
_PAUSE = 0.5  # seconds before the second try; twice as many before each further one
_LONGEST_PAUSE = 30.0
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses that may pass
_CHARACTERS = 3  # of a token, where the server does not count them


class _Failure(Exception):
    """One try that failed. `final`: another would fail as well."""

    def __init__(self, reason: str, *, final: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.final, self.pause = final, pause


@dataclass
class _Spent:
    """Tokens that the server was asked to read and write, up to a bound."""

    most: int
    tokens: int = 0
    requests: int = 0


class Server:
    """A model behind an address, asked by a rubric for verdicts and, if it is to grade, for severity."""

    folder: Path | None = None

    def __init__(
        self,
        section: JudgeSection,
        rubric: Rubric,
        severity: Rubric | None,
        behaviour: str,
        token: str | None,
    ) -> None:
        """Check its address; nothing is asked yet.

        Raises:
            ConfigError: the address cannot be used, or would send the token where others can read it.
        """
        self._address, host = _checked(section.source, token)
        if not section.model:
            raise ConfigError(
                "scores.judge.model: name the model that the server is to answer with (--set "
                "scores.judge.model=NAME)"
            )
        self.name = f"{section.model} at {host}"
        self.grades, self.at_once = severity is not None, 4 * section.parallel
        self._section, self._token = section, token
        self._rubric, self._severity, self._behaviour = rubric, severity, behaviour
        self._spent, self._lock = _Spent(section.most_tokens), threading.Lock()
        self._over = threading.Event()
        self._failure: JudgeError | None = None
        self.facts: dict[str, Any] = {
            "kind": "server",
            "model": section.model,
            "host": host,
            "rubric": rubric.facts,
            "severity": severity.facts if severity else None,
            "behaviour": behaviour,
        }

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return the verdict that the server's reply on each response begins with.

        Raises:
            JudgeError: it does not answer, refuses to, or has been asked as much as it may be.
        """
        return self._ask(exchanges, self._rubric)

    def severities(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return the severity that the server's reply on each response begins with.

        Raises:
            JudgeError: as `verdicts`.
        """
        assert self._severity is not None
        return self._ask(exchanges, self._severity)

    def _ask(self, exchanges: Sequence[Exchange], rubric: Rubric) -> list[Opinion]:
        questions = [rubric.ask(one, self._behaviour) for one in exchanges]
        pool, self._failure = ThreadPoolExecutor(self._section.parallel), None
        self._over.clear()
        try:
            return [rubric.read(reply) for reply in pool.map(self._reply, questions)]
        finally:
            self._over.set()  # those under way try no more
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, question: str) -> str:
        """Return the reply to one question; once one has failed, all others fail with it.

        Raises:
            JudgeError: none of its tries, or of another question's, came to a reply.
        """
        try:
            return self._tries(question)
        except JudgeError as error:
            with self._lock:
                self._failure = self._failure or error
            self._over.set()
            raise self._failure from None

    def _tries(self, question: str) -> str:
        pause, most = _PAUSE, self._section.tries
        for number in range(1, most + 1):
            if self._over.is_set():
                break
            self._check_bound()
            try:
                return self._try(question)
            except _Failure as failure:
                if number == most or failure.final:
                    tries = f" ({number} tries)" if number > 1 else ""
                    raise JudgeError(
                        f"judge {self.name}: {self._safe(str(failure))}{tries}"
                    ) from None
                self._over.wait(min(max(pause, failure.pause), _LONGEST_PAUSE))
            pause *= 2
        raise JudgeError(f"judge {self.name}: it was not asked any further")

    def _check_bound(self) -> None:
        with self._lock:
            spent = self._spent
            if spent.tokens >= spent.most:
                raise JudgeError(
                    f"judge {self.name}: {spent.requests:,} requests took {spent.tokens:,} tokens, and "
                    f"scores.judge.most_tokens allows {spent.most:,}: raise it to go on"
                )

    def _try(self, question: str) -> str:
        import requests

        body = {
            "model": self._section.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self._section.reply_tokens,
        }
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        seconds = self._section.timeout
        end = time.monotonic() + seconds
        try:
            with requests.Session() as session:
                session.trust_env = False
                with session.post(
                    f"{self._address}/chat/completions", json=body, headers=headers,
                    timeout=seconds, allow_redirects=False, stream=True,
                ) as response:  # fmt: skip
                    data = _read(response, end)
                    status, later = response.status_code, response.headers.get("Retry-After", "")
        except requests.Timeout:
            raise _Failure(f"no answer within {seconds:g} seconds") from None
        except (requests.RequestException, OSError) as error:
            raise _Failure(f"it cannot be reached, or went away: {_reason(error)}") from None
        if status != 200:
            pause = float(later) if later.isdecimal() and len(later) < 6 else 0.0
            said = one_line(data.decode("utf-8", "replace"), 200)
            words = f"it answers with status {status}: {said}"
            raise _Failure(words, final=status not in _AGAIN, pause=pause)
        return self._content(data, question)

    def _content(self, data: bytes, question: str) -> str:
        """Return the text of a reply, and count what it took."""
        try:
            found = parse_json(data, "its reply", ConfigError)
            content = found["choices"][0]["message"]["content"]
            usage = found.get("usage") or {}
        except (ConfigError, LookupError, TypeError, AttributeError):
            said = one_line(data.decode("utf-8", "replace"), 120)
            raise _Failure(f"its reply is no chat completion: {said!r}") from None
        text = after_thinking(content) if isinstance(content, str) else ""
        counted = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(counted, int) or counted < 1:
            counted = (len(question) + len(text)) // _CHARACTERS + 1
        with self._lock:
            self._spent.tokens += counted
            self._spent.requests += 1
        return text

    def _safe(self, text: str) -> str:
        """Return a text without the token, should the server have repeated it."""
        return text.replace(self._token, "***") if self._token else text


def _read(response: Any, end: float) -> bytes:
    """Read a reply of bounded size by a deadline: a server may send it a byte at a time."""
    data = bytearray()
    for part in response.iter_content(1):  # larger parts would be waited for past the deadline
        data += part
        if len(data) > _LARGEST:
            raise _Failure(f"its reply has more than {_LARGEST:,} bytes", final=True)
        if time.monotonic() > end:
            raise _Failure("its reply does not come to an end in time")
    return bytes(data)


def _checked(address: str, token: str | None) -> tuple[str, str]:
    """Return the address without a slash at its end, and host and port.

    Raises:
        ConfigError: it is no plain http or https address, or the token would cross the network in clear.
    """
    where = f"scores.judge.source: {address!r:.100}"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{where} is no address") from None
    if parts.username or parts.password:
        raise ConfigError(
            "scores.judge.source: leave user and password out of the address, which is written to the "
            "run folder: set EXCISE_JUDGE_TOKEN"
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"{where} is no address such as http://127.0.0.1:8000/v1")
    if token and parts.scheme == "http" and not _is_here(host):
        raise ConfigError(
            f"{where}: the token would cross the network unencrypted: use https, or unset it"
        )
    return address.rstrip("/"), host if port is None else f"{host}:{port}"


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: BaseException) -> str:
    """Return the innermost reason of a failed connection: outer ones repeat addresses of objects."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)
