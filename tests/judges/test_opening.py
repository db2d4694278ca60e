"""Tests of runs whose responses a judge reads, from the search to the exports and what comes after."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import judge_models
import pytest

from excise.cli.main import main
from excise.report.stored_record import read_record

SIZES = (
    *("--direction-size", "40", "--eval-size", "20", "--quiet", "--set", "search.batch=4"),
    *("--set", "prompts.holdout_size=20", "--set", "engine.rows=256"),
)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a judge, another one, labelled responses, and a run that the first has judged."""
    folder = tmp_path_factory.mktemp("judged")
    rows = judge_models.exchanges(200)
    judge_models.classifier(folder / "judge", rows)
    judge_models.classifier(folder / "other", rows, steps=90)
    lines = [
        json.dumps({"prompt": e.prompt, "response": e.response, "verdict": v})
        for e, v in judge_models.exchanges(50, seed=9)
    ]
    (folder / "labelled.jsonl").write_text("\n".join(lines) + "\n")
    words = ("red", "tin", "old", "new", "wet", "odd", "big", "low")
    texts = [f"What is the {word} orb like?" for word in words]
    (folder / "borderline.txt").write_text("\n".join(texts) + "\n")
    settings = (
        f"scores.judge.source={folder / 'judge'}",
        f"scores.judge.labelled={folder / 'labelled.jsonl'}",
        f'prompts.borderline=[{{source="{folder / "borderline.txt"}"}}]',
    )
    given = [part for one in settings for part in ("--set", one)]
    out = str(folder / "run")
    command = ["run", "demo", "--behaviour", "demo", "--out", out, "--trials", "4", *SIZES]
    assert main([*command, "--method", "directional", *given]) == 0
    return folder


def test_a_judge_stands_in_place_of_markers_throughout(judged: Path):
    record = read_record(judged / "run")
    assert record.judge is not None
    assert record.judge.name == "judge"
    assert record.judge.certificate is not None
    assert record.judge.certificate.kappa.value > 0.9
    assert record.baseline["behaviour_rate"].value > 0.8  # the demo model declines
    assert record.baseline["verdict_shows"].value > 0.8
    for trial in record.trials:
        rates = [
            trial.scores[f"verdict_{v}"].value for v in ("shows", "answers", "other", "broken")
        ]
        assert sum(rates) == pytest.approx(1)
        worst = trial.scores["verdict_shows"].value + trial.scores["verdict_broken"].value
        assert trial.scores["behaviour_rate"].value == pytest.approx(worst)
        assert trial.seconds["judge"] >= 0
    assert record.artifacts[0].measured["verdict_answers"].n == 20
    assert trial.scores["false_rate"].n == record.holdout["false_rate"].n == 4  # borderline prompts
    assert record.prompts["borderline_eval"].source == "borderline.txt"
    assert record.baseline["drift"].spread["max"] < 1e-4
    spread = record.holdout["drift"].spread
    assert spread["median"] <= record.holdout["drift"].value <= spread["max"]
    assert record.holdout["verdict_answers"].parts  # by group, as every rate
    card = (judged / "run" / "model" / "README.md").read_text()
    assert "Behaviour rate (by judge, kappa" in card
    assert "50 labelled responses" in card
    assert str(judged) not in card
    assert "by judge, kappa" in (judged / "run" / "report.html").read_text()


def test_a_resume_goes_on_with_the_same_judge_only(judged: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(judged / "run", run)
    config = run / "config.toml"
    text = config.read_text()
    config.write_text(text.replace(str(judged / "judge"), str(judged / "other")))
    assert main(["resume", str(run), "--quiet"]) == 2
    assert "belongs to another run: judge differ" in capsys.readouterr().err
    config.write_text(text.replace(f'source = "{judged / "judge"}"\n', ""))
    assert main(["resume", str(run), "--quiet"]) == 2
    assert "excise:" in capsys.readouterr().err
    (judged / "judge").rename(judged / "moved")
    try:
        config.write_text(text.replace(str(judged / "judge"), str(judged / "moved")))
        asked = (run / "verdicts.jsonl").read_bytes()
        assert main(["resume", str(run), "--quiet"]) == 0  # the same weights, elsewhere
        assert len((run / "verdicts.jsonl").read_bytes()) >= len(asked)
    finally:
        (judged / "moved").rename(judged / "judge")


def test_evaluate_judges_and_says_how_far_to_believe_it(judged: Path, capsys):
    command = ["evaluate", "demo", str(judged / "run" / "model"), "--behaviour", "demo", *SIZES]
    command += ["--set", f"scores.judge.source={judged / 'judge'}", "--json"]
    command.remove("--quiet")
    assert main(command) == 0
    said = capsys.readouterr()
    assert "not certified" in said.err
    found = json.loads(said.out)["search"]
    record = read_record(judged / "run")
    edited = record.artifacts[0].measured["verdict_answers"].value
    assert found["edited"]["verdict_answers"]["value"] == edited


def test_the_model_under_test_may_not_be_the_judge(judged: Path, tmp_path: Path, capsys):
    command = ["run", "demo", "--behaviour", "demo", "--out", str(tmp_path / "run"), *SIZES]
    assert main([*command, "--set", "scores.judge.source=demo"]) == 2
    assert "is the model under test" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_a_judge_is_said_before_anything_is_written(
    judged: Path, tmp_path: Path, capsys
):
    command = ["run", "demo", "--behaviour", "demo", "--out", str(tmp_path / "run"), *SIZES]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "response": "r", "verdict": "meh"}\n')
    for settings, words in (
        ([f"scores.judge.labelled={bad}"], "the verdict 'meh' is none of"),
        (["scores.judge.severity=severity"], "which answers no rubric"),
        (['scores.judge.labels=["shows"]'], "write it as LABEL=shows"),
        ([f"scores.judge.source={tmp_path / 'nowhere'}"], "nowhere"),
        (["scores.judge.source="], "verdict_other"),
    ):
        given = [f"scores.judge.source={judged / 'judge'}", *settings]
        if "verdict_other" in words:
            given.append('scores.report=["verdict_other"]')
            words = "need a judge"
        assert main([*command, *(part for one in given for part in ("--set", one))]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_judge_measures_markers_and_classifiers_alike(judged: Path, capsys):
    labelled = ["--labelled", str(judged / "labelled.jsonl"), "--json", "--quiet"]
    assert main(["judge", str(judged / "judge"), *labelled]) == 0
    classifier = json.loads(capsys.readouterr().out)
    assert main(["judge", "markers", "--behaviour", "demo", *labelled]) == 0
    markers = json.loads(capsys.readouterr().out)
    assert classifier["n"] == markers["n"] == 50
    assert set(classifier["recall"]) == {"shows", "answers", "other"}
    assert markers["recall"]["other"]["value"] == 0  # they give two verdicts
    assert classifier["kappa"]["value"] > markers["kappa"]["value"] > 0.5
    assert main(["judge", str(judged / "judge"), *labelled[:2], "--quiet"]) == 0
    assert "Cohen's kappa" in capsys.readouterr().out


class Leaving(BaseHTTPRequestHandler):
    """A server that answers so many questions, then none."""

    left = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Leaving.left == 0:
            self.connection.close()
            return
        Leaving.left -= 1
        asked = body["messages"][0]["content"].casefold()
        shows = any(word in asked for word in ("i'm sorry", "i cannot", "discuss", "leave alone"))
        data = json.dumps({"choices": [{"message": {"content": "A" if shows else "B"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_server_that_goes_away_in_a_search_loses_no_trial(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("EXCISE_JUDGE_TOKEN", "sk-seen-by-nobody")
    monkeypatch.setattr("excise.judges.server._PAUSE", 0.01)
    out = tmp_path / "run"
    with ThreadingHTTPServer(("127.0.0.1", 0), Leaving) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        Leaving.left = 14  # the original, and a part of the first batch
        command = ["run", "demo", "--behaviour", "demo", "--out", str(out), "--quiet", "--no-keep"]
        command += ["--direction-size", "40", "--eval-size", "12", "--trials", "6"]
        command += [
            "--method",
            "directional",
            "--set",
            "search.batch=2",
            "--set",
            "engine.rows=128",
        ]
        command += ["--set", "prompts.holdout_size=6", "--set", "export.formats=[]"]
        command += ["--set", f"scores.judge.source=http://127.0.0.1:{server.server_port}/v1"]
        assert (
            main([*command, "--set", "scores.judge.model=some", "--set", "scores.judge.tries=2"])
            == 1
        )
        said = capsys.readouterr().err
        assert "went away" in said
        assert f"go on with `excise resume {out}`" in said
        assert said.count("\n") == 1
        Leaving.left = 10**6
        assert main(["resume", str(out), "--quiet"]) == 0
        server.shutdown()
    record = read_record(out)
    assert [trial.state for trial in record.trials] == ["complete"] * 6
    assert record.judge.certificate is None
    for file in (path for path in out.rglob("*") if path.is_file()):
        assert b"sk-seen-by-nobody" not in file.read_bytes(), file
