"""Rows of prompt files: what each cell means, where a fault stands, and what is too much."""

from __future__ import annotations

import datetime
import json
import os
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from excise.config import PromptSource
from excise.errors import PromptError
from excise.prompts import prompt_files, sets
from excise.prompts.sets import Prompt, read_prompts

NAN = float("nan")


def file_of(path, content):
    """A prompt file with these bytes, this text, or these columns."""
    if isinstance(content, dict):
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **columns):
    return read_prompts(PromptSource(source=str(path), **columns))


def refusal(path, **columns):
    """The one line, of bounded length, that a file is refused with."""
    with pytest.raises(PromptError) as error:
        read(path, **columns)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 500 + len(str(path))
    return text


BOTH = {"answer_column": "a", "group_column": "g"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "p.parquet",
            {
                "text": pyarrow.array([1.5, NAN, 2.0, 3.0]),
                "a": pyarrow.array([NAN, 1, 7.0, None]),
                "g": pyarrow.array([None, "x", "k", "x"]),
            },
        ),
        (
            "p.jsonl",
            '{"text": 1.5, "a": NaN, "g": null}\n{"text": NaN, "a": 1, "g": "x"}\n'
            '{"text": 2.0, "a": 7.0, "g": "k"}\n{"text": "3.0", "a": null, "g": "x"}\n',
        ),
        ("p.csv", "text,a,g\n1.5,nan,NaN\n nan,1,x\n2.0,7.0,k\n3.0,NAN,x\n"),
    ],
)
def test_a_number_that_is_missing_is_no_text(tmp_path, name, content):
    """Pandas writes what is missing in a column of numbers so; "nan" is not what anybody asks."""
    found = read(file_of(tmp_path / name, content), **BOTH)
    assert found == (Prompt("1.5"), Prompt("2.0", "7.0", "k"), Prompt("3.0", None, "x"))


def test_numbers_dates_and_booleans_are_written_out(tmp_path):
    path = file_of(
        tmp_path / "p.parquet",
        {
            "text": [Decimal("1.50"), Decimal("2.25")],
            "a": [True, None],
            "g": [datetime.date(2024, 2, 29), None],
        },
    )
    assert read(path, **BOTH) == (Prompt("1.50", "True", "2024-02-29"), Prompt("2.25"))
    assert read(file_of(tmp_path / "q.jsonl", '{"text": "nan"}\n')) == (Prompt("nan"),)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": True}, "line 2: column 'text' holds bool, not text"),
        ({"text": ["a"]}, r"line 2: column 'text' holds list, not text: \['a'\]"),
        ({"text": {"a": "b" * 9000}}, "line 2: column 'text' holds dict, not text"),
        ({"text": "a", "a": ["x", "y"], "g": 1}, "line 2: column 'a' holds list, not text"),
        ({"text": "a", "a": 1, "g": {}}, "line 2: column 'g' holds dict, not text"),
        ({"text": "\ud800", "a": 1, "g": 1}, "line 2 holds half of a character"),
        ({"text": "a", "a": "x\udfff", "g": 1}, "line 2 holds half of a character"),
        ({"text": "a", "a": 1, "g": "\ud83d"}, "line 2 holds half of a character"),
        ({"text": "x" * 200_000}, "line 2: a text of 200,000 characters, where at most 131,072"),
        ({"question": "x"}, "line 2: there is no column 'text'; the columns are: question$"),
        (
            {f"c{n}\n": 1 for n in range(900)},
            "line 2: there is no column 'text'; the columns are: c0",
        ),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, row, words):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "ok", "a": 1, "g": 1}\n' + json.dumps(row) + "\n")
    columns = BOTH if "a" in row else {}
    with pytest.raises(PromptError, match=words):
        read(path, **columns)
    refusal(path, **columns)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", '{"text": "a"}\n\n{"text": x}\n', "line 3 is not valid JSON: .*(column 10)"),
        ("p.jsonl", '{"text": 1' + "0" * 5000 + "}\n", "line 1 is not valid JSON"),
        ("p.jsonl", '{"text": ' + "[" * 100_000 + "\n", "line 1 nests more than"),
        (
            "p.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "line 2: it is not UTF-8 text",
        ),
        ("p.csv", 'text\nok\n"open\n', "line 3: unexpected end of data"),
        ("p.csv", 'text\n"' + "x" * 200_000 + '"\n', "line 2: field larger than field limit"),
        ("p.csv", "text,text\na,b\n", "line 1: the column 'text' stands there twice"),
        ("p.csv", "text\na\nb,c\n", "line 3: more fields than the header has"),
        ("p.csv", "q,a\n1,2\n", "line 1: there is no column 'text'; the columns are: q, a"),
        ("p.parquet", {"q": ["a"]}, "there is no column 'text'; the columns are: q"),
        ("p.parquet", {"text": [b"a"]}, "column 'text' holds bytes, not text: b'a'"),
        ("p.parquet", {"text": ["ok", "x" * 200_000]}, "row 2: a text of 200,000 characters"),
        ("p.parquet", b"PAR1" + b"\0" * 90 + b"PAR1", "not a readable parquet file"),
    ],
)
def test_a_fault_is_said_with_its_place(tmp_path, name, content, words):
    path = file_of(tmp_path / name, content)
    with pytest.raises(PromptError, match=words):
        read(path)
    refusal(path)


def test_half_of_a_character_in_a_data_set(monkeypatch):
    """Other libraries make strings of their own; nothing could be written about these."""
    rows = [("row 1", {"text": "a", "a": "x\ud800", "g": "y"})]
    monkeypatch.setattr(sets, "read_rows", lambda source: iter(rows))
    for columns, name in ((BOTH, "a"), ({"answer_column": "g", "group_column": "a"}, "a")):
        with pytest.raises(PromptError, match=f"row 1: column '{name}' holds half of a character"):
            read("owner/name", **columns)


def test_a_link_is_known_by_its_own_name(tmp_path):
    """In the Hub's cache it leads to a blob without a suffix."""
    blob = file_of(tmp_path / "0a1b2c", '{"text": "orb"}\n')
    (tmp_path / "p.jsonl").symlink_to(blob)
    assert read(tmp_path / "p.jsonl") == (Prompt("orb"),)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for name, words in {
        "pipe.txt": "is a pipe, socket or device",
        "folder.jsonl": "is a folder",
        "loop.csv": "cannot be read",
    }.items():
        assert words in refusal(tmp_path / name)
    assert "socket or device" in refusal("/dev/zero")


# -- far too much ----------------------------------------------------------------------------------


def test_one_long_text_for_many_rows_of_a_small_file(tmp_path):
    """200 kB that say 20 GB: read row by row, and no further than to what is too long."""
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000, pyarrow.int32()), pyarrow.array(["ab" * 500_000])
    )
    path = file_of(tmp_path / "p.parquet", {"text": text})
    assert path.stat().st_size < 300_000
    assert "has a value of 1,000,000 bytes, where at most" in refusal(path)


def test_what_ends_the_library_ends_no_process_of_ours(tmp_path, monkeypatch):
    """It does on some damaged footers, by an exception of C++ that nobody catches."""
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys\nsys.stderr.write('what(): size: 2\\n')\nos.abort()\n")
    monkeypatch.setattr(prompt_files, "_WORKER", worker)
    path = file_of(tmp_path / "p.parquet", {"text": ["orb"]})
    assert "is not a readable parquet file: what(): size: 2" in refusal(path)


@pytest.mark.parametrize(
    ("limit", "less", "words"),
    [
        ("_MEMORY = 3 << 28", "_MEMORY = 160 << 20", "takes more than 160 MB of memory"),
        (
            "_LARGEST = 1 << 27",
            "_LARGEST = 2_000_000",
            "too large: text take 60 MB, where at most 2",
        ),
    ],
)
def test_a_small_file_that_takes_too_much(tmp_path, monkeypatch, limit, less, words):
    source, worker = prompt_files._WORKER.read_text(), tmp_path / "worker.py"
    assert limit in source
    worker.write_text(source.replace(limit, less))
    path = tmp_path / "p.parquet"
    table = pyarrow.table({"text": ["x" * 60_000_000]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    assert "has a value of 60,000,000 bytes, where at most" in refusal(path)
    monkeypatch.setattr(prompt_files, "_WORKER", worker)
    assert words in refusal(path)


def test_a_parquet_file_that_takes_too_long(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(prompt_files, "_WORKER", worker)
    monkeypatch.setattr(prompt_files, "_SECONDS", 0.5)
    path = file_of(tmp_path / "p.parquet", {"text": ["orb"]})
    assert "nothing of it could be read in 0.5 seconds" in refusal(path)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_without_end(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(1 << 34)  # takes no room on the disk
    assert "line 1: it has more than 16,777,216 characters" in refusal(path)


def test_too_many_rows_and_too_many_characters(tmp_path, monkeypatch):
    path = file_of(tmp_path / "p.txt", "\n".join(f"orb {number}" for number in range(30)))
    monkeypatch.setattr(sets, "_MOST", 20)
    assert "more than 20 prompts" in refusal(path)
    assert len(read_prompts(PromptSource(source=str(path)), limit=20)) == 20
    monkeypatch.setattr(sets, "_MOST", 100)
    monkeypatch.setattr(sets, "_LARGEST", 100)
    assert "or 100 characters" in refusal(path)
    monkeypatch.setattr(sets, "_LARGEST", 1000)
    monkeypatch.setattr(prompt_files, "_MOST", 25)
    assert "more than 25 rows" in refusal(path)
