"""The fuzzer: its first inputs, that they repeat, and that its judge sees what is planted to be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from fuzz import checks, fuzzing, judge, measuring, preparing
from fuzz.case import Case
from fuzz.formats import change_gguf, change_safetensors, parse
from fuzz.fuzzing import Fuzz, listing, table
from fuzz.kinds import KINDS
from fuzz.mutations import change_json
from fuzz.running import run

SHORT = 150


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    """The fuzzer on its ground."""
    folder = tmp_path_factory.mktemp("fuzz")
    preparing.load_libraries()
    return Fuzz(preparing.ground(folder), folder)


def test_nothing_is_wrong_with_the_first_inputs(fuzz: Fuzz):
    verdicts = fuzz.meet_all(range(SHORT), jobs=1)
    assert {v.kind for v in verdicts} == set(KINDS)
    assert {v.code for v in verdicts} >= {0, 2}
    assert not [v for v in verdicts if v.faults], listing(verdicts, 0) + "\n" + table(verdicts)


@pytest.mark.parametrize("kind", ["weights", "gguf", "captured", "journal"])
def test_undamaged_input_passes(fuzz: Fuzz, kind: str):
    found = fuzz.meet(list(KINDS).index(kind), sound=True)
    assert found.code == 0
    assert not found.faults


def test_an_input_is_the_same_again(fuzz: Fuzz, tmp_path: Path):
    for number in (0, 6, 19):
        twice = [Fuzz(fuzz.ground, tmp_path / name, keep=True) for name in "ab"]
        first, second = (one.meet(number) for one in twice)
        assert (first.changed, first.code) == (second.changed, second.code)
        a, b = (next(one.folder.iterdir()) for one in twice)
        files = [p.relative_to(a) for p in a.glob("*/*") if p.suffix in (".safetensors", ".gguf")]
        assert all((a / path).read_bytes() == (b / path).read_bytes() for path in files)


def test_a_fork_gives_what_a_new_process_gives(fuzz: Fuzz, tmp_path: Path):
    setup, records = fuzz.ground.setup, []
    for name in ("forked", "new"):
        out = tmp_path / name
        if name == "forked":
            folder = tmp_path / "work"
            folder.mkdir()
            assert run(lambda out=out: fuzzing.command(setup.run(out)), folder).code == 0
        else:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "excise.cli", *setup.run(out)]
            subprocess.run(command, env=environment, check=True, capture_output=True)
        records.append(json.loads((out / "record.json").read_text()))
    a, b = records
    assert checks.facts(a) == checks.facts(b)
    assert (a["holdout"], a["selected"]) == (b["holdout"], b["selected"])


# -- the judge -------------------------------------------------------------------------------------


def ending(tmp_path: Path, function, **limits) -> list[str]:
    """The classes of what is wrong with how a planted command ends."""
    return [fault.kind for fault in judge.faults_of_ending(run(function, tmp_path, **limits))]


def says(text: str, code: int):
    def command() -> int:
        sys.stderr.write(text)
        return code

    return command


def test_the_judge_sees_how_a_command_ends(tmp_path: Path):
    assert ending(tmp_path, lambda: 0) == []
    assert ending(tmp_path, says("excise: no such file\n", 2)) == []
    assert ending(tmp_path, lambda: 1 // 0) == ["traceback"]
    assert ending(tmp_path, says("a\nb\nc\nd\n", 2)) == ["long message"]
    assert ending(tmp_path, says("x" * 5000, 2)) == ["long message"]
    assert ending(tmp_path, says("", 2)) == ["long message"]
    assert ending(tmp_path, says("excise: no \x1b[31mfile\n", 1)) == ["escape"]
    assert ending(tmp_path, says("excise: no file\n", 7)) == ["exit code"]
    assert ending(tmp_path, lambda: os.kill(os.getpid(), 11) or 0) == ["exit code", "long message"]


def test_the_judge_stops_what_hangs_or_eats_memory(tmp_path: Path):
    def eat() -> int:
        kept = []
        while True:
            kept.append(bytearray(b"x") * (64 << 20))

    assert ending(tmp_path, lambda: time.sleep(60) or 0, seconds=0.3) == ["limit"]
    assert ending(tmp_path, eat, most=3 << 30) == ["limit"]


def test_the_judge_sees_what_is_left_over(tmp_path: Path):
    def leave() -> int:
        subprocess.Popen(["sleep", "60"])
        return 0

    assert ending(tmp_path, leave) == ["left over"]


def test_the_judge_sees_what_bad_input_wrote(tmp_path: Path):
    kept, absent = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()

    def write() -> int:
        (kept / "config.toml").write_text("x")
        absent.mkdir()
        sys.stderr.write("excise: no\n")
        return 2

    before = {kept: judge.digest(kept)}
    found = run(write, tmp_path)
    faults = list(judge.faults_of_files(found, before, (absent,), tmp_path))
    assert [fault.kind for fault in faults] == ["written", "written"]
    (absent / ".model.partial-1").mkdir()
    faults = list(judge.faults_of_files(run(lambda: 0, tmp_path), {}, (), tmp_path))
    assert [fault.kind for fault in faults] == ["left over"]


@pytest.fixture(scope="module")
def finished(fuzz: Fuzz) -> Path:
    """A run of the undamaged job, which a test may spoil."""
    out = fuzz.folder / "finished"
    folder = fuzz.folder / "work"
    folder.mkdir()
    assert run(lambda: fuzzing.command(fuzz.ground.setup.run(out)), folder).code == 0
    return out


def wrong(fuzz: Fuzz, check) -> list[str]:
    """What is wrong with a result, as the fuzzer asks for it."""
    folder = fuzz.folder / f"wrong-{time.monotonic_ns()}"
    folder.mkdir()
    case = Case([], lambda _: check())
    return [fault.words for fault in fuzz.results(case, "", folder)]


def spoilt_record(out: Path, to: Path, change) -> Path:
    """A copy of a run with a changed record."""
    to.mkdir()
    for path in out.iterdir():
        if path.name != "record.json":
            (to / path.name).symlink_to(path)
    record = json.loads((out / "record.json").read_text())
    change(record)
    (to / "record.json").write_text(json.dumps(record))
    return to


def test_the_judge_measures_a_run_for_itself(fuzz: Fuzz, finished: Path, tmp_path: Path):
    setup = fuzz.ground.setup
    assert wrong(fuzz, lambda: checks.check_run(setup, finished)) == []

    def change(record):
        record["baseline"]["behaviour_rate"]["value"] += 1 / 3
        record["artifacts"][0]["measured"]["drift"]["value"] *= 1.2
        record["prompts"]["target_eval"]["sha256"] = "0" * 64

    out = spoilt_record(finished, tmp_path / "run", change)
    found = wrong(fuzz, lambda: checks.check_run(setup, out))
    assert [words.partition(":")[0] for words in found] == [
        "the target_eval prompts are others than the file holds",
        "baseline",
        "export",
    ]


def test_the_judge_knows_other_weights(fuzz: Fuzz, tmp_path: Path):
    truth, run_folder = fuzz.ground.truth("ridge"), fuzz.ground.run("ridge")
    own = run_folder / "model"
    trial = truth["record"]["selected"]
    assert not list(checks.check_weights(truth, own, trial))
    assert list(checks.check_weights(truth, own, (trial + 1) % 6))
    changed = tmp_path / "model"
    changed.mkdir()
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(bytes(data))
    assert list(checks.check_weights(truth, changed, trial))


def test_the_judge_knows_other_trials(fuzz: Fuzz, tmp_path: Path):
    truth, run_folder = fuzz.ground.truth("directional"), fuzz.ground.run("directional")
    assert not list(checks.check_resume(truth, run_folder))

    def change(record):
        record["trials"][2]["params"]["direction_index"] = 0.123

    changed = spoilt_record(run_folder, tmp_path / "run", change)
    assert "trials [2] are others than they were" in list(checks.check_resume(truth, changed))
    said = {"front": [dict(truth["record"]["trials"][n]) for n in truth["record"]["front"]]}
    assert not list(checks.check_front(truth, json.dumps(said)))
    said["front"][0]["params"] = {"direction_index": 0.123}
    assert list(checks.check_front(truth, json.dumps(said)))


def test_a_judge_that_cannot_follow_is_a_fault(fuzz: Fuzz):
    def lost():
        raise measuring.Unloadable("tensors are missing")

    assert "the judge cannot follow" in wrong(fuzz, lost)[0]


# -- what is changed -------------------------------------------------------------------------------


def test_changes_change_and_cover_all_ways(fuzz: Fuzz):
    weights = (fuzz.ground.folder / "model" / "model.safetensors").read_bytes()
    gguf = (fuzz.ground.folder / "model.gguf").read_bytes()
    assert parse(gguf).encode() == gguf
    for data, change in ((weights, change_safetensors), (gguf, change_gguf)):
        found = [change(data, Random(n)) for n in range(150)]
        assert sum(changed != data for changed, _ in found) > 140
        assert len({what for _, what in found}) > 100
    document = b'{"a": {"b": [1, 2.5, "x", true, null]}, "c": "y"}'
    texts = {change_json(document, Random(n))[0] for n in range(400)}
    assert len(texts) > 250
    assert any(b"\\ud800" in text for text in texts)
    assert any(text.count(b'"c"') == 2 for text in texts)
    assert any(len(text) > 50_000 for text in texts)
