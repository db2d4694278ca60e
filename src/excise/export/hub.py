"""Upload an export to the Hugging Face Hub, in one commit, with its card.

huggingface_hub finds the token, in the environment or the Hub's own login; it is never seen here. Files
that an interrupted upload has brought over already are not sent again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from excise.errors import ExciseError, HubError, InputError, RunStateError, first_line
from excise.events import Notice, OnEvent, ignore, phase
from excise.files import CARD, hashes_of
from excise.formats import DEFAULT
from excise.reading import is_folder
from excise.record import ArtifactRecord, Record
from excise.report.card import model_card
from excise.report.formatting import hub_id
from excise.report.stored_record import read_record
from excise.run_lock import hold

_REFUSED = (401, 403)


@dataclass(frozen=True)
class Pushed:
    """Place of an upload: the address of the commit, and whether everybody can see it."""

    address: str
    public: bool


def push(
    folder: Path,
    repo: str,
    *,
    format_name: str = DEFAULT,
    trial: int | None = None,
    place: Path | None = None,
    public: bool = False,
    endpoint: str | None = None,
    on_event: OnEvent = ignore,
) -> Pushed:
    """Upload one export of a run.

    Args:
        folder: the run.
        repo: OWNER/NAME; made where it does not exist.
        format_name: which export, one of `formats.FORMATS`.
        trial: whose; by default the selected one's.
        place: where the export is, if not within the run folder: what a record says of other places
            is not enough to send what is there.
        public: make a new repository public; private is the default. One that exists stays as it is.
        endpoint: of another Hub.
        on_event: told of the steps.

    Raises:
        RunStateError: no such export, or its files are not those that were measured.
        InputError: not a repository id, no token, a token without the right, or a public repository.
        HubError: the Hub could not be reached, or broke off.
    """
    if hub_id(repo) is None:
        raise InputError(f"{repo!r} is not a repository id: write it as OWNER/NAME")
    read_record(folder)  # where there is none, this is no run: not even a lock is left there
    with hold(folder):
        record = read_record(folder)
        path, artifact = _artifact(record, folder, format_name, trial, place)
        card = model_card(
            record, artifact_format=format_name, trial=artifact.trial, artifact=artifact, repo=repo
        )
        with phase("push", on_event):
            done = _upload(path, sorted(_sent(artifact)), repo, card, public, endpoint)
    if public and not done.public:
        on_event(Notice(f"{repo} exists and stays private: its settings on the Hub make it public"))
    return done


def _artifact(
    record: Record, folder: Path, name: str, trial: int | None, place: Path | None
) -> tuple[Path, ArtifactRecord]:
    """Find an export and its record; check that every file is the one on the record."""
    number = record.chosen().number if trial is None else record.trial(trial).number
    found = [a for a in record.artifacts if a.format == name and a.trial == number]
    if not found:
        raise RunStateError(
            f"{folder} has no {name} export of trial {number}: write one with `excise export "
            f"{folder} --to PATH --format {name}`"
        )
    artifact = found[-1]
    path = place or _inside(folder, artifact.path)
    if not is_folder(path):
        raise RunStateError(f"the export {path} is gone: write it again with `excise export`")
    here = _hashes(path)
    if place is not None:  # one of several, told by what it holds
        artifact = next((a for a in reversed(found) if _sent(a) == here), artifact)
    _check_same(path, _sent(artifact), here)
    return path, artifact


def _inside(folder: Path, name: str) -> Path:
    """Return the place of an export within the run folder, links followed."""
    path, root = (folder / name).resolve(), folder.resolve()
    if path == root or not path.is_relative_to(root):
        raise RunStateError(
            f"the record in {folder} places this export outside of it, at {folder / name}: if that "
            "is what to upload, name it with --from"
        )
    return path


def _sent(artifact: ArtifactRecord) -> dict[str, str]:
    """List what is uploaded of an export, beside its card: name -> hash."""
    return {name: digest for name, digest in artifact.files.items() if not _hidden(name)}


def _hashes(path: Path) -> dict[str, str]:
    links = [p for p in sorted(path.rglob("*")) if p.is_symlink()]
    if links:
        raise RunStateError(f"{links[0]} is a link, and exports hold none: remove it")
    try:
        return {name: digest for name, digest in hashes_of(path).items() if not _hidden(name)}
    except OSError as error:
        raise RunStateError(f"cannot read {error.filename}: {error.strerror}") from None


def _check_same(path: Path, known: dict[str, str], here: dict[str, str]) -> None:
    """Refuse to send anything but what was written and measured."""
    if not known:
        raise RunStateError(
            f"the record of {path} has no hashes of its files, as earlier versions wrote it: export "
            "again"
        )
    other = [name for name in sorted({*known, *here}) if known.get(name) != here.get(name)]
    if other:
        how = "missing" if other[0] not in here else "another file"
        how = how if other[0] in known else "not of the export"
        raise RunStateError(
            f"the files in {path} are not those that were measured ({other[0]} is {how}): export again"
        )


def _upload(
    path: Path, names: list[str], repo: str, card: str, public: bool, endpoint: str | None
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the library never prints
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # nor tells of every attempt
    api = HfApi(endpoint=endpoint)
    with _explained(repo):
        api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.repo_info(repo).private)
        if not public and not private:
            raise InputError(f"{repo} exists and is public: add --public, or name another")
        additions = [CommitOperationAdd(name, str(path / name)) for name in names]
        additions.append(CommitOperationAdd(CARD, card.encode()))
        done = api.create_commit(repo, additions, commit_message="Upload with Excise")
    return Pushed(str(done.commit_url), not private)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the Hub client's errors into one line each that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except ExciseError:
        raise
    except LocalTokenNotFoundError:
        raise InputError(_TOKEN.format("no token was found")) from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in _REFUSED:
            raise InputError(_TOKEN.format(f"the token may not write to {repo} ({code})")) from None
        raise HubError(_AGAIN.format(repo, first_line(error))) from None
    # The client's transport and its worker threads raise errors of several libraries.
    except (OSError, RuntimeError, ValueError, _transport_error()) as error:
        raise HubError(_AGAIN.format(repo, first_line(error.__cause__ or error))) from None


_TOKEN = (
    "{}: make one with write access in the Hub's settings, then `hf auth login` or set HF_TOKEN"
)
_AGAIN = (
    "the upload to {} broke off and nothing was committed ({}): run the command again, what has "
    "arrived is not sent twice"
)


def _transport_error() -> type[Exception]:
    """Return the root of the HTTP library's errors, whichever one this huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
