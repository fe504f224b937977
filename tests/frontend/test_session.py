"""Sessions: batches, order, isolation, cancelling, breaking, limits."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import msgspec
import pytest

from paceline.frontend.server import Server
from paceline.frontend.session import Sessions
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import (
    MODEL,
    POOL,
    Caller,
    Talk,
    bad_request,
    calling,
    commit,
    new_id,
    reserve,
    retry_after,
    running,
    state_of,
    succeeded,
    until,
    violations,
)

CANCELLED = 1
INVALID_ARGUMENT = 3
RESOURCE_EXHAUSTED = 8


def waiting(server: Server) -> int:
    engine = server.router.slots["default"].engine
    assert engine is not None
    return sum(engine.waiting().values())


async def greeted(caller: Caller, **fields: Any) -> Talk:
    talk = Talk(caller)
    await talk.hello(**fields)
    return talk


async def test_welcome(caller: Caller) -> None:
    talk = Talk(caller)
    welcome = await talk.hello(protocol_version=7, language="python")
    assert welcome.protocol_version == 1
    assert "retry-after" in welcome.header_names
    assert welcome.max_batch_items == 1_024
    assert welcome.max_batch_bytes == 1_048_576
    assert welcome.session_id


async def test_every_operation(caller: Caller, server: Server) -> None:
    talk = await greeted(caller)
    request = reserve()
    grant = (await talk.one(reserve=request)).reserve.grant
    assert grant.pool == POOL
    renewed = await talk.one(
        renew=pb.RenewRequest(reservation_id=request.reservation_id, context=grant.context, output_tokens=7)
    )
    assert renewed.renew.HasField("expires_in")
    settled = await talk.one(commit=commit(request, grant.context))
    assert settled.commit.settlements
    observed = await talk.one(observe=pb.ObserveRequest(target=pb.Target(model=MODEL), outcome=succeeded()))
    assert observed.observe.settlements
    released = await talk.one(release=pb.ReleaseRequest(reservation_id=new_id()))
    assert released.release.tombstone
    assert not server.desk.undelivered


async def test_a_batch_and_a_bad_item(caller: Caller, server: Server) -> None:
    talk = await greeted(caller)
    bad = reserve()
    bad.candidates[0].estimate.input_tokens = -1
    items = [
        pb.RequestItem(reserve=reserve()),
        pb.RequestItem(reserve=bad),
        pb.RequestItem(),
        pb.RequestItem(commit=commit(reserve(), b"forged")),
        pb.RequestItem(reserve=reserve()),
    ]
    first, second, third, fourth, fifth = await talk.answers(await talk.send(*items))
    assert first.reserve.HasField("grant")
    assert fifth.reserve.HasField("grant")
    assert second.error.code == INVALID_ARGUMENT
    assert bad_request(second.error).field_violations[0].field == "candidates[0].estimate.input_tokens"
    assert bad_request(third.error).field_violations[0].field == "op"
    assert bad_request(fourth.error).field_violations[0].field == "context"
    assert len(state_of(server).open) == 2


async def test_numbers(caller: Caller) -> None:
    talk = await greeted(caller)
    await talk.one(reserve=reserve(input_tokens=59_900))
    await talk.send(pb.RequestItem(number=9, reserve=reserve(input_tokens=900, wait=10)))
    await talk.send(pb.RequestItem(number=9, reserve=reserve()))
    again = await talk.answer(9)
    assert bad_request(again.error).field_violations[0].field == "number"
    await talk.call.write(pb.SessionRequest(batch=pb.RequestBatch(items=[pb.RequestItem(reserve=reserve())])))
    zero = await talk.answer(0)
    assert bad_request(zero.error).field_violations[0].field == "number"
    assert (await talk.answer(9)).reserve.HasField("grant")


async def test_a_large_batch(caller: Caller, server: Server) -> None:
    talk = await greeted(caller)
    numbers = await talk.send(*(pb.RequestItem(reserve=reserve(output_tokens=1)) for _ in range(200)))
    answers = await talk.answers(numbers)
    assert sum(answer.reserve.HasField("grant") for answer in answers) == 60
    assert all(answer.reserve.HasField("denial") for answer in answers[60:])
    assert len(talk.shares) == 1
    await until(lambda: not server.desk.undelivered)


async def test_defaults_of_the_session(caller: Caller, server: Server) -> None:
    talk = await greeted(caller, tenant="acme")
    await talk.one(reserve=reserve())
    await talk.one(reserve=reserve(tenant="other"))
    assert [each.tenant for each in state_of(server).open.values()] == ["acme", "other"]


async def test_cancel(caller: Caller, server: Server) -> None:
    talk = await greeted(caller)
    await talk.one(reserve=reserve(input_tokens=59_900))
    (number,) = await talk.send(pb.RequestItem(reserve=reserve(input_tokens=10_000, wait=60)))
    await until(lambda: waiting(server) == 1)
    cancelled = await talk.one(cancel=number)
    assert cancelled.cancel.cancelled
    assert (await talk.answer(number)).error.code == CANCELLED
    await until(lambda: waiting(server) == 0)
    assert not (await talk.one(cancel=number)).cancel.cancelled
    assert not (await talk.one(cancel=12_345)).cancel.cancelled
    assert not server.desk.undelivered
    assert len(state_of(server).open) == 1


async def test_cancelling_a_grant_on_its_way(caller: Caller, server: Server) -> None:
    talk = await greeted(caller)
    request = reserve()
    await talk.send(pb.RequestItem(number=1, reserve=request), pb.RequestItem(number=2, cancel=1))
    answer = await talk.answer(1)
    assert answer.error.code == CANCELLED
    await until(lambda: not state_of(server).open and not server.desk.undelivered)


async def test_a_broken_stream_withdraws_what_waits(caller: Caller, server: Server) -> None:
    talk = await greeted(caller)
    kept = (await talk.one(reserve=reserve(input_tokens=59_900))).reserve.grant
    await talk.send(*(pb.RequestItem(reserve=reserve(input_tokens=9_000, wait=60)) for _ in range(3)))
    await until(lambda: waiting(server) == 3)
    talk.call.cancel()
    await until(lambda: waiting(server) == 0)
    await until(lambda: not server.desk.undelivered)
    assert kept.pool == POOL
    assert len(state_of(server).open) == 1  # The one that was delivered.
    assert not server.sessions.running


async def test_another_session_takes_over(caller: Caller, server: Server) -> None:
    first = await greeted(caller)
    await first.one(reserve=reserve(input_tokens=59_900))
    request = reserve(input_tokens=2_500, wait=60)
    await first.send(pb.RequestItem(reserve=request))
    await until(lambda: waiting(server) == 1)
    first.call.cancel()
    second = await greeted(caller)
    assert (await second.one(reserve=request)).reserve.HasField("grant")
    await asyncio.sleep(1.2)
    assert any(key.endswith(request.reservation_id) for key in state_of(server).open)


async def test_the_end_of_the_requests_waits_for_the_answers(caller: Caller) -> None:
    talk = await greeted(caller)
    await talk.one(reserve=reserve(input_tokens=59_900))
    (number,) = await talk.send(pb.RequestItem(reserve=reserve(input_tokens=500, wait=60)))
    await talk.call.done_writing()
    assert (await talk.answer(number)).reserve.HasField("grant")
    assert await talk.call.read() is grpc.aio.EOF
    assert await talk.call.code() is grpc.StatusCode.OK


async def ended(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(
    ("messages", "code", "field"),
    [
        ([pb.SessionRequest()], grpc.StatusCode.INVALID_ARGUMENT, "hello"),
        ([pb.SessionRequest(batch=pb.RequestBatch())], grpc.StatusCode.INVALID_ARGUMENT, "hello"),
        ([pb.SessionRequest(hello=pb.Hello())] * 2, grpc.StatusCode.INVALID_ARGUMENT, "hello"),
        ([pb.SessionRequest(hello=pb.Hello()), pb.SessionRequest()], grpc.StatusCode.INVALID_ARGUMENT, "message"),
        (
            [pb.SessionRequest(hello=pb.Hello(instance_id="x" * 129))],
            grpc.StatusCode.INVALID_ARGUMENT,
            "hello.instance_id",
        ),
        (
            [pb.SessionRequest(hello=pb.Hello(protocol_version=-1))],
            grpc.StatusCode.FAILED_PRECONDITION,
            "hello.protocol_version",
        ),
    ],
)
async def test_what_ends_a_session(
    caller: Caller, messages: list[pb.SessionRequest], code: grpc.StatusCode, field: str
) -> None:
    call = caller.coordinator.Session()
    for message in messages:
        await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ended(call)
    assert caught.value.code() is code
    assert violations(caught.value) == [field]


def limited(handler: Sessions, **caps: int) -> None:
    handler._caps = msgspec.structs.replace(handler._caps, **caps)


async def test_caps(caller: Caller, server: Server) -> None:
    limited(server.sessions, sessions=2, open_items=2, batch_items=10, busy_items=1, outbox_bytes=1)
    talk = await greeted(caller)
    await talk.one(reserve=reserve(input_tokens=59_900))
    requests = [pb.RequestItem(reserve=reserve(input_tokens=900, wait=60)) for _ in range(3)]
    numbers = await talk.send(*requests)
    last = await talk.answer(numbers[2])
    assert last.error.code == RESOURCE_EXHAUSTED
    assert retry_after(last.error) == 0.2
    assert all(answer.reserve.HasField("grant") for answer in await talk.answers(numbers[:2]))

    # Reading stops and goes on; nothing is lost.
    observe = pb.ObserveRequest(target=pb.Target(model=MODEL), outcome=succeeded(1, 1))
    numbers = []
    for _ in range(30):
        numbers += await talk.send(*(pb.RequestItem(observe=observe) for _ in range(10)))
    assert all(answer.HasField("observe") for answer in await talk.answers(numbers))

    second = await greeted(caller)
    third = Talk(caller)
    with pytest.raises((EOFError, grpc.aio.AioRpcError, AssertionError)):
        await third.hello()
    assert await third.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await second.send(*(pb.RequestItem(observe=observe) for _ in range(11)))
    with pytest.raises(grpc.aio.AioRpcError):
        await second.answer(99)
    assert await second.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: len(server.sessions.running) == 1)
    await greeted(caller)


async def test_a_silent_client_is_let_go(caller: Caller, server: Server) -> None:
    limited(server.sessions, hello_timeout_us=100_000)
    call = caller.coordinator.Session()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_client_that_does_not_read(caller: Caller, server: Server) -> None:
    """Its answers stay bounded: the server stops reading it, and others are served."""
    limited(server.sessions, outbox_bytes=50_000)
    talk = await greeted(caller)
    bad = pb.RequestItem(reserve=pb.ReserveRequest(reservation_id="x"))

    async def flood() -> None:
        while True:
            await talk.send(*(pb.RequestItem.FromString(bad.SerializeToString()) for _ in range(500)))

    flooding = asyncio.create_task(flood())
    await asyncio.sleep(1)
    (session,) = server.sessions.running
    assert session._size + session._full_size < 1_000_000
    assert (await caller.reserve()).HasField("grant")
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)
    talk.call.cancel()
    await until(lambda: not server.sessions.running)


async def test_large_answers_are_split() -> None:
    fields = {
        "accounts": {
            "default": {"pools": {"sonnet-4": {"requests": 100_000, "input_tokens": 10**9, "output_tokens": 10**9}}}
        }
    }
    async with running(fields) as server, calling(server) as caller:
        talk = await greeted(caller)
        numbers: list[int] = []
        for _ in range(8):
            numbers += await talk.send(*(pb.RequestItem(reserve=reserve(output_tokens=1)) for _ in range(500)))
        answers = await talk.answers(numbers)
        assert all(answer.reserve.HasField("grant") for answer in answers)
        assert len({answer.reserve.grant.context for answer in answers}) == 4_000
        await until(lambda: not server.desk.undelivered)


async def test_a_grant_for_a_handler_that_was_cancelled(caller: Caller, server: Server) -> None:
    first = reserve(input_tokens=60_000)
    grant = (await caller.reserve(first)).grant
    talk = await greeted(caller)
    await talk.send(pb.RequestItem(reserve=reserve(input_tokens=9_000, wait=60)))
    await until(lambda: waiting(server) == 1)
    (session,) = server.sessions.running
    await until(lambda: session._wake is not None)
    (handler,) = [task for task in asyncio.all_tasks() if getattr(task, "_fut_waiter", None) is session._wake]
    handler.cancel()
    await until(lambda: not server.sessions.running)
    # Its turn comes before it is withdrawn.
    await caller.coordinator.Release(pb.ReleaseRequest(reservation_id=first.reservation_id, context=grant.context))
    await until(lambda: waiting(server) == 0)
    await until(lambda: not state_of(server).open and not server.desk.undelivered)


async def test_a_grant_that_cannot_be_answered_is_given_back(
    caller: Caller, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(server.desk.replies, "granted", fail)
    talk = await greeted(caller)
    assert (await talk.one(reserve=reserve())).HasField("error")
    await until(lambda: not state_of(server).open and not server.desk.undelivered)


async def test_cancelling_a_reserve_over_several_accounts() -> None:
    full = {"requests": 1, "input_tokens": 60_000, "output_tokens": 6_000}
    fields = {"accounts": {"one": {"pools": {"sonnet-4": full}}, "two": {"pools": {"sonnet-4": full}}}}
    async with running(fields) as server, calling(server) as caller:
        await caller.reserve(account="one")
        request = reserve(account="one")
        request.candidates.append(reserve(account="two").candidates[0])
        talk = await greeted(caller)
        await talk.send(pb.RequestItem(number=100, reserve=request), pb.RequestItem(number=101, cancel=100))
        assert (await talk.answer(101)).cancel.cancelled
        assert (await talk.answer(100)).error.code == CANCELLED
        await asyncio.sleep(0.3)
        assert not state_of(server, "two").open
        assert not server.desk.spreads.running
        assert not server.desk.undelivered
        # The other way: what the first one asked has granted goes back.
        request = reserve(account="two")
        request.candidates.append(reserve(account="one").candidates[0])
        await talk.send(pb.RequestItem(number=200, reserve=request), pb.RequestItem(number=201, cancel=200))
        assert (await talk.answer(201)).cancel.cancelled
        await until(lambda: not state_of(server, "two").open and not server.desk.spreads.running)
