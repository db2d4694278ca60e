"""Uploads to a Hub on the loopback, from the command line and with the real client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from conftest import job
from hub_server import READER, WRITER, Hub
from huggingface_hub import ModelCard

from excise.cli.main import main
from excise.report.stored_record import read_record, write_record
from excise.run_lock import hold

REPO = "someone/velm-edited"


@pytest.fixture(scope="module")
def original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter beside the model."""
    run = tmp_path_factory.mktemp("hub") / "run"
    more = ("--set", 'export.formats=["safetensors", "adapter"]')
    assert main(job(tiny, run, *more)) == 0
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.serve() as running:
        yield running


def push(hub: Hub, run: Path, *more: str, token: str | None = WRITER) -> Any:
    """`excise push` in a process of its own: the client reads its settings when it is imported."""
    home = run.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **({"HF_TOKEN": token} if token else {}),
    }
    command = [sys.executable, "-m", "excise.cli", "push", str(run), REPO, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_model_and_its_card_arrive_in_one_commit_and_private(hub: Hub, run: Path) -> None:
    done = push(hub, run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"private: {hub.url}/{REPO}/commit/")
    repo = hub.repos[REPO]
    assert repo["private"]
    assert hub.commits == 1
    local = {p.name: p.read_bytes() for p in (run / "model").iterdir()}
    card = ModelCard(repo["files"].pop("README.md").decode())
    del local["README.md"]
    assert repo["files"] == local
    assert f'model_id = "{REPO}"' in card.text
    assert card.data.library_name == "transformers"


def test_the_token_is_nowhere(hub: Hub, run: Path) -> None:
    done = push(hub, run, "--debug")
    assert WRITER in hub.seen
    assert WRITER not in done.stdout + done.stderr
    for path in (run.parent).rglob("*"):
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path
    assert "record.json" not in hub.repos[REPO]["files"]


def test_public_is_asked_for_and_never_by_chance(hub: Hub, run: Path) -> None:
    hub.repos[REPO] = {"private": False, "files": {}}
    done = push(hub, run)
    assert done.returncode == 2
    assert "exists and is public: add --public" in done.stderr
    assert hub.commits == 0
    assert push(hub, run, "--public").returncode == 0
    assert hub.commits == 1


def test_an_adapter_is_pushed_as_one(hub: Hub, run: Path) -> None:
    assert push(hub, run, "--format", "adapter").returncode == 0
    files = hub.repos[REPO]["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    assert f'adapter_id = "{REPO}"' in files["README.md"].decode()


def test_what_was_pushed_can_be_downloaded_and_loaded(hub: Hub, run: Path) -> None:
    assert push(hub, run).returncode == 0
    code = (
        "from huggingface_hub import snapshot_download; from excise.config import ModelSection; "
        "from excise.checkpoints.loading import load; import sys; "
        f"print(load(ModelSection(source={REPO!r})).anatomy.model_type)"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(run.parent / "download"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": READER,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "qwen3", done.stderr


def test_a_private_repository_stays_so_and_is_called_so(hub: Hub, run: Path) -> None:
    hub.repos[REPO] = {"private": True, "files": {}}
    done = push(hub, run, "--public")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("private: ")
    assert "exists and stays private" in done.stderr
    assert hub.repos[REPO]["private"]


def test_a_record_sends_nothing_from_elsewhere(hub: Hub, run: Path) -> None:
    """Not by an absolute path, not by `..`, not by links; a place outside is named by the user."""
    record = read_record(run)
    outside = run.parent / "elsewhere"
    shutil.move(run / "model", outside)
    for path in (str(outside), "../elsewhere", ".", "link"):
        if path == "link":
            (run / "link").symlink_to(outside)
        first = record.artifacts[0].model_copy(update={"path": path})
        write_record(run, record.model_copy(update={"artifacts": [first]}))
        done = push(hub, run)
        assert done.returncode == 2
        assert "outside of it" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not hub.seen
    (outside / "more").symlink_to(run / "config.toml")
    assert "is a link" in push(hub, run, "--from", str(outside)).stderr
    (outside / "more").unlink()
    assert push(hub, run, "--from", str(outside)).returncode == 0
    assert "model.safetensors" in hub.repos[REPO]["files"]


def test_a_run_that_is_worked_on_is_not_pushed_and_gets_no_pages(hub: Hub, run: Path) -> None:
    with hold(run):
        done = push(hub, run)
        assert done.returncode == 2
        assert "in use by another process" in done.stderr
        assert main(["report", str(run)]) == 2
    assert not hub.seen
    assert main(["report", str(run)]) == 0


def test_an_adapter_names_no_folder_of_this_machine(run: Path) -> None:
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    card = (run / "adapter" / "README.md").read_text()
    assert 'base_id = "path/or/hub-id/of/the/base/model"' in card
    source = read_record(run).model.source
    for path in (run / "adapter").iterdir():
        assert source.encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (READER, f"the token may not write to {REPO} (403)"),
        ("hf_nobody", f"the token may not write to {REPO} (401)"),
        (None, "hf auth login"),
    ],
)
def test_a_token_without_the_right_is_one_line(
    hub: Hub, run: Path, token: str | None, words: str
) -> None:
    done = push(hub, run, "--quiet", token=token)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not hub.repos


def test_a_broken_upload_commits_nothing_and_goes_on_where_it_was(hub: Hub, run: Path) -> None:
    """The first blob arrives, the second breaks off; the next run sends the second alone."""
    record = read_record(run)
    second = run / "model" / "extra.safetensors"
    second.write_bytes((run / "model" / "model.safetensors").read_bytes()[::-1])
    _retell(run, record)
    hub.drop = hashlib.sha256(second.read_bytes()).hexdigest()
    done = push(hub, run, "--quiet")
    assert done.returncode == 1
    assert "broke off and nothing was committed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.commits == 0
    assert not hub.repos[REPO]["files"]
    arrived = list(hub.uploads)
    assert len(arrived) == 1
    hub.drop = ""
    assert push(hub, run).returncode == 0
    assert hub.commits == 1
    assert len(hub.uploads) == len(set(hub.uploads)) == 2


def _retell(run: Path, record: Any) -> None:
    """Put the folder's new hashes on the record."""
    from excise.files import hashes_of

    first = record.artifacts[0].model_copy(update={"files": hashes_of(run / "model")})
    artifacts = [first, *record.artifacts[1:]]
    write_record(run, record.model_copy(update={"artifacts": artifacts}))


def test_what_cannot_be_pushed_is_said_before_the_hub_is_asked(hub: Hub, run: Path) -> None:
    cases = [
        (["--format", "gguf"], "has no gguf export"),
        (["--trial", "999"], "has no trial 999"),
    ]
    for flags, words in cases:
        assert words in push(hub, run, *flags).stderr
    for name, words in [
        ("model.safetensors", "model.safetensors is another file"),
        ("config.json", "config.json is another file"),
        ("secret.txt", "secret.txt is not of the export"),
    ]:
        before = (run / "model" / name).read_bytes() if (run / "model" / name).exists() else None
        (run / "model" / name).write_bytes(b"other")
        said = push(hub, run)
        assert said.returncode == 2
        assert words in said.stderr
        (run / "model" / name).unlink()
        if before is not None:
            (run / "model" / name).write_bytes(before)
    shutil.rmtree(run / "model")
    assert "is gone" in push(hub, run).stderr
    assert not hub.seen
