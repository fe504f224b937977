"""Calls that are reported late, and a ledger that was away: nothing is charged twice, and nothing is given twice.

The model is the bucket that upstream has: every call is taken off it when it is made. The ledger hears of some of them
only later, or was not there when they were made. Once it has heard of all, it must never have more than upstream; and
where it was there all the time, hardly less.
"""

from __future__ import annotations

from fractions import Fraction

from hypothesis import event, given
from hypothesis import strategies as st
from msgspec import structs

from paceline.engine import events as ev
from paceline.engine.absence import Absence
from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.losses import SLOT_US, Losses
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    DefineShare,
    Disposition,
    Observation,
    Observe,
    Operation,
    Outcome,
    Reading,
    Release,
    Reserve,
)
from paceline.engine.state import State

START = 1_790_000_000 * SECOND_US
TOKENS = Dimension.INPUT_TOKENS
PROFILE = Profile("test", (Rule(TOKENS, hold_input=1_000, settle_input=1_000),))
AMOUNT, BURST = 600, 200
"""Ten a second, saved up for twenty seconds."""
UNSEEN = 120 * SECOND_US

Made = tuple[int, int, int]
"""A call: when, how much, and how long after that it is reported."""


class Ledger:
    """An engine with one pool, and what another machine makes of its events."""

    def __init__(self) -> None:
        self.engine = Engine("main")
        self.shadow = State("main")
        self.now = START
        self.do(DefinePool("pool", PROFILE, (Limit(TOKENS, Window.MINUTE, AMOUNT, BURST),)))

    def do(self, *operations: Operation) -> None:
        step = self.engine.step(self.now, list(enumerate(operations)))
        for each in ev.decode(ev.encode(step.events)):
            self.shadow.apply(each)
        assert self.shadow.digest() == self.engine.state.digest()
        bucket = self.engine.state.buckets[0]
        assert bucket.level == bucket.refilled - bucket.charged + bucket.adjusted
        assert bucket.level <= bucket.burst

    def restart(self, absence: Absence = Absence(most_us=UNSEEN)) -> None:  # noqa: B008
        """Another process goes on with what the journal has."""
        self.shadow = State.restore(self.shadow.dump())
        self.engine = Engine("main", State.restore(self.engine.state.dump()), absence=absence)

    @property
    def level(self) -> int:
        bucket = self.engine.state.buckets[0]
        return bucket.level + bucket.refill(self.now)[0]


def observe(tokens: int, age: int) -> Observe:
    outcome = Outcome(Disposition.SUCCEEDED, Usage(1, tokens), UsageKind.FINAL)
    return Observe(Candidate("pool"), outcome, age_us=age)


def upstream(calls: list[Made], until: int, closed: tuple[int, int] = (0, 0)) -> Fraction:
    """The level at ``until`` of a bucket from which every call was taken when it was made.

    In the span ``closed`` nothing refills.
    """
    level, at = Fraction(BURST), START
    for made, tokens in [*sorted((made, tokens) for made, tokens, _ in calls), (until, 0)]:
        open_time = (made - at) - max(0, min(made, closed[1]) - max(at, closed[0]))
        level = min(Fraction(BURST), level + Fraction(AMOUNT * open_time, MINUTE_US))
        level -= tokens
        at = made
    return level


delays = st.one_of(st.just(0), st.integers(0, 5 * SECOND_US), st.integers(0, 120 * SECOND_US))
histories = st.lists(st.tuples(st.integers(0, 12 * SECOND_US), st.integers(0, 150), delays), min_size=1, max_size=40)


def told(plan: list[tuple[int, int, int]]) -> list[Made]:
    """From gaps between calls to instants."""
    calls, at = [], START
    for gap, tokens, delay in plan:
        at += gap
        calls.append((at, tokens, delay))
    return calls


@given(histories)
def test_a_late_report_costs_what_it_would_have_cost_in_time(plan: list[tuple[int, int, int]]) -> None:
    calls = told(plan)
    ledger = Ledger()
    for made, tokens, delay in sorted(calls, key=lambda call: call[0] + call[2]):
        ledger.now = made + delay
        ledger.do(observe(tokens, delay))
    ledger.now += SECOND_US
    late = sum(delay > 0 for _, _, delay in calls)
    event(f"late: {min(late, 5)}")
    ideal = upstream(calls, ledger.now)
    assert ledger.level <= ideal + len(calls)
    # Where spans of time are joined, it is too low by what refills in one.
    assert ledger.level >= ideal - (late + 1) * (AMOUNT * SLOT_US // MINUTE_US + 2)


@given(histories, st.integers(0, 39), st.integers(0, 240 * SECOND_US), st.randoms(use_true_random=False))
def test_a_ledger_that_was_away_gives_nothing_twice(
    plan: list[tuple[int, int, int]], cut: int, away: int, chance: object
) -> None:
    calls = told(plan)
    died = calls[min(cut, len(calls) - 1)][0]
    ledger = Ledger()
    for made, tokens, _ in calls:
        if made <= died:
            ledger.now = made
            ledger.do(observe(tokens, 0))
    before = ledger.level
    back = died + away
    # The others were made on their own; what was to come after the return did not happen.
    calls = [call for call in calls if call[0] <= back]
    ledger.now = back
    ledger.restart()
    ledger.do()
    seen = max(0, away - UNSEEN) * AMOUNT // MINUTE_US
    assert ledger.level <= before + seen + 1, "a burst on return"
    for made, tokens, delay in sorted((call for call in calls if call[0] > died), key=lambda call: call[2]):
        ledger.now = max(ledger.now, back + delay)
        ledger.do(observe(tokens, ledger.now - made))
    ideal = upstream(calls, ledger.now)
    assert ledger.level <= ideal + len(calls), "more than upstream has"
    # Never lower than a bucket that had no refill while nobody looked, apart from what joined spans cost.
    assert ledger.level >= upstream(calls, ledger.now, (died, min(back, died + UNSEEN))) - 1
    ledger.now += BURST * MINUTE_US // AMOUNT + MINUTE_US * max(0, -ledger.level) // AMOUNT
    ledger.do()
    assert ledger.level == BURST, "the absence outlives its evidence"


def test_what_was_used_in_the_absence_is_charged_once() -> None:
    ledger = Ledger()
    ledger.do(observe(200, 0))
    ledger.now += 60 * SECOND_US
    ledger.restart()
    ledger.do()
    assert ledger.level == 0
    for second in range(60):
        ledger.do(observe(10, (60 - second) * SECOND_US))
    assert ledger.level == 0
    assert ledger.engine.state.buckets[0].charged == 800
    # All of it is paid for: one more is a debt.
    ledger.do(observe(10, 30 * SECOND_US))
    assert ledger.level == -10


def test_an_absence_counts_once_whatever_the_number_of_restarts() -> None:
    ledger = Ledger()
    ledger.do(observe(200, 0))
    for _ in range(3):
        ledger.now += 20 * SECOND_US
        ledger.restart()
        ledger.do()
    ledger.do(observe(400, 50 * SECOND_US), observe(300, 60 * SECOND_US))
    assert ledger.level == -100


def test_a_reading_shows_that_less_was_used() -> None:
    ledger = Ledger()
    ledger.do(observe(200, 0))
    ledger.now += 60 * SECOND_US
    ledger.restart()
    ledger.do(Reserve("one", (Candidate("pool", estimate=Estimate(1, 0)),)))
    ledger.now += SECOND_US
    seen = Observation((Reading(TOKENS, limit=AMOUNT, remaining=150),))
    ledger.do(Commit("one", Outcome(Disposition.SUCCEEDED, Usage(1, 0), UsageKind.FINAL, seen)))
    assert ledger.level >= 150


def test_a_call_older_than_a_reading_is_not_taken_off_it() -> None:
    """As after a partition: the reading has had that call in it."""
    ledger = Ledger()
    ledger.do(Reserve("one", (Candidate("pool", estimate=Estimate(1, 0)),)))
    ledger.now += SECOND_US
    seen = Observation((Reading(TOKENS, limit=AMOUNT, remaining=50),))
    ledger.do(Commit("one", Outcome(Disposition.SUCCEEDED, Usage(1, 0), UsageKind.FINAL, seen)))
    ledger.do(observe(150, 30 * SECOND_US))
    assert ledger.level >= 50
    # One that came after it is.
    ledger.do(observe(150, 0))
    assert ledger.level <= -90


@given(
    histories,
    st.integers(-30 * SECOND_US, 60 * SECOND_US),
    st.integers(0, 60 * SECOND_US),
    st.sampled_from([0, SECOND_US, 30 * SECOND_US]),
)
def test_only_the_time_that_nobody_saw_is_left_out(
    plan: list[tuple[int, int, int]], alive: int, away: int, most: int
) -> None:
    calls = told(plan)
    ledger = Ledger()
    for made, tokens, _ in calls:
        ledger.now = made
        ledger.do(observe(tokens, 0))
    died = ledger.now
    since = died + alive
    ledger.now = max(died, since) + away
    ledger.restart(Absence(since=since, most_us=most))
    ledger.do()
    # Whoever journalled an event was alive, whatever the lease says.
    unseen = (max(died, since), min(ledger.now, max(died, since) + most))
    ideal = upstream(calls, ledger.now, unseen)
    assert ideal - 2 <= ledger.level <= ideal


@given(histories, st.integers(0, 20 * SECOND_US), st.integers(0, 20 * SECOND_US), st.integers(0, 10 * SECOND_US))
def test_what_may_have_been_granted_and_lost_is_debited(
    plan: list[tuple[int, int, int]], alive: int, away: int, loss: int
) -> None:
    calls = told(plan)
    plain, debited = Ledger(), Ledger()
    for ledger in (plain, debited):
        for made, tokens, _ in calls:
            ledger.now = made
            ledger.do(observe(tokens, 0))
        since = ledger.now + alive
        ledger.now = since
        ledger.restart(Absence(since=since, loss_us=loss if ledger is debited else 0))
        ledger.do()
    debit = plain.level - debited.level
    assert debit == max(0, min(AMOUNT * loss // MINUTE_US, plain.level)), "more than there was, or debt of its own"
    for ledger in (plain, debited):
        ledger.now += away
        ledger.do()
    assert plain.level - debit <= debited.level <= plain.level
    # It passes.
    debited.now += (BURST + debit) * MINUTE_US // AMOUNT + MINUTE_US * max(0, -debited.level) // AMOUNT
    debited.do()
    assert debited.level == BURST


def test_a_refund_after_the_debit_credits_no_second_twice() -> None:
    ledger = Ledger()
    ledger.do(Reserve("one", (Candidate("pool", estimate=Estimate(1, 50)),)))
    ledger.now += 60 * SECOND_US
    ledger.restart(Absence(since=ledger.now, loss_us=4 * SECOND_US))
    ledger.do()
    assert ledger.level == BURST - 40
    # Had the call never been made, the bucket would have been as full.
    ledger.do(Release("one"))
    assert ledger.level == BURST - 40


def test_a_reading_from_before_says_nothing_of_the_absence() -> None:
    for absence in (Absence(most_us=UNSEEN), Absence(loss_us=6 * SECOND_US)):
        ledger = Ledger()
        ledger.do(Reserve("one", (Candidate("pool", estimate=Estimate(1, 100)),)))
        ledger.do(Reserve("two", (Candidate("pool", estimate=Estimate(1, 0)),)))
        ledger.now += SECOND_US
        seen = Observation((Reading(TOKENS, limit=AMOUNT, remaining=100),))
        ledger.do(Commit("one", Outcome(Disposition.SUCCEEDED, Usage(1, 100), UsageKind.FINAL, seen)))
        before = ledger.level
        ledger.now += 3 * SECOND_US
        ledger.restart(structs.replace(absence, since=ledger.now if absence.loss_us else 0))
        ledger.do()
        expected = before if absence.most_us else before + 30 - 60
        assert ledger.level == expected
        ledger.do(Commit("two", Outcome(Disposition.SUCCEEDED, Usage(1, 0), UsageKind.FINAL)))
        assert ledger.level == expected, "an old reading has given it back"
        newer = Observation((Reading(TOKENS, limit=AMOUNT, remaining=150),))
        ledger.do(Reserve("three", (Candidate("pool", estimate=Estimate(1, 0)),)))
        ledger.now += 1_000
        ledger.do(Commit("three", Outcome(Disposition.SUCCEEDED, Usage(1, 0), UsageKind.FINAL, newer)))
        assert ledger.level >= 150


def test_shares_and_gauges_are_not_debited() -> None:
    ledger = Ledger()
    gauge = Limit(Dimension.CONCURRENCY, Window.NONE, 10)
    profile = Profile("both", (*PROFILE.rules, Rule(Dimension.CONCURRENCY, hold_requests=1_000)))
    tokens = Limit(TOKENS, Window.MINUTE, AMOUNT, BURST)
    ledger.do(DefinePool("pool", profile, (tokens, gauge)), DefineShare("team", (tokens,)))
    ledger.do(Observe(Candidate("pool", ("team",)), Outcome(Disposition.NOT_SENT)))
    ledger.restart(Absence(since=ledger.now, loss_us=6 * SECOND_US))
    ledger.do()
    assert [bucket.level for bucket in ledger.engine.state.buckets[:3]] == [BURST - 60, 10, BURST]


@given(
    st.lists(st.tuples(st.integers(0, 3 * SECOND_US), st.integers(1, 20)), max_size=400),
    st.integers(0, 500 * SECOND_US),
    st.integers(0, 5_000),
)
def test_losses_are_never_overstated(spans: list[tuple[int, int]], at: int, wanted: int) -> None:
    losses, now, truth = Losses(), 0, []
    for gap, amount in spans:
        # A full bucket loses as fast as it refills.
        length = amount * MINUTE_US // AMOUNT
        truth.append((now + gap, now + gap + length, amount))
        now += gap + length
        losses.add(*truth[-1])
    exact = sum(Fraction(amount * (end - max(at, start)), end - start) for start, end, amount in truth if end > at)
    # A span that was joined loses too early, never too late.
    assert losses.since(at) <= exact
    assert len(losses.spans) <= 128
    total, before = losses.since(0), losses.since(at)
    taken = min(wanted, before)
    losses.take(at, taken)
    assert losses.since(at) == before - taken
    assert total - taken - 1 <= losses.since(0) <= total - taken
