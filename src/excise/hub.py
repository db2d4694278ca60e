"""Upload an export to the Hugging Face Hub, in one commit, with its card.

huggingface_hub finds the token, in the environment or the Hub's own login; it is never seen here. Files
that an interrupted upload has brought over already are not sent again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from excise.card import model_card
from excise.errors import ExciseError, HubError, InputError, RunStateError, first_line
from excise.events import OnEvent, ignore, phase
from excise.record import ArtifactRecord, Record, read_record
from excise.staging import sha256_of
from excise.wording import hub_id

_CARD = "README.md"
_REFUSED = (401, 403)


def push(
    folder: Path,
    repo: str,
    *,
    format_name: str = "safetensors",
    trial: int | None = None,
    public: bool = False,
    endpoint: str | None = None,
    on_event: OnEvent = ignore,
) -> str:
    """Upload one export of a run; returns the address of the commit.

    Args:
        folder: the run.
        repo: OWNER/NAME; made where it does not exist.
        format_name: which export, one of `config.Format`.
        trial: whose; by default the selected one's.
        public: make the repository public; private is the default.
        endpoint: of another Hub.
        on_event: told of the steps.

    Raises:
        RunStateError: no such export, or its files are not those that were measured.
        InputError: not a repository id, no token, a token without the right, or a public repository.
        HubError: the Hub could not be reached, or broke off.
    """
    if hub_id(repo) is None:
        raise InputError(f"{repo!r} is not a repository id: write it as OWNER/NAME")
    record = read_record(folder)
    artifact = _artifact(record, folder, format_name, trial)
    card = model_card(
        record, artifact_format=format_name, trial=artifact.trial, artifact=artifact, repo=repo
    )
    with phase("push", on_event):
        return _upload(folder / artifact.path, repo, card, public, endpoint)


def _artifact(record: Record, folder: Path, name: str, trial: int | None) -> ArtifactRecord:
    number = record.chosen().number if trial is None else record.trial(trial).number
    found = [a for a in record.artifacts if a.format == name and a.trial == number]
    if not found:
        raise RunStateError(
            f"{folder} has no {name} export of trial {number}: write one with `excise export "
            f"{folder} --to PATH --format {name}`"
        )
    artifact = found[-1]
    path = folder / artifact.path
    if not path.is_dir():
        raise RunStateError(f"the export {path} is gone: write it again with `excise export`")
    if sha256_of(path) != artifact.sha256:
        raise RunStateError(f"the weights in {path} are not those that were measured: export again")
    return artifact


def _upload(path: Path, repo: str, card: str, public: bool, endpoint: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the library never prints
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # nor tells of every attempt
    api = HfApi(endpoint=endpoint)
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
    with _explained(repo):
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise InputError(f"{repo} exists and is public: add --public, or name another")
        additions = [
            CommitOperationAdd(p.relative_to(path).as_posix(), str(p))
            for p in files
            if p != path / _CARD
        ]
        additions.append(CommitOperationAdd(_CARD, card.encode()))
        done = api.create_commit(repo, additions, commit_message="Upload with Excise")
    return str(done.commit_url)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The Hub client's errors, each as one line that says what to do."""
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
    """The root of the HTTP library's errors, whichever one this huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
