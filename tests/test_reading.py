"""The door for files of others: what cannot be read is said in one line, within bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from excise import reading
from excise.errors import ModelError


def refused(path: Path, read=reading.read_json, **more) -> str:
    with pytest.raises(ModelError) as caught:
        read(path, "settings", ModelError, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_there_is_read_with_or_without_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "a.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + '{"a": "ü 😀"}'.encode())
        assert reading.read_json(path, "settings", ModelError) == {"a": "ü 😀"}
    path.write_text('{"a": "\\ud83d\\ude00"}')  # a whole pair
    assert reading.read_json(path, "settings", ModelError) == {"a": "😀"}
    path.write_bytes(b'\xef\xbb\xbfa = "b"')
    assert reading.read_toml(path, "settings", ModelError) == {"a": "b"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b"[" * 100_000, "nests"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nests"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert said in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a = ", "not valid TOML"),
        (b"a = " + b"[" * 100_000, "nests"),
        (b"a = " + b"[" * 200 + b"]" * 200, "nests"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
    ],
)
def test_toml_that_is_none(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    assert said in refused(path, reading.read_toml)


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe, socket or device" in refused(tmp_path / "pipe")  # and does not wait for a writer
    assert "pipe, socket or device" in refused(Path("/dev/zero"))
    assert "is a folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none")
    assert "too long" in refused(tmp_path / ("n" * 300))
    assert "cannot be read" in refused(tmp_path / "a\0b")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in refused(tmp_path / "loop")
    (tmp_path / "big").write_text(json.dumps({"a": "b" * 100}))
    assert "at most" in refused(tmp_path / "big", largest=50)


def test_a_path_that_cannot_be_looked_at_leads_to_nothing(tmp_path: Path):
    for name in ("n" * 300, "a\0b", "none"):
        assert not reading.is_file(tmp_path / name)
        assert not reading.is_folder(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    assert not reading.is_file(tmp_path / "pipe")
    assert reading.is_folder(tmp_path)


def test_files_that_may_not_be_read_are_said_to_be_so(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the administrator may read all
    assert "permission denied" in refused(path)


def test_half_a_character_is_replaced():
    for text in ("whole ä \U0001f600", "half \ud800", "\udcff half", "\ude00\ud83d"):
        assert reading.is_unicode(reading.replace_surrogates(text))
        assert reading.replace_surrogates(text) == "".join(
            c if reading.is_unicode(c) else "\ufffd" for c in text
        )
    assert reading.replace_surrogates("\ud83d\ude00") == "\U0001f600"  # both halves are one
