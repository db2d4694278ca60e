"""Configuration: the order of its layers, what a file says back, and how a mistake is named."""

from __future__ import annotations

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.config import (
    Config,
    PromptSource,
    ScoreSection,
    behaviours,
    load_config,
    read_behaviour,
    to_toml,
    validate,
)
from excise.errors import ConfigError

STEADY = settings(derandomize=True, deadline=None)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_without_layers_there_are_the_defaults():
    config = load_config()
    assert config == Config()
    assert (config.search.trials, config.search.startup_trials) == (200, 60)
    assert (config.prompts.direction_size, config.prompts.eval_size) == (400, 100)
    assert config.scores.objectives == ("behaviour_rate", "drift")


def test_later_layers_win(tmp_path):
    """defaults < behaviour < --config < flags < --set, each seen to beat the one below it."""
    keys = [f"search.{name}" for name in ("trials", "startup_trials", "ei_candidates", "batch")]
    names = [key.split(".")[1] for key in keys]

    def table(value, count):
        return "[search]\n" + "".join(f"{name} = {value}\n" for name in names[:count])

    config = load_config(
        behaviour=str(write(tmp_path / "quirk.toml", table(11, 4))),
        file=write(tmp_path / "more.toml", table(12, 3)),
        flags=dict.fromkeys(keys[:2], 13),
        sets=(f"{keys[0]}=14",),
    )
    found = [getattr(config.search, name) for name in names]
    assert found == [14, 13, 12, 11]


def test_a_later_layer_replaces_a_list_and_merges_a_table(tmp_path):
    """But a prompt set given by flag is whole: the columns of another file are not its own."""
    below = write(
        tmp_path / "quirk.toml",
        '[scores]\nmarkers = ["a", "b"]\nmax_new_tokens = 7\n'
        '[prompts.target]\nsource = "owner/name"\ncolumn = "q"\n',
    )
    config = load_config(
        behaviour=str(below),
        file=write(tmp_path / "more.toml", '[prompts.target]\nsplit = "test"\n'),
        flags={"scores.markers": ["c"]},
    )
    assert config.scores.markers == ("c",)
    assert config.scores.max_new_tokens == 7
    assert config.prompts.target == PromptSource(source="owner/name", column="q", split="test")
    flags = {"prompts.target": {"source": "owner/other"}}
    config = load_config(behaviour=str(below), flags=flags)
    assert config.prompts.target == PromptSource(source="owner/other")
    assert config.scores.max_new_tokens == 7


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("scores.markers=['no', 'never']", ("no", "never")),
        ("scores.markers=[]", ()),
        ("scores.markers_file=plain words.txt", "plain words.txt"),
        ('scores.markers_file="quoted = text"', "quoted = text"),
        ("scores.markers_file = a=b", "a=b"),
        ("engine.reuse=false", False),
        ("engine.memory_fraction=0.5", 0.5),
        ("engine.rows= 12", 12),
        ("directions.winsor=0.995", 0.995),
    ],
)
def test_set_reads_toml_values_and_takes_the_rest_as_text(expression, value):
    section, _, name = expression.partition("=")[0].strip().partition(".")
    assert getattr(getattr(load_config(sets=(expression,)), section), name) == value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h0m5s", 3605), (" 45m ", 2700)],
)
def test_a_time_is_read_as_people_write_it(text, seconds):
    config = load_config(flags={"search.time": text})
    assert config.search.time == seconds
    assert load_config(sets=(f"search.time={seconds}",)) == config


@pytest.mark.parametrize(
    "text", "|5 m|0s|0m|-5m|1.5h|30|m30|30m1h|5x|s|1h30|٣m|1e9s|99999999h|1m1m|1d".split("|")
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ConfigError, match=r"^configuration key search\.time: [^\n]*$"):
        load_config(flags={"search.time": text})


def test_the_last_of_two_sets_wins():
    assert load_config(sets=("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize("expression", ["", "seed", "=3", " = 3"])
def test_a_set_that_is_no_assignment(expression):
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(sets=(expression,))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("search.trails=3", "unknown configuration key search.trails; did you mean search.trials?"),
        ("serch.trials=3", "unknown configuration key serch; did you mean search?"),
        ("prompts.target.colum=x", "did you mean prompts.target.column?"),
        ("prompts.zzzzzz=1", "unknown configuration key prompts.zzzzzz"),
    ],
)
def test_an_unknown_key_names_its_neighbour(expression, text):
    with pytest.raises(ConfigError) as error:
        load_config(flags={"prompts.target.source": "owner/name"}, sets=(expression,))
    assert text in str(error.value)
    assert ("did you mean" in str(error.value)) == ("did you mean" in text)


@pytest.mark.parametrize(
    ("expression", "key"),
    [
        ("search.trials=0", "search.trials"),
        ("search.trials='many'", "search.trials"),
        ("search=3", "search"),
        ("prompts.target.source.x=3", "prompts.target.source"),
        ("directions.winsor=0.5", "directions.winsor"),
        ("method='magic'", "method"),
        ("scores.show=['everything']", "scores.show"),
        ("export.formats=['onnx']", "export.formats"),
        ("engine.memory_fraction=1.5", "engine.memory_fraction"),
    ],
)
def test_a_bad_value_names_its_key_in_one_line(expression, key):
    with pytest.raises(ConfigError) as error:
        load_config(sets=(expression,))
    assert f"configuration key {key}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("scores.objectives=['drift', 'drift']", "scores.objectives: names 'drift' twice"),
        ("export.formats=['adapter', 'adapter']", "export.formats: names 'adapter' twice"),
        ('model.source="a\\u0000b"', "model.source: holds control characters"),
        ('scores.markers_file="a\\nb"', "holds control characters"),
        (f"prompts.target.source='{'x' * 300}.txt'", "longer than a file name"),
        (f"export.llama_cpp='{'x/' * 3000}'", "longer than a file name"),
        ("search.trials=inf", "search.trials"),
        ("search.trials=nan", "search.trials"),
        (f"seed={'9' * 400}", "seed"),
        (f"seed={'9' * 5000}", "seed"),
        ("directions.winsor=nan", "directions.winsor"),
        ("engine.memory_fraction=inf", "engine.memory_fraction"),
        ("export.adapter_error=nan", "export.adapter_error"),
        ("search.trials=99999999999", "search.trials"),
        (f"{'a.' * 2000}b=1", "section.key=value"),
        (f"{'a' * 5000}=1", "unknown configuration key 'aaa"),
        (f"scores.markers={'[' * 5000}", "scores.markers"),
        ("a\x1b[31mb=1", r"unknown configuration key 'a\x1b"),
        ("scores.markers=['\udcff']", "not UTF-8"),
        ("description=\udcff", "not UTF-8"),
        ("\udcff=1", "not UTF-8"),
    ],
)
def test_what_no_setting_can_be_is_one_line_of_bounded_length(expression, words):
    with pytest.raises(ConfigError) as error:
        load_config(sets=(expression,))
    line = str(error.value)
    assert words in line
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 500


def test_a_set_of_two_lines_is_text():
    """It would set something else besides."""
    assert load_config(sets=("description=1\nseed = 4",)).seed == 0


def test_many_mistakes_are_counted():
    with pytest.raises(ConfigError, match="and 17 more"):
        load_config(sets=tuple(f"search.{'x' * n}=1" for n in range(1, 21)))


def test_a_file_begins_where_its_mark_ends(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load_config(file=path).seed == 3
    for text in (b"a = " + b"[" * 50_000, b"seed = " + b"9" * 5000, b"[a" + b".a" * 3000 + b"]"):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=r"^[^\n]*$"):
            load_config(file=path)


def test_names_in_sets_are_whole_and_a_run_goes_on_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.py").touch()
    (tmp_path / "prompts.txt").touch()
    monkeypatch.chdir(tmp_path)
    sets = (
        "scores.files=['mine.py']",
        "prompts.target.source=prompts.txt",
        "model.source=owner/name",
    )
    config = load_config(sets=sets)
    assert config.scores.files == (str(tmp_path / "mine.py"),)
    assert config.prompts.target.source == str(tmp_path / "prompts.txt")
    assert config.model.source == "owner/name"


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(sets=("search.trails=3", "seed=-1"))
    assert "search.trails" in str(error.value)
    assert "seed" in str(error.value)


def test_sections_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError):
        Config().seed = 3


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"[search\n", "not valid TOML"), (b"a = '\xff'", "not UTF-8"), (None, "does not exist")],
)
def test_a_configuration_file_that_cannot_be_used(tmp_path, content, text):
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        load_config(file=path)


def round_trip(config, tmp_path):
    return load_config(file=write(tmp_path / "config.toml", to_toml(config)))


@pytest.mark.parametrize("name", sorted(behaviours()))
def test_behaviours_load_and_come_back_from_toml(name, tmp_path):
    config = load_config(behaviour=name, flags={"model.source": "owner/name"})
    assert config.behaviour == name
    assert config.description
    assert config.prompts.target is not None
    assert config.prompts.contrast is not None
    assert round_trip(config, tmp_path) == config


@pytest.mark.parametrize(
    ("role", "final"),
    [
        ("target", ("restored", "kept")),  # of the directions alone
        ("target_eval", ("kept",)),
        ("target_holdout", ("kept",)),
        ("contrast_eval", ("restored",)),
        ("contrast_holdout", ("restored",)),
    ],
)
def test_prompts_of_ones_own_take_the_behaviours_known_answers_with_them(role, final):
    flags = {"model.source": "owner/name", f"prompts.{role}": {"source": "own.txt"}}
    assert load_config(behaviour="demo", flags=flags).scores.final == final
    asked = load_config(behaviour="demo", flags=flags, sets=('scores.final=["restored", "kept"]',))
    assert asked.scores.final == ("restored", "kept")


def test_there_are_the_behaviours_of_the_contract():
    assert {"demo", "disclaimers", "refusal"} <= set(behaviours())


def test_every_section_comes_back_from_toml(tmp_path):
    config = load_config(
        flags={
            "behaviour": "x",
            "seed": 3,
            "model": {"source": "owner/name", "revision": "main", "trust_remote_code": True},
            "prompts": {
                "target": {"source": "a/b", "answer_column": "t"},
                "holdout_size": 5,
                "keep": [{"source": "builtin"}, {"source": "c/d", "column": 'q"'}],
            },
            "directions": {"center": "geometric_median", "winsor": 0.995, "projected": True},
            "edit": {"components": ["mlp.down_proj"], "row_norms": "pre", "post_norms": False},
            "scores": {"objectives": ["drift"], "report": [], "show": [], "max_new_tokens": 1},
            "search": {"ei_candidates": 8, "select": "drift<=0.01"},
            "engine": {"memory_fraction": 1e-05},
            "export": {"formats": [], "adapter_rank": 4},
        }
    )
    assert round_trip(config, tmp_path) == config


HARD = [
    'a "quoted" word',
    "back\\slash and \\n, not a line",
    "two\nlines\r\nand\ttabs",
    "'''\"\"\"",
    "naïve — “quotes” 漢字 🙂\u2028\u0085",
    "\x00\x01\x1b\x7f",
    "# no comment = []",
    " ",
    "",
]


@pytest.mark.parametrize("text", HARD)
def test_any_text_comes_back_from_toml(text, tmp_path):
    config = load_config(
        flags={"description": text, "prompts.suffix": text, "scores.markers": [text, "x"]}
    )
    assert round_trip(config, tmp_path) == config


@STEADY
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1, exclude_min=True))
def test_any_value_comes_back_from_toml(text, number):
    import tomllib

    config = validate(
        {
            "description": text,
            "scores": {"markers": [text]},
            "engine": {"memory_fraction": number},
        }
    )
    assert validate(tomllib.loads(to_toml(config))) == config


def test_file_names_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    folder.mkdir()
    for name in ("t.txt", "m.txt", "k.txt", "own.py"):
        write(folder / name, "")
    text = (
        'prompts.keep = [{source = "builtin"}, {source = "k.txt"}]\n'
        '[prompts.target]\nsource = "t.txt"\n[prompts.contrast]\nsource = "owner/name"\n'
        '[scores]\nmarkers_file = "../there/m.txt"\nfiles = ["own.py", "none.py"]\n'
    )
    monkeypatch.chdir(tmp_path)
    write(folder / "quirk.toml", text)
    for config in (
        load_config(behaviour="there/quirk.toml"),
        load_config(file=folder / "quirk.toml"),
    ):
        assert config.prompts.target.source == str(folder / "t.txt")
        assert config.prompts.contrast.source == "owner/name"
        assert [one.source for one in config.prompts.keep] == ["builtin", str(folder / "k.txt")]
        assert config.scores == ScoreSection(
            markers_file=str(folder / "m.txt"), files=(str(folder / "own.py"), "none.py")
        )


def test_file_names_in_flags_stay_as_they_are(tmp_path, monkeypatch):
    write(tmp_path / "t.txt", "")
    monkeypatch.chdir(tmp_path)
    config = load_config(flags={"prompts.target": {"source": "t.txt"}})
    assert config.prompts.target.source == "t.txt"


def test_a_run_started_with_relative_names_is_resumed_from_anywhere(tmp_path, monkeypatch):
    """config.toml is all that a resume has: what it names must still be found."""
    from pathlib import Path

    from excise.cli import main as cli

    monkeypatch.chdir(tmp_path)
    for name in ("t.txt", "c.txt", "m.txt"):
        write(tmp_path / name, "")
    for name in ("model", "run", "elsewhere"):
        (tmp_path / name).mkdir()
    arguments = "run model --out run --target t.txt --contrast c.txt --markers m.txt".split()
    config = cli._config(cli.build_parser().parse_args(arguments), "model")
    file = write(tmp_path / "run" / "config.toml", to_toml(config))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_config(file=file)
    found = [again.prompts.target.source, again.prompts.contrast.source, again.scores.markers_file]
    assert [Path(name).is_file() for name in found] == [True, True, True]
    assert Path(again.model.source).is_dir()


@pytest.mark.parametrize(
    ("flags", "sources"),
    [
        ("", ["builtin"]),
        ("--no-keep", []),
        ("--keep builtin owner/name", ["builtin", "owner/name"]),
    ],
)
def test_what_to_keep_is_the_wide_set_unless_flags_say_otherwise(flags, sources):
    from excise.cli import main as cli

    arguments = cli.build_parser().parse_args(f"run model --out run {flags}".split())
    assert [one.source for one in cli._config(arguments, "model").prompts.keep] == sources


def test_a_behaviour_of_ones_own_is_named_after_its_file_unless_it_says_otherwise(tmp_path):
    path = write(tmp_path / "hedging.toml", 'description = "d"\n')
    assert load_config(behaviour=str(path)).behaviour == "hedging"
    write(path, 'behaviour = "weaselling"\n')
    assert load_config(behaviour=str(path)).behaviour == "weaselling"


@pytest.mark.parametrize("name", ["politeness", "none.toml", "behaviour.txt", ""])
def test_an_unknown_behaviour_names_those_there_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "behaviour.txt", "")
    with pytest.raises(ConfigError, match="demo, disclaimers, refusal"):
        read_behaviour(name)


def test_the_demo_behaviours_files_exist():
    from pathlib import Path

    config = load_config(behaviour="demo")
    sources = [v["source"] for v in config.prompts.model_dump().values() if isinstance(v, dict)]
    assert len(sources) == 6
    assert all(Path(source).is_file() for source in [*sources, config.scores.markers_file])
