"""Why a call waits or was denied: what is said fits what the engine then does, and saying it changes nothing."""

from __future__ import annotations

import msgspec

from paceline.engine.accounting import Estimate, Profile, Rule
from paceline.engine.answers import Denied, Granted, Reason
from paceline.engine.audit import Audit, Kind, Record
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.explaining import Finding
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    DefineShare,
    Disposition,
    Mode,
    Operation,
    Outcome,
    Priority,
    Release,
    Reserve,
    SetMode,
    SetPaused,
)
from paceline.engine.state import State
from tests.engine.test_books import SECOND
from tests.engine.world import LEDGER, START_US

REQUESTS = Profile("one", (Rule(Dimension.REQUESTS, hold_requests=1000),))
TOKENS = Profile("two", (Rule(Dimension.REQUESTS, hold_requests=1000), Rule(Dimension.INPUT_TOKENS, hold_input=1000)))


def limits(amount: int, burst: int) -> tuple[Limit, ...]:
    return (Limit(Dimension.REQUESTS, Window.MINUTE, amount, burst),)


def reserve(name: str, tenant: str = "", wait: int = 600, **fields: object) -> Reserve:
    call = (Candidate("p", estimate=Estimate(requests=1)),)
    return Reserve(f"svc/{name}", **{"candidates": call, "tenant": tenant, "max_wait_us": wait * SECOND} | fields)  # type: ignore[arg-type]


def engine_with(*operations: Operation, amount: int = 60, burst: int = 2) -> Engine:
    """One call a second and two saved up, both of which are gone."""
    engine = Engine(LEDGER)
    before = [reserve(f"used{number}") for number in range(burst)]
    found = [DefinePool("p", REQUESTS, limits(amount, burst)), *before, *operations]
    engine.step(START_US, list(enumerate(found)))
    return engine


def order_of(engine: Engine, step_at: int | None) -> list[str]:
    """The keys in the order of their grants, until nobody waits."""
    order: list[str] = []
    while len(engine.waiters()):
        assert step_at is not None
        step = engine.step(step_at, [])
        order += [answer.keys[0] for _, answer in step.answers if isinstance(answer, Granted)]
        step_at = step.wake_at
    return order


def test_a_waiter_hears_what_binds_how_many_come_first_and_when_its_turn_is() -> None:
    engine = engine_with()
    step = engine.step(START_US, [(9 + place, reserve(f"w{place}")) for place in range(5)])
    now = START_US + SECOND // 2
    told = []
    for place in range(5):
        (found,) = engine.explainer(now).waiting(f"svc/w{place}")
        assert (found.finding, found.dimension, found.reason) == (Finding.LIMIT, Dimension.REQUESTS, Reason.LIMIT)
        assert (found.needed, found.available, found.ahead) == (1, 0, place)
        assert found.wait_us is not None
        told.append(now + found.wait_us)
    turns: dict[str, int] = {}
    while len(engine.waiters()):
        assert step.wake_at is not None
        step = engine.step(step.wake_at, [])
        turns |= {answer.keys[0]: step.at for _, answer in step.answers if isinstance(answer, Granted)}
    assert [turns[f"svc/w{place}"] for place in range(5)] == told
    assert engine.explainer(now).waiting("svc/w0") == ()


def test_of_other_tenants_as_many_come_first_as_are_then_served_before() -> None:
    crowd = [reserve(f"{tenant}{place}", tenant) for place in range(12) for tenant in "abc"]
    engine = engine_with(*crowd, amount=600, burst=10)
    keys = [operation.key for operation in crowd]
    told = {key: engine.explainer(START_US).waiting(key)[0].ahead for key in keys}
    order = order_of(engine, START_US + 1)
    assert len(order) == len(keys)
    for key in keys:
        said = told[key]
        # A call of each other tenant more or less: whose turn it is among equals is not said.
        assert said is not None
        assert abs(said - order.index(key)) <= 3, (key, said, order.index(key))


def test_a_more_urgent_call_has_fewer_before_it() -> None:
    low = [reserve(f"low{place}", priority=Priority.BATCH) for place in range(20)]
    engine = engine_with(*low, reserve("high", priority=Priority.INTERACTIVE))
    (high,) = engine.explainer(START_US).waiting("svc/high")
    (last,) = engine.explainer(START_US).waiting("svc/low19")
    assert high.ahead is not None
    assert last.ahead is not None
    assert high.ahead <= 1
    assert last.ahead == 20


def test_each_rung_of_a_ladder_says_its_own() -> None:
    ladder = (
        Candidate("large", estimate=Estimate(requests=1, input_tokens=5_000)),
        Candidate("p", estimate=Estimate(requests=1)),
        Candidate("q", estimate=Estimate(requests=1, input_tokens=80)),
    )
    tokens = (*limits(600, 600), Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 60, 100))
    engine = engine_with(DefinePool("large", TOKENS, tokens), DefinePool("q", TOKENS, tokens))
    engine.step(START_US, [(0, reserve("u", candidates=ladder[2:]))])
    engine.step(START_US, [(1, reserve("w", candidates=ladder))])
    first, second = engine.explainer(START_US).waiting("svc/w")
    assert (first.pool, first.index, first.dimension) == ("p", 1, Dimension.REQUESTS)
    assert (second.pool, second.index, second.dimension) == ("q", 2, Dimension.INPUT_TOKENS)
    assert (second.needed, second.available, second.wait_us) == (80, 20, 60 * SECOND)
    outlook = engine.explainer(START_US).request(reserve("x", candidates=ladder))
    assert [step.finding for step in outlook.steps] == [Finding.NEVER, Finding.LIMIT, Finding.LIMIT]
    assert outlook.steps[0].reason is Reason.TOO_LARGE
    assert [step.ahead for step in outlook.steps] == [0, 1, 1]
    assert outlook.reason is None
    assert outlook.index is None


def test_what_is_said_of_a_call_is_what_would_be_done_and_changes_nothing() -> None:
    engine = engine_with(DefineShare("team", (Limit(Dimension.REQUESTS, Window.MINUTE, 6),)))
    capped = reserve("c", "new", candidates=(Candidate("p", ("team",), Estimate(requests=1)),))
    engine.step(START_US, [(7, reserve("w", wait=3))])
    for now in range(START_US, START_US + 9 * SECOND, SECOND // 3):
        for operation in (reserve("x", "t", 0), reserve("x", "t", 1), reserve("x", "t", 60), capped):
            engine.step(now, [])
            digest, lines = engine.state.digest(), engine.waiting()
            outlook = engine.explainer(now).request(operation)
            assert engine.state.digest() == digest
            assert engine.waiting() == lines
            copy = _copy_of(engine, now)
            answers = copy.step(now, [(1, operation)]).answers
            answer = next((each for ticket, each in answers if ticket == 1), None)
            if isinstance(answer, Granted):
                assert (outlook.index, outlook.reason) == (answer.candidate_index, None)
            elif isinstance(answer, Denied):
                assert (outlook.reason, outlook.binding) == (answer.reason, answer.binding)
                assert outlook.wait_us == answer.retry_after_us
            else:
                assert (outlook.index, outlook.reason) == (None, None)
                assert outlook.wait_us is not None


def _copy_of(engine: Engine, now: int) -> Engine:
    """The same books with the same waiters."""
    copy = Engine(LEDGER, State.restore(engine.state.dump()))
    for waiter in engine.waiters():
        left = waiter.deadline - now
        operation = reserve(waiter.key.rpartition("/")[2], waiter.tenant)
        copy.step(engine.state.at, [(99, msgspec.structs.replace(operation, max_wait_us=left))])
    return copy


def test_a_call_to_a_ledger_that_decided_nothing_yet_is_explained() -> None:
    engine = Engine(LEDGER)
    engine.step(START_US, [(0, DefinePool("p", REQUESTS, limits(60, 2)))])
    digest = engine.state.digest()
    assert engine.explainer(START_US).request(reserve("x")).index == 0
    assert engine.explainer(START_US).request(reserve("x", count=3)).reason is Reason.TOO_LARGE
    assert engine.state.digest() == digest


def test_pauses_modes_and_unknown_pools_are_said() -> None:
    engine = engine_with(SetMode(Mode.OBSERVE, "p", "seen"))
    outlook = engine.explainer(START_US).request(reserve("x", "seen"))
    assert (outlook.index, outlook.observed, outlook.reason, outlook.wait_us) == (0, True, None, SECOND)
    engine.step(START_US, [(1, SetPaused("p", True))])
    outlook = engine.explainer(START_US).request(reserve("x"))
    assert outlook.reason is Reason.POOL_PAUSED
    assert outlook.steps[0].finding is Finding.NEVER
    outlook = engine.explainer(START_US).request(reserve("x", candidates=(Candidate("none"),)))
    assert not outlook.known
    assert outlook.steps[0].finding is Finding.NEW


def test_the_audit_has_every_decision_with_its_reason() -> None:
    engine = engine_with()
    engine.step(START_US, [(1, reserve("denied", wait=0)), (2, reserve("waits", wait=5)), (3, reserve("gone", wait=5))])
    engine.step(START_US, [(4, Release("svc/gone"))])
    engine.step(START_US + SECOND, [])
    outcome = Outcome(Disposition.SUCCEEDED)
    engine.step(START_US + 2 * SECOND, [(5, Commit("svc/waits", outcome)), (6, Release("svc/used0"))])
    engine.step(START_US + 2_000 * SECOND, [])
    audit = engine.stats.audit

    def told(name: str) -> list[tuple[Kind, int]]:
        return [(record.kind, (record.at - START_US) // SECOND) for record in audit.of({f"svc/{name}"})]

    (denied,) = audit.of({"svc/denied"})
    assert (denied.kind, denied.reason, denied.binding) == (Kind.DENIED, Reason.LIMIT, Dimension.REQUESTS)
    assert (denied.amounts[0], denied.levels[0], denied.ahead, denied.wait_us) == (1, 0, 0, SECOND)
    assert told("waits") == [(Kind.WAITING, 0), (Kind.GRANTED, 1), (Kind.SETTLED, 2)]
    assert audit.of({"svc/waits"})[1].wait_us == SECOND
    assert told("gone") == [(Kind.WAITING, 0), (Kind.RELEASED, 0)]
    assert audit.of({"svc/gone"})[0].ahead == 1
    assert told("used0") == [(Kind.GRANTED, 0), (Kind.RELEASED, 2)]
    assert [kind for kind, _ in told("used1")] == [Kind.GRANTED, Kind.EXPIRED]


def test_the_memory_of_decisions_is_bounded() -> None:
    audit = Audit(most=3)
    for number in range(5):
        audit.note(Record(number, Kind.RELEASED, f"svc/{number}", "p"))
    assert audit.count == 5
    assert [record.at for record in audit.of({"svc/0", "svc/1", "svc/4", "svc/2"})] == [2, 4]
    assert audit.since(0, 9)[0] == 2
    assert [record.at for record in audit.since(0, 9)[1]] == [2, 3, 4]
    assert [record.at for record in audit.since(3, 1)[1]] == [3]
    assert audit.since(5, 9) == (5, [])
