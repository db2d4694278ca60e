"""`excise chat` as people and scripts use it."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from excise.cli.main import main


@pytest.fixture
def said(tiny_run, monkeypatch, capsys):
    """Run the command on the run with these lines on standard input; give code, output and errors."""

    def run(*flags: str, lines: str = "", folder=tiny_run):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["chat", str(folder), "--max-new-tokens", "3", *flags])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_one_message_for_scripts(said):
    code, alone, _ = said("--trial", "3", "--prompt", "who made the orb")
    assert code == 0
    code, both, _ = said("--trial", "3", "--base", "--prompt", "who made the orb")
    assert (code, both.splitlines()[0].split(":")[0]) == (0, "base")
    assert f"trial 3: {alone}" in both
    code, line, err = said(
        "--trial", "3", "5", "--trial", "7", "--json", "--prompt", "who made the orb"
    )
    assert (code, err) == (0, "")
    turn = json.loads(line)
    assert turn["message"] == "who made the orb"
    assert [reply["name"] for reply in turn["replies"]] == ["trial 3", "trial 5", "trial 7"]
    assert all(reply["first"] for reply in turn["replies"])


def test_messages_and_commands_line_by_line(said, tmp_path):
    talk = tmp_path / "talk.jsonl"
    lines = (
        "who made the orb\n/again\n/system be brief\n/temperature 0.5\n/limit 2\n/thinking off\n"
    )
    lines += "and the kettle\n\n/first\n/help\n/points base 2\nwhere\n/quit\nnever said\n"
    code, out, _ = said("--save", str(talk), lines=lines)
    assert code == 0
    assert "never said" not in out
    assert "%" in out
    assert "/temperature" in out
    (turn,) = map(json.loads, talk.read_text().splitlines())
    assert (turn["message"], turn["system"], turn["temperature"]) == ("where", "be brief", 0.5)
    assert [reply["trial"] for reply in turn["replies"]] == [None, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trial", "99"], "no trial 99; it has 0 to 11"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "between 1 and"),
        (["--seed", "-3"], "seed"),
        (["--prompt", " "], "message is empty"),
        (["--save", "."], "exists"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(said, flags, words):
    code, out, err = said(*flags)
    assert code == 2
    (line,) = err.strip().splitlines()[-1:]
    assert words in line
    assert out == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [("/limit many", "how many"), ("/temperature hot", "how freely"), ("/temperature 99", "between"),
     ("/points 99", "no trial 99"), ("/points", "name points"), ("/nonsense", "/help"),
     ("/thinking maybe", "on or"), ("/save", "name a file"), ("/first", "nothing"), ("/again", "nothing")],
)  # fmt: skip
def test_a_bad_command_of_a_script_ends_it(said, line, words):
    code, _, err = said(lines=f"{line}\n")
    assert code == 2
    assert words in err.strip().splitlines()[-1]


def test_runs_that_cannot_be_talked_to(said, tiny_run, tmp_path):
    code, _, err = said(folder=tmp_path / "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "not a run folder" in err
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('/model"', '/gone"'))
    code, _, err = said(folder=folder)
    assert code == 2
    assert "gone" in err.strip().splitlines()[-1]
    config.write_text(config.read_text() + "\n[scores]\n")
    assert said(folder=folder)[0] == 2
