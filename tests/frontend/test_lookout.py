"""What is told of the limits of a ledger, and when: a real engine under a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import pytest

from paceline.engine.accounting import Estimate, Prices, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Denied, Granted, Reason
from paceline.engine.dimensions import DAY_US, SECOND_US, UNLIMITED, Dimension, Limit, Window
from paceline.engine.engine import Caps, Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    DefineShare,
    DefineSpend,
    Disposition,
    Observation,
    Operation,
    Outcome,
    Reading,
    Release,
    Reserve,
    SetLimit,
)
from paceline.engine.state import State
from paceline.frontend.alerts import Alert, Kind, lookout
from paceline.frontend.alerts.lookout import Lookout

START = int(datetime(2026, 1, 20, tzinfo=UTC).timestamp()) * SECOND_US
FEBRUARY = int(datetime(2026, 2, 1, tzinfo=UTC).timestamp()) * SECOND_US
NANO = 1_000_000_000
DOLLAR_A_TOKEN = Prices(NANO * 1_000_000)
TOKENS = Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000)
PROFILE = Profile("test", (TOKENS, Rule(Dimension.CONCURRENCY, hold_requests=1_000)))


class Bench:
    """An engine with one pool of 100 tokens a minute, looked at each second."""

    def __init__(
        self, *operations: Operation, thresholds: tuple[int, ...] = (800,), limits: Iterable[Limit] = ()
    ) -> None:
        self.engine = Engine("main", caps=Caps(pools=50_000, buckets=60_000))
        self.now = START
        self.calls = 0
        self.alerts: list[Alert] = []
        self.lookout = Lookout("main", thresholds, self.engine.state, self.engine.stats, self.now)
        own = tuple(limits) or (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 100),)
        self.do(DefinePool("pool", PROFILE, own), *operations)

    def do(self, *operations: Operation) -> list[Answer]:
        step = self.engine.step(self.now, list(enumerate(operations)))
        return [answer for _, answer in sorted(step.answers, key=lambda pair: pair[0])]

    def hold(self, tokens: int, *shares: str, pool: str = "pool", prices: Prices = DOLLAR_A_TOKEN) -> str:
        """A call that was granted; its key."""
        key, answer = self.ask(tokens, *shares, pool=pool, prices=prices)
        assert isinstance(answer, Granted), answer
        return key

    def ask(self, tokens: int, *shares: str, pool: str = "pool", prices: Prices = DOLLAR_A_TOKEN) -> tuple[str, Answer]:
        self.calls += 1
        key = f"me/00000000-0000-0000-0000-{self.calls:012}"
        candidate = Candidate(pool, shares, Estimate(input_tokens=tokens, output_tokens=0), prices)
        (answer,) = self.do(Reserve(key, (candidate,)))
        return key, answer

    def spend(self, tokens: int, *shares: str, observation: Observation | None = None) -> None:
        """A call that came to its end."""
        outcome = Outcome(Disposition.SUCCEEDED, Usage(input_tokens=tokens), UsageKind.FINAL, observation)
        self.do(Commit(self.hold(tokens, *shares), outcome))

    def look(self) -> list[Alert]:
        """What is new."""
        found = [alert for part in self.lookout.look(lambda: self.now) for alert in part]
        self.alerts += found
        return found

    def later(self, seconds: float) -> list[Alert]:
        """Let time pass, with a look each second; what was new."""
        found: list[Alert] = []
        for _ in range(int(seconds)):
            self.now += SECOND_US
            found += self.look()
        return found

    def jump(self, to: int) -> list[Alert]:
        self.now = to
        return self.look()

    @property
    def standing(self) -> list[Alert]:
        return list(self.lookout.alerts(1_000))


def budget(amount: int) -> DefineSpend:
    return DefineSpend(amount * NANO)


def brief(alerts: Iterable[Alert]) -> list[tuple[str, str, str, int, int, int]]:
    return [(a.kind.value, a.share, a.dimension.name, a.permille, a.used, a.amount) for a in alerts]


WIDE = (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 1_000_000_000),)


def test_a_months_threshold_is_told_once() -> None:
    bench = Bench(budget(100), limits=WIDE)
    bench.spend(79)
    assert bench.look() == []
    bench.spend(1)
    (alert,) = bench.look()
    assert brief([alert]) == [("threshold", "", "SPEND", 800, 80 * NANO, 100 * NANO)]
    assert (alert.ledger, alert.pool, alert.window, alert.at) == ("main", "", Window.MONTH, START)
    bench.spend(5)
    assert bench.later(120) == []
    assert bench.standing == [alert]


def test_what_is_only_held_is_not_spent() -> None:
    bench = Bench(budget(100), limits=WIDE)
    key = bench.hold(95)
    assert bench.look() == []
    bench.do(Release(key))
    assert bench.look() == []


def test_each_threshold_is_told_by_itself() -> None:
    bench = Bench(budget(100), limits=WIDE, thresholds=(500, 800, 950))
    bench.spend(85)
    assert [alert.permille for alert in bench.look()] == [500, 800]
    bench.spend(10)
    assert [alert.permille for alert in bench.look()] == [950]
    assert len(bench.standing) == bench.lookout.standing == 3


def test_a_new_month_begins_anew() -> None:
    bench = Bench(budget(100), limits=WIDE)
    bench.spend(90)
    assert len(bench.look()) == 1
    assert bench.jump(FEBRUARY - 1) == []
    assert len(bench.standing) == 1
    assert bench.jump(FEBRUARY) == []
    assert bench.standing == []
    bench.spend(79)
    assert bench.look() == []
    bench.spend(1)
    assert brief(bench.look()) == [("threshold", "", "SPEND", 800, 80 * NANO, 100 * NANO)]


def test_a_month_that_turns_between_two_looks_is_told_anew() -> None:
    bench = Bench(budget(100), limits=WIDE)
    bench.spend(90)
    (january,) = bench.look()
    bench.now = FEBRUARY + SECOND_US
    bench.spend(85)
    (february,) = bench.look()
    assert february.used == 85 * NANO
    assert bench.standing == [february]
    assert january.id != february.id


def test_below_by_five_points_it_is_told_again() -> None:
    bench = Bench(budget(100), limits=WIDE)
    bench.spend(80)
    assert len(bench.look()) == 1
    bench.do(budget(106))  # 75.5 %
    assert bench.look() == []
    bench.do(budget(100))
    assert bench.look() == []
    bench.do(budget(107))  # 74.8 %
    assert bench.look() == []
    assert bench.standing == []
    bench.do(budget(100))
    assert brief(bench.look()) == [("threshold", "", "SPEND", 800, 80 * NANO, 100 * NANO)]


def test_shares_have_thresholds_of_their_own() -> None:
    caps = (Limit(Dimension.SPEND, Window.MONTH, 50 * NANO), Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 60))
    bench = Bench(budget(1_000), DefineShare("team", caps), limits=WIDE)
    bench.spend(45, "team")
    found = bench.look()
    assert sorted(brief(found)) == [
        ("threshold", "team", "SPEND", 800, 45 * NANO, 50 * NANO),
    ]
    bench.spend(4, "team")
    assert brief(bench.later(1)) == [("threshold", "team", "INPUT_TOKENS", 800, 49, 60)]


def test_a_minute_counts_the_last_sixty_seconds() -> None:
    bench = Bench()
    bench.spend(40)
    assert bench.later(30) == []
    bench.spend(39)
    assert bench.later(1) == []
    bench.spend(1)
    (alert,) = bench.later(1)
    assert brief([alert]) == [("threshold", "", "INPUT_TOKENS", 800, 80, 100)]
    assert (alert.pool, alert.window) == ("pool", Window.MINUTE)
    # The first forty leave the window a minute after they were charged; then 40 of 100 are left.
    assert bench.later(26) == []
    assert len(bench.standing) == 1
    assert bench.later(4) == []
    assert bench.standing == []
    bench.spend(40)
    assert brief(bench.later(1)) == [("threshold", "", "INPUT_TOKENS", 800, 80, 100)]


def test_a_minute_hovering_at_the_threshold_is_told_once() -> None:
    bench = Bench()
    found: list[Alert] = []
    used: set[int] = set()
    for second in range(600):
        # After the first minute: 78 of 100 in sixty seconds, or 82.
        bench.spend(1 + (second % 60 < 18) + 4 * (second % 120 == 90))
        found += bench.later(1)
        if second > 90:
            (entry,) = bench.lookout._entries.values()
            used.add(bench.lookout._used(bench.engine.state.buckets[0], entry, bench.now))
    assert used >= {78, 82}
    assert len(found) == 1


def test_what_comes_back_was_not_used() -> None:
    bench = Bench()
    key = bench.hold(90)
    bench.do(Release(key))
    assert bench.later(2) == []


def test_idle_limits_are_forgotten() -> None:
    bench = Bench()
    bench.spend(40)
    bench.later(62)
    assert bench.lookout._entries == {}


def test_a_gauge_counts_what_is_held() -> None:
    bench = Bench(limits=(*WIDE, Limit(Dimension.CONCURRENCY, Window.NONE, 5)))
    keys = [bench.hold(1) for _ in range(4)]
    assert brief(bench.look()) == [("threshold", "", "CONCURRENCY", 800, 4, 5)]
    bench.do(Release(keys[0]))
    assert bench.look() == []
    assert bench.standing == []
    bench.hold(1)
    assert len(bench.look()) == 1


def test_a_day_counts_what_its_bucket_lacks() -> None:
    bench = Bench(limits=(*WIDE, Limit(Dimension.INPUT_TOKENS, Window.DAY, 86_400)))
    bench.spend(70_000)
    assert brief(bench.look()) == [("threshold", "", "INPUT_TOKENS", 800, 70_000, 86_400)]
    # One unit a second refills.
    assert bench.jump(START + 5_000 * SECOND_US) == []
    assert len(bench.standing) == 1
    assert bench.jump(START + 5_201 * SECOND_US) == []
    assert bench.standing == []


def test_a_cap_is_told_when_denials_begin() -> None:
    caps = (Limit(Dimension.SPEND, Window.MONTH, 50 * NANO),)
    bench = Bench(budget(1_000), DefineShare("team", caps), DefineShare("other", caps), limits=WIDE)
    bench.spend(49, "team")
    bench.spend(10, "other")
    bench.look()
    _, answer = bench.ask(2, "team")
    assert isinstance(answer, Denied)
    assert (answer.reason, answer.pool) == (Reason.SPEND_CAP, "pool")
    assert answer.retry_after_us == FEBRUARY - START
    (alert,) = bench.later(1)
    assert (alert.kind, alert.share, alert.used, alert.amount) == (Kind.CAP_REACHED, "team", 49 * NANO, 50 * NANO)
    for _ in range(100):
        assert isinstance(bench.ask(2, "team")[1], Denied)
        assert bench.later(2) == []
    # Callers that give up for a while find nothing new when they come back.
    assert bench.later(120) == []
    assert isinstance(bench.ask(2, "team")[1], Denied)
    assert bench.later(1) == []
    assert bench.jump(FEBRUARY) == []
    assert bench.standing == []
    bench.spend(49, "team")
    assert isinstance(bench.ask(2, "team")[1], Denied)
    assert [alert.kind for alert in bench.later(1)] == [Kind.THRESHOLD, Kind.CAP_REACHED]


def test_a_call_too_large_for_what_is_left_does_not_hide_the_cap() -> None:
    bench = Bench(budget(100), limits=WIDE)
    bench.spend(30)
    assert isinstance(bench.ask(90)[1], Denied)
    assert [alert.kind for alert in bench.later(1)] == [Kind.CAP_REACHED]
    bench.later(61)
    assert bench.standing == []
    bench.spend(69)
    assert isinstance(bench.ask(5)[1], Denied)
    assert [alert.kind for alert in bench.later(1)] == [Kind.THRESHOLD, Kind.CAP_REACHED]


def told(limit: int) -> Observation:
    return Observation((Reading(Dimension.INPUT_TOKENS, limit=limit, remaining=limit - 1),))


def test_a_limit_that_readings_moved_is_told() -> None:
    bench = Bench()
    bench.spend(1, observation=told(100))
    assert bench.later(1) == []
    bench.spend(1, observation=told(50))
    (alert,) = bench.later(1)
    assert (alert.kind, alert.previous, alert.amount) == (Kind.LIMIT_MOVED, 100, 50)
    # Not more than once a minute; then what has come of it.
    for limit in (40, 30, 20):
        bench.spend(1, observation=told(limit))
        assert bench.later(1) == []
    bench.later(50)
    bench.spend(1, observation=told(20))
    (alert,) = [alert for alert in bench.later(10) if alert.kind is Kind.LIMIT_MOVED]
    assert (alert.previous, alert.amount) == (50, 20)
    assert alert in bench.standing
    bench.later(601)
    assert bench.standing == []


def test_an_operators_change_is_no_news_to_operators() -> None:
    bench = Bench()
    limit = Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 50)
    bench.do(SetLimit("pool", Dimension.INPUT_TOKENS, limit))
    assert bench.later(3) == []


def test_what_is_not_limited_is_not_told() -> None:
    bench = Bench(
        DefineSpend(None), limits=(Limit(Dimension.INPUT_TOKENS, Window.MINUTE, UNLIMITED),), thresholds=(100,)
    )
    bench.spend(1_000_000)
    assert bench.later(2) == []
    assert bench.lookout._entries == {}


def test_a_closed_limit_is_not_told() -> None:
    bench = Bench(limits=(Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 0),))
    assert isinstance(bench.ask(1)[1], Denied)
    assert bench.later(2) == []


def test_another_owner_tells_nothing_again_but_what_comes_after() -> None:
    bench = Bench(budget(100), limits=WIDE, thresholds=(800, 950))
    bench.spend(90)
    assert len(bench.look()) == 1
    bench.engine = Engine("main", State.restore(list(bench.engine.state.dump())))
    bench.lookout = Lookout("main", (800, 950), bench.engine.state, bench.engine.stats, bench.now)
    bench.spend(6)
    found = bench.look()
    assert [(alert.permille, alert.inherited) for alert in found] == [(800, True), (950, False)]
    assert bench.later(3) == []
    assert len(bench.standing) == 2


def test_books_that_were_read_again_change_nothing() -> None:
    bench = Bench(budget(100))
    bench.spend(85)
    assert len(bench.later(2)) == 2
    bench.engine = Engine("main", State.restore(list(bench.engine.state.dump())))
    bench.lookout.follow(bench.engine.state, bench.engine.stats)
    assert bench.later(3) == []
    assert len(bench.standing) == 2


def test_many_at_once_are_told_in_parts_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "MAX_TOLD", 10)
    names = [f"pool{number}" for number in range(35)]
    limits = (Limit(Dimension.INPUT_TOKENS, Window.DAY, 100), Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 100))
    bench = Bench(*(DefinePool(name, PROFILE, limits) for name in names))
    for name in names:
        bench.hold(90, pool=name)
    sizes = [len(bench.later(1)) for _ in range(5)]
    assert sizes == [10, 10, 10, 5, 0]
    assert {alert.pool for alert in bench.alerts} == set(names)


def test_what_stands_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "MAX_STANDING", 3)
    names = [f"pool{number}" for number in range(5)]
    limits = (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 100),)
    bench = Bench(*(DefinePool(name, PROFILE, limits) for name in names))
    for name in names:
        bench.hold(90, pool=name)
    assert len(bench.later(5)) == 3
    assert len(bench.standing) == bench.lookout.standing == 3
    bench.later(70)
    assert (bench.standing, bench.lookout.standing) == ([], 0)


def test_a_look_comes_in_slices() -> None:
    limits = (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 100),)
    bench = Bench(*(DefinePool(f"pool{number}", PROFILE, limits) for number in range(2 * lookout.SLICE)))
    assert len(list(bench.lookout.look(lambda: bench.now))) == 3
    # Pools that come between two slices are looked at.
    parts = bench.lookout.look(lambda: bench.now)
    next(parts)
    bench.do(DefinePool("late", PROFILE, limits))
    bench.hold(90, pool="late")
    assert [alert.pool for part in parts for alert in part] == ["late"]


@pytest.mark.parametrize("month", range(1, 13))
def test_months_turn_in_utc(month: int) -> None:
    """What is spent, or denied, in the last microsecond of a month is not that of the next."""
    begin = int(datetime(2027, month, 1, tzinfo=UTC).timestamp()) * SECOND_US
    bench = Bench(budget(100), limits=WIDE)
    bench.now = begin - DAY_US
    bench.spend(60)
    bench.now = begin - 1
    bench.spend(39)
    assert [alert.used for alert in bench.look()] == [99 * NANO]
    _, answer = bench.ask(2)
    assert isinstance(answer, Denied)
    assert (answer.reason, answer.retry_after_us) == (Reason.SPEND_CAP, 1)
    bench.now = begin
    bench.spend(2)
    assert bench.look() == []
    assert bench.standing == []
