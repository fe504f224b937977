"""What would have been decided, beside what the upstream did: counts that add up, judged as enforcing would judge."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.engine import events as ev
from paceline.engine import hindsight
from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Committed, Denied, Granted, Reason, Would
from paceline.engine.dimensions import SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Caps, Engine, Step
from paceline.engine.hindsight import Fate, Upstream
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Mode,
    Observation,
    Observe,
    Operation,
    Outcome,
    Refusal,
    Release,
    Reserve,
    SetMode,
)

START = 1_790_000_000 * SECOND_US
PROFILE = Profile("test", (Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),))
AMOUNT, BURST = 60, 20
"""A token a second, saved up to twenty."""
LIMIT = Limit(Dimension.INPUT_TOKENS, Window.MINUTE, AMOUNT, BURST)


def key(number: int) -> str:
    return f"me/00000000-0000-0000-0000-{number:012}"


def reserve(
    number: int, tokens: int, wait: int = 0, *, tenant: str = "", pool: str = "p", observed: bool = False
) -> Reserve:
    candidate = Candidate(pool, (), Estimate(input_tokens=tokens))
    return Reserve(key(number), (candidate,), tenant=tenant, max_wait_us=wait * SECOND_US, observed=observed)


REFUSED = Outcome(Disposition.REJECTED, observation=Observation(refusal=Refusal.BUDGET, retry_after_us=0))


def commit(number: int, tokens: int) -> Commit:
    return Commit(key(number), Outcome(Disposition.SUCCEEDED, Usage(input_tokens=tokens), UsageKind.FINAL))


def engine(mode: Mode = Mode.ENFORCE, caps: Caps = Caps()) -> Engine:  # noqa: B008
    found = Engine("main", caps=caps)
    found.step(START, [(0, DefinePool("p", PROFILE, (LIMIT,), learn=False)), (1, SetMode(mode))])
    return found


# -- what would have been decided -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call that comes some seconds after the one before, and is over some seconds after its grant."""

    after: int
    tokens: int
    wait: int
    lasts: int


CALLS = st.lists(
    st.builds(
        # One that is larger than the burst, and let through all the same, can put what is said off by a token.
        Call,
        st.integers(0, 6),
        st.integers(1, BURST),
        st.sampled_from([0, 0, 3, 10, 40]),
        st.integers(1, 15),
    ),
    min_size=1,
    max_size=60,
)
Decided = dict[int, tuple[Reason | None, int]]
"""Reason of a denial, or the wait, by number of the call."""


class Provider:
    """Has the same limit, and refuses what does not fit."""

    def __init__(self) -> None:
        self.level, self.at = BURST * SECOND_US, START
        self.refused: set[int] = set()

    def call(self, number: int, tokens: int, now: int) -> None:
        self.level = min(BURST * SECOND_US, self.level + (now - self.at) * AMOUNT // 60)
        self.at = now
        if self.level >= tokens * SECOND_US:
            self.level -= tokens * SECOND_US
        else:
            self.refused.add(number)


def run(subject: Engine, calls: list[Call]) -> tuple[Decided, set[int]]:
    """Every call waits as long as it may, and is made when it is granted. Also those that the upstream refused."""
    decided: Decided = {}
    upstream = Provider()
    now = START
    ends: list[tuple[int, int]] = []
    coming = list(enumerate(calls))
    due = START + calls[0].after * SECOND_US
    wake: int | None = None
    while coming or ends or (wake is not None and len(decided) < len(calls)):
        times = ([due] if coming else []) + [at for at, _ in ends] + ([wake] if wake is not None else [])
        now = max(now, min(times))
        operations: list[tuple[int, Operation]] = []
        for at, number in sorted(ends):
            if at <= now:
                refused = number in upstream.refused
                operations.append(
                    (-1, Commit(key(number), REFUSED) if refused else commit(number, calls[number].tokens))
                )
        ends = [each for each in ends if each[0] > now]
        while coming and due <= now:
            number, one = coming.pop(0)
            operations.append((number, reserve(number, one.tokens, one.wait)))
            if coming:
                due += coming[0][1].after * SECOND_US
        step = subject.step(now, operations)
        wake = step.wake_at
        note(step, calls, decided, ends, upstream)
    return decided, upstream.refused


def note(step: Step, calls: list[Call], decided: Decided, ends: list[tuple[int, int]], upstream: Provider) -> None:
    for number, answer in step.answers:
        if isinstance(answer, Granted):
            would = answer.would or Would(None, answer.waited_us)
            decided[number] = (would.reason, would.wait_us)
            upstream.call(number, calls[number].tokens, step.at)
            ends.append((step.at + calls[number].lasts * SECOND_US, number))
        elif isinstance(answer, Denied):
            decided[number] = (answer.reason, 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CALLS)
def test_observing_says_what_enforcing_does(calls: list[Call]) -> None:
    """Also after the first excess, and whatever the upstream refuses: what enforcing would have denied does not count
    against the next call, and what it would have made later does."""
    would, _ = run(engine(Mode.OBSERVE), calls)
    did, refused = run(engine(), calls)
    assert not refused
    assert set(would) == set(did) == set(range(len(calls)))
    for number, one in enumerate(calls):
        assert would[number][0] == did[number][0], (number, one, would, did)
        assert abs(would[number][1] - did[number][1]) <= 2, (number, one, would, did)


def test_what_was_given_away_is_forgotten_as_the_bucket_refills() -> None:
    subject = engine(Mode.OBSERVE)
    subject.step(START, [(number, reserve(number, BURST)) for number in range(50)])
    bucket = subject.state.buckets[0]
    # Fifty bursts were taken, of which enforcing would have allowed one.
    assert bucket.level == -49 * BURST
    assert subject.stats.hindsight.shadow.more(0) == 49 * BURST
    later = START + 10 * SECOND_US
    (answer,) = [answer for _, answer in subject.step(later, [(0, reserve(100, 10))]).answers]
    assert isinstance(answer, Granted)
    assert answer.would == Would()
    (answer,) = [answer for _, answer in subject.step(later, [(0, reserve(101, 1))]).answers]
    assert isinstance(answer, Granted)
    assert answer.would == Would(Reason.LIMIT, 0, Dimension.INPUT_TOKENS)
    # Those that end give back what they had taken, and no more counts as given away than is missing.
    subject.step(later, [(number, Release(key(number))) for number in (*range(50), 100, 101)])
    assert subject.stats.hindsight.shadow.more(0) == 0
    assert subject.stats.hindsight.remembered == 0


def test_one_call_may_be_observed_while_all_others_are_enforced() -> None:
    subject = engine()
    (_, first), (_, second), (_, third) = subject.step(
        START, [(0, reserve(0, BURST)), (1, reserve(1, 5, 60, observed=True)), (2, reserve(2, 5))]
    ).answers
    assert isinstance(first, Granted)
    assert first.would is None
    assert isinstance(second, Granted)
    assert second.would == Would(None, 5 * SECOND_US, Dimension.INPUT_TOKENS)
    assert isinstance(third, Denied)


# -- the counts -------------------------------------------------------------------------------------------------------

ENDS = {
    Upstream.ACCEPTED: Outcome(Disposition.SUCCEEDED, Usage(input_tokens=3), UsageKind.FINAL),
    Upstream.REFUSED: Outcome(Disposition.REJECTED, observation=Observation(refusal=Refusal.BUDGET)),
    Upstream.OVERLOADED: Outcome(Disposition.REJECTED, observation=Observation(refusal=Refusal.OVERLOAD)),
    Upstream.FAILED: Outcome(Disposition.FAILED),
    Upstream.UNKNOWN: Outcome(Disposition.NO_RESPONSE),
}
Step_ = tuple[str, int, int, Upstream]
HISTORY = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "observed", "commit", "commit", "release", "expire", "without", "mode"]),
        st.integers(0, 30),
        st.integers(0, 20),
        st.sampled_from(list(ENDS)),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(HISTORY)
def test_every_settled_call_is_counted_once(history: list[Step_]) -> None:
    subject = engine()
    counts = subject.stats.hindsight
    now = START
    settled: Counter[Upstream] = Counter()
    granted = 0
    for what, number, amount, upstream in history:
        now += amount * SECOND_US // 4
        tenant = f"tenant {number % 3}"
        operation: Operation
        if what in ("reserve", "observed"):
            operation = reserve(number, amount + 1, amount, tenant=tenant, observed=what == "observed")
        elif what == "commit":
            operation = Commit(key(number), ENDS[upstream])
        elif what == "release":
            operation = Release(key(number))
        elif what == "without":
            operation = Observe(Candidate("p"), ENDS[upstream], tenant)
        elif what == "mode":
            operation = SetMode(Mode(1 + number % 2))
        else:
            now += 400 * SECOND_US
            operation = Release(key(1_000))
        before = subject.stats.settlements["p"]
        step = subject.step(now, [(0, operation)])
        granted += len({event.key for event in step.events if isinstance(event, ev.Granted)})
        for _, answer in step.answers:
            if isinstance(answer, Committed) and not answer.duplicate:
                settled[upstream] += 1
        assert subject.stats.settlements["p"] - before <= 1
    rows = [row for _, _, _, row in counts.rows()]
    assert sum(map(sum, (cells for row in rows for cells in row.outcomes))) == subject.stats.settlements["p"]
    for upstream in Upstream:
        assert sum(row.outcomes[fate][upstream] for row in rows for fate in Fate) == settled[upstream]
    made = Counter({fate: sum(row.decided[fate] for row in rows) for fate in Fate})
    refused = sum(row.decided[Fate.DENIED] for _, _, mode, row in counts.rows() if mode is Mode.ENFORCE)
    assert made[Fate.AT_ONCE] + made[Fate.WAITED] + made[Fate.DENIED] == granted + refused
    for _, _, mode, row in counts.rows():
        assert sum(row.denials.values()) == row.decided[Fate.DENIED]
        assert sum(row.waits) == row.decided[Fate.WAITED]
        if mode is not None:
            assert all(sum(row.outcomes[fate]) <= row.decided[fate] for fate in Fate)
    assert counts.remembered <= granted


def test_memory_is_bounded() -> None:
    limits = hindsight.MAX_TENANTS, hindsight.MAX_DECISIONS
    subject = engine(Mode.OBSERVE)
    counts = subject.stats.hindsight
    for number in range(limits[0] + 50):
        subject.step(START, [(0, reserve(number, 1, tenant=f"tenant {number}"))])
    rows = {tenant: row for _, tenant, _, row in counts.rows()}
    assert len(rows) == limits[0] + 1
    assert sum(rows[None].decided) == 50
    would = Would(Reason.LIMIT)
    for number in range(0, limits[1] + 1_000, 1_000):
        keys = tuple(map(str, range(number, number + 1_000)))
        counts.granted("p", "", keys, (0,), (1,), 0, would)
    assert counts.remembered == limits[1]
    # One that is no longer remembered counts as not known.
    counts.settled("0", "p", "tenant 1", ENDS[Upstream.ACCEPTED])
    unknown = next(row for _, _, mode, row in counts.rows() if mode is None)
    assert unknown.outcomes[Fate.UNKNOWN][Upstream.ACCEPTED] == 1
