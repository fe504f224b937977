"""A store that loses its last records, an owner that goes on without them, and what it is told of them.

The history is that of :mod:`tests.engine.test_books`, with one more thing that may happen: for a while a ledger decides
what its store then loses. Another engine begins from what is left, adopts what the first one testifies, and takes its
place; to callers nothing may have happened. The model knows of no loss: the books must be what it says.
"""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from msgspec import structs

from paceline.engine import adoption
from paceline.engine import events as ev
from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Committed, Denied, Done, Granted, Invalid, Reason, Released, Renewed
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine, Step
from paceline.engine.keys import child_keys
from paceline.engine.operations import (
    Adopt,
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Expire,
    Observation,
    Observe,
    Operation,
    Outcome,
    Reading,
    Release,
    Renew,
    Reserve,
)
from paceline.engine.state import State
from tests.engine import tally
from tests.engine.test_books import SECOND, BooksMachine, candidates, outcomes
from tests.engine.world import LEDGER, START_US, World

REQUESTS = Rule(Dimension.REQUESTS, hold_requests=1000, settle_requests=1000)
TOKENS = Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000)


class LosingWorld(World):
    """Its store loses what is decided after :meth:`part`; :meth:`adopt` goes on from what was there."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[bytes] = []
        self._lost: list[ev.Event] | None = None

    def part(self) -> None:
        self._kept = list(self.state.dump())
        self._lost = []

    def _fold(self, step: Step) -> None:
        super()._fold(step)
        if self._lost is not None:
            self._lost += step.events

    def adopt(self, *, idle: bool, order: st.DataObject | None = None) -> None:
        """Another engine takes the place of this one. ``idle``: a step goes before."""
        assert self._lost is not None
        told = adoption.testimony(self.state, ev.decode(ev.encode(self._lost)))
        self._lost = None
        assert len({each.key for each in told}) == len(told)
        if order is not None:
            bulk = [each for each in told if each.kind is EndKind.TOGETHER]
            told = order.draw(st.permutations([each for each in told if each not in bulk]), label="order") + bulk
        winner, shadow = Engine(LEDGER, State.restore(self._kept), self.caps), State.restore(self._kept)
        loser = self.state
        wake_at: int | None = None
        before = b""
        for batch in ([], told, told) if idle else (told, told):
            before = winner.state.digest()
            step = winner.step(self.now, list(enumerate(batch)))
            for each in ev.decode(ev.encode(step.events)):
                shadow.apply(each)
            assert shadow.digest() == winner.state.digest()
            assert [answer for _, answer in step.answers] == [Done()] * len(batch)
            wake_at = step.wake_at
        assert before == winner.state.digest(), "adopting twice has changed the books"
        self.seen.count(f"adopted: {min(len(told), 3)}")
        assert set(winner.state.open) == set(loser.open)
        for key, mine in winner.state.open.items():
            theirs = loser.open[key]
            assert (mine.holds, mine.expires_at, mine.granted_at) == (
                theirs.holds,
                theirs.expires_at,
                theirs.granted_at,
            )
            assert (mine.index, mine.sizes, mine.output_tokens) == (theirs.index, theirs.sizes, theirs.output_tokens)
        self.engine, self.shadow, self.waiting, self.wake_at = winner, shadow, {}, wake_at
        kept = {(b.pool, b.share, b.dimension, b.window) for b in winner.state.buckets}
        for address in [one for one in self.books.buckets if one not in kept]:
            # Made for a call that was then denied.
            assert not self.books.buckets[address].charged
            del self.books.buckets[address]
        for bucket in self.books.buckets.values():
            # The winner charges now what was charged before: meanwhile it may have lost at its rim.
            bucket.grown = True
        self.do()


class AdoptionMachine(BooksMachine):
    """What callers rest on survives the loss."""

    property = "adoption"

    def __init__(self) -> None:
        super().__init__()
        self.world: LosingWorld = LosingWorld()
        # What is adopted may put a month's money into debt, and then a denial may name too early an instant.
        self.world.comes_back = False

    @rule(data=st.data(), idle=st.booleans(), count=st.integers(1, 8))
    def lose(self, data: st.DataObject, idle: bool, count: int) -> None:
        world = self.world
        world.part()
        for _ in range(count):
            match data.draw(st.sampled_from("rrrccclwot"), label="lost"):
                case "r":
                    world.do(self.reserve_op(data))
                case "c":
                    op = self.commit_op(data)
                    call = world.books.calls.get(op.key)
                    if call is None or call.state != "released":
                        # To the winner a call that was given up and then made has been made all along.
                        world.do(op)
                case "l":
                    world.do(self.release_op(data))
                case "w":
                    # What is known of an input may be lost: what is held for it stands until the call is settled.
                    world.do(structs.replace(self.renew_op(data), usage=None))
                case "o":
                    key = data.draw(st.sampled_from(["", "svc/seen-1", "svc/seen-3"]), label="key")
                    world.do(Observe(data.draw(candidates), data.draw(outcomes), tenant="t1", key=key))
                case _:
                    world.advance(data.draw(st.integers(1, 12 * SECOND), label="us"))
        world.adopt(idle=idle, order=data if data.draw(st.booleans(), label="shuffled") else None)


class SmallAdoptionMachine(RuleBasedStateMachine):
    """One small bucket, nearly full, and many losses: where a refund or a charge could be made twice."""

    def __init__(self) -> None:
        super().__init__()
        tally.example("adoption, refunds")
        self.world = LosingWorld()
        self.world.comes_back = False
        self.opened = 0

    @initialize(amount=st.sampled_from([60, 101, 7]), burst=st.sampled_from([100, 13]))
    def define(self, amount: int, burst: int) -> None:
        limits = (Limit(Dimension.INPUT_TOKENS, Window.MINUTE, amount, burst),)
        self.world.do(DefinePool("p", Profile("one", (TOKENS,)), limits))
        self.world.part()

    def key(self, back: int) -> str:
        return f"svc/{max(0, self.opened - back)}"

    @rule(size=st.integers(0, 60), hold=st.sampled_from([10, 300, 300]))
    def reserve(self, size: int, hold: int) -> None:
        self.opened += 1
        candidate = Candidate("p", estimate=Estimate(input_tokens=size))
        self.world.do(Reserve(self.key(0), (candidate,), hold_us=hold * SECOND))

    @rule(back=st.integers(0, 5), used=st.integers(0, 80))
    def commit(self, back: int, used: int) -> None:
        self.world.do(Commit(self.key(back), _used(used)))

    @rule(back=st.integers(0, 5))
    def release(self, back: int) -> None:
        self.world.do(Release(self.key(back)))

    @rule(back=st.integers(0, 5), output=st.sampled_from([None, 10]), hold=st.sampled_from([None, 600]))
    def renew(self, back: int, output: int | None, hold: int | None) -> None:
        hold_us = None if hold is None else hold * SECOND
        self.world.do(Renew(self.key(back), hold_us=hold_us, output_tokens=output))

    @rule(us=st.integers(1, 20 * SECOND))
    def advance(self, us: int) -> None:
        self.world.advance(us)

    @rule()
    def persist(self) -> None:
        self.world.part()

    @rule(idle=st.booleans())
    def lose(self, idle: bool) -> None:
        self.world.adopt(idle=idle)
        self.world.part()

    def teardown(self) -> None:
        if not self.world.failed:
            self.world.drain()


AdoptionTest = AdoptionMachine.TestCase
AdoptionTest.settings = settings(max_examples=60 * tally.SCALE, stateful_step_count=40)
SmallAdoptionTest = SmallAdoptionMachine.TestCase
SmallAdoptionTest.settings = settings(max_examples=100 * tally.SCALE, stateful_step_count=50)


def _used(tokens: int) -> Outcome:
    return Outcome(Disposition.SUCCEEDED, Usage(input_tokens=tokens), UsageKind.FINAL)


LIMITS = (Limit(Dimension.REQUESTS, Window.MINUTE, 60), Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 600))
POOL = DefinePool("p", Profile("two", (REQUESTS, TOKENS)), LIMITS)


def _call(pool: str) -> tuple[Candidate, ...]:
    return (Candidate(pool, estimate=Estimate(input_tokens=100)),)


CALL = _call("p")


class Lives:
    """One ledger that its store has split: ``loser`` decided what ``winner`` never saw."""

    def __init__(self, *common: Operation) -> None:
        self.now = START_US
        first = Engine(LEDGER)
        first.step(self.now, list(enumerate((POOL, *common))))
        kept = list(first.state.dump())
        self.loser, self.winner = Engine(LEDGER, State.restore(kept)), Engine(LEDGER, State.restore(kept))
        self.lost: list[ev.Event] = []

    def lose(self, *operations: Operation) -> None:
        self.lost += self.loser.step(self.now, list(enumerate(operations))).events

    def told(self) -> list[Adopt]:
        return adoption.testimony(self.loser.state, self.lost)

    def win(self, *operations: Operation) -> list[Answer]:
        return [answer for _, answer in self.winner.step(self.now, list(enumerate(operations))).answers]

    def figures(self, dimension: Dimension) -> tuple[int, int, int]:
        (bucket,) = (one for one in self.winner.state.buckets if one.dimension is dimension and one.pool)
        assert bucket.level == bucket.refilled - bucket.charged + bucket.adjusted
        assert bucket.granted == bucket.settled + bucket.released + bucket.expired + bucket.held
        return bucket.held, bucket.charged, bucket.level


def test_a_settlement_that_was_lost_settles_what_is_open_here() -> None:
    lives = Lives(Reserve("a", CALL))
    lives.lose(Commit("a", _used(70)))
    assert lives.win(*lives.told()) == [Done()]
    assert lives.figures(Dimension.INPUT_TOKENS) == (0, 70, 530)
    (again,) = lives.win(Commit("a", _used(99)))
    assert isinstance(again, Committed)
    assert again.duplicate
    assert dict(again.charges)[Dimension.INPUT_TOKENS] == 70


def test_a_release_that_was_lost_releases_what_is_open_here() -> None:
    lives = Lives(Reserve("a", CALL))
    lives.lose(Release("a"))
    lives.win(*lives.told())
    assert lives.figures(Dimension.INPUT_TOKENS) == (0, 0, 600)
    (again,) = lives.win(Release("a"))
    assert again == Released(duplicate=True)


def test_a_settlement_that_was_lost_replaces_an_expiry() -> None:
    lives = Lives(Reserve("a", CALL))
    lives.lose(Commit("a", _used(70)))
    lives.win(Expire("a"))
    assert lives.figures(Dimension.INPUT_TOKENS)[1] == 100
    lives.win(*lives.told())
    lives.win(*lives.told())
    assert lives.figures(Dimension.INPUT_TOKENS) == (0, 70, 530)


def test_what_is_known_to_have_ended_stands() -> None:
    lives = Lives(Reserve("a", CALL), Reserve("b", CALL))
    lives.lose(Commit("a", _used(70)), Renew("b", hold_us=900 * SECOND))
    lives.win(Commit("a", _used(40)), Release("b"))
    lives.win(*lives.told())
    assert lives.figures(Dimension.INPUT_TOKENS) == (0, 40, 560)
    assert not lives.winner.state.open


def test_a_renewal_that_was_lost_counts() -> None:
    lives = Lives(Reserve("a", CALL, hold_us=SECOND))
    lives.lose(Renew("a", hold_us=900 * SECOND))
    lives.win(*lives.told())
    lives.now += 2 * SECOND
    lives.win()
    assert list(lives.winner.state.open) == ["a"]


def test_a_tombstone_that_was_lost_still_stops_its_reserve() -> None:
    lives = Lives()
    lives.lose(Release("a"))
    lives.win(*lives.told())
    (answer,) = lives.win(Reserve("a", CALL))
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.RELEASED


def test_a_hold_that_was_lost_ends_at_its_time() -> None:
    lives = Lives()
    lives.lose(Reserve("a", CALL, hold_us=30 * SECOND))
    lives.now += 10 * SECOND
    step = lives.winner.step(lives.now, list(enumerate(lives.told())))
    assert step.wake_at == START_US + 30 * SECOND
    lives.now = step.wake_at
    lives.win()
    assert lives.winner.state.ended["a"].kind is EndKind.EXPIRED


def test_a_reserve_that_waits_here_gets_the_grant_it_had() -> None:
    """A caller that has sent its Reserve again, and lost the race against the testimony."""
    key = "svc/00000000-0000-0000-0000-000000000001"
    full = Reserve("full", (Candidate("p", estimate=Estimate(input_tokens=600)),))
    for count in (1, 2):
        lives = Lives()
        again = Reserve(key, CALL, max_wait_us=60 * SECOND, count=count)
        lives.lose(again)
        assert lives.win(full, again)[1:] == [], "does not wait"
        granted = [one for one in lives.win(*lives.told()) if isinstance(one, Granted)]
        assert len(granted) == 1, "still waits"
        (answer,) = granted
        assert answer.keys == ((key,) if count == 1 else child_keys(key, 2))
        assert answer.context.granted_at == START_US
        assert len(lives.winner.waiters()) == 0


def test_a_grant_that_was_lost_is_renewed_and_settled_although_its_reserve_waits_here() -> None:
    """Its caller knows the grant before anybody has told of it; a copy of its Reserve was sent here from elsewhere."""
    full = Reserve("full", (Candidate("p", estimate=Estimate(input_tokens=600)),))
    again = Reserve("a", CALL, max_wait_us=60 * SECOND)
    lives = Lives()
    step = lives.loser.step(lives.now, [(0, again)])
    lives.lost += step.events
    ((_, granted),) = step.answers
    assert isinstance(granted, Granted)
    assert lives.win(full, again)[1:] == [], "does not wait"
    (refused,) = lives.win(Commit("a", _used(70)))
    assert isinstance(refused, Invalid), "without a context nobody knows of a grant"
    (renewed,) = lives.win(Renew("a", granted.context))
    assert isinstance(renewed, Renewed)
    assert renewed.late
    committed, told = lives.win(Commit("a", _used(70), granted.context))
    assert isinstance(told, Granted)
    assert isinstance(committed, Committed)
    assert committed.late
    assert told.context.granted_at == granted.context.granted_at
    assert len(lives.winner.waiters()) == 0
    assert lives.figures(Dimension.INPUT_TOKENS)[1] == 670
    lives.win(*lives.told())
    assert lives.figures(Dimension.INPUT_TOKENS)[1] == 670


def test_a_bulk_request_is_known_by_its_own_key() -> None:
    lives = Lives()
    key = "svc/00000000-0000-0000-0000-000000000001"
    lives.lose(Reserve(key, CALL, count=2))
    lives.win(*lives.told())
    assert lives.figures(Dimension.INPUT_TOKENS) == (200, 200, 400)
    (answer,) = lives.win(Release(key))
    assert answer == Released(released=True)
    assert lives.figures(Dimension.INPUT_TOKENS) == (0, 0, 600)


def test_a_pool_that_is_not_known_here_is_left_out() -> None:
    lives = Lives()
    lives.lose(DefinePool("q", Profile("two", (REQUESTS, TOKENS)), LIMITS), Reserve("a", _call("q")))
    (answer,) = lives.win(*lives.told())
    assert isinstance(answer, Invalid)
    assert answer.field == "pool"
    assert not lives.winner.state.open


def test_what_is_older_than_the_memory_is_left_out() -> None:
    lives = Lives()
    lives.lose(Reserve("a", CALL))
    lives.now += 2 * 3600 * SECOND
    (answer,) = lives.win(*lives.told())
    assert isinstance(answer, Invalid)
    assert answer.field == "at"


def test_a_reading_that_came_before_the_testimony_may_have_seen_the_call() -> None:
    lives = Lives(Reserve("mine", CALL))
    lives.lose(Reserve("lost", CALL))
    lives.now += SECOND
    seen = Observation((Reading(Dimension.INPUT_TOKENS, limit=600, remaining=400),))
    lives.win(Commit("mine", Outcome(Disposition.SUCCEEDED, Usage(input_tokens=100), UsageKind.FINAL, seen)))
    lives.now += SECOND
    lives.win()
    *_, before = lives.figures(Dimension.INPUT_TOKENS)
    lives.win(*lives.told())
    (bucket,) = (one for one in lives.winner.state.buckets if one.dimension is Dimension.INPUT_TOKENS)
    assert bucket.constraint is not None
    assert bucket.constraint.after == 0, "the reading is taken to be older than the call"
    held, charged, level = lives.figures(Dimension.INPUT_TOKENS)
    assert (held, charged) == (100, 200)
    assert before - 100 <= level <= before


def test_a_testimony_crosses_between_processes() -> None:
    lives = Lives(Reserve("a", CALL))
    bulk = "svc/00000000-0000-0000-0000-000000000001"
    lives.lose(Commit("a", _used(70)), Reserve("b", CALL), Reserve(bulk, CALL, count=2), Release("c"))
    lives.lose(Observe(CALL[0], _used(5)))
    told = lives.told()
    assert len(told) == 7
    decoder = msgspec.msgpack.Decoder(list[Operation])
    assert decoder.decode(msgspec.msgpack.encode(told)) == told
