"""The tests of the books, tested: engines that are broken on purpose, each of which they must catch.

Most faults are put in where decisions become events, so that the fold stays true to its events and only the meaning is
wrong; what a test of examples would hardly see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from msgspec.structs import replace

from paceline.engine import absence, admission, engine, queue, reconcile
from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine.adoption import Adopting
from paceline.engine.books import Books
from paceline.engine.bucket import Bucket, EndKind
from paceline.engine.dimensions import GAUGES, WINDOW_US, Window
from paceline.engine.engine import Engine
from paceline.engine.peaks import Peaks
from paceline.engine.queue import Waiter
from paceline.engine.reserving import Reserving
from paceline.engine.settling import Settling
from paceline.engine.state import State
from paceline.engine.turns import Turns
from paceline.engine.waiting import Waiting
from tests.engine import tally, test_absence, test_adoption, test_interval, test_turns
from tests.engine.test_adoption import AdoptionMachine
from tests.engine.test_books import BooksMachine, ForgetfulMachine, QueueMachine, RefundMachine
from tests.engine.test_interval import History
from tests.engine.test_regressions import CASES

pytestmark = pytest.mark.timeout(180)

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
BOOKS: dict[str, Mutation] = {}
FORGETFUL: dict[str, Mutation] = {}
REFUNDS: dict[str, Mutation] = {}
QUEUE: dict[str, Mutation] = {}
INTERVAL: dict[str, Mutation] = {}
ADOPTION: dict[str, Mutation] = {}
TOLD: dict[str, Mutation] = {}
LOSS: dict[str, Mutation] = {}
TURNS: dict[str, Mutation] = {}


def mutant(kind: dict[str, Mutation]) -> Callable[[Mutation], Mutation]:
    def note(mutation: Mutation) -> Mutation:
        kind[mutation.__name__] = mutation
        return mutation

    return note


def altered(patch: Patch, alter: Callable[[State, Any], Any]) -> None:
    """Change events on their way into the fold and the journal alike; ``None`` loses one."""
    emit = Books.emit

    def emit_altered(self: Books, event: ev.Event) -> None:
        found = alter(self.state, event)
        if found is not None:
            emit(self, found)

    patch.setattr(Books, "emit", emit_altered)


def wrapped(patch: Patch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """``around(original, ...)`` in the place of a function."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **named: around(original, *args, **named))


# -- refunds, charges, holds -----------------------------------------------------------------------------------------


@mutant(REFUNDS)
def refunds_credit_the_same_seconds_twice(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Settled | ev.Released | ev.Replaced | ev.Expired):
            return replace(event, forfeits=(0,) * len(event.forfeits))
        return event

    altered(patch, alter)


@mutant(REFUNDS)
def refunds_do_not_see_each_other(patch: Patch) -> None:
    patch.setattr(Peaks, "raise_since", lambda *_: None)


@mutant(BOOKS)
def an_expiry_gives_everything_back(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Expired):
            nothing = (0,) * len(event.charges)
            return replace(event, charges=nothing, forfeits=nothing, overs=nothing, cost=0)
        return event

    altered(patch, alter)


@mutant(REFUNDS)
def a_late_usage_is_added(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Replaced):
            old = state.ended[event.key].charges
            both = tuple(a + b for a, b in zip(old, event.charges, strict=True))
            return replace(event, charges=both, forfeits=(0,) * len(old))
        return event

    altered(patch, alter)


@mutant(BOOKS)
def a_second_commit_charges_again(patch: Patch) -> None:
    def commit(original: Any, self: Any, operation: op.Commit) -> Any:
        ended = self._books.state.ended.get(operation.key)
        if ended is not None and ended.kind is EndKind.SETTLED and ended.buckets:
            self._books.advance_all(ended.buckets)
            overs = (0,) * len(ended.buckets)
            event = ev.Booked("", ended.pool, ended.shares, ended.buckets, ended.charges, overs, self._books.now, 0)
            self._books.emit(event)
        return original(self, operation)

    wrapped(patch, Settling, "commit", commit)


@mutant(BOOKS)
def releasing_a_settled_call_refunds_it(patch: Patch) -> None:
    def release(original: Any, self: Any, operation: op.Release) -> Any:
        ended = self._books.state.ended.get(operation.key)
        if ended is not None and ended.kind is EndKind.SETTLED and ended.buckets:
            bucket = self._books.advance(ended.buckets[0])
            if bucket.level + ended.charges[0] <= bucket.burst:
                self._books.emit(ev.Corrected(ended.buckets[0], ended.charges[0]))
        return original(self, operation)

    wrapped(patch, Settling, "release", release)


@mutant(BOOKS)
def a_share_is_not_held(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Granted):
            holds = tuple(
                0 if state.buckets[number].share else hold
                for number, hold in zip(event.buckets, event.holds, strict=True)
            )
            return replace(event, holds=holds)
        return event

    altered(patch, alter)


@mutant(BOOKS)
def a_gauge_does_not_come_back(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Settled):
            held = state.open[event.key]
            charges = tuple(
                hold if state.buckets[number].dimension in GAUGES else charge
                for number, hold, charge in zip(held.buckets, held.holds, event.charges, strict=True)
            )
            return replace(event, charges=charges)
        return event

    altered(patch, alter)


@mutant(BOOKS)
def a_renewal_holds_no_more(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Renewed):
            return replace(event, holds=state.open[event.key].holds)
        return event

    altered(patch, alter)


@mutant(BOOKS)
def a_denial_costs_something(patch: Patch) -> None:
    def deny(original: Any, self: Any, ticket: int, reason: Any, option: Any, *rest: Any) -> Any:
        self._books.advance(option.buckets[0])
        self._books.emit(ev.Corrected(option.buckets[0], -1))
        return original(self, ticket, reason, option, *rest)

    wrapped(patch, Reserving, "_deny", deny)


@mutant(BOOKS)
def holds_never_expire(patch: Patch) -> None:
    patch.setattr(Settling, "expire", lambda self: None)


# -- refill ----------------------------------------------------------------------------------------------------------


@mutant(REFUNDS)
def refill_drops_its_fractions(patch: Patch) -> None:
    altered(patch, lambda state, event: replace(event, carry=0) if isinstance(event, ev.Advanced) else event)


@mutant(BOOKS)
def refill_does_not_stop_at_the_burst(patch: Patch) -> None:
    def refill(original: Any, self: Bucket, now: int) -> tuple[int, int]:
        window = WINDOW_US.get(self.window)
        if window is None:
            return original(self, now)  # type: ignore[no-any-return]
        return divmod(self.carry + self.amount * (now - self.at), window)

    wrapped(patch, Bucket, "refill", refill)


@mutant(BOOKS)
def a_new_month_forgets_what_is_held(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.Advanced):
            bucket = state.buckets[event.bucket]
            if bucket.window is Window.MONTH and state.at >= bucket.turns_at:
                return replace(event, refilled=bucket.burst - bucket.level)
        return event

    altered(patch, alter)


@mutant(BOOKS)
def a_changed_limit_starts_full(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        if isinstance(event, ev.LimitMoved):
            bucket = state.buckets[event.bucket]
            if bucket.window in WINDOW_US:
                return replace(event, adjusted=event.burst - bucket.level)
        return event

    altered(patch, alter)


@mutant(REFUNDS)
def a_known_input_is_credited_in_full(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        return replace(event, forfeits=(0,) * len(event.holds)) if isinstance(event, ev.Renewed) else event

    altered(patch, alter)


@mutant(REFUNDS)
def a_known_input_changes_no_hold(patch: Patch) -> None:
    def renew(original: Any, self: Any, operation: op.Renew) -> Any:
        return original(self, replace(operation, usage=None))

    wrapped(patch, Settling, "renew", renew)


# -- decisions -------------------------------------------------------------------------------------------------------


@mutant(QUEUE)
def everything_fits(patch: Patch) -> None:
    patch.setattr(admission, "fits", lambda *_: True)


@mutant(QUEUE)
def a_bulk_grant_is_always_partial(patch: Patch) -> None:
    def count(original: Any, self: Any, option: Any, operation: op.Reserve) -> Any:
        return original(self, option, replace(operation, partial=True))

    wrapped(patch, Reserving, "count_that_fits", count)


@mutant(QUEUE)
def newcomers_overtake(patch: Patch) -> None:
    patch.setattr(Turns, "may_pass", lambda *_, **__: True)


@mutant(QUEUE)
def deadlines_are_not_kept(patch: Patch) -> None:
    def due(self: Waiting, now: int) -> Iterator[Any]:
        return iter(())

    patch.setattr(Waiting, "due", due)


@mutant(QUEUE)
def nobody_wakes_the_engine(patch: Patch) -> None:
    patch.setattr(Engine, "_wake_at", lambda self: None)


@mutant(QUEUE)
def the_first_in_line_stops_only_itself(patch: Patch) -> None:
    def serve_head(original: Any, self: Turns, line: Any, leaf: Any, *rest: Any) -> Any:
        return original(self, line, leaf, *rest) or leaf

    wrapped(patch, Turns, "_serve_head", serve_head)


@mutant(QUEUE)
def urgency_counts_for_nothing(patch: Patch) -> None:
    patch.setattr(queue, "CLASSES", tuple(op.Class(priority, 1) for priority in op.Priority))


@mutant(QUEUE)
def what_a_share_waits_for_is_taken(patch: Patch) -> None:
    def stopped(original: Any, self: Turns, leaf: Any, *rest: Any) -> Any:
        return None if original(self, leaf, *rest) is None else leaf

    wrapped(patch, Turns, "_stopped_by_share", stopped)


@mutant(QUEUE)
def waiters_are_not_served(patch: Patch) -> None:
    patch.setattr(Turns, "_serve_line", lambda *_: False)


@mutant(BOOKS)
def a_retry_is_granted_anew(patch: Patch) -> None:
    def seen_before(original: Any, self: Any, ticket: int, operation: op.Reserve) -> Any:
        known = operation.key in self._books.state.ended
        return False if known else original(self, ticket, operation)

    wrapped(patch, Reserving, "_seen_before", seen_before)


# -- memory and journal ------------------------------------------------------------------------------------------------


@mutant(BOOKS)
def tombstones_are_ignored(patch: Patch) -> None:
    altered(patch, lambda state, event: None if isinstance(event, ev.Tombstoned) else event)


@mutant(BOOKS)
def the_memory_is_too_short(patch: Patch) -> None:
    def forget(original: Any, self: Any) -> None:
        if len(self._books.state.ended) > 2:
            self._books.emit(ev.Forgotten(1))
        original(self)

    wrapped(patch, Settling, "forget", forget)


@mutant(FORGETFUL)
def an_old_commit_is_booked_though_it_may_have_been_settled(patch: Patch) -> None:
    patch.setattr(Settling, "is_stale", lambda *_: False)


@mutant(BOOKS)
def an_event_is_folded_but_not_journalled(patch: Patch) -> None:
    def emit(original: Any, self: Books, event: ev.Event) -> None:
        original(self, event)
        if isinstance(event, ev.Renewed) and self.events:
            self.events.pop()

    wrapped(patch, Books, "emit", emit)


@mutant(BOOKS)
def a_snapshot_loses_the_fractions(patch: Patch) -> None:
    restore = State.restore

    def restored(chunks: Any) -> State:
        state = restore(chunks)
        for bucket in state.buckets:
            bucket.carry = 0
        return state

    patch.setattr(State, "restore", restored)


# -- readings --------------------------------------------------------------------------------------------------------


def interval_by(patch: Patch, around: Callable[..., Any]) -> None:
    wrapped(patch, reconcile, "interval", around)
    patch.setattr(test_interval, "interval", reconcile.interval)


@mutant(INTERVAL)
def calls_in_flight_are_ignored(patch: Patch) -> None:
    def around(original: Any, bucket: Bucket, constraint: Any, now: int) -> Any:
        low, high = original(bucket, constraint, now)
        return None if low is None else low + bucket.held, high

    interval_by(patch, around)


@mutant(INTERVAL)
def settled_calls_are_ignored(patch: Patch) -> None:
    interval_by(patch, lambda original, bucket, c, now: original(bucket, replace(c, ended=0), now))


@mutant(INTERVAL)
def its_own_call_counts_in_full(patch: Patch) -> None:
    interval_by(patch, lambda original, bucket, c, now: original(bucket, replace(c, own=2 * c.own), now))


@mutant(INTERVAL)
def output_beyond_the_estimate_is_ignored(patch: Patch) -> None:
    def around(original: Any, bucket: Bucket, constraint: Any, now: int) -> Any:
        low, high = original(bucket, constraint, now)
        return low, None if high is None else high - bucket.over

    interval_by(patch, around)


@mutant(INTERVAL)
def the_age_of_a_reading_is_taken_for_the_least(patch: Patch) -> None:
    interval_by(patch, lambda original, bucket, c, now: original(bucket, replace(c, since=c.until), now))


@mutant(INTERVAL)
def the_age_of_a_reading_is_taken_for_the_most(patch: Patch) -> None:
    interval_by(patch, lambda original, bucket, c, now: original(bucket, replace(c, until=c.since), now))


@mutant(INTERVAL)
def rounding_is_ignored(patch: Patch) -> None:
    def bounds(original: Any, bucket: Bucket, reading: op.Reading) -> Any:
        return original(bucket, replace(reading, rounding=0))

    wrapped(patch, reconcile, "bounds_of_remaining", bounds)


@mutant(INTERVAL)
def nothing_remaining_is_taken_for_no_debt(patch: Patch) -> None:
    def bounds(original: Any, bucket: Bucket, reading: op.Reading) -> Any:
        low, high = original(bucket, reading)
        return 0 if reading.remaining == 0 else low, high

    wrapped(patch, reconcile, "bounds_of_remaining", bounds)


# -- taking over -----------------------------------------------------------------------------------------------------


@mutant(ADOPTION)
def what_was_settled_elsewhere_stays_open(patch: Patch) -> None:
    patch.setattr(Adopting, "_end", lambda *_: None)


@mutant(ADOPTION)
def an_adopted_grant_begins_anew(patch: Patch) -> None:
    def alter(state: State, event: Any) -> Any:
        return None if isinstance(event, ev.Clocked) and event.at < state.at else event

    altered(patch, alter)


@mutant(ADOPTION)
def what_is_adopted_twice_is_charged_twice(patch: Patch) -> None:
    def adopt(original: Any, self: Any, told: op.Adopt) -> Any:
        ended = self._books.state.ended.get(told.key)
        if ended is not None and ended.kind is EndKind.SETTLED and any(ended.charges):
            self._books.advance_all(ended.buckets)
            overs = (0,) * len(ended.buckets)
            event = ev.Booked("", ended.pool, ended.shares, ended.buckets, ended.charges, overs, self._books.now, 0)
            self._books.emit(event)
        return original(self, told)

    wrapped(patch, Adopting, "adopt", adopt)


@mutant(TOLD)
def a_bulk_request_is_not_adopted(patch: Patch) -> None:
    patch.setattr(Adopting, "_together", lambda *_: None)


@mutant(TOLD)
def a_settlement_does_not_replace_an_expiry(patch: Patch) -> None:
    patch.setattr(Adopting, "_replace", lambda *_: None)


@mutant(TOLD)
def a_waiting_caller_is_not_told(patch: Patch) -> None:
    patch.setattr(Reserving, "tell", lambda *_: None)


@mutant(LOSS)
def a_debit_is_not_remembered_as_a_peak(patch: Patch) -> None:
    def lower(self: Bucket, ordinal: int, amount: int) -> None:
        self.level -= amount

    patch.setattr(Bucket, "lower", lower)


@mutant(LOSS)
def an_old_reading_speaks_of_the_absence(patch: Patch) -> None:
    patch.setattr(absence, "_doubt_reading", lambda *_: None)


@mutant(LOSS)
def nothing_is_debited(patch: Patch) -> None:
    altered(patch, lambda state, event: None if isinstance(event, ev.Corrected) and event.adjusted < 0 else event)


@mutant(LOSS)
def the_last_event_counts_and_not_the_lease(patch: Patch) -> None:
    def begin_after(original: Any, books: Books, known: absence.Absence) -> None:
        original(books, replace(known, since=0))

    patch.setattr(engine, "begin_after", partial(begin_after, absence.begin_after))


@mutant(TURNS)
def a_waiter_that_comes_back_stands_behind_all(patch: Patch) -> None:
    patch.setattr(Waiter, "arrival", property(lambda self: self.serial, lambda self, value: None))


@mutant(TURNS)
def whoever_comes_back_first_goes_first(patch: Patch) -> None:
    patch.setattr(Reserving, "_gathers", lambda *_: False)


@mutant(TURNS)
def gathering_ends_with_the_first_step(patch: Patch) -> None:
    def begin(original: Any, self: Any, answers: Any) -> None:
        original(self, answers)
        self.turns.gather_until = min(self.turns.gather_until, self._books.now)

    wrapped(patch, Reserving, "begin", begin)


# -- the proof ---------------------------------------------------------------------------------------------------------

HISTORIES = 400
FAST = settings(
    max_examples=120,
    stateful_step_count=40,
    phases=(Phase.generate,),
    derandomize=True,
    database=None,
    deadline=None,
    verbosity=Verbosity.quiet,
    report_multiple_bugs=False,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


MACHINES: dict[str, type[RuleBasedStateMachine]] = {
    **dict.fromkeys(BOOKS, BooksMachine),
    **dict.fromkeys(FORGETFUL, ForgetfulMachine),
    **dict.fromkeys(REFUNDS, RefundMachine),
    **dict.fromkeys(QUEUE, QueueMachine),
    **dict.fromkeys(ADOPTION, AdoptionMachine),
}
KINDS = (BOOKS, FORGETFUL, REFUNDS, QUEUE, ADOPTION)
PROPERTIES = {
    **dict.fromkeys(
        TOLD,
        (
            test_adoption.test_a_settlement_that_was_lost_replaces_an_expiry,
            test_adoption.test_a_reserve_that_waits_here_gets_the_grant_it_had,
            test_adoption.test_a_bulk_request_is_known_by_its_own_key,
        ),
    ),
    **dict.fromkeys(
        LOSS,
        (
            test_absence.test_what_may_have_been_granted_and_lost_is_debited,
            test_absence.test_only_the_time_that_nobody_saw_is_left_out,
            test_absence.test_a_refund_after_the_debit_credits_no_second_twice,
            test_absence.test_a_reading_from_before_says_nothing_of_the_absence,
        ),
    ),
    **dict.fromkeys(
        TURNS,
        (
            test_turns.test_places_are_kept_within_a_batch,
            test_turns.test_places_are_kept_over_batches_that_come_while_gathering,
        ),
    ),
}


def is_caught(machine: type[RuleBasedStateMachine]) -> bool:
    """By the properties; or, for what random histories meet too seldom, by a counter-example that was kept."""
    try:
        run_state_machine_as_test(machine, settings=FAST)
        for check in CASES:
            check()
    except (AssertionError, KeyError):
        return True
    return False


@pytest.mark.parametrize("machine", sorted(set(MACHINES.values()), key=repr))
def test_the_engine_as_it_is_passes(machine: type[RuleBasedStateMachine]) -> None:
    """Else the rest of this proves nothing: the same examples, and no fault."""
    assert not is_caught(machine)


def test_the_interval_as_it_is_passes() -> None:
    """Likewise."""
    for seed in range(HISTORIES):
        History(Random(seed), 3 + seed % 12).run()


@pytest.mark.parametrize("name", MACHINES)
def test_a_broken_engine_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    next(kind[name] for kind in KINDS if name in kind)(monkeypatch)
    tally.example(f"mutant: {name}")
    assert is_caught(MACHINES[name])


@pytest.mark.parametrize("name", INTERVAL)
def test_a_broken_interval_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    INTERVAL[name](monkeypatch)
    tally.example(f"mutant: {name}")
    with pytest.raises(AssertionError):  # noqa: PT012 -- any of many histories
        for seed in range(HISTORIES):
            History(Random(seed), 3 + seed % 12).run()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_broken_beginning_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    {**TOLD, **LOSS, **TURNS}[name](monkeypatch)
    tally.example(f"mutant: {name}")
    for check in PROPERTIES[name]:
        # Without making the counter-example small.
        monkeypatch.setattr(check, "_hypothesis_internal_use_settings", FAST, raising=False)
    with pytest.raises(AssertionError):  # noqa: PT012 -- any of these properties
        for check in PROPERTIES[name]:
            check()
