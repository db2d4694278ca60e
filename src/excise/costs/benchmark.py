"""Benchmarks of lm-evaluation-harness, in process: on the loaded model, and through an edit's hooks.

Nothing is exported, and original and edit meet the very same samples. The library is the extra `bench`.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.chat.opened_run import open_run
from excise.checkpoints.loading import Loaded, load
from excise.config import ModelSection
from excise.costs.paired import difference
from excise.costs.task_files import SPLIT, read_task
from excise.engine.stacking import CandidateEdits, Stack
from excise.errors import ConfigError, MeasurementError, first_line
from excise.events import OnEvent, ignore, phase
from excise.intervals import Z95, wilson
from excise.model.anatomy import Writer
from excise.record import BenchmarkRecord, ScoreRecord
from excise.report.pages import write_pages
from excise.report.stored_record import read_record, write_record
from excise.run_lock import hold

DEFAULTS = ("truthfulqa_mc2", "lambada_openai", "gsm8k", "arc_challenge", "piqa")
LIMIT = 200  # samples of a task
_BATCH = 8
_TASK_ENDINGS = (".yaml", ".yml")
# Of these lm-evaluation-harness takes no mean over samples.
_NO_MEANS = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}

Values = dict[tuple[str, str], list[float]]  # (task, metric) -> one value per sample


@dataclass(frozen=True)
class Outcome:
    """What one model made of the tasks. `asked` hashes what it was asked, by task."""

    values: Values
    asked: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One metric of one task, of one model alone or of two."""

    task: str
    metric: str
    score: ScoreRecord


def bench_run(
    folder: Path,
    names: Sequence[str] = DEFAULTS,
    *,
    trial: int | None = None,
    limit: int | None = LIMIT,
    trust_tasks: bool = False,
    trust_run: bool = False,
    on_event: OnEvent = ignore,
) -> list[BenchmarkRecord]:
    """Compare a trial's edit with its original on benchmarks; add what is found to the run's record.

    Args:
        folder: a finished run.
        names: tasks of lm-evaluation-harness, or paths of task files.
        trial: its number; by default the selected one.
        limit: the first samples of each task; None for all.
        trust_tasks: let code run that task files name.
        trust_run: let code run that the run folder names.
        on_event: told of progress.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or a task cannot be loaded.
        RunStateError: no such run or trial, or it has changed.
        MeasurementError: a task could not be measured.
    """
    record = read_record(folder)
    chosen = record.chosen() if trial is None else record.trial(trial)
    tasks = Tasks(names, limit, trust=trust_tasks, on_event=on_event)
    run = open_run(folder, record, trust_run=trust_run, on_event=on_event)
    session, edits = run.session, run.session.edits(chosen.params)
    before = tasks.measure(session.loaded, on_event, "bench original")
    after = tasks.measure(session.loaded, on_event, "bench edited", session.writers, edits)
    found = compared(before, after, chosen.number)
    with hold(folder):
        record = read_record(folder).with_benchmarks(found)
        write_record(folder, record)
        write_pages(folder, record)
    return found


def bench_models(
    model: ModelSection,
    names: Sequence[str] = DEFAULTS,
    *,
    against: str | None = None,
    limit: int | None = LIMIT,
    trust_tasks: bool = False,
    on_event: OnEvent = ignore,
) -> list[BenchmarkRecord] | list[Row]:
    """Measure a model on benchmarks, alone or beside another one; the two are not in memory at once.

    Args:
        model: the model.
        names: tasks, as `bench_run` takes them.
        against: the model that it is compared with.
        limit: as there.
        trust_tasks: as there.
        on_event: told of progress.

    Raises:
        ConfigError, MeasurementError: as `bench_run`. ModelError: a model cannot be loaded.
    """
    tasks = Tasks(names, limit, trust=trust_tasks, on_event=on_event)
    first = None
    if against is not None:
        with phase("load", on_event):
            base = load(model.model_copy(update={"source": against, "revision": None}))
        first = tasks.measure(base, on_event, "bench original")
        base.free_layers()
        del base
    with phase("load edited" if against else "load", on_event):
        loaded = load(model)
    second = tasks.measure(loaded, on_event, "bench edited" if against else "bench original")
    if first is not None:
        return compared(first, second, 0)
    return [Row(*key, _score(values)) for key, values in second.values.items()]


def compared(before: Outcome, after: Outcome, trial: int) -> list[BenchmarkRecord]:
    """Compare two models' outcomes on the same samples.

    Raises:
        MeasurementError: they were asked different things.
    """
    changed = [task for task in before.asked if before.asked[task] != after.asked.get(task)]
    if changed:
        raise MeasurementError(
            f"{', '.join(changed)}: the two models were not asked the same: their tokenizers or "
            "templates differ"
        )
    rows = []
    for (task, metric), first in before.values.items():
        second = after.values[task, metric]
        found = difference(first, second)
        rows.append(
            BenchmarkRecord(
                task=task,
                metric=metric,
                trial=trial,
                n=found.n,
                original=_score(first),
                edited=_score(second),
                difference=found.value,
                interval=found.interval,
                gained=found.gained,
                lost=found.lost,
                p=found.p,
                samples_sha256=before.asked[task],
            )
        )
    return rows


def _score(values: Sequence[float]) -> ScoreRecord:
    n, mean = len(values), math.fsum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return ScoreRecord(value=mean, n=n, interval=wilson(round(sum(values)), n))
    spread = (math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1) / n) ** 0.5
    return ScoreRecord(value=mean, n=n, interval=(mean - Z95 * spread, mean + Z95 * spread))


class Tasks:
    """Tasks of lm-evaluation-harness, found before any model is loaded."""

    def __init__(
        self, names: Sequence[str], limit: int | None, *, trust: bool, on_event: OnEvent = ignore
    ) -> None:
        try:
            import lm_eval.tasks
        except ImportError:
            raise ConfigError(
                "excise bench needs lm-evaluation-harness: pip install 'excise[bench]'"
            ) from None
        if not names:
            raise ConfigError("no tasks: name some after --tasks")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._limit = limit
        files = [Path(name) for name in names if name.endswith(_TASK_ENDINGS)]
        known = [name for name in names if not name.endswith(_TASK_ENDINGS)]
        plain = [] if trust else [read_task(path) for path in files]
        with phase("tasks", on_event):
            self._manager = lm_eval.tasks.TaskManager(include_defaults=bool(known))
            self._check_names(known)
            specs = [*map(_own, plain), *known, *(str(path) for path in files if trust)]
            self.found: dict[str, Any] = {}
            for spec in specs:
                self.found |= self._load(spec)

    def _check_names(self, names: Sequence[str]) -> None:
        every = self._manager.all_tasks
        for name in names:
            if name not in every:
                near = difflib.get_close_matches(name, every, n=1)
                hint = f"; did you mean {near[0]}?" if near else ", and no .yaml file"
                raise ConfigError(f"{name!r:.100} is no task of lm-evaluation-harness{hint}")

    def _load(self, spec: Any) -> Mapping[str, Any]:
        name = spec if isinstance(spec, str) else spec.get("task", "the task file")
        try:
            return dict(self._manager.load([spec])["tasks"])
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(
                f"task {name}: its data set cannot be had ({first_line(error):.160}). Without a network, "
                "name a task file of your own"
            ) from None
        except Exception as error:  # noqa: BLE001 (a task is of others' making, and may raise anything)
            raise ConfigError(f"task {name} cannot be loaded: {first_line(error)}") from None

    def measure(
        self,
        loaded: Loaded,
        on_event: OnEvent,
        name: str,
        writers: Sequence[Writer] = (),
        edits: CandidateEdits = (),
    ) -> Outcome:
        """Measure a model, with a candidate's edits where they are given.

        Raises:
            MeasurementError: lm-evaluation-harness fails.
        """
        from lm_eval.evaluator import evaluate

        from excise.costs.harness_model import harness_model

        hooks: AbstractContextManager[None] = nullcontext()
        if edits:
            hooks = Stack(writers, [edits]).applied([0])  # any number of rows, all of one candidate
        with phase(name, on_event), hooks:
            try:
                found = evaluate(
                    lm=harness_model(loaded, _BATCH, name, on_event),
                    task_dict=self.found,
                    limit=self._limit,
                    bootstrap_iters=0,
                    log_samples=True,
                )
            except ConfigError:
                raise
            except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
                raise MeasurementError(
                    f"the tasks could not be measured: {first_line(error)}"
                ) from None
        return _outcome(found["samples"])


def _own(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task's configuration with its samples as a data set."""
    from datasets import Dataset, DatasetDict

    samples = task["samples"]

    def made(**_: Any) -> Any:
        return DatasetDict({SPLIT: Dataset.from_list(samples)})

    return {**{k: v for k, v in task.items() if k != "samples"}, "custom_dataset": made}


def _outcome(samples: Mapping[str, list[dict[str, Any]]]) -> Outcome:
    values: Values = {}
    asked = {}
    for task, rows in samples.items():
        rows = sorted(rows, key=lambda row: (row["filter"], row["doc_id"]))
        filters = {row["filter"] for row in rows}
        digest = hashlib.sha256()
        for row in rows:
            digest.update(f"{row['doc_hash']} {row['prompt_hash']} {row['target_hash']}".encode())
            for metric in row["metrics"]:
                value = row[metric]
                if metric in _NO_MEANS or not isinstance(value, bool | int | float):
                    continue
                if not math.isfinite(value):
                    raise MeasurementError(f"task {task}: {metric} of a sample is not a number")
                name = metric if len(filters) == 1 else f"{metric}, {row['filter']}"
                values.setdefault((task, name), []).append(float(value))
        asked[task] = digest.hexdigest()
    return Outcome(values, asked)
