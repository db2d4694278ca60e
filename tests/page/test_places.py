"""What a browser may name: keys, plain names, models below the folders. Never a path."""

from __future__ import annotations

import pytest

from excise.errors import ConfigError, ExciseError, OutputError, RunStateError
from excise.page.places import Places

CLIMBING = ["..", "../x", "a/../../x", "/etc", "/", ".", "", " ", "a/b", "a\\b", "..\\x", ".hidden", "a\0b",
            "-flag", "--to", "x" * 200, "café", "a b", "%2e%2e", "~", "CON:"]  # fmt: skip


@pytest.fixture
def places(tmp_path):
    root = tmp_path / "runs"
    for name in ("one", "group/two", "group/deep/three/four", ".hidden"):
        (root / name).mkdir(parents=True)
        (root / name / "config.toml").write_text("")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.toml").write_text("")
    (root / "link").symlink_to(outside)
    return Places([root])


def test_runs_below_the_folders_are_found(places):
    assert [place.name for place in places.runs().values()] == ["group/two", "one"]
    for key, place in places.runs().items():
        assert places.run(key) == place


def test_a_folder_that_is_a_run_is_one_itself(places):
    (one,) = Places([places.roots[0] / "one"]).runs().values()
    assert one.name == "one"
    with pytest.raises(OutputError, match="folder of runs"):
        Places([places.roots[0] / "one"]).new("x")


@pytest.mark.parametrize("key", [*CLIMBING, "one", "0" * 12])
def test_no_run_is_named_by_its_path(places, key):
    with pytest.raises(RunStateError, match="no such run"):
        places.run(key)


@pytest.mark.parametrize("name", CLIMBING)
def test_new_names_are_plain(places, name):
    with pytest.raises(OutputError, match="plain name"):
        places.new(name)


def test_new_folders_lie_in_the_first_of_the_folders(places):
    assert places.new("new-1.x") == places.roots[0] / "new-1.x"
    with pytest.raises(OutputError, match="exists"):
        places.new("one")


def test_models_are_named_ones_hub_ids_or_below_the_folders(places):
    assert places.model(" demo ") == "demo"
    assert places.model("owner/some-model") == "owner/some-model"
    assert places.model("model") == str(places.roots[0] / "model")


@pytest.mark.parametrize("text", [*CLIMBING, "/etc/passwd", "../outside", "link", "model/../../outside",
                                  "owner/../x", "a/b/c", "https://x/y"])  # fmt: skip
def test_no_model_elsewhere_is_named(places, text):
    if text in ("a/b", ".hidden"):  # a Hub id; a folder that is there
        assert places.model(text).endswith(text)
        return
    with pytest.raises(ConfigError, match="the model must be"):
        places.model(text)


def test_what_lies_outside_is_not_within(places, tmp_path):
    root = places.roots[0]
    assert places.within(root / "one" / "model" / "README.md")
    for path in (
        root / ".." / "outside",
        root / "link" / "README.md",
        tmp_path,
        root.parent / "runs2",
    ):
        assert not places.within(path)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ExciseError, match="not a folder"):
        Places([tmp_path / "none"])
