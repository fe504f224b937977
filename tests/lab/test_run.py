"""What a run counts, and what happens in the middle of one."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from bench.lab import ideal, special
from bench.lab.clock import EPOCH, SECOND, Clock
from bench.lab.fleet import Task
from bench.lab.run import Run
from bench.lab.setting import Event, Ramp, Setting, Source, usual, window_for
from bench.workloads import Renewal, Size
from paceline.engine.operations import Priority
from paceline.engine.teaching import Teacher

SMALL = {"requests": 400, "input_tokens": 400_000, "output_tokens": 80_000}


def small(seed: int = 7, **changed: object) -> Setting:
    """A tenth of the usual limits."""
    return Setting(seed, limits=SMALL, warmup_s=10.0, window_s=40.0, **changed)  # type: ignore[arg-type]


# -- refusals that could have been avoided ---------------------------------------------------------------------------


def test_what_is_refused_before_the_ledger_can_know_of_a_change_was_not_avoidable() -> None:
    run = Run(small(late_s=30.0, events=(Event(10.0, "limits", 0.2),))).go()
    changed = run.started + 10 * SECOND
    refused = [one for one in run.fleet.refused if one.at >= changed]
    assert refused
    assert not refused[0].avoidable


def test_what_is_refused_after_the_news_was_avoidable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Deaf: the news arrives, and nothing is made of it.
    monkeypatch.setattr(Teacher, "observe", lambda *_: None)
    run = Run(small(events=(Event(10.0, "limits", 0.2),))).go()
    changed = run.started + 10 * SECOND
    late = [one for one in run.fleet.refused if one.at >= changed + 5 * SECOND]
    assert late
    assert all(one.avoidable for one in late)


def test_readings_are_counted_until_a_new_limit_rules() -> None:
    run = Run(small(events=(Event(10.0, "limits", 0.5), Event(25.0, "limits", 1.0)))).go()
    found = special.limit_changes(run)
    assert found["readings_down"] == 1
    # One that was overtaken may come in between.
    assert found["readings_up"] in (2, 3)


# -- events ----------------------------------------------------------------------------------------------------------


def test_nobody_is_answered_while_the_coordinator_is_away_and_all_come_back() -> None:
    run = Run(small(events=(Event(10.0, "restart", seconds=2.0),))).go()
    away, back = run.started + 10 * SECOND, run.started + 12 * SECOND
    arrivals = [call.at for call in run.service.account.calls]
    # What was granted before is still on its way.
    assert not [at for at in arrivals if away + 100_000 < at < back]
    assert [at for at in arrivals if back < at < back + SECOND]
    assert run.coordinator.restarted_at == back
    assert not [task for task in run.fleet.tasks if not task.fate]
    assert "refused_after" in special.restart(run)


def test_in_a_silence_nobody_begins_a_call() -> None:
    run = Run(small(events=(Event(5.0, "silence", seconds=10.0),))).go()
    inside = [task for task in run.fleet.tasks if 5.0 < (task.begun - run.started) / SECOND < 15.0]
    after = [task for task in run.fleet.tasks if 15.0 <= (task.begun - run.started) / SECOND < 17.0]
    assert not inside
    assert after


@pytest.mark.parametrize("what", ["limit", "burst", "level", "block"])
def test_what_is_planted_is_believed(what: str) -> None:
    run = Run(small(events=(Event(20.0, "plant", what=what),), sample_s=0.05)).go()
    before, after = run.between(19.0, 20.0)[-1], next(one for one in run.samples if one.at >= 20.0)
    assert {
        "limit": after.limit < before.limit,
        "burst": after.burst < before.burst,
        "level": after.level < before.level - after.true_burst,
        "block": after.blocked and not before.blocked,
    }[what]


def test_a_ramp_is_the_limit_that_is_measured() -> None:
    run = Run(small(ramp=Ramp(50_000, 10_000))).go()
    assert run.used["ramp"].budget < 0.5 * run.used["input_tokens"].budget
    assert {one.true_limit for one in run.samples} == {50_000, 60_000}
    assert run.service.account.groups["models"].refused_by["ramp"] > 0


# -- the ideal bucket --------------------------------------------------------------------------------------------------


def task(at: float, tokens: int) -> Task:
    source = Source("code", "code", Priority.STANDARD, False)
    begun = EPOCH + round(at * SECOND)
    return Task(source, Size(tokens, 0, 10), begun, begun + 60 * SECOND, lambda _: None)


def test_the_ideal_bucket_lets_in_by_order_of_coming() -> None:
    setting = Setting(1, limits={"requests": 600, "input_tokens": 60_000, "output_tokens": 60_000}, initial=0.0)
    # A thousand tokens a second; the upstream's estimate is a tenth above the truth.
    waits = ideal.waits([task(0.0, 1_000), task(0.0, 1_000), task(20.0, 1_000)], setting)
    assert waits == [pytest.approx(1.1), pytest.approx(2.1), 0.0]


# -- arrivals and windows ----------------------------------------------------------------------------------------------


def test_clumped_arrivals_have_their_rate_and_their_variation() -> None:
    times = Renewal(10.0, 13.0).times(2_000.0, random.Random(1))
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert len(times) == 20_000
    assert times == sorted(times)
    assert 9 < spread / mean < 17


def test_the_usual_fleet_wants_twice_the_limit() -> None:
    chat, batch = usual(SMALL)
    assert chat.arrivals is not None
    # 40 % and 160 %, at 1,149 and 2,081 tokens; a batch call takes 0.8 s.
    assert chat.arrivals.mean_rate == pytest.approx(0.4 * 400_000 / 60 / 1_149, rel=0.01)
    assert batch.workers == pytest.approx(1.6 * 400_000 / 60 / 2_081 * 0.8, abs=1)
    assert window_for(1_000, usual(SMALL), SMALL, "input_tokens") == pytest.approx(1_000 / 4.07, rel=0.03)


def test_the_clock_goes_in_order_and_wakes_first() -> None:
    clock, seen = Clock(), []
    clock.at(EPOCH + 20, lambda: seen.append("b"))
    clock.at(EPOCH + 10, lambda: seen.append("a"))
    clock.awake = lambda: seen.append("wake")
    clock.wake = EPOCH + 10
    clock.until(EPOCH + 15)
    assert (seen, clock.now) == (["wake", "a"], EPOCH + 15)
    clock.until(EPOCH + 20)
    assert seen == ["wake", "a", "b"]
