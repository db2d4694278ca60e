"""The search repeats itself exactly, and a journal survives what can happen to it."""

from __future__ import annotations

import os

import pytest
from toy_search import COMPONENTS, GOALS, Watch, search_in, toy, trials, whole

from excise.errors import RunStateError
from excise.events import Progress, ignore
from excise.methods.profiles import from_params
from excise.record import ScoreRecord
from excise.run_lock import hold
from excise.search import journal
from excise.search.loop import Measured, batches, importance
from excise.search.region import CEILING, FLOOR, Edges, Region


class Stop(BaseException):
    """A kill, as far as the search can see one."""


@pytest.mark.parametrize("moment", [0, 1, 13, 14, 29, 41])
def test_a_search_cut_short_anywhere_repeats_the_unbroken_one(tmp_path, monkeypatch, moment):
    expected = whole(tmp_path / "whole", 40)
    folder = tmp_path / "cut"
    folder.mkdir()
    search = search_in(folder)
    count = 0
    original = journal.Journal._write

    def append(backend, logs):
        """As many lines as are left, also of those that are written together."""
        nonlocal count
        left = moment * 11 - count
        count += len(logs)
        if left > 0:
            original(backend, logs[:left])
        if count > moment * 11:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "_write", append)
        with pytest.raises(Stop):
            search.run(40, toy, ignore)
    resumed = search_in(folder)
    resumed.run(40, toy, ignore)
    assert trials(resumed) == expected


@pytest.mark.parametrize("share", [0.05, 0.2, 0.37, 0.5, 0.68, 0.9, 0.99])
def test_a_journal_that_a_power_cut_ended_anywhere_repeats_the_unbroken_one(tmp_path, share):
    """Also within what was written together."""
    expected = whole(tmp_path / "whole", 40)
    written = (tmp_path / "whole" / journal.FILE).read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / journal.FILE).write_bytes(written[: int(share * len(written))])
    resumed = search_in(folder)
    resumed.run(40, toy, ignore)
    assert trials(resumed) == expected


def test_what_was_asked_before_an_interrupt_is_kept(tmp_path):
    study = search_in(tmp_path).study

    def interrupted():
        with study.journal.together():
            study.set_user_attr("a", 1)
            with study.journal.together():
                study.set_user_attr("b", 2)
            study.set_user_attr("c", 3)
            assert study.user_attrs["b"] == 2
            assert "a" not in search_in(tmp_path).study.user_attrs
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    kept = search_in(tmp_path).study.user_attrs
    assert [kept[name] for name in "abc"] == [1, 2, 3]


def test_a_batch_is_flushed_when_it_is_asked_and_when_it_is_told(tmp_path, monkeypatch):
    search, flushed, seen = search_in(tmp_path), [], []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.append(number), fsync(number)))

    def measure(params):
        kept = search_in(tmp_path)  # another process would see them before they are measured
        seen.append(trials(kept)[-len(params) :])
        return toy(params)

    search.run(24, measure, ignore)
    assert [[one[2] for one in batch] for batch in seen] == [
        [one[2] for one in trials(search)[start : start + 8]] for start in (0, 8, 16)
    ]
    assert len(flushed) == 1 + 2 * 3  # the total that was asked for; every batch twice
    assert trials(search_in(tmp_path)) == trials(search)


def test_random_trials_differ_and_depend_on_the_seed(tmp_path):
    first = whole(tmp_path / "a", 12)
    assert len({str(params) for _, _, params, _ in first}) == 12
    assert first == whole(tmp_path / "b", 12)
    assert first != whole(tmp_path / "c", 12, seed=1)


def test_more_trials_keep_the_ones_there_are(tmp_path):
    folder = tmp_path / "run"
    first = whole(folder, 20)
    more = whole(folder, 30)
    assert more[:20] == first
    assert len(more) == 30


def test_a_resume_measures_the_first_batch_first_and_once(tmp_path):
    """What later batches are measured with may be learnt from it, in every process alike."""
    whole(tmp_path, 16)
    asked = []

    def measure(params):
        asked.append(params)
        return toy(params)

    search = search_in(tmp_path)
    first = [trial.params for trial in search.study.trials[:8]]
    search.run(16, measure, ignore)
    assert not asked
    search.run(40, measure, ignore)
    assert asked[0] == first
    assert [len(params) for params in asked] == [8] * 4


def test_fewer_trials_than_there_are_change_nothing(tmp_path):
    folder = tmp_path / "run"
    assert whole(folder, 10) == whole(folder, 5)


def test_a_smaller_total_ends_at_a_whole_batch_and_the_rest_comes_later(tmp_path):
    expected = whole(tmp_path / "whole", 20)
    folder = tmp_path / "cut"
    folder.mkdir()
    calls = []

    def dies(params):
        calls.append(params)
        if len(calls) == 2:
            raise Stop
        return toy(params)

    with pytest.raises(Stop):
        search_in(folder).run(20, dies, ignore)
    search = search_in(folder)
    search.run(10, toy, ignore)
    assert trials(search) == expected[:16]  # those of the second batch had been asked for
    assert whole(folder, 16) == expected[:16]
    assert whole(folder, 20) == expected


def test_a_total_that_was_asked_for_after_a_batch_was_cut_short_is_kept(tmp_path):
    def dies(_params):
        raise Stop

    for total in (20, 30):
        with pytest.raises(Stop):
            search_in(tmp_path).run(total, dies, ignore)
    assert search_in(tmp_path).study.user_attrs["stops"] == [20, 30]
    search = search_in(tmp_path)
    search.run(30, toy, ignore)
    assert search.study.user_attrs["stops"] == [20, 30]
    assert len(trials(search)) == 30


def test_a_search_asks_for_no_batch_that_its_time_is_too_short_for(tmp_path):
    watch, said = Watch(10.0), []
    search = search_in(tmp_path, clock=watch)
    search.run_for(35.0, watch.toy, said.append)
    assert len(search.records()) == 24
    assert (watch.now, search.spent, search.asked) == (30.0, 30.0, 24)
    told = [(e.done, e.total, e.left) for e in said if isinstance(e, Progress)]
    assert told == [(8, 24, 25.0), (16, 24, 15.0), (24, 24, 5.0)]
    # Three tenths of the 28 trials that the time seemed to allow, not the twelve that were set.
    assert search.startup == search.facts().startup_trials == 8


def test_a_search_for_a_time_has_the_trials_of_one_for_as_many(tmp_path):
    watch = Watch(10.0)
    timed = search_in(tmp_path, clock=watch)
    timed.run_for(65.0, watch.toy, ignore)
    assert timed.startup == 12
    assert trials(timed) == whole(tmp_path / "whole", 48)


@pytest.mark.parametrize("seconds", [1, 9.99])
def test_the_first_batch_is_measured_whatever_the_time(tmp_path, seconds):
    watch = Watch(10.0)
    search = search_in(tmp_path, clock=watch)
    for _ in range(2):
        search.run_for(seconds, watch.toy, ignore)
        assert (len(search.records()), search.asked, search.startup) == (
            8,
            8,
            1 if seconds < 3 else 2,
        )


def test_time_is_in_all_also_after_a_kill_and_beside_trials(tmp_path):
    watch = Watch(10.0)

    def dies(params):
        if watch.now >= 30:
            raise Stop
        return watch.toy(params)

    with pytest.raises(Stop):
        search_in(tmp_path, clock=watch).run_for(65.0, dies, ignore)
    cut = search_in(tmp_path, clock=watch)
    cut.run_for(65.0, watch.toy, ignore)
    # The first batch was measured again, which is not in the time.
    assert (len(trials(cut)), cut.spent, watch.now) == (48, 60.0, 70.0)
    cut.run(52, watch.toy, ignore)
    cut.run_for(90.0, watch.toy, ignore)
    assert (len(trials(cut)), cut.spent, cut.asked) == (68, 90.0, 68)
    unbroken = tmp_path / "unbroken"
    for total in (48, 52):
        whole(unbroken, total)
    assert trials(cut) == whole(unbroken, 68)


def test_a_time_that_is_over_ends_a_search_that_more_trials_were_asked_of(tmp_path):
    def dies(params):
        if watch.now >= 20:
            raise Stop
        return watch.toy(params)

    watch = Watch(10.0)
    with pytest.raises(Stop):
        search_in(tmp_path, clock=watch).run(60, dies, ignore)
    search = search_in(tmp_path, clock=watch)
    search.run_for(25.0, watch.toy, ignore)
    assert (len(search.records()), search.asked) == (16, 16)


REGION = Region((Edges(0.0, 0.1), Edges(FLOOR, CEILING, log=True)))


def test_a_search_that_knows_its_region_stays_there(tmp_path):
    search = search_in(tmp_path)
    search.aim(REGION)
    search.run(64, toy, ignore)
    values = [[t.scores[o.name].value for o in GOALS] for t in search.records()]
    plain = [[t[3][o.name].value for o in GOALS] for t in whole(tmp_path / "plain", 64)]
    assert values[:12] == plain[:12]
    # 62 % of them, where the sampler is told scores 10 %
    assert sum(map(REGION.holds, values[12:])) > 0.5 * len(values[12:])
    assert sum(map(REGION.holds, plain[12:])) < 0.2 * len(plain[12:])
    assert [tuple(t.told) for t in search.records()] == [REGION.told(v) for v in values]
    assert [t.values for t in search.study.trials] == values  # as they were measured
    assert set(search.facts().region) == {"behaviour_rate", "drift"}


def test_a_study_keeps_the_region_that_it_was_begun_with(tmp_path):
    folders = [tmp_path / name for name in ("unbroken", "cut", "without")]
    for folder in folders:
        folder.mkdir()
    unbroken, cut, without = map(search_in, folders)
    for search in (unbroken, cut):
        search.aim(REGION)
    unbroken.run(40, toy, ignore)
    for search, folder in ((cut, folders[1]), (without, folders[2])):
        search.run(24, toy, ignore)
        again = search_in(folder)
        again.aim(Region((Edges(0.0, 9.0), Edges(FLOOR, CEILING, log=True))))
        again.run(40, toy, ignore)
    assert trials(search_in(folders[1])) == trials(unbroken)
    assert trials(search_in(folders[2])) == whole(tmp_path / "plain", 40)
    assert without.facts().region == {}
    assert without.records()[0].told is None


def test_batches_stop_where_a_total_was_asked_for():
    assert batches([10], 4) == [(0, 4), (4, 8), (8, 10)]
    assert batches([10, 15], 4) == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 15)]


def test_a_torn_last_line_is_dropped(tmp_path):
    folder = tmp_path / "run"
    expected = whole(folder, 16)
    with (folder / journal.FILE).open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    torn = (folder / journal.FILE).read_bytes()
    assert trials(search_in(folder)) == expected
    assert (folder / journal.FILE).read_bytes() == torn  # nothing is written before there is need
    assert whole(folder, 24)[:16] == expected
    assert trials(search_in(folder))[:16] == expected


def test_a_journal_of_another_run_is_refused(tmp_path):
    whole(tmp_path, 8)
    study = journal.open_study(tmp_path)
    journal.check_identity(tmp_path, study, {"model": "a"})
    with pytest.raises(RunStateError, match="model differ"):
        journal.check_identity(tmp_path, study, {"model": "b"})


def test_a_journal_that_is_not_one_is_refused(tmp_path):
    (tmp_path / journal.FILE).write_text("hello\n" * 3)
    with pytest.raises(RunStateError, match="not a readable Excise journal"):
        journal.open_study(tmp_path)


def test_two_processes_cannot_hold_one_run(tmp_path):
    from filelock import FileLock

    with hold(tmp_path):
        other = FileLock(tmp_path / ".lock", is_singleton=False)
        with pytest.raises(TimeoutError):
            other.acquire(timeout=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"drift": ScoreRecord(value=float("nan"), n=10)},
        {"drift": ScoreRecord(value=1.0, n=10, interval=(0.0, float("inf")))},
        {"drift_first": ScoreRecord(value=float("inf"), n=10)},
    ],
)
def test_a_score_that_is_not_finite_fails_its_trial_only(bad, tmp_path):
    def sometimes(params):
        results = toy(params)
        return [results[0], Measured(results[1].scores | bad), *results[2:]]

    search = search_in(tmp_path)
    search.run(8, sometimes, ignore)
    states = [t.state for t in search.records()]
    assert states.count("failed") == 1
    assert search.records()[1].reason == "a score is not finite"
    assert not search.records()[1].scores.keys() & bad.keys()


def test_the_sampler_finds_better_points_than_chance(tmp_path):
    found = whole(tmp_path, 64)
    late = [t[3]["drift"].value + t[3]["behaviour_rate"].value for t in found[40:]]
    early = [t[3]["drift"].value + t[3]["behaviour_rate"].value for t in found[:12]]
    assert sum(late) / len(late) < sum(early) / len(early)


def test_importance_names_what_matters(tmp_path):
    whole(tmp_path, 48)
    search = search_in(tmp_path)
    shares = importance(search.study, GOALS)
    assert set(shares) == {"behaviour_rate", "drift"}
    assert max(shares["behaviour_rate"], key=shares["behaviour_rate"].get) in (
        "attn.o_proj.max_weight",
        "mlp.down_proj.max_weight",
    )


def test_parameters_and_candidates_say_the_same():
    params = {
        "direction_scope": "global",
        "direction_index": 3.5,
        **{
            f"{c}.{k}": 1.0
            for c in COMPONENTS
            for k in ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
        },
    }
    candidate = from_params(params)
    assert candidate.index == 3.5
    assert candidate.strength("attn.o_proj", 1) == 1.0
    assert from_params(params | {"direction_scope": "per layer"}).index is None
