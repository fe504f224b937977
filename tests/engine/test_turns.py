"""Places are kept when waiters come back to a new owner, in whatever order and in however many batches they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.absence import Absence
from paceline.engine.accounting import Estimate, Profile, Rule
from paceline.engine.answers import Denied, Granted, Reason
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine, Step
from paceline.engine.operations import Candidate, DefinePool, Mode, Priority, Reserve, SetMode
from paceline.engine.state import State
from tests.engine.test_books import SECOND
from tests.engine.world import LEDGER, START_US

GATHER = SECOND // 5
REQUESTS = Profile("one", (Rule(Dimension.REQUESTS, hold_requests=1000),))
CALL = (Candidate("p", estimate=Estimate(requests=1)),)

Wait = tuple[int, Priority, int]
"""How long one has waited, how urgent it is, and in which batch it comes back."""
waits = st.lists(
    st.tuples(st.integers(1, 9 * SECOND), st.sampled_from(Priority), st.integers(0, 3)), min_size=1, max_size=30
)


def taken_over(*, used: int, gather_us: int) -> Engine:
    """An engine over books that another has left: one call a second, of which at most ten are saved up."""
    first = Engine(LEDGER)
    pool = DefinePool("p", REQUESTS, (Limit(Dimension.REQUESTS, Window.MINUTE, 60, 10),))
    reserves = [Reserve(f"used/{number}", CALL, hold_us=900 * SECOND) for number in range(used)]
    first.step(START_US, list(enumerate([pool, *reserves])))
    return Engine(LEDGER, State.restore(first.state.dump()), absence=Absence(gather_us=gather_us))


def reserve(ticket: int, waited: int = 0, priority: Priority = Priority.STANDARD, most: int = 600) -> Reserve:
    return Reserve(f"svc/{ticket}", CALL, priority=priority, max_wait_us=most * SECOND, waited_us=waited)


def granted(step: Step) -> list[int]:
    assert all(isinstance(answer, Granted) for _, answer in step.answers)
    return [ticket for ticket, _ in step.answers]


def by_priority(order: Iterable[int], priority_of: Callable[[int], Priority]) -> dict[Priority, list[int]]:
    """The tickets of each priority: what share of the service a priority gets is not at issue here."""
    found: dict[Priority, list[int]] = {}
    for ticket in order:
        found.setdefault(priority_of(ticket), []).append(ticket)
    return found


def served(engine: Engine, step: Step) -> list[int]:
    """The tickets in the order of their grants, after those of ``step``, until nobody waits."""
    order: list[int] = []
    while len(engine.waiters()):
        assert step.wake_at is not None
        step = engine.step(step.wake_at, [])
        order += granted(step)
    return order


@given(waits, st.integers(0, 10))
def test_places_are_kept_over_batches_that_come_while_gathering(found: list[Wait], used: int) -> None:
    engine = taken_over(used=used, gather_us=GATHER)
    arrivals: dict[int, tuple[Priority, int, int]] = {}
    step = engine.step(START_US, [])
    for batch in range(4):
        now = START_US + batch * GATHER // 4
        operations = []
        for ticket, (waited, priority, when) in enumerate(found):
            if when == batch:
                operations.append((ticket, reserve(ticket, waited, priority)))
                arrivals[ticket] = (priority, now - waited, len(arrivals))
        step = engine.step(now, operations)
        assert granted(step) == []
        assert not arrivals or step.wake_at == START_US + GATHER
    # One that comes only now stands behind all of its urgency.
    step = engine.step(START_US + GATHER - 1, [(999, reserve(999))])
    arrivals[999] = (Priority.STANDARD, START_US + GATHER - 1, len(arrivals))
    order = served(engine, step)
    expected = sorted(arrivals, key=lambda ticket: arrivals[ticket])
    assert by_priority(order, lambda ticket: arrivals[ticket][0]) == by_priority(
        expected, lambda ticket: arrivals[ticket][0]
    )


@given(waits, st.integers(0, 10))
def test_places_are_kept_within_a_batch(found: list[Wait], used: int) -> None:
    engine = taken_over(used=used, gather_us=0)
    operations = [(ticket, reserve(ticket, waited, priority)) for ticket, (waited, priority, _) in enumerate(found)]
    step = engine.step(START_US, operations)
    order = granted(step) + served(engine, step)
    expected = sorted(range(len(found)), key=lambda ticket: (found[ticket][1], -found[ticket][0], ticket))
    assert by_priority(order, lambda ticket: found[ticket][1]) == by_priority(expected, lambda ticket: found[ticket][1])


@given(waits)
def test_places_are_kept_over_batches_while_nothing_is_free(found: list[Wait]) -> None:
    engine = taken_over(used=10, gather_us=0)
    arrivals: dict[int, tuple[Priority, int, int]] = {}
    step = engine.step(START_US, [])
    for batch in range(4):
        now = START_US + batch * GATHER // 4
        operations = []
        for ticket, (waited, priority, when) in enumerate(found):
            if when == batch:
                operations.append((ticket, reserve(ticket, waited, priority)))
                arrivals[ticket] = (priority, now - waited, len(arrivals))
        step = engine.step(now, operations)
        assert granted(step) == []
    order = served(engine, step)
    expected = sorted(arrivals, key=lambda ticket: arrivals[ticket])
    assert by_priority(order, lambda ticket: arrivals[ticket][0]) == by_priority(
        expected, lambda ticket: arrivals[ticket][0]
    )


def test_a_wait_ends_while_others_gather() -> None:
    engine = taken_over(used=10, gather_us=30 * SECOND)
    step = engine.step(START_US, [(1, reserve(1, waited=5 * SECOND, most=20)), (2, reserve(2, most=60))])
    assert step.answers == []
    assert step.wake_at == START_US + 20 * SECOND
    ((ticket, answer),) = engine.step(step.wake_at, []).answers
    assert ticket == 1
    assert isinstance(answer, Denied)
    assert answer.reason is Reason.TIMEOUT


def test_who_will_not_wait_is_answered_while_others_gather() -> None:
    engine = taken_over(used=0, gather_us=GATHER)
    step = engine.step(START_US, [(1, reserve(1, most=0))])
    assert granted(step) == [1]
    step = engine.step(START_US, [(2, reserve(2)), (3, reserve(3, most=0))])
    ((ticket, answer),) = step.answers
    assert ticket == 3
    assert isinstance(answer, Denied)


def test_who_is_only_observed_does_not_gather() -> None:
    engine = taken_over(used=0, gather_us=GATHER)
    step = engine.step(START_US, [(1, SetMode(Mode.OBSERVE)), (2, reserve(2, waited=SECOND))])
    assert [ticket for ticket, answer in step.answers if isinstance(answer, Granted)] == [2]


def test_what_was_waited_elsewhere_is_told() -> None:
    engine = taken_over(used=0, gather_us=GATHER)
    engine.step(START_US, [(1, reserve(1, waited=3 * SECOND))])
    ((_, answer),) = engine.step(START_US + GATHER, []).answers
    assert isinstance(answer, Granted)
    assert answer.waited_us == 3 * SECOND + GATHER
