"""The books under everything that can happen to them: random histories, checked against the model at every step."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from paceline.engine.accounting import Estimate, Prices, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Granted
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Caps
from paceline.engine.operations import (
    Candidate,
    Commit,
    Context,
    DefinePool,
    DefineShare,
    DefineSpend,
    Disposition,
    Mode,
    Observe,
    Operation,
    Outcome,
    Priority,
    Release,
    Renew,
    Reserve,
    SetLimit,
    SetMode,
    SetPaused,
)
from tests.engine import tally
from tests.engine.model import month_starts
from tests.engine.world import LEDGER, World

pytestmark = pytest.mark.timeout(300 * tally.SCALE)

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

REQUESTS = Rule(Dimension.REQUESTS, hold_requests=1000, settle_requests=1000)
GAUGE = Rule(Dimension.CONCURRENCY, hold_requests=1000)
SEPARATE = Profile(
    "separate",
    (
        REQUESTS,
        GAUGE,
        Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000, settle_cache_write=1000),
        Rule(Dimension.OUTPUT_TOKENS, hold_output=1000, settle_output=1000),
    ),
    default_input_tokens=20,
    default_output_tokens=20,
    max_output_tokens=60,
)
COMBINED = Profile(
    "combined",
    (
        REQUESTS,
        GAUGE,
        Rule(
            Dimension.TOKENS,
            hold_input=1000,
            hold_cached=100,
            hold_output=5000,
            settle_input=1000,
            settle_cache_read=100,
            settle_output=5000,
        ),
        Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_as_held=True),
    ),
    default_input_tokens=10,
    default_output_tokens=5,
    max_output_tokens=30,
)
PROFILES = {"a": SEPARATE, "b": COMBINED}
LIMITS = {
    "a": (
        Limit(Dimension.REQUESTS, Window.MINUTE, 7, 7),
        Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 101, 100),
        Limit(Dimension.OUTPUT_TOKENS, Window.MINUTE, 60),
        Limit(Dimension.CONCURRENCY, Window.NONE, 4),
    ),
    "b": (
        Limit(Dimension.TOKENS, Window.MINUTE, 600, 300),
        Limit(Dimension.INPUT_TOKENS, Window.DAY, 1_000, 400),
        Limit(Dimension.REQUESTS, Window.MINUTE, 30),
    ),
}
SHARES: dict[str, tuple[Limit, ...]] = {
    "team": (
        Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 60),
        Limit(Dimension.SPEND, Window.MONTH, 4_000),
    ),
    "team/x": (
        Limit(Dimension.REQUESTS, Window.MINUTE, 3),
        Limit(Dimension.OUTPUT_TOKENS, Window.MINUTE, 50, 40),
    ),
}
PRICES = Prices(input_tokens=3_000_000, cache_read_tokens=300_000, output_tokens=15_000_000)

small = st.integers(0, 60)
sizes = st.one_of(st.none(), st.sampled_from([0, 1, 10, 33]), small, st.sampled_from([100, 101, 5_000]))
estimates = st.builds(
    Estimate,
    requests=st.sampled_from([None, None, 1, 0, 2]),
    input_tokens=sizes,
    cached_input_tokens=st.sampled_from([None, 0, 15]),
    output_tokens=sizes,
    max_output_tokens=st.sampled_from([None, 10, 40]),
)
candidates = st.builds(
    Candidate,
    pool=st.sampled_from(["a", "a", "b"]),
    shares=st.sampled_from([(), (), ("team",), ("team", "team/x")]),
    estimate=estimates,
    prices=st.sampled_from([Prices(), PRICES]),
)
usages = st.builds(
    Usage,
    requests=st.sampled_from([1, 1, 1, 0]),
    input_tokens=st.one_of(small, st.sampled_from([0, 90, 400])),
    cache_read_tokens=st.sampled_from([0, 0, 25]),
    cache_write_tokens=st.sampled_from([0, 0, 7]),
    output_tokens=st.one_of(small, st.sampled_from([0, 90])),
)
outcomes = st.one_of(
    st.builds(
        Outcome,
        disposition=st.sampled_from([Disposition.SUCCEEDED, Disposition.SUCCEEDED, Disposition.ABORTED]),
        usage=usages,
        usage_kind=st.sampled_from([UsageKind.FINAL, UsageKind.FINAL, UsageKind.PARTIAL]),
    ),
    st.builds(
        Outcome,
        disposition=st.sampled_from(
            [Disposition.REJECTED, Disposition.FAILED, Disposition.NO_RESPONSE, Disposition.ABORTED]
        ),
    ),
    st.just(Outcome(Disposition.NOT_SENT)),
)
holds = st.sampled_from([SECOND, 10 * SECOND, 30 * SECOND, 300 * SECOND, 300 * SECOND])
waits = st.sampled_from([0, 0, 1, SECOND, 20 * SECOND, 90 * SECOND, 600 * SECOND])
durations = st.one_of(
    st.sampled_from([0, 1, 7, 999_999, SECOND, 3 * SECOND, 10 * SECOND, 29 * SECOND, MINUTE]),
    st.integers(1, 40 * SECOND),
    st.sampled_from([5 * MINUTE, 20 * MINUTE, HOUR - 1, HOUR, HOUR + 1, 3 * HOUR, DAY]),
)


class BooksMachine(RuleBasedStateMachine):
    """Rules are what callers, operators and time may do."""

    caps: Caps | None = None
    property = "books"

    def __init__(self) -> None:
        super().__init__()
        tally.example(self.property)
        self.world = World(self.caps)
        self.keys: list[str] = []
        self.reserves: list[Reserve] = []
        self.foreign: dict[str, Context] = {}
        """What another life of this ledger had granted."""
        self.fresh = 0

    def key(self) -> str:
        self.fresh += 1
        return f"svc/{UUID(int=self.fresh)}"

    def some_key(self, data: st.DataObject) -> str:
        """Mostly one that is known, the newest most of all."""
        granted = list(self.world.seen.contexts)
        known = self.keys[-6:] + granted[-8:] + list(self.world.state.open)[:3]
        if not known or data.draw(st.integers(0, 12), label="fresh") == 0:
            return self.key()
        return data.draw(st.sampled_from(known), label="key")

    def old_key(self, data: st.DataObject) -> str:
        """One that a caller has used for a Reserve, a Commit or a Release before; never that of a bulk's child."""
        known = [key for key in (*self.keys, *self.world.tombstones) if key not in self.world.parents]
        return data.draw(st.sampled_from(known[-8:]), label="old key") if known else self.key()

    @initialize(spend=st.sampled_from([None, 9_000, 9_000]), shares=st.booleans(), offset=st.integers(0, 3 * DAY))
    def define(self, spend: int | None, shares: bool, offset: int) -> None:
        self.world.now += offset
        for pool, profile in PROFILES.items():
            self.world.do(DefinePool(pool, profile, LIMITS[pool]))
        for share, caps in SHARES.items():
            self.world.do(DefineShare(share, caps if shares else ()))
        self.world.do(DefineSpend(spend))

    # -- callers --------------------------------------------------------------------------------------------------

    def reserve_op(self, data: st.DataObject) -> Reserve:
        if self.reserves and data.draw(st.integers(0, 7), label="retry") == 0:
            return data.draw(st.sampled_from(self.reserves[-8:]), label="again")
        count = data.draw(st.sampled_from([1, 1, 1, 1, 2, 3]), label="count")
        shares = data.draw(st.sampled_from([(), (), ("team",), ("team", "team/x")]), label="shares")
        wanted = data.draw(st.lists(candidates, min_size=1, max_size=2), label="candidates")
        op = Reserve(
            key=self.old_key(data) if data.draw(st.integers(0, 15), label="old") == 0 else self.key(),
            candidates=tuple(structs.replace(candidate, shares=shares) for candidate in wanted),
            tenant=data.draw(st.sampled_from(["t1", "t1", "t2"]), label="tenant"),
            priority=data.draw(st.sampled_from(Priority), label="priority"),
            max_wait_us=data.draw(waits, label="wait"),
            hold_us=data.draw(holds, label="hold"),
            count=count,
            partial=count > 1 and data.draw(st.booleans(), label="partial"),
        )
        if op.key in self.world.grants:
            op = self.world.grants[op.key].op
        self.keys.append(op.key)
        self.reserves.append(op)
        return op

    def commit_op(self, data: st.DataObject) -> Commit:
        key = self.some_key(data)
        context = self.world.seen.contexts.get(key)
        if context is None and data.draw(st.booleans(), label="foreign"):
            age = data.draw(st.sampled_from([0, 1, MINUTE, HOUR - 1, HOUR + 1, 2 * DAY]), label="age")
            context = Context(
                ledger=LEDGER,
                key=key,
                pool="a",
                shares=("team",),
                tenant="t1",
                route="",
                granted_at=max(0, self.world.now - age),
                charges=((Dimension.REQUESTS, 1), (Dimension.INPUT_TOKENS, 12), (Dimension.OUTPUT_TOKENS, 9)),
                prices=PRICES,
            )
            context = self.foreign.setdefault(key, context)
        if context is not None and data.draw(st.integers(0, 3), label="without context") == 0:
            context = None
        return Commit(key, data.draw(outcomes, label="outcome"), context)

    def release_op(self, data: st.DataObject) -> Release:
        key = self.some_key(data)
        return Release(key, self.world.seen.contexts.get(key))

    def renew_op(self, data: st.DataObject) -> Renew:
        key = self.some_key(data)
        return Renew(
            key,
            self.world.seen.contexts.get(key),
            hold_us=data.draw(st.one_of(st.none(), holds), label="hold"),
            output_tokens=data.draw(st.sampled_from([None, 0, 5, 30, 80]), label="output"),
            usage=data.draw(st.one_of(st.none(), st.none(), usages), label="usage"),
        )

    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        self.world.do(self.reserve_op(data))

    @rule(data=st.data())
    def reserve_again(self, data: st.DataObject) -> None:
        self.world.do(self.reserve_op(data))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.world.do(self.commit_op(data))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.world.do(self.release_op(data))

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        self.world.do(self.renew_op(data))

    @rule(candidate=candidates, outcome=outcomes, key=st.sampled_from(["", "", "svc/seen-1", "svc/seen-2"]))
    def observe(self, candidate: Candidate, outcome: Outcome, key: str) -> None:
        self.world.do(Observe(candidate, outcome, tenant="t1", key=key))

    @rule(data=st.data())
    def batch(self, data: st.DataObject) -> None:
        ops: list[Operation] = []
        for kind in data.draw(st.lists(st.sampled_from("rrrcclw"), min_size=2, max_size=6), label="kinds"):
            match kind:
                case "r":
                    ops.append(self.reserve_op(data))
                case "c":
                    ops.append(self.commit_op(data))
                case "l":
                    ops.append(self.release_op(data))
                case _:
                    ops.append(self.renew_op(data))
        self.world.do(*ops)

    # -- time -----------------------------------------------------------------------------------------------------

    @rule(us=durations)
    def advance(self, us: int) -> None:
        self.world.advance(us)

    @rule(us=st.integers(1, 15 * SECOND))
    def advance_little(self, us: int) -> None:
        self.world.advance(us)

    @rule(us=durations)
    def doze(self, us: int) -> None:
        if not self.world.waiting:
            self.world.doze(us)

    @precondition(lambda self: bool(self.world.state.open))
    @rule(data=st.data(), off=st.sampled_from([-1, 0, 1]))
    def to_an_expiry(self, data: st.DataObject, off: int) -> None:
        ends = sorted(call.expires_at for call in self.world.state.open.values())
        target = data.draw(st.sampled_from(ends), label="end") + off
        self.world.advance(max(0, target - self.world.now))

    @rule()
    def next_month(self) -> None:
        self.world.advance(20 * DAY)

    @rule(off=st.sampled_from([-20 * SECOND, -SECOND, -1, 0]))
    def to_the_end_of_the_month(self, off: int) -> None:
        (turn, *_) = month_starts(self.world.now, self.world.now + 32 * DAY)
        self.world.advance(max(0, turn + off - self.world.now))

    # -- operators and machines -------------------------------------------------------------------------------------

    @rule(
        pool=st.sampled_from(["a", "b"]),
        which=st.integers(0, 2),
        amount=st.sampled_from([0, 1, 20, 60, 100, 450]),
        burst=st.sampled_from([None, 5, 50, 200]),
        lift=st.booleans(),
    )
    def limit(self, pool: str, which: int, amount: int, burst: int | None, lift: bool) -> None:
        old = LIMITS[pool][which]
        new = None if lift else Limit(old.dimension, old.window, amount, burst)
        self.world.do(SetLimit(pool, old.dimension, new))

    @rule(pool=st.sampled_from(["a", "b"]), percent=st.sampled_from([50, 90, 100, 100, 130, 300]))
    def redefine(self, pool: str, percent: int) -> None:
        limits = tuple(
            Limit(
                limit.dimension,
                limit.window,
                limit.amount * percent // 100,
                None if limit.burst is None else limit.burst * percent // 100,
            )
            for limit in LIMITS[pool]
        )
        self.world.do(DefinePool(pool, PROFILES[pool], limits))

    @rule(cap=st.sampled_from([None, 500, 9_000, 20_000]))
    def spend(self, cap: int | None) -> None:
        self.world.do(DefineSpend(cap))

    @rule(share=st.sampled_from(sorted(SHARES)), amount=st.sampled_from([0, 2, 30, 60, 500]))
    def share(self, share: str, amount: int) -> None:
        self.world.do(DefineShare(share, tuple(Limit(c.dimension, c.window, amount) for c in SHARES[share])))

    @rule(pool=st.sampled_from(["a", "b"]), paused=st.sampled_from([True, False, False]))
    def pause(self, pool: str, paused: bool) -> None:
        self.world.do(SetPaused(pool, paused))

    @rule(
        mode=st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE]),
        pool=st.sampled_from(["", "a"]),
        tenant=st.sampled_from(["", "t1", "t2"]),
    )
    def mode(self, mode: Mode, pool: str, tenant: str) -> None:
        self.world.do(SetMode(mode, pool, tenant))

    @rule(resend=st.booleans())
    def restart(self, resend: bool) -> None:
        self.world.restart(resend=resend)

    @rule()
    def snapshot(self) -> None:
        self.world.refold()

    # -- the end ----------------------------------------------------------------------------------------------------

    @invariant()
    def reported(self) -> None:
        note(f"now {self.world.now}: {self.world.seen.outcomes}")

    def teardown(self) -> None:
        if self.world.profiles and not self.world.failed:
            self.world.drain()


class ForgetfulMachine(BooksMachine):
    """The same with a memory that holds a few ended ids only: nothing is booked twice for all that."""

    caps = Caps(ended=5)
    property = "books, bounded memory"


class RefundMachine(RuleBasedStateMachine):
    """One small bucket that is nearly full, and many holds that come back: where seconds could be credited twice."""

    property = "refunds"

    def __init__(self) -> None:
        super().__init__()
        tally.example(self.property)
        self.world = World()
        self.opened: list[str] = []

    @initialize(amount=st.sampled_from([60, 60, 101, 7]), burst=st.sampled_from([100, 100, 13]))
    def define(self, amount: int, burst: int) -> None:
        limits = (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, amount, burst),)
        profile = Profile("one", (Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000),))
        self.world.do(DefinePool("p", profile, limits))

    @rule(size=st.integers(0, 60), hold=st.sampled_from([10, 300, 300]), count=st.sampled_from([1, 1, 1, 2]))
    def reserve(self, size: int, hold: int, count: int) -> None:
        key = f"svc/{UUID(int=len(self.opened) + 1)}"
        candidate = Candidate("p", estimate=Estimate(input_tokens=size), prices=PRICES)
        (answer,) = self.world.do(Reserve(key, (candidate,), hold_us=hold * SECOND, count=count))
        self.opened += answer.keys if isinstance(answer, Granted) else [key]

    @rule(which=st.integers(0, 7), used=st.one_of(st.just(0), st.integers(0, 80)))
    def commit(self, which: int, used: int) -> None:
        if self.opened:
            key = self.opened[-1 - which % len(self.opened)]
            outcome = Outcome(Disposition.SUCCEEDED, Usage(input_tokens=used), UsageKind.FINAL)
            self.world.do(Commit(key, outcome))

    @rule(which=st.integers(0, 7), used=st.integers(0, 20))
    def learn_the_input(self, which: int, used: int) -> None:
        if self.opened:
            self.world.do(Renew(self.opened[-1 - which % len(self.opened)], usage=Usage(input_tokens=used)))

    @rule(which=st.integers(0, 7))
    def release(self, which: int) -> None:
        if self.opened:
            self.world.do(Release(self.opened[-1 - which % len(self.opened)]))

    @rule(us=st.one_of(st.integers(1, 40 * SECOND), st.sampled_from([SECOND, 10 * SECOND])))
    def advance(self, us: int) -> None:
        self.world.advance(us)

    @rule(used=st.integers(0, 90))
    def observe(self, used: int) -> None:
        outcome = Outcome(Disposition.SUCCEEDED, Usage(input_tokens=used), UsageKind.FINAL)
        self.world.do(Observe(Candidate("p"), outcome))

    @rule(amount=st.sampled_from([30, 60, 200]), burst=st.sampled_from([20, 100, 150]))
    def limit(self, amount: int, burst: int) -> None:
        limit = Limit(Dimension.INPUT_TOKENS, Window.MINUTE, amount, burst)
        self.world.do(SetLimit("p", limit.dimension, limit))

    def teardown(self) -> None:
        if not self.world.failed:
            self.world.drain()


class QueueMachine(RuleBasedStateMachine):
    """A crowd before two small pools: turns, deadlines and wake-ups."""

    property = "turns"

    def __init__(self) -> None:
        super().__init__()
        tally.example(self.property)
        self.world = World()
        self.keys: list[str] = []

    @initialize(capped=st.booleans())
    def define(self, capped: bool) -> None:
        rule_of_input = Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000)
        profile = Profile("crowd", (rule_of_input, GAUGE))
        for pool in "pq":
            limits = (
                Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 120, 60),
                Limit(Dimension.CONCURRENCY, Window.NONE, 3),
            )
            self.world.do(DefinePool(pool, profile, limits))
        if capped:
            self.world.do(DefineShare("team", (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 60, 40),)))

    @rule(
        sizes=st.lists(st.sampled_from([1, 5, 30, 38, 60]), min_size=1, max_size=2),
        pools=st.sampled_from(["p", "p", "p", "q", "pq", "qp"]),
        shares=st.sampled_from([(), (), ("team",), ("team",), ("team", "member")]),
        priority=st.sampled_from(Priority),
        wait=st.sampled_from([0, 1, 20, 60, 300, 300]),
        hold=st.sampled_from([5, 60, 300]),
        count=st.sampled_from([1, 1, 1, 2]),
        partial=st.booleans(),
    )
    def reserve(
        self,
        sizes: list[int],
        pools: str,
        shares: tuple[str, ...],
        priority: Priority,
        wait: int,
        hold: int,
        count: int,
        partial: bool,
    ) -> None:
        self.keys.append(f"svc/{UUID(int=len(self.keys) + 1)}")
        candidates = tuple(Candidate(pool, shares, Estimate(input_tokens=size)) for pool in pools for size in sizes)
        op = Reserve(
            self.keys[-1],
            candidates,
            priority=priority,
            max_wait_us=wait * SECOND,
            hold_us=hold * SECOND,
            count=count,
            partial=partial and count > 1,
        )
        self.world.do(op)

    @precondition(lambda self: bool(self.world.state.open))
    @rule(which=st.integers(0, 5), used=st.sampled_from([0, 0, 10, 60]))
    def commit(self, which: int, used: int) -> None:
        keys = list(self.world.state.open)
        outcome = Outcome(Disposition.SUCCEEDED, Usage(input_tokens=used), UsageKind.FINAL)
        self.world.do(Commit(keys[which % len(keys)], outcome))

    @rule(which=st.integers(0, 5), again=st.booleans())
    def release_or_repeat(self, which: int, again: bool) -> None:
        waiting = list(self.world.waiting.values())
        if waiting:
            op = waiting[which % len(waiting)].op
            self.world.do(op if again else Release(op.key))

    @rule(us=st.one_of(st.integers(1, 8 * SECOND), st.sampled_from([SECOND, 30 * SECOND])))
    def advance(self, us: int) -> None:
        self.world.advance(us)

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.world.do(SetPaused("q", paused))

    @rule(resend=st.booleans())
    def restart(self, resend: bool) -> None:
        self.world.restart(resend=resend)

    def teardown(self) -> None:
        if not self.world.failed:
            self.world.drain()


BooksTest = BooksMachine.TestCase
BooksTest.settings = settings(max_examples=150 * tally.SCALE, stateful_step_count=50)
ForgetfulTest = ForgetfulMachine.TestCase
ForgetfulTest.settings = settings(max_examples=60 * tally.SCALE, stateful_step_count=50)
RefundTest = RefundMachine.TestCase
RefundTest.settings = settings(max_examples=150 * tally.SCALE, stateful_step_count=50)
QueueTest = QueueMachine.TestCase
QueueTest.settings = settings(max_examples=100 * tally.SCALE, stateful_step_count=50)


def test_who_comes_back_when_told_is_served() -> None:
    """Calls in flight have no end that can be told: a denial that also waits for one of them must not name a time."""
    profile = Profile("one", (Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000), GAUGE))
    limits = (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 120, 60), Limit(Dimension.CONCURRENCY, Window.NONE, 1))
    world = World()
    world.comes_back = True
    world.do(DefinePool("p", profile, limits))
    for number in (1, 2):
        candidate = Candidate("p", estimate=Estimate(input_tokens=38))
        world.do(Reserve(f"svc/{UUID(int=number)}", (candidate,)))
