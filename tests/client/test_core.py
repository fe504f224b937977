"""The protocol on a clock of the test's, without threads or sockets."""

from __future__ import annotations

import random
import uuid
from itertools import pairwise
from typing import Any

import pytest

from paceline_client import _core
from paceline_client._core import Core, Failure, Kind, Operation, State, Stream, new_id
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2

BUDGET = 0.25


def core() -> Core:
    return Core(BUDGET, random.Random(1))


def reserve(now: float, max_wait: float = 0.0) -> Operation:
    request = pb.ReserveRequest(reservation_id=new_id())
    return Operation(Kind.RESERVE, request, now, turn_by=now + max_wait)


def commit(now: float, header_time: float | None = None) -> Operation:
    return Operation(Kind.COMMIT, pb.CommitRequest(reservation_id=new_id()), now, None, header_time)


def connected(state: Core, now: float = 0.0, **bounds: int) -> Stream:
    stream = Stream()
    state.welcome(stream, pb.Welcome(**bounds), now)  # type: ignore[arg-type]
    return stream


def taken(state: Core, stream: Stream, now: float) -> list[pb.RequestItem]:
    message = state.take(stream, now)
    return [] if message is None else list(message.batch.items)


def answer(state: Core, stream: Stream, now: float, number: int, **result: Any) -> None:
    state.answers(stream, pb.ResponseBatch(items=[pb.ResponseItem(number=number, **result)]), now)


GRANT = pb.ReserveResponse(grant=pb.Grant(pool="p"))
AWAY = status_pb2.Status(code=14, message="away")


def failed(operation: Operation) -> Failure:
    assert operation.state is State.ENDED
    assert isinstance(operation.result, Failure)
    return operation.result


def test_a_wait_has_its_time_and_the_budget() -> None:
    state = core()
    stream = connected(state)
    operation = reserve(0.0, max_wait=10)
    state.submit(operation, 0.0)
    (item,) = taken(state, stream, 0.5)
    assert item.reserve.max_wait.ToNanoseconds() == 9_500_000_000
    assert state.tick(10.24) == pytest.approx(10.25)
    assert operation.state is State.SENT
    state.tick(10.25)
    assert failed(operation).unreachable
    # Its answer belongs to nobody.
    answer(state, stream, 10.3, item.number, reserve=GRANT)
    assert failed(operation).unreachable
    assert not stream.open


def test_the_budget_runs_from_the_moment_when_nobody_is_there() -> None:
    state = core()
    state.went_down(0.0)
    early, late = reserve(0.0, 60), reserve(0.2, 60)
    state.submit(early, 0.0)
    state.submit(late, 0.2)
    state.tick(0.25)
    assert failed(early).unreachable
    assert failed(late).unreachable
    at_once = reserve(0.3, 60)
    state.submit(at_once, 0.3)
    assert failed(at_once).unreachable
    connected(state, 1.0)
    fine = reserve(1.0, 60)
    state.submit(fine, 1.0)
    assert fine.state is State.QUEUED


def test_a_short_break_costs_nobody_the_place() -> None:
    state = core()
    stream = connected(state)
    operation, report = reserve(0.0, 60), commit(0.0, header_time=0.0)
    state.submit(operation, 0.0)
    state.submit(report, 0.0)
    assert len(taken(state, stream, 0.0)) == 2
    state.broken(stream, 5.0)
    new = connected(state, 5.2)
    first, second = taken(state, new, 5.2)
    assert first.commit.outcome.header_age.ToMilliseconds() == 5_200
    assert second.reserve.max_wait.ToMilliseconds() == 54_800
    state.tick(6.0)
    answer(state, new, 6.0, second.number, reserve=GRANT)
    answer(state, new, 6.0, first.number, commit=pb.CommitResponse())
    assert [each.result for each in state.ended] == [GRANT, pb.CommitResponse()]
    assert state.counters.resent == 2
    # What the old stream still says is not heard.
    assert state.take(stream, 6.0) is None


def test_order_is_kept_over_a_break() -> None:
    state = core()
    stream = connected(state)
    operations = [commit(0.0) for _ in range(5)]
    for operation in operations[:3]:
        state.submit(operation, 0.0)
    taken(state, stream, 0.0)
    for operation in operations[3:]:
        state.submit(operation, 0.0)
    state.broken(stream, 1.0)
    items = taken(state, connected(state, 1.0), 1.0)
    assert [item.commit.reservation_id for item in items] == [each.request.reservation_id for each in operations]  # type: ignore[attr-defined]


def test_a_refused_session_is_told_to_those_who_wait() -> None:
    state = core()
    state.went_down(0.0)
    waiting = reserve(0.0, 60)
    state.submit(waiting, 0.0)
    refusal = Failure("UNAUTHENTICATED", "who are you")
    state.broken(Stream(), 0.1, refusal)
    assert failed(waiting) == refusal
    later = reserve(3.0, 60)
    state.submit(later, 3.0)
    assert failed(later) == refusal
    stream = connected(state, 4.0)
    again = reserve(4.0, 60)
    state.submit(again, 4.0)
    assert len(taken(state, stream, 4.0)) == 1


def test_unavailable_is_tried_again_within_the_budget_and_then_at_once_not() -> None:
    state = core()
    stream = connected(state)
    operation = reserve(0.0, 60)
    state.submit(operation, 0.0)
    now, sent = 0.0, 0
    while operation.state is not State.ENDED:
        now += 0.005
        state.tick(now)
        for item in taken(state, stream, now):
            sent += 1
            answer(state, stream, now, item.number, error=AWAY)
    assert failed(operation).unreachable
    assert 3 <= sent <= 6
    assert now <= BUDGET + 0.01
    another = reserve(now, 60)
    state.submit(another, now)
    (item,) = taken(state, stream, now)
    answer(state, stream, now, item.number, error=AWAY)
    assert failed(another).unreachable


def test_reports_are_tried_with_growing_delays_until_they_are_too_old() -> None:
    state = core()
    stream = connected(state)
    operation = commit(0.0)
    state.submit(operation, 0.0)
    times: list[float] = []
    now = 0.0
    while now < 5_000:
        for item in taken(state, stream, now):
            times.append(now)
            answer(state, stream, now, item.number, error=AWAY)
        if operation.result is not None:
            break
        due = state.tick(now)
        assert due is not None
        now = due
        state.tick(now)
    assert failed(operation).code == "DEADLINE_EXCEEDED"
    assert _core.REPORT_MAX_AGE < now < _core.REPORT_MAX_AGE + 2 * _core.LAST_RETRY
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[0] < 0.05
    assert max(gaps) <= _core.LAST_RETRY * 1.25
    assert state.reports == 0


def test_a_silent_stream_is_suspected_and_one_that_speaks_is_not() -> None:
    state = core()
    stream = connected(state)
    state.submit(reserve(0.0), 0.0)
    taken(state, stream, 0.0)
    state.tick(0.25)
    # Meanwhile nobody waits for it, but one call in a second tries.
    probe, other = reserve(0.3), reserve(0.3)
    state.submit(probe, 0.3)
    state.submit(other, 0.3)
    assert probe.state is State.QUEUED
    assert failed(other).unreachable
    (item,) = taken(state, stream, 0.3)
    answer(state, stream, 0.4, item.number, reserve=GRANT)
    state.tick(5.0)
    assert not state.suspects
    state.submit(reserve(6.0), 6.0)
    taken(state, stream, 6.0)
    state.tick(6.25)
    state.tick(7.0)
    assert state.suspects == [stream]


def test_one_bad_answer_fails_alone() -> None:
    state = core()
    stream = connected(state)
    one, other = reserve(0.0, 5), reserve(0.0, 5)
    state.submit(one, 0.0)
    state.submit(other, 0.0)
    first, second = taken(state, stream, 0.0)
    answer(state, stream, 0.1, first.number, commit=pb.CommitResponse())
    answer(state, stream, 0.1, 77, reserve=GRANT)
    answer(state, stream, 0.1, second.number, reserve=GRANT)
    assert failed(one).code == "INTERNAL"
    assert other.result == GRANT


def test_what_is_abandoned_leaves_nothing() -> None:
    state = core()
    stream = connected(state)
    unsent, sent = reserve(0.0, 60), reserve(0.0, 60)
    state.submit(sent, 0.0)
    (item,) = taken(state, stream, 0.0)
    state.submit(unsent, 0.0)
    assert state.abandon(sent)
    assert not state.abandon(unsent)
    assert not state.abandon(unsent)
    assert not taken(state, stream, 0.0)
    assert not state.waiting
    state.broken(stream, 1.0)
    new = connected(state, 1.0)
    assert not taken(state, new, 1.0)
    answer(state, new, 1.0, item.number, reserve=GRANT)
    assert not state.ended


def test_timers_and_queues_stay_small() -> None:
    state = core()
    stream = connected(state, max_open_items=10)
    for n in range(5_000):
        operation = reserve(n * 0.001, 600)
        state.submit(operation, n * 0.001)
        if n >= 9:
            state.abandon(operation)
        taken(state, stream, n * 0.001)
    assert len(state._timers) < 200
    assert len(state._reserve_queue) < 200
    assert len(stream.open) <= 9


def test_a_drained_stream_takes_nothing_new() -> None:
    state = core()
    stream = connected(state)
    old, new = reserve(0.0, 60), reserve(1.0, 60)
    state.submit(old, 0.0)
    (item,) = taken(state, stream, 0.0)
    state.drain(stream, 1.0)
    state.submit(new, 1.0)
    assert state.take(stream, 1.0) is None
    state.tick(1.3)
    # Nobody else came: the new one goes by the policy, the old one still waits where it is.
    assert failed(new).unreachable
    assert old.state is State.SENT
    answer(state, stream, 2.0, item.number, reserve=GRANT)
    assert old.result == GRANT


def test_one_left_behind_by_a_drain_has_the_budget() -> None:
    state = core()
    stream = connected(state)
    operation = reserve(0.0, 60)
    state.submit(operation, 0.0)
    (item,) = taken(state, stream, 0.0)
    state.drain(stream, 1.0)
    state.tick(1.3)
    denial = pb.ReserveResponse(denial=pb.Denial(reason=pb.DENIAL_REASON_DRAINING))
    answer(state, stream, 2.0, item.number, reserve=denial)
    state.tick(2.1)
    assert failed(operation).unreachable


def test_ids_are_uuids() -> None:
    ids = {new_id() for _ in range(2_000)}
    assert len(ids) == 2_000
    for each in ids:
        found = uuid.UUID(each)
        assert str(found) == each
        assert found.version == 4
        assert found.variant == uuid.RFC_4122


def test_a_drained_stream_takes_reports_while_nobody_else_is_there() -> None:
    state = core()
    stream = connected(state)
    state.drain(stream, 1.0)
    assert state.is_done(stream)
    state.submit(reserve(1.0, 60), 1.0)
    assert state.take(stream, 1.0) is None
    state.submit(commit(1.0), 1.0)
    assert state.has_queued
    assert not state.is_done(stream)
    (item,) = taken(state, stream, 1.0)
    assert item.HasField("commit")
    answer(state, stream, 1.1, item.number, commit=pb.CommitResponse())
    assert state.reports == 0
    held = True
    state.call_at(60.0, lambda _: None, lambda: held)
    assert not state.is_done(stream)
    new = connected(state, 1.2)
    assert state.is_done(stream)
    state.submit(commit(1.3), 1.3)
    assert state.take(stream, 1.3) is None
    assert len(taken(state, new, 1.3)) == 2
    state.broken(new, 1.4)
    state.broken(stream, 1.4)
    assert not state.can_report


def test_what_makes_the_server_fail_is_not_sent_again() -> None:
    state = core()
    stream = connected(state)
    report, call = commit(0.0), reserve(0.0, 60)
    state.submit(report, 0.0)
    state.submit(call, 0.0)
    for item in taken(state, stream, 0.0):
        answer(state, stream, 0.1, item.number, error=status_pb2.Status(code=10, message="failed at it"))
    assert failed(report).code == "ABORTED"
    assert state.reports == 0
    # Not the fault of the caller, whose policy decides.
    assert failed(call).unreachable
    state.tick(100.0)
    assert not taken(state, stream, 100.0)
