"""A run folder is a contract: what goes on with it goes by what its trials were measured with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import job
from safetensors.torch import load_file, save_file

from excise.cli import main as cli
from excise.config import Config, load_config, to_toml
from excise.errors import ConfigError, OutputError, RunStateError
from excise.report import card, pages
from excise.report.stored_record import read_record, write_record
from excise.runs import baseline, pipeline
from excise.runs.changed_settings import check_settings, read_settings
from excise.search import journal
from excise.search.pareto import Objective, parse_rule

GOALS = [Objective("behaviour_rate"), Objective("drift")]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory) -> Path:
    """A finished run that captured for its method, without an export."""
    out = tmp_path_factory.mktemp("finished") / "run"
    more = ("--method", "ridge", "--set", "export.formats=[]")
    assert cli.main(job(tiny, out, *more)) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def said(capsys):
    """One line of standard error for a command, and its exit code."""

    def check(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([*arguments, *([] if arguments[0] in ("front", "report") else ["--quiet"])])
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) <= 1
        return code, lines[0] if lines else ""

    return check


def commands(run: Path) -> list[list[str]]:
    to = str(run.parent / "to")
    return [
        ["export", str(run), "--to", to],
        ["geometry", str(run)],
        ["resume", str(run), "--trials", "16"],
    ]


def edit(run: Path, old: str, new: str) -> None:
    path = run / "config.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('row_norms = "full"', 'row_norms = "none"', "edit.row_norms"),
        ("rank = 8", "rank = 2", "ridge.rank"),
        ("seed = 0", "seed = 1", "seed"),
        ("direction_size = 10", "direction_size = 9", "prompts.direction_size"),
        ("startup_trials = 6", "startup_trials = 7", "search.startup_trials"),
        ('method = "ridge"', 'method = "directional"', "method"),
    ],
)
def test_a_changed_setting_is_refused_by_name(run, said, old, new, key):
    edit(run, old, new)
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"}
    for command in commands(run):
        code, line = said(*command)
        assert code == 2
        assert f"{key} is " in line
        assert "Set it back" in line
    assert not (run.parent / "to").exists()
    assert before == {p: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"}


def test_every_setting_is_free_or_compared():
    """A setting that a later version adds is compared until somebody says that it may change."""
    known = Config(method="ridge").model_dump(mode="json", exclude_none=True)
    folder = Path("run")
    for key, value in (
        ("description", "x"),
        ("search.trials", 3),
        ("search.select", "drift<=1"),
        ("export.formats", []),
        ("model.source", "elsewhere"),
        ("scores.final", ["kept"]),
        ("prompts.target", {"source": "moved.txt"}),
    ):
        check_settings(folder, load_config(flags={"method": "ridge", key: value}), known)
    for key, value in (
        ("search.ei_candidates", 3),
        ("engine.rows", 8),
        ("scores.objectives", ["drift"]),
        ("scores.max_new_tokens", 3),
        ("prompts.system", "x"),
        ("edit.components", ["attn.o_proj"]),
        ("directions.winsor", 0.9),
        ("goal", "strengthen"),
        ("model.quantize", "bnb-4bit"),
        ("model.trust_remote_code", True),
    ):
        with pytest.raises(RunStateError, match=key.replace(".", r"\.")):
            check_settings(folder, load_config(flags={"method": "ridge", key: value}), known)


def test_a_folder_with_settings_of_another_version_says_what_to_do(tmp_path):
    known = Config(method="ridge").model_dump(mode="json", exclude_none=True)
    known["search"]["refine"] = 0
    with pytest.raises(
        RunStateError, match=r"key search\.refine.*front.*the version of Excise that"
    ):
        check_settings(tmp_path, Config(method="ridge"), known)
    (tmp_path / "config.toml").write_text("[search]\nrefine = 0\n")
    with pytest.raises(RunStateError, match=r"config\.toml: unknown .* search\.refine"):
        read_settings(tmp_path)


def test_a_run_of_a_version_without_a_keep_set_goes_on_without_one(tmp_path):
    (tmp_path / "config.toml").write_text("[prompts]\ndirection_size = 7\n")
    assert read_settings(tmp_path).prompts.keep == ()
    (tmp_path / "config.toml").write_text(to_toml(Config()))
    assert [one.source for one in read_settings(tmp_path).prompts.keep] == ["builtin"]


def test_what_a_configuration_leaves_open_is_as_it_was():
    known = Config.model_validate({"method": "ara", "model": {"dtype": "bfloat16"}})
    found = check_settings(Path("run"), Config(), known.model_dump(mode="json"))
    assert (found.method, found.model.dtype) == ("ara", "bfloat16")


def test_free_settings_may_change(run, said):
    edit(run, "trials = 12", "trials = 8")
    edit(run, 'select = "knee"', 'select = "rate<=1"')
    edit(run, "formats = []", 'formats = ["adapter"]')
    assert said("resume", str(run)) == (0, "")
    record = read_record(run)
    assert len(record.trials) == 12
    assert record.config["search"]["trials"] == 12  # as many as there are, not the fewer asked for
    assert record.selection == "rate<=1"
    assert [a.format for a in record.artifacts] == ["adapter"]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["directions.safetensors", "method.safetensors"])
@pytest.mark.parametrize("how", ["values", "gone"])
def test_captured_tensors_that_changed_are_refused(run, said, name, how):
    if how == "gone":
        (run / name).unlink()
    else:
        tensors = load_file(run / name)
        key = sorted(tensors)[0]
        tensors[key] = tensors[key] * 1.01
        from safetensors import safe_open

        with safe_open(run / name, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, run / name, metadata=metadata)
    for command in commands(run):
        code, line = said(*command)
        assert code == 2
        assert name in line
        assert "put it back" in line
    assert not (run.parent / "to").exists()


def test_markers_and_answers_that_changed_are_refused_by_export(tiny, tmp_path, said):
    place = Path(shutil.copytree(tiny, tmp_path / "place"))
    out, to = tmp_path / "run", str(tmp_path / "to")
    assert cli.main(job(place, out, "--set", "export.formats=[]")) == 0
    (place / "markers.txt").write_text("o\n")
    code, line = said("export", str(out), "--to", to)
    assert code == 2
    assert "belongs to another run: markers differ" in line


# -- code ------------------------------------------------------------------------------------------


def own_scorer(folder: Path) -> tuple[Path, list[str]]:
    """A scorer that leaves a mark when it is loaded, and the flags of a run that has it."""
    file, mark = folder / "mine.py", folder / "was_run"
    file.write_text(
        "from pathlib import Path\nfrom excise import Responses, Score, scorer\n"
        f"Path({str(mark)!r}).touch()\n"
        "@scorer('mine', needs=lambda _: [Responses('target')])\n"
        "def mine(e, c):\n    return Score(0.5, 1)\n"
    )
    sets = (f'scores.files=["{file}"]', 'scores.report=["mine"]', "export.formats=[]")
    return mark, [part for one in sets for part in ("--set", one)]


def test_code_that_a_run_folder_names_runs_only_where_it_is_trusted(tiny, tmp_path, said):
    mark, flags = own_scorer(tmp_path)
    out = tmp_path / "run"
    assert cli.main(job(tiny, out, *flags)) == 0
    mark.unlink()
    export, geometry, resume = commands(out)
    for command in (export, resume):
        code, line = said(*command)
        assert code == 2
        assert str(tmp_path / "mine.py") in line
        assert "--trust-run" in line
    assert said(*geometry) == (0, "")  # it scores nothing
    assert not mark.exists()
    assert said(*export, "--trust-run") == (0, "")
    assert mark.exists()


def test_a_setting_that_names_code_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "config.toml").write_text(
        "[model]\ntrust_remote_code = true\n[export]\nllama_cpp = '/opt/llama'\n"
    )
    with pytest.raises(
        RunStateError, match=r"trust_remote_code = True.*export\.llama_cpp = /opt/llama"
    ):
        read_settings(tmp_path)
    with pytest.raises(RunStateError, match="trust_remote_code"):
        read_settings(tmp_path, unused=("export.llama_cpp",))
    assert read_settings(tmp_path, trust=True).model.trust_remote_code


# -- two runs in one folder ------------------------------------------------------------------------


def test_a_run_that_began_while_the_model_was_loaded_is_not_written_over(tiny, tmp_path, finished):
    out = tmp_path / "run"
    real = pipeline.load

    def slow(section):
        shutil.copytree(finished, out)
        return real(section)

    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load", slow)
        arguments = cli.build_parser().parse_args(job(tiny, out))
        config = cli._config(arguments, arguments.model)
        with pytest.raises(OutputError, match="already holds a run"):
            pipeline.run(config, out)
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_a_capture_without_a_study_is_made_anew(tiny, tmp_path, monkeypatch):
    """Nothing says what it was: a kill came before the study was there."""
    out = tmp_path / "run"

    def dies(*_args, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, "create_study", dies)
        assert cli.main(job(tiny, out, "--set", "export.formats=[]")) == 130
    path = out / "directions.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "unit": -tensors["unit"]}, path, metadata={"projected": "true"})
    assert cli.main(["resume", str(out), "--quiet"]) == 0
    assert (load_file(path)["unit"] == tensors["unit"]).all()


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report", "card"])
def test_a_page_that_fails_takes_neither_record_nor_model(run, said, monkeypatch, name):
    def broken(*_args, **_more):
        raise KeyError("no such thing")

    to = run.parent / "to"
    edit(run, "formats = []", 'formats = ["safetensors"]')
    with monkeypatch.context() as patch:
        where = (pages, "html_report") if name == "report" else (card, "model_card")
        patch.setattr(*where, broken)
        code, line = said("resume", str(run))
        assert code == 1
        assert "record and exports" in line
        assert f"`excise report {run}`" in line
        (artifact,) = read_record(run).artifacts
        assert (run / artifact.path / "model.safetensors").is_file()
        text = (run / artifact.path / "README.md").read_text()
        assert ("not its model card" in text) == (name == "card")
        assert said("export", str(run), "--to", str(to))[0] == 1
        assert (to / "model.safetensors").is_file()
        assert read_record(run).artifacts[-1].path == str(to)
    assert said("report", str(run)) == (0, "")
    assert "## Figures" in (run / "model" / "README.md").read_text()
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    "text", ["---\nlicense: [a: b: c\n", "---\na: &a [*a]\nlicense: *a\n---\n"]
)
def test_a_models_card_is_in_no_runs_way(tiny, tmp_path, text):
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    (model / "README.md").write_text(text)
    arguments = job(tiny, tmp_path / "run")
    arguments[1] = str(model)
    assert cli.main(arguments) == 0
    record = read_record(tmp_path / "run")
    assert record.model.license is None
    assert record.artifacts


# -- nothing to edit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "n", "strengthen", "nothing"),
    [
        (0, 1, False, True),
        (0, 10, False, True),
        (1, 10, False, False),
        (4, 100, False, True),
        (5, 100, False, False),
        (100, 100, False, False),
        (100, 100, True, True),
        (96, 100, True, True),
        (95, 100, True, False),
        (0, 100, True, False),
    ],
)
def test_when_there_is_nothing_to_edit(shown, n, strengthen, nothing):
    from excise.record import ScoreRecord

    score = ScoreRecord(value=shown / n, n=n)
    assert baseline.has_nothing(score, strengthen=strengthen) is nothing


@pytest.mark.parametrize("how", ["remove", "strengthen"])
def test_a_search_with_nothing_to_find_stops_after_the_baseline(tiny, tmp_path, said, how):
    out, markers = tmp_path / "run", tmp_path / "markers.txt"
    given = [a for a in job(tiny, out, "--set", "export.formats=[]") if a != "--anyway"]
    markers.write_text("no such phrase\n" if how == "remove" else "\ufffd\ny\n6\ns\n")
    given[given.index("--markers") + 1] = str(markers)
    given += ["--strengthen"] if how == "strengthen" else []
    given.remove("--quiet")
    code, line = said(*given)
    assert code == 1
    count = {"remove": "0 of 10", "strengthen": "10 of 10"}[how]
    assert f"the original shows the behaviour in {count} responses" in line
    assert "'yyyy'" in line
    assert f"`excise resume {out} --anyway`" in line
    assert not (out / "record.json").exists()
    assert said("resume", str(out))[0] == 1
    assert said("resume", str(out), "--anyway") == (0, "")
    assert said("resume", str(out), "--trials", "16") == (0, "")  # with trials, that is decided
    assert len(read_record(out).trials) == 16


def test_responses_that_may_not_be_shown_are_not(tiny, tmp_path, said):
    given = [a for a in job(tiny, tmp_path / "run") if a not in ("--anyway", "--quiet")]
    (tmp_path / "none.txt").write_text("no such phrase\n")
    given[given.index("--markers") + 1] = str(tmp_path / "none.txt")
    line = said(*given, "--set", 'scores.show=["contrast"]')[1]
    assert "there is nothing to remove" in line
    assert "yyyy" not in line


# -- the record ------------------------------------------------------------------------------------


def changed(**keys):
    return lambda data: data.update(keys)


def in_trial(**keys):
    return lambda data: data["trials"][2].update(keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(schema=9), "has schema 9"),
        (changed(trials=3), "'trials': Input should be a valid list"),
        (lambda d: d["trials"].pop(3), "trial 4 stands where trial 3 belongs"),
        (lambda d: d["trials"].insert(3, d["trials"][3]), "trial 3 stands where trial 4 belongs"),
        (in_trial(params={"rank": [1]}), "neither text nor a number"),
        (in_trial(params={"rank": 3}), "has not the parameters of method 'ridge'"),
        (
            lambda d: d["trials"][2]["params"].update(strength=1.5),
            "are not those that were written",
        ),
        (
            lambda d: d["trials"][2]["scores"]["drift"].update(value=0.5),
            "not those that were written",
        ),
        (lambda d: d["trials"][2]["scores"]["drift"].update(value="NaN"), "not a number"),
        (changed(front=[99]), "its front names trials that are not there"),
        (changed(selected=99), "the selected trial 99 is not there"),
        (changed(selected=-1), "the selected trial -1 is not there"),
        (changed(objectives=["drift", "drift"]), "do not fit"),
        (changed(goals=["minimize"]), "do not fit"),
        (changed(timing={"a": "Infinity"}), "timing.a"),
        (changed(geometry=[{"layer": 1}]), "its geometry lacks columns"),
        (changed(config={"search": {"trials": "many"}}), "search.trials"),
        (lambda d: d["model"].update(layers=10**9), "model.layers"),
        (lambda d: d["model"].update(sampling={"top_p": "a"}), "model.sampling"),
        (lambda d: d["formatting"].update(notes=3), "formatting"),
        (
            changed(
                artifacts=[{"path": "a\0b", "format": "x", "sha256": "", "trial": 0, "bytes": 1}]
            ),
            "is not the path of a folder",
        ),
    ],
)
def test_a_record_that_no_run_wrote_is_refused_in_one_line(run, said, change, words):
    data = json.loads((run / "record.json").read_text())
    change(data)
    (run / "record.json").write_text(json.dumps(data))
    for command in ("front", "report"):
        code, line = said(command, str(run))
        assert code == 2
        assert words in line
        assert len(line) < 600
    assert said("export", str(run), "--to", str(run.parent / "to"))[0] == 2


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"schema": 1', "[" * 10_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_a_record_that_is_no_record(run, said, text):
    (run / "record.json").write_text(text)
    for command in ("front", "report"):
        assert said(command, str(run))[0] == 2


def test_a_record_of_an_earlier_version_is_read(run, said):
    data = json.loads((run / "record.json").read_text())
    for key in ("figures_sha256", "files", "identity"):
        del data[key]
    (run / "record.json").write_text(json.dumps(data))
    assert said("front", str(run)) == (0, "")
    record = read_record(run)
    assert (record.files, record.identity) == ({}, {})
    write_record(run, record)
    assert read_record(run).figures_sha256 is not None


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["rate<=5", "behaviour_rate<=1.01", "rate<=-0.1"])
def test_a_rate_is_a_share(rule):
    with pytest.raises(ConfigError, match="is not a share"):
        parse_rule(rule, GOALS)


def test_shares_and_drifts_are_limits():
    assert parse_rule("rate<=0.05", GOALS) == (0, 0.05, None)
    assert parse_rule("drift<=5", GOALS) == (1, 5.0, None)


# -- what others read ------------------------------------------------------------------------------


def test_every_command_ends_its_events_with_its_result(run, capsys):
    to = str(run.parent / "to")
    for command, keys in (
        (["export", str(run), "--to", to], {"trial", "format", "sha256", "path"}),
        (["geometry", str(run)], {"layers"}),
    ):
        capsys.readouterr()
        assert cli.main([*command, "--json-events"]) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["event"] == "Result"
        assert set(last["result"]) == keys


def test_an_edited_model_that_cannot_be_read_is_said_before_the_base_is_measured(
    tiny, tmp_path, said, monkeypatch
):
    def measured(*_args, **_more):
        raise AssertionError("the base was measured first")

    monkeypatch.setattr("excise.search.evaluation.Panel.measure", measured)
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    flags = job(tiny, tmp_path)[4:14]
    (model / "model.safetensors").write_bytes(b"short")
    for edited in (tmp_path / "none", model):
        code, line = said("evaluate", str(tiny / "model"), str(edited), *flags)
        assert code == 2
        assert str(edited) in line
    shutil.copy(tiny / "model" / "model.safetensors", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    code, line = said("evaluate", str(tiny / "model"), str(model), *flags)
    assert code == 2
    assert "other shapes" in line


def test_an_adapter_of_a_rank_that_no_matrix_has(tiny, tmp_path, said):
    out = tmp_path / "run"
    given = [a for a in job(tiny, out) if a != "--quiet"]
    sets = ("--set", 'export.formats=["adapter"]', "--set", "export.adapter_rank=5000")
    code, line = said(*given, *sets)
    assert code == 2
    assert "export.adapter_rank is 5000" in line
    assert not out.exists()


def test_names_that_are_not_utf8_are_refused_before_the_work(tiny, tmp_path, said, finished):
    bad = "no-\udcff-name"
    given = [a for a in job(tiny, tmp_path / bad) if a != "--quiet"]
    assert said(*given)[0] == 2
    code, _ = said("export", str(finished), "--to", str(tmp_path / bad))
    assert code == 2
    assert list(tmp_path.iterdir()) == []
