"""What it costs to remove a behaviour, by every method: a run of each, side by side in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from excise.config import Config
from excise.errors import ConfigError
from excise.events import Notice, OnEvent, ignore
from excise.files import check_writable
from excise.report.stored_record import FILE, read_record
from excise.runs.changed_settings import CONFIG, check_settings
from excise.runs.pipeline import Sharing, run


def audit(
    configs: Mapping[str, Config],
    out: Path,
    on_event: OnEvent = ignore,
    *,
    anyway: bool = False,
    judge_token: str | None = None,
    workers: Callable[[Config], Sharing | None] = lambda _: None,
) -> tuple[list[Path], dict[str, str]]:
    """Run every method in a folder of its own in `out`; return these, and why others are left out.

    What is there already is not done again: a finished run stays, one that was interrupted goes on. A
    method that cannot work with the settings is left out, and said.

    Args:
        configs: method -> what to do.
        out: the folder of the runs.
        on_event: told of progress.
        anyway: search also where the original leaves nothing to find.
        judge_token: what a server that judges is shown.
        workers: what measures beside this process in a run.

    Raises:
        ConfigError: fewer than two methods can work with the settings.
        ExciseError: a run failed; what was finished is kept.
    """
    check_writable(out)
    done, left_out = list[Path](), dict[str, str]()
    for place, (method, config) in enumerate(configs.items(), 1):
        folder = out / method
        if _is_finished(folder, config):
            on_event(Notice(f"{method} ({place} of {len(configs)}): finished before"))
            done.append(folder)
            continue
        on_event(Notice(f"{method} ({place} of {len(configs)})"))
        try:
            run(
                config,
                folder,
                on_event,
                resume=(folder / CONFIG).exists(),
                anyway=anyway,
                judge_token=judge_token,
                workers=workers(config),
            )
        except ConfigError as error:
            left_out[method] = str(error)
        else:
            done.append(folder)
    if len(done) < 2:
        words = "; ".join(f"{method}: {reason}" for method, reason in left_out.items())
        raise ConfigError(f"fewer than two methods can work with these settings: {words}")
    return done, left_out


def _is_finished(folder: Path, config: Config) -> bool:
    """Return whether a folder holds all that a configuration asks for.

    Raises:
        RunStateError: it is the run of another one.
    """
    if not (folder / FILE).exists():
        return False
    record = read_record(folder)
    check_settings(folder, config, record.config)
    asked = config.search
    return asked.time is not None or len(record.trials) >= asked.trials
