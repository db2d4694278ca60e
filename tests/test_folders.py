"""Folders of others: what is listed, and which links are followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from excise.errors import ExportError, ModelError
from excise.folders import check_inside, commit_of, list_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "token"
    path.parent.mkdir()
    path.write_text("of this machine")
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model in the Hub's cache: every file is a link to a blob."""
    repo = tmp_path / "hub" / "models--owner--name"
    folder = repo / "snapshots" / COMMIT
    (folder / "sub").mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, name in enumerate(("config.json", "sub/more.txt")):
        (repo / "blobs" / f"blob{number}").write_text(name)
        up = "../" * (2 + name.count("/"))
        (folder / name).symlink_to(f"{up}blobs/blob{number}")
    return folder


def names(folder: Path) -> list[str]:
    return [file.as_posix() for file in list_files(folder, ModelError)]


def test_files_of_a_folder_and_of_those_below_it(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", ".gitattributes", ".cache/lock", "a/.git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again.txt").symlink_to("a/c.txt")
    assert names(tmp_path) == [".gitattributes", "a/c.txt", "again.txt", "b.txt"]


def test_a_snapshot_of_the_hubs_cache_is_links_to_blobs(snapshot: Path) -> None:
    assert names(snapshot) == ["config.json", "sub/more.txt"]
    assert check_inside(snapshot / "config.json", snapshot, ModelError).name == "blob0"
    assert commit_of(snapshot) == COMMIT


def test_blobs_in_the_store_that_a_caches_models_share(snapshot: Path) -> None:
    store = snapshot.parents[2] / "blobs" / "ab"
    store.mkdir(parents=True)
    (store / f"ab{'0' * 62}").write_text("shared")
    blob = snapshot.parents[1] / "blobs" / "blob0"
    blob.unlink()
    blob.symlink_to(f"../../blobs/ab/ab{'0' * 62}")
    assert names(snapshot) == ["config.json", "sub/more.txt"]
    (snapshot / "direct.txt").symlink_to(store / f"ab{'0' * 62}")  # not by a blob of its own
    with pytest.raises(ModelError, match="out of its folder"):
        names(snapshot)


@pytest.mark.parametrize("how", ["absolute", "relative", "folder", "chain", "another model's blob"])
def test_a_link_out_of_the_folder_is_refused(snapshot: Path, secret: Path, how: str) -> None:
    link = snapshot / "notes.txt"
    if how == "absolute":
        link.symlink_to(secret)
    elif how == "relative":
        link.symlink_to(os.path.relpath(secret, snapshot))
    elif how == "folder":
        link.symlink_to(secret.parent, target_is_directory=True)
    elif how == "chain":
        blob = snapshot.parents[1] / "blobs" / "x"
        blob.symlink_to(secret)
        link.symlink_to("../../blobs/x")
    else:
        other = snapshot.parents[2] / "models--owner--private" / "blobs" / "x"
        other.parent.mkdir(parents=True)
        other.write_text("theirs")
        link.symlink_to(other)
    with pytest.raises(ExportError, match=r"notes\.txt is a link out of its folder"):
        list_files(snapshot, ExportError)


@pytest.mark.parametrize(
    "place", ["snapshots/v1", f"models--a--b/snapshots/{COMMIT[:-1]}", f"snapshots/{COMMIT}"]
)
def test_only_the_caches_own_layout_is_the_caches(tmp_path: Path, secret: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    assert commit_of(folder) is None
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("beside it")
    (folder / "x").symlink_to(blobs / "x")
    with pytest.raises(ModelError, match="out of its folder"):
        names(folder)


def test_what_is_no_file_or_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "merges.txt").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"merges\.txt links to a missing file"):
        names(tmp_path)
    (tmp_path / "merges.txt").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is a pipe, socket or device"):
        names(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "locked.txt").write_text("")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for anyone but root
    with pytest.raises(ModelError, match=r"locked\.txt cannot be read: permission denied"):
        names(tmp_path)
    monkeypatch.undo()
    (tmp_path / "locked.txt").rename(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    with pytest.raises(ModelError, match="not UTF-8"):
        names(tmp_path)
