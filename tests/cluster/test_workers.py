"""One study on several workers: the same trials, whoever measures, and whoever is lost."""

from __future__ import annotations

import sys

import builders
import psutil
import pytest

from excise.cli.main import main
from excise.cluster.workers import Workers
from excise.config import load_config
from excise.errors import ClusterError
from excise.events import Notice, TrialMeasured
from excise.runs.pipeline import run

TRIALS, BATCH = 8, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return builders.checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    sides = {}
    for name in ("target", "contrast"):
        file = folder / f"{name}.txt"
        file.write_text("\n".join(f"{name} colour of lantern {n}" for n in range(10)))
        sides |= {f"prompts.{name}{part}": {"source": str(file)} for part in ("", "_eval")}
    sizes = {"prompts.eval_size": 5, "prompts.direction_size": 6, "scores.max_new_tokens": 3}
    search = {"search.trials": TRIALS, "search.startup_trials": 4, "search.batch": BATCH}
    flags = {"model.source": str(model), "scores.markers": ["e", "a"], "prompts.keep": []}
    return load_config(flags=sides | sizes | search | flags)


def trials_of(record):
    return [(t.params, {n: s.value for n, s in t.scores.items()}) for t in record.trials]


def same(one, other):
    assert [params for params, _ in one] == [params for params, _ in other]
    for (_, mine), (_, theirs) in zip(one, other, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return trials_of(run(config, tmp_path_factory.mktemp("alone") / "run", anyway=True))


def ours(name):
    """Processes below this one whose command names this."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if name in " ".join(p.cmdline())]


def test_three_workers_give_the_trials_of_one(config, alone, tmp_path):
    told = []
    record = run(config, tmp_path / "run", told.append, anyway=True, workers=Workers(3))
    same(alone, trials_of(record))
    assert not [e for e in told if isinstance(e, Notice) and "given up" in e.message]
    assert not ours("ray")
    assert not list(tmp_path.glob("excise-ray-*"))


def test_lost_workers_and_a_cut_search_lose_nothing(config, alone, tmp_path):
    """One worker is killed in the second batch, one hangs; the search is cut, and goes on alone."""
    told = []

    def watch(event):
        told.append(event)
        measured = [e for e in told if isinstance(e, TrialMeasured)]
        if isinstance(event, TrialMeasured) and len(measured) == BATCH:
            killed, hanging = ours("ray::Worker")
            killed.kill()
            hanging.suspend()
        if len(measured) == TRIALS:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(config, out, watch, anyway=True, workers=Workers(3, least_patience=2.0))
    notices = [e.message for e in told if isinstance(e, Notice)]
    given_up = sorted(n.split("given up: ")[1] for n in notices if "given up" in n)
    assert [why.split(".")[0] for why in given_up] == [
        "it did not answer in many times what the others take",
        "its process ended",
    ]
    assert not ours("ray")
    same(alone, trials_of(run(config, out, resume=True, anyway=True)))


@pytest.mark.parametrize(
    "flags", [["--workers", "0"], ["--workers", "x"], ["--gpus-per-worker", "-1"]]
)
def test_bad_counts_are_refused(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    assert "is not a count from 1 to 10000" in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(config, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "t.txt").write_text("a\nb\n")
    (tmp_path / "c.txt").write_text("c\nd\n")
    prompts = [f"--{side}={tmp_path / side[0]}.txt" for side in ("target", "contrast")]
    given = ["run", str(model), "--out", str(tmp_path / "out"), *prompts, "--workers", "2"]
    assert main(given) == 2
    assert "pip install 'excise[cluster]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_answers_at_an_address(config, tmp_path):
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        run(config, tmp_path / "run", anyway=True, workers=Workers(2, "127.0.0.1:9"))
