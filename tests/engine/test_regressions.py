"""Counter-examples, kept: each was wrong once, or is so rare that random histories may miss it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec import structs

from paceline.engine.accounting import Estimate, Prices, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Committed, Denied, Granted, Reason, Released
from paceline.engine.calendar import next_month
from paceline.engine.dimensions import SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Caps, Engine
from paceline.engine.keys import child_keys
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefineModes,
    DefinePool,
    DefineShare,
    DefineSpend,
    Disposition,
    Mode,
    Observation,
    Observe,
    Operation,
    Outcome,
    Priority,
    Reading,
    Refusal,
    Release,
    Renew,
    Reserve,
    SetLimit,
    SetMode,
)

START = 1_790_000_000 * SECOND_US
PROFILE = Profile("test", (Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),))
NANO_A_TOKEN = Prices(1_000_000)
CASES: list[Callable[[], None]] = []


class Bench:
    """An engine with one pool of 60 tokens a minute, saved up to 100, and a clock in seconds."""

    def __init__(self, *operations: Operation, amount: int = 60, burst: int = 100) -> None:
        self.engine = Engine("main")
        self.now = START
        limit = Limit(Dimension.INPUT_TOKENS, Window.MINUTE, amount, burst)
        self.do(DefinePool("pool", PROFILE, (limit,)), *operations)

    def do(self, *operations: Operation) -> list[Answer]:
        step = self.engine.step(self.now, list(enumerate(operations)))
        return [answer for _, answer in sorted(step.answers, key=lambda pair: pair[0])]

    def later(self, seconds: float) -> None:
        self.now += int(seconds * SECOND_US)
        self.do()

    def pass_by(self, seconds: int) -> None:
        """Tenth by tenth, as an engine that is woken whenever it asks for it."""
        for _ in range(10 * seconds):
            self.later(0.1)

    def level(self, dimension: Dimension = Dimension.INPUT_TOKENS) -> int:
        """Of the pool (or of the account's money), now."""
        for bucket in self.engine.state.buckets:
            if bucket.dimension is dimension and not bucket.share:
                return bucket.level + bucket.refill(self.now)[0]
        raise KeyError(dimension)


def key(number: int) -> str:
    return f"me/00000000-0000-0000-0000-{number:012}"


def reserve(
    number: int,
    tokens: int,
    *,
    wait: float = 0,
    count: int = 1,
    shares: tuple[str, ...] = (),
    priority: Priority = Priority.STANDARD,
) -> Reserve:
    candidate = Candidate("pool", shares, Estimate(input_tokens=tokens), NANO_A_TOKEN)
    return Reserve(key(number), (candidate,), priority=priority, max_wait_us=int(wait * SECOND_US), count=count)


def commit(number: int, tokens: int) -> Commit:
    usage = Usage(input_tokens=tokens)
    return Commit(key(number), Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL))


def case(check: Callable[[], None]) -> Callable[[], None]:
    CASES.append(check)
    return check


@case
def test_input_that_turns_out_smaller_gives_back_no_second_twice() -> None:
    bench = Bench()
    bench.do(reserve(1, 50))
    bench.later(60)
    assert bench.level() == 100
    bench.do(reserve(2, 30))
    # Upstream counted five: it has been full since, but for the thirty of the second call.
    bench.do(Renew(key(1), usage=Usage(input_tokens=5)))
    assert bench.level() == 70
    # What it holds now is what its end is measured against.
    bench.do(commit(1, 5))
    assert bench.level() == 70


@case
def test_a_bulk_call_near_the_burst_passes_when_the_bucket_is_full() -> None:
    bench = Bench(amount=6_000, burst=6_000)
    seen = Observation((Reading(Dimension.INPUT_TOKENS, 6_000, 6_000, 100),))
    bench.do(reserve(1, 10))
    bench.do(Renew(key(1), observation=seen))
    bench.do(commit(1, 10))
    assert not bench.do(reserve(2, 595, wait=300, count=10))
    # A margin is kept beside what is held, but it makes no call impossible.
    bench.later(30)
    assert len(bench.engine.state.open) == 10


@case
def test_a_full_ledger_does_not_ask_to_be_woken_for_what_only_an_end_can_give() -> None:
    bench = Bench()
    bench.engine = Engine("main", caps=Caps(open=2))
    bench.do(DefinePool("pool", PROFILE, (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 60, 100),)))
    bench.do(reserve(1, 60))
    assert not bench.do(reserve(2, 90, wait=200))
    assert isinstance(bench.do(reserve(3, 10, priority=Priority.INTERACTIVE))[0], Granted)
    bench.later(60)
    # There is room in the bucket for the one that waits, but none in the ledger: its deadline is what comes next.
    assert bench.level() >= 90
    assert bench.engine.step(bench.now, []).wake_at == START + 200 * SECOND_US
    bench.do(commit(3, 10))
    assert key(2) in bench.engine.state.open


@case
def test_what_a_stream_says_at_its_beginning_is_not_its_output() -> None:
    rules = (PROFILE.rules[0], Rule(Dimension.OUTPUT_TOKENS, hold_output=1_000, settle_output=1_000))
    bench = Bench()
    limits = tuple(Limit(rule.dimension, Window.MINUTE, 60, 1_000) for rule in rules)
    bench.do(DefinePool("pool", Profile("both", rules), limits))
    candidate = Candidate("pool", (), Estimate(input_tokens=50, output_tokens=30))
    bench.do(Reserve(key(1), (candidate,), hold_us=10 * SECOND_US))
    bench.do(Renew(key(1), usage=Usage(input_tokens=40, output_tokens=1)))
    before = bench.level(Dimension.OUTPUT_TOKENS)
    bench.later(10)
    # It never said more: what it may have produced stays charged, as estimated.
    (ended,) = bench.engine.state.ended.values()
    assert ended.charges[:2] == (40, 30)
    assert bench.level(Dimension.OUTPUT_TOKENS) == before + 10


@case
def test_an_urgent_call_passes_patient_ones() -> None:
    bench = Bench()
    assert isinstance(bench.do(reserve(1, 100))[0], Granted)
    assert not bench.do(reserve(2, 40, wait=300, priority=Priority.BATCH))
    bench.later(10)
    # Ten tokens are there, and one that is more urgent does not stand behind the forty.
    assert isinstance(bench.do(reserve(3, 10, priority=Priority.INTERACTIVE))[0], Granted)
    # Nor does its wait count what the patient one wants.
    assert not bench.do(reserve(4, 20, wait=20, priority=Priority.INTERACTIVE))
    assert bench.level() == 0
    bench.later(20)
    assert key(4) in bench.engine.state.open
    assert key(2) not in bench.engine.state.open


@case
def test_small_calls_of_a_team_do_not_pass_a_large_one_of_it() -> None:
    bench = Bench(DefineShare("team", (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 30, 30),)))
    assert isinstance(bench.do(reserve(1, 30, shares=("team",)))[0], Granted)
    assert not bench.do(reserve(2, 20, wait=300, shares=("team",)))
    bench.later(10)
    # The team's five tokens are what the large one waits for; the pool has room for everybody else.
    assert not bench.do(reserve(3, 5, wait=300, shares=("team", "member")))
    assert isinstance(bench.do(reserve(4, 5))[0], Granted)
    bench.later(30)
    assert key(2) in bench.engine.state.open
    assert key(3) not in bench.engine.state.open


@case
def a_large_call_is_served_beside_a_stream_of_small_ones() -> None:
    bench = Bench(amount=600, burst=1_000)
    bench.do(reserve(1, 1_000))
    bench.do(reserve(2, 500, wait=900))
    for number in range(1_200):
        bench.do(structs.replace(reserve(10 + number, 1, wait=900), tenant="another"))
    # Ten a second come in, and half of them are for the large one.
    bench.pass_by(90)
    assert key(2) not in bench.engine.state.open
    bench.pass_by(15)
    assert key(2) in bench.engine.state.open
    assert sum(1 for each in bench.engine.state.open.values() if each.tenant == "another") > 400


@case
def the_urgent_get_most_and_the_patient_something() -> None:
    bench = Bench(amount=600, burst=1_000)
    bench.do(reserve(1, 1_000))
    for number in range(100):
        bench.do(reserve(100 + number, 10, wait=900, priority=Priority.BATCH))
        bench.do(reserve(300 + number, 10, wait=900, priority=Priority.INTERACTIVE))
    bench.pass_by(60)
    granted = [each.priority for each in bench.engine.state.open.values()]
    assert granted.count(Priority.BATCH) in (2, 3, 4)
    assert granted.count(Priority.INTERACTIVE) >= 56


@case
def refunds_see_each_other() -> None:
    bench = Bench()
    bench.do(reserve(1, 10), reserve(2, 10))
    bench.later(5)
    bench.do(reserve(3, 50))
    bench.do(commit(1, 0), commit(2, 0))
    assert bench.level() <= 50  # Without the two it was full when the third came.


@case
def refunds_together_may_reach_a_peak_that_none_reaches_alone() -> None:
    bench = Bench()
    bench.do(reserve(1, 30), reserve(2, 30))
    bench.later(25)
    bench.do(reserve(3, 60))
    bench.do(Release(key(1)), Release(key(2)))
    assert bench.level() <= 40


@case
def a_release_gives_back_also_where_the_burst_is_one() -> None:
    bench = Bench(amount=60, burst=1)
    bench.do(reserve(1, 1))
    bench.later(0.5)
    bench.do(Release(key(1)))
    assert bench.level() == 1


@case
def what_is_held_is_not_in_the_new_month() -> None:
    bench = Bench(DefineSpend(100))
    bench.do(reserve(1, 40))
    bench.engine.step(next_month(bench.now) - 1, [(0, reserve(2, 30))])
    bench.now = next_month(bench.now)
    bench.do(reserve(3, 1))
    assert bench.level(Dimension.SPEND) == 100 - 30 - 1


@case
def last_month_gives_nothing_back_to_this_one() -> None:
    bench = Bench(DefineSpend(100))
    bench.do(reserve(1, 40))
    bench.later(400)  # It expires.
    bench.now = next_month(bench.now)
    bench.do(commit(1, 0))
    bench.do(reserve(2, 1))
    assert bench.level(Dimension.SPEND) == 99


@case
def the_turn_of_a_month_promises_nothing_that_open_calls_take_along() -> None:
    bench = Bench(DefineSpend(100), amount=600, burst=1_000)
    bench.engine.step(next_month(bench.now) - 10 * SECOND_US, [(0, reserve(1, 80))])
    bench.now = next_month(bench.now) - 5 * SECOND_US
    (answer,) = bench.do(reserve(2, 30))
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.SPEND_CAP
    assert answer.retry_after_us is None


@case
def a_month_that_has_turned_wakes_nobody_again() -> None:
    bench = Bench(DefineSpend(100), amount=600, burst=1_000)
    bench.engine.step(next_month(bench.now) - 10 * SECOND_US, [(0, reserve(1, 80))])
    bench.now = next_month(bench.now) + 100 * SECOND_US
    step = bench.engine.step(bench.now, [(0, reserve(2, 30, wait=600))])
    assert not step.answers
    assert step.wake_at is not None
    # The first call's hold runs out.
    assert step.wake_at >= bench.now + 100 * SECOND_US


@case
def a_release_after_the_settlement_changes_nothing() -> None:
    bench = Bench()
    bench.do(reserve(1, 50))
    bench.do(commit(1, 50))
    (answer,) = bench.do(Release(key(1)))
    assert isinstance(answer, Released)
    assert answer.duplicate
    assert bench.level() == 50


@case
def what_does_not_fit_is_denied() -> None:
    bench = Bench()
    answers = bench.do(reserve(1, 60), reserve(2, 60))
    assert [type(answer) for answer in answers] == [Granted, Denied]
    assert bench.level() == 40


@case
def a_second_not_sent_is_the_first_again() -> None:
    bench = Bench()
    bench.do(reserve(1, 50))
    not_sent = Commit(key(1), Outcome(Disposition.NOT_SENT))
    assert [answer.duplicate for answer in bench.do(not_sent, not_sent) if isinstance(answer, Committed)] == [
        False,
        True,
    ]
    (answer,) = bench.do(commit(1, 50))
    assert isinstance(answer, Committed)
    assert answer.duplicate
    assert bench.level() == 100


@case
def a_released_bulk_stays_released() -> None:
    bench = Bench()
    bench.do(reserve(1, 10, count=3))
    bench.do(Release(key(1)))
    (answer,) = bench.do(reserve(1, 10, count=3))
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.RELEASED
    assert not bench.engine.state.open


@case
def a_bulk_with_a_released_call_is_not_granted() -> None:
    bench = Bench()
    bench.do(Release(child_keys(key(1), 3)[1]))
    (answer,) = bench.do(reserve(1, 10, count=3))
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.RELEASED
    assert not bench.engine.state.open


@case
def a_share_without_money_stops_only_itself() -> None:
    bench = Bench(DefineShare("poor", (Limit(Dimension.SPEND, Window.MONTH, 5),)))
    (answer,) = bench.do(reserve(1, 10, wait=60, shares=("poor",)))
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.SPEND_CAP
    bench.do(reserve(2, 5, shares=("poor",)))
    bench.do(reserve(3, 5, wait=60, shares=("poor",)))  # It waits: the money held may come back.
    (answer,) = bench.do(reserve(4, 10, wait=60))
    assert isinstance(answer, Granted)


@case
def an_override_outlives_what_was_learned() -> None:
    bench = Bench(amount=1_000, burst=1_000)
    bench.do(SetLimit("pool", Dimension.INPUT_TOKENS, Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 100)))
    told = Outcome(
        Disposition.SUCCEEDED, Usage(), UsageKind.FINAL, Observation((Reading(Dimension.INPUT_TOKENS, limit=80),))
    )
    bench.do(reserve(1, 1))
    bench.do(Commit(key(1), told))
    bench.later(3_600)
    bench.do(reserve(2, 100), reserve(3, 90))
    assert bench.engine.state.buckets[0].amount == 100


@case
def an_unchanged_configuration_leaves_the_operators_mode() -> None:
    configured = DefineModes((("", "", Mode.OBSERVE),))
    bench = Bench(configured)
    bench.do(SetMode(Mode.ENFORCE))
    bench.do(configured)
    assert bench.engine.state.modes == {("", ""): Mode.ENFORCE}
    bench.do(DefineModes(()))
    assert bench.engine.state.modes == {}


@case
def who_waits_holds_in_shares_defined_meanwhile() -> None:
    bench = Bench()
    bench.do(reserve(1, 100))
    bench.do(reserve(2, 30, wait=60, shares=("team",)))
    bench.do(DefineShare("team", (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 1_000),)))
    bench.later(31)
    (capped,) = [bucket for bucket in bench.engine.state.buckets if bucket.share == "team"]
    assert capped.held == 30


@case
def a_newcomer_does_not_overtake() -> None:
    bench = Bench()
    bench.do(reserve(1, 100))
    assert bench.do(reserve(2, 80, wait=120)) == []
    bench.later(10)
    (answer,) = bench.do(reserve(3, 5))
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.LIMIT


@case
def a_deadline_is_kept() -> None:
    bench = Bench()
    bench.do(reserve(1, 100))
    assert bench.do(reserve(2, 50, wait=60)) == []
    used = Outcome(Disposition.SUCCEEDED, Usage(input_tokens=100), UsageKind.FINAL)
    bench.do(Observe(Candidate("pool"), used))
    step = bench.engine.step(bench.now + 60 * SECOND_US, [])
    reasons = [answer.reason for _, answer in step.answers if isinstance(answer, Denied)]
    assert reasons == [Reason.TIMEOUT]


@case
def a_large_call_claims_nothing_while_its_pool_is_shut() -> None:
    bench = Bench()
    bench.do(reserve(1, 100))
    bench.do(reserve(2, 80, wait=300))
    bench.later(20)
    shut = Observation((), refusal=Refusal.BUDGET, retry_after_us=30 * SECOND_US)
    bench.do(Observe(Candidate("pool"), Outcome(Disposition.REJECTED, observation=shut)))
    until = bench.engine.state.pools["pool"].blocked_until
    assert until > bench.now
    # It was woken again and again to set aside a part that it may not take yet.
    bench.now += SECOND_US
    assert bench.engine.step(bench.now, []).wake_at == until


@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
def test_what_was_wrong_once(check: Callable[[], None]) -> None:
    check()
