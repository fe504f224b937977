"""Kinds of refusal apart: what overloads, bounds on concurrency, ramps and a quota of zero change, and for how long.

Figures are of a closed loop on a virtual clock; the laws are of random histories, which engines that are broken on
purpose do not get through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from paceline.engine import events as ev
from paceline.engine import pressing, pressure, ramp
from paceline.engine.accounting import Estimate
from paceline.engine.answers import Denied, Granted, Reason
from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Mode,
    Observation,
    Observe,
    Outcome,
    Reading,
    Refusal,
    Release,
    Renew,
    Reserve,
    SetMode,
    SetPaused,
)
from paceline.engine.pressure import LONGEST_GAP_US, OVERLOAD_LAPSE_US, QUOTA_PROBE_US
from paceline.engine.reserving import Reserving
from paceline.engine.state import Pool, State
from tests.engine import tally
from tests.engine.pressed import ACCEPTED, CROWDED, OVERLOADED, PROFILE, START, Loop, Traffic

SUCCEEDED = Outcome(Disposition.SUCCEEDED)
CALL = (Candidate("p", estimate=Estimate(requests=1, input_tokens=100)),)


class Fleet:
    """One pool with room for everything, driven by hand."""

    def __init__(self, limit: int = 60_000_000) -> None:
        self.engine = Engine("fleet")
        self.now = START
        self.serial = 0
        limits = tuple(Limit(d, Window.MINUTE, limit) for d in (Dimension.REQUESTS, Dimension.INPUT_TOKENS))
        self.do(DefinePool("p", PROFILE, limits))

    @property
    def pool(self) -> Pool:
        return self.engine.state.pools["p"]

    def do(self, *operations: Any) -> list[Any]:
        step = self.engine.step(self.now, list(enumerate(operations)))
        self.wake_at = step.wake_at
        return [answer for _, answer in sorted(step.answers, key=lambda pair: pair[0])]

    def later(self, seconds: float) -> None:
        self.now += round(seconds * SECOND_US)
        self.do()

    def reserve(self, count: int = 1, **named: Any) -> list[str]:
        """Keys of those of ``count`` calls that were granted at once."""
        keys = []
        for _ in range(count):
            self.serial += 1
            key = f"call/{self.serial}"
            if isinstance(self.do(Reserve(key, CALL, **named))[0], Granted):
                keys.append(key)
        return keys

    def refuse(self, keys: list[str], refusal: Refusal, **named: Any) -> None:
        for key in keys:
            self.do(Commit(key, Outcome(Disposition.REJECTED, observation=Observation(refusal=refusal, **named))))


def episode(first: int, last: int) -> Callable[[int, int], Observation]:
    """Every call between these seconds is refused."""
    return lambda now, _: OVERLOADED if first * SECOND_US <= now - START < last * SECOND_US else ACCEPTED


@pytest.mark.parametrize(
    "traffic",
    [
        Traffic(20, 3.0),
        Traffic(60, 1.0),
        Traffic(20, 1.0, answers_in=0.3, refuses_in=0.05),
        Traffic(20, 10.0, early=False),
    ],
    ids=["chat", "short", "refused at once", "long, and no early headers"],
)
def test_an_episode_stops_the_fleet_and_its_end_starts_it(traffic: Traffic) -> None:
    loop = Loop(traffic, episode(20, 80))
    loop.run(20)
    charged = [bucket.charged for bucket in loop.state.buckets]
    made = len(loop.attempts)
    assert made
    assert loop.state.pools["p"].pressure is None, "nothing has been refused"
    loop.run(110)
    normal = traffic.a_second
    assert loop.rate(loop.attempts, 25, 80) <= 0.10 * normal
    assert all(loop.rate(loop.attempts, since, since + 10) > 0 for since in range(25, 80, 10)), "it is probed"
    assert loop.rate(loop.accepted, 85, 95) >= 0.9 * normal
    assert loop.rate(loop.accepted, 95, 105) >= 0.9 * normal
    # What was refused has cost nothing.
    requests = loop.state.buckets[0]
    done = sum(ended.granted_at is not None for ended in loop.state.ended.values()) - len(loop.refused)
    assert requests.charged == done + len(loop.state.open)
    assert [bucket.amount for bucket in loop.state.buckets[:2]] == [60_000, 60_000_000]
    assert charged[0] < requests.charged
    assert loop.is_replayed()


def test_the_reason_of_those_who_waited_in_vain_is_told() -> None:
    loop = Loop(Traffic(20, patience=5), episode(10, 60))
    loop.run(50)
    assert {denied.reason for denied in loop.denied} == {Reason.BLOCKED}


def test_a_single_refusal_costs_nothing() -> None:
    few = {number * 97 for number in range(1, 30)}
    loop = Loop(Traffic(20, 3.0), lambda now, _: OVERLOADED if len(loop.attempts) in few else ACCEPTED)
    loop.run(60)
    assert loop.rate(loop.attempts, 5, 60) >= 0.99 * 20
    assert len(loop.refused) > 8
    assert not loop.denied


def test_what_is_refused_in_mid_stream_counts() -> None:
    fleet = Fleet()
    keys = fleet.reserve(40)
    fleet.later(20)
    for key in keys[:20]:
        fleet.do(Renew(key, observation=OVERLOADED))
        fleet.do(Commit(key, Outcome(Disposition.ABORTED)))
    assert len(fleet.reserve(40)) <= 1, "one may try"
    assert len(fleet.engine.state.open) >= 20, "what is open goes on"


def test_calls_without_a_grant_teach_it_too() -> None:
    fleet = Fleet()
    for _ in range(8):
        fleet.do(Observe(CALL[0], Outcome(Disposition.REJECTED, observation=OVERLOADED)))
    assert len(fleet.reserve(8)) <= 1


def test_observing_it_stops_nobody() -> None:
    fleet = Fleet()
    fleet.do(SetMode(Mode.OBSERVE, "p"))
    fleet.refuse(fleet.reserve(20), Refusal.OVERLOAD)
    assert fleet.pool.pressure is not None
    assert len(fleet.reserve(20)) == 20


def test_a_bulk_request_gets_what_there_is_room_for() -> None:
    fleet = Fleet()
    fleet.refuse(fleet.reserve(4), Refusal.CONCURRENCY)
    limit = fleet.pool.pressure.crowd.limit  # type: ignore[union-attr]
    (answer,) = fleet.do(Reserve(f"svc/{UUID(int=1)}", CALL, count=10, partial=True))
    assert len(answer.keys) == limit
    (denied,) = fleet.do(Reserve(f"svc/{UUID(int=2)}", CALL, count=2))
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.binding) == (Reason.LIMIT, Dimension.CONCURRENCY)


def test_a_planted_overload_ends_with_the_first_good_answers() -> None:
    loop = Loop(Traffic(20, 3.0), lambda *_: ACCEPTED)
    now = START + 1
    planted = pressure.Overload(1, 60, LONGEST_GAP_US, SECOND_US, now, now, now, failures=3, opens_at=now)
    loop.state.apply(ev.Pressed("p", pressure.Pressure(planted)))
    loop.engine = Engine("loop", loop.state)
    loop.run(12)
    assert loop.rate(loop.attempts, 10, 12) >= 20


# -- concurrency -----------------------------------------------------------------------------------------------------


def test_calls_in_flight_stay_near_what_the_upstream_takes() -> None:
    loop = Loop(Traffic(20, 3.0, patience=20), lambda _, under_way: CROWDED if under_way >= 30 else ACCEPTED)
    loop.run(130)
    assert loop.rate(loop.accepted, 10, 130) >= 0.93 * 30 / 3
    assert loop.rate(loop.refused, 60, 130) * 70 <= 2
    assert loop.is_replayed()


def test_a_wrong_bound_on_concurrency_is_soon_gone() -> None:
    loop = Loop(Traffic(20, 3.0), lambda *_: ACCEPTED)
    now = START + 1
    least = pressure.CROWD_WAIT_US[0]
    loop.state.apply(ev.Pressed("p", pressure.Pressure(crowd=pressure.Crowd(1, 1, least, least, now, now))))
    loop.engine = Engine("loop", loop.state)
    loop.run(17)
    assert loop.rate(loop.attempts, 13, 17) >= 20


# -- ramps -----------------------------------------------------------------------------------------------------------


class Ramping:
    """An upstream that takes ``first`` tokens a minute, and ``step`` more from each minute on, saved up for 10 s.

    Its minutes turn ``later`` (in seconds) than ours.
    """

    def __init__(self, first: int, step: int, tokens: int, later: int = 0) -> None:
        self.later = later * SECOND_US
        self.first, self.step, self.tokens = first, step, tokens
        self.level, self.at = first / 6, START

    def allowed(self, now: int) -> int:
        return self.first + self.step * ((now - START - self.later) // MINUTE_US)

    def __call__(self, now: int, _: int) -> Observation:
        rate = self.allowed(now)
        self.level = min(rate / 6, self.level + rate * (now - self.at) / MINUTE_US)
        self.at = now
        # The headers go on telling of the full limit.
        full = Reading(Dimension.INPUT_TOKENS, 4_000_000, 3_990_000, reset_us=SECOND_US)
        if self.level >= self.tokens:
            self.level -= self.tokens
            return Observation((full,))
        wait = -int(-(self.tokens - self.level) * 60 // rate) * SECOND_US
        return Observation((full,), 0, Refusal.RAMP, None, wait, rate)


def test_a_ramp_is_followed() -> None:
    upstream = Ramping(100_000, 10_000, 1_000)
    loop = Loop(Traffic(6, 1.0, tokens=1_000, patience=5), upstream, {Dimension.INPUT_TOKENS: 4_000_000})
    loop.run(120)
    learning = len(loop.refused)
    loop.run(360)
    for minute in range(2, 8):
        used = 60_000 * loop.rate(loop.accepted, 60 * minute, 60 * minute + 60)
        assert used >= 0.95 * upstream.allowed(START + minute * MINUTE_US)
    assert learning <= 12
    assert len(loop.refused) - learning <= 1
    assert loop.is_replayed()


def test_minutes_that_turn_elsewhere_are_found() -> None:
    upstream = Ramping(100_000, 10_000, 1_000, later=20)
    loop = Loop(Traffic(6, 1.0, tokens=1_000, patience=5), upstream, {Dimension.INPUT_TOKENS: 4_000_000})
    loop.run(420)
    allowed = sum(upstream.allowed(START + second * SECOND_US) for second in range(240, 420)) / 180
    assert 60_000 * loop.rate(loop.accepted, 240, 420) >= 0.93 * allowed
    assert loop.rate(loop.refused, 240, 420) * 180 <= 1


def test_a_full_limit_in_the_headers_undoes_no_ramp() -> None:
    fleet = Fleet(600_000)
    fleet.refuse(fleet.reserve(1), Refusal.RAMP, allowed=60_000, retry_after_us=2 * SECOND_US)
    bucket = fleet.engine.state.buckets[1]
    level = bucket.level
    full = Observation((Reading(Dimension.INPUT_TOKENS, 600_000, 599_000, reset_us=SECOND_US),))
    for _ in range(3):
        fleet.do(Observe(CALL[0], Outcome(Disposition.SUCCEEDED, observation=full)))
    assert (bucket.amount, bucket.burst) == (60_000, 60_000)
    assert bucket.level <= level
    # A lower one rules at once, as always.
    lower = Observation((Reading(Dimension.INPUT_TOKENS, 30_000),))
    fleet.do(Observe(CALL[0], Outcome(Disposition.SUCCEEDED, observation=lower)))
    assert bucket.amount == 30_000


def test_a_ramp_moves_no_level_up_and_ends_by_itself() -> None:
    fleet = Fleet(600_000)
    fleet.refuse(fleet.reserve(1), Refusal.RAMP, allowed=60_000, retry_after_us=2 * SECOND_US)
    bucket = fleet.engine.state.buckets[1]
    assert (bucket.amount, bucket.burst) == (60_000, 60_000)
    assert bucket.level < 0
    assert fleet.engine.state.buckets[0].amount == 600_000, "the other limit is as it was"
    for _ in range(3):
        before = bucket.level
        fleet.now += MINUTE_US
        fleet.do()
        assert bucket.level <= before + bucket.amount
    assert bucket.amount > 60_000
    fleet.later(20 * 60)
    assert (bucket.amount, bucket.burst) == (600_000, 600_000)
    assert fleet.pool.pressure is None


def test_an_operator_rules_over_a_ramp() -> None:
    fleet = Fleet(600_000)
    fleet.refuse(fleet.reserve(1), Refusal.RAMP, allowed=60_000)
    limits = tuple(Limit(d, Window.MINUTE, 300_000) for d in (Dimension.REQUESTS, Dimension.INPUT_TOKENS))
    fleet.do(DefinePool("p", PROFILE, limits))
    fleet.later(120)
    assert fleet.engine.state.buckets[1].amount == 300_000
    assert fleet.pool.pressure is None


def test_a_ramp_without_a_figure_is_half_of_what_was_used() -> None:
    fleet = Fleet(600_000)
    keys = fleet.reserve(100)
    for key in keys[:80]:
        fleet.do(Commit(key, SUCCEEDED))
    fleet.refuse(keys[80:81], Refusal.RAMP)
    assert fleet.engine.state.buckets[1].amount == pytest.approx(5_000, abs=100)


# -- closed pools ----------------------------------------------------------------------------------------------------


def test_a_pool_without_quota_is_tried_by_one_call_at_a_time() -> None:
    fleet = Fleet()
    keys = fleet.reserve(10)
    fleet.refuse(keys, Refusal.NO_QUOTA)
    (denied,) = fleet.do(Reserve("closed", CALL, max_wait_us=MINUTE_US))
    assert (denied.reason, denied.retry_after_us) == (Reason.POOL_CLOSED, None)
    fleet.later(QUOTA_PROBE_US / SECOND_US + 1)
    probe = fleet.reserve(10)
    assert len(probe) == 1
    fleet.refuse(probe, Refusal.NO_QUOTA)
    assert fleet.pool.closed
    fleet.later(QUOTA_PROBE_US / SECOND_US + 1)
    for _ in range(6):
        for key in fleet.reserve(20):
            fleet.do(Commit(key, SUCCEEDED))
        fleet.later(1)
    assert len(fleet.reserve(20)) == 20
    assert fleet.pool.pressure is None


@pytest.mark.parametrize("refusal", [Refusal.SPEND, Refusal.NO_QUOTA, Refusal.OVERLOAD])
def test_an_operator_opens_what_was_closed(refusal: Refusal) -> None:
    fleet = Fleet()
    fleet.refuse(fleet.reserve(20), refusal)
    assert not fleet.reserve(20)
    fleet.do(SetPaused("p", paused=False))
    assert len(fleet.reserve(20)) == 20


def test_a_spend_stop_is_not_shortened_by_other_refusals() -> None:
    fleet = Fleet()
    keys = fleet.reserve(20)
    fleet.refuse(keys[:1], Refusal.SPEND)
    until = fleet.pool.blocked_until
    fleet.refuse(keys[1:], Refusal.NO_QUOTA)
    assert (fleet.pool.blocked_until, fleet.pool.closed) == (until, True)


# -- laws ------------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["reserve", "reserve", "reserve", "overload", "overload", "crowd", "good", "headers", "release"]
        ),
        st.integers(1, 12),
        st.integers(0, 3 * SECOND_US),
    ),
    min_size=5,
    max_size=40,
)


def a_history(found: list[tuple[str, int, int]]) -> None:
    """Drive a pool at random, beside the laws of what may pass."""
    fleet = Fleet()
    journal: list[ev.Event] = []
    fleet.engine = Engine("fleet", State.restore(list(fleet.engine.state.dump())))
    first = State.restore(list(fleet.engine.state.dump()))
    keys: list[str] = []
    for what, count, after in found:
        fleet.now += after
        journal += fleet.engine.step(fleet.now, []).events
        before, flying = fleet.pool.pressure, len(fleet.engine.state.open)
        before = None if before is None else before.copy()
        operations: list[Any] = []
        for _ in range(count):
            fleet.serial += 1
            if what == "reserve":
                operations.append(Reserve(f"call/{fleet.serial}", CALL))
            elif keys and what == "headers":
                operations.append(Renew(keys[0], observation=ACCEPTED))
            elif keys and what == "release":
                operations.append(Release(keys.pop(0)))
            elif keys:
                seen = {"overload": OVERLOADED, "crowd": CROWDED}.get(what, ACCEPTED)
                kind = Disposition.SUCCEEDED if what == "good" else Disposition.REJECTED
                operations.append(Commit(keys.pop(0 if count % 2 else -1), Outcome(kind, observation=seen)))
        step = fleet.engine.step(fleet.now, list(enumerate(operations)))
        journal += step.events
        granted = [key for _, answer in step.answers if isinstance(answer, Granted) for key in answer.keys]
        keys += granted
        if what != "reserve":
            continue
        if before is None:
            assert len(granted) == count, "held back without evidence"
            continue
        room = pressure.room(before, flying, fleet.now) if before.overload is None else None
        if room is not None:
            assert len(granted) == min(count, room)
        overload = before.overload
        if overload is not None:
            # Never more in flight than allowed, but for one that is tried.
            assert fleet.now >= overload.opens_at or not granted
            most = pressure.limit_at(overload, fleet.now)
            assert not granted or len(fleet.engine.state.open) <= max(most, flying + 1)
            heard = max(overload.opens_at, overload.last_at, overload.refused_at)
            crowded = before.crowd is not None and flying >= before.crowd.limit
            if fleet.now >= heard + LONGEST_GAP_US and not crowded:
                assert granted, "not probed"
        tally.step()
    for event in ev.decode(ev.encode(journal)):
        first.apply(event)
    assert first.digest() == fleet.engine.state.digest()
    for bucket in fleet.engine.state.buckets:
        assert bucket.level == bucket.refilled - bucket.charged + bucket.adjusted
        assert bucket.granted == bucket.settled + bucket.released + bucket.expired + bucket.held
        assert not bucket.adjusted, "a refusal for something else has changed the budget"
    # Silence: a probe passes, and in the end nothing is left, whatever is still open.
    crowd = None if fleet.pool.pressure is None else fleet.pool.pressure.crowd
    fleet.later(LONGEST_GAP_US / SECOND_US)
    if crowd is None or len(fleet.engine.state.open) < crowd.limit:
        assert fleet.reserve(1), "not probed after silence"
    fleet.later(OVERLOAD_LAPSE_US / SECOND_US)
    assert fleet.pool.pressure is None or fleet.pool.pressure.overload is None
    fleet.later(600)
    assert fleet.pool.pressure is None
    assert len(fleet.reserve(30)) == 30


@given(steps)
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_laws_of_what_may_pass(found: list[tuple[str, int, int]]) -> None:
    tally.example("pressure")
    a_history(found)


# -- the laws, tested --------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def nothing_is_held_back(patch: Patch) -> None:
    patch.setattr(Reserving, "pressed", lambda *_: False)


def it_never_lapses(patch: Patch) -> None:
    patch.setattr(pressing, "_lapsed", lambda *_: False)


def nothing_is_tried(patch: Patch) -> None:
    patch.setattr(pressure, "_between_probes", lambda *_: 1 << 60)
    patch.setattr(pressure, "patience", lambda *_: 1 << 60)


def an_overload_takes_from_the_budget(patch: Patch) -> None:
    original = pressing.Pressing._overloaded

    def overloaded(self: Any, pool: Pool, *rest: Any) -> None:
        original(self, pool, *rest)
        self._books.advance(0)
        self._books.emit(ev.Corrected(0, -1))

    patch.setattr(pressing.Pressing, "_overloaded", overloaded)


def the_state_shares_what_changes_with_its_events(patch: Patch) -> None:
    patch.setattr(pressure.Pressure, "copy", lambda self: self)


def probes_do_not_wait(patch: Patch) -> None:
    original = pressure._free

    def free(overload: pressure.Overload, open_calls: int, now: int) -> int:
        return original(replace(overload, opens_at=0), open_calls, now)

    patch.setattr(pressure, "_free", free)


MUTANTS = [
    nothing_is_held_back,
    it_never_lapses,
    nothing_is_tried,
    an_overload_takes_from_the_budget,
    the_state_shares_what_changes_with_its_events,
    probes_do_not_wait,
]
FAST = settings(
    max_examples=150,
    phases=(Phase.generate,),
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.__name__)
def test_a_broken_engine_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    tally.example(f"mutant: {mutant.__name__}")
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        FAST(given(steps)(a_history))()


EXAMPLES: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "a reading is believed in spite of a ramp": (
        pressing.Pressing,
        "believable",
        lambda self, pool, number, reading: reading,
        test_a_full_limit_in_the_headers_undoes_no_ramp,
    ),
    "what is left of the full limit counts in a ramp": (
        pressing.Pressing,
        "climbs",
        lambda *_: False,
        test_a_full_limit_in_the_headers_undoes_no_ramp,
    ),
    "a ramp never climbs": (
        ramp,
        "climbed",
        lambda standing, amount, now: (standing, amount),
        test_a_ramp_moves_no_level_up_and_ends_by_itself,
    ),
    "probes follow each other at once": (
        pressure,
        "gap",
        lambda overload: 0,
        lambda: test_an_episode_stops_the_fleet_and_its_end_starts_it(
            Traffic(20, 1.0, answers_in=0.3, refuses_in=0.05)
        ),
    ),
    "a bound on concurrency is never tried": (
        pressure,
        "uncrowded",
        lambda crowd, *_: crowd,
        test_a_wrong_bound_on_concurrency_is_soon_gone,
    ),
    "good answers say nothing of an overload": (
        pressure,
        "accepted",
        lambda overload, *_: overload,
        test_a_planted_overload_ends_with_the_first_good_answers,
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_fault_is_caught_by_an_example(name: str, monkeypatch: Patch) -> None:
    tally.example(f"mutant: {name}")
    owner, attribute, fault, check = EXAMPLES[name]
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check()


def test_silence_doubles_and_then_adds() -> None:
    overload = pressure.Overload(1, 10, LONGEST_GAP_US, SECOND_US // 10, START, START, START, first_at=START)
    limits = [pressure.limit_at(overload, START + seconds * SECOND_US) for seconds in range(7)]
    assert limits == [1, 2, 4, 8, 10, 11, 12]


def test_a_ramp_that_is_behind_catches_up() -> None:
    begun = ramp.begun(0, 1_000_000, 1_000_000, 100_000, START + 5 * SECOND_US, blind=False)
    after, amount = ramp.told(begun, 150_000, 110_000, START + 61 * SECOND_US, START + 62 * SECOND_US)
    assert (after.step, after.known, amount) == (10_000, True, 110_000)
    after, amount = ramp.climbed(after, amount, START + 5 * MINUTE_US + SECOND_US)
    assert amount == 150_000
    after, amount = ramp.climbed(after, amount, START + 60 * MINUTE_US)
    assert amount == 1_000_000
