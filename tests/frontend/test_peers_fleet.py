"""Two servers over one Redis, in one event loop: callers of either, whoever owns the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import (
    LEDGER,
    POOL,
    Caller,
    Talk,
    calling,
    commit,
    config,
    new_id,
    reserve,
    running,
    succeeded,
    until,
)
from tests.replicas.redis_server import RedisServer, need_redis

pytestmark = [pytest.mark.redis, pytest.mark.process]

ACCOUNTS = {
    name: {
        "tier": "build",
        "pools": {"sonnet-4": {"requests": 600, "input_tokens": 60_000, "output_tokens": 600_000}},
    }
    for name in (LEDGER, "second", "third", "fourth")
}


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    need_redis()
    with RedisServer() as server:
        yield server.url


class Pair:
    """Two servers and a caller of each; ``owner`` owns the ledger, ``other`` does not."""

    def __init__(self, one: Server, two: Server, callers: dict[str, Caller]) -> None:
        mine = one.router.slots[LEDGER]
        self.owner, self.other = (two, one) if mine.is_remote else (one, two)
        self.at_owner, self.at_other = callers[self.owner.node], callers[self.other.node]


@pytest_asyncio.fixture
async def pair(redis: str) -> AsyncIterator[Pair]:
    number = new_id()[:8]
    fields = {"store": f"{redis}?prefix=t{number}", "accounts": ACCOUNTS}
    async with (
        running(fields | {"node": "one"}) as one,
        running(fields | {"node": "two"}) as two,
        calling(one) as at_one,
        calling(two) as at_two,
    ):
        servers = (one, two)
        await until(lambda: all(slot.ready for server in servers for slot in server.router.slots.values()), 10)
        yield Pair(one, two, {"one": at_one, "two": at_two})


async def test_both_answer_alike(pair: Pair) -> None:
    settled = []
    for caller in (pair.at_other, pair.at_owner):
        # The first call to the pool: the one that does not own the ledger defines it there.
        request = reserve()
        granted = await caller.reserve(request)
        settled.append(await caller.coordinator.Commit(commit(request, granted.grant.context)))
    assert list(settled[0].settlements) == list(settled[1].settlements)
    assert len(settled[0].settlements) == 4
    # A grant of one is settled at the other, its context signed by the store's key.
    request = reserve()
    granted = await pair.at_owner.reserve(request)
    assert not (await pair.at_other.coordinator.Commit(commit(request, granted.grant.context))).late


async def test_a_reservation_without_its_context_is_found(pair: Pair) -> None:
    at_other = pair.at_other.coordinator
    request = reserve()
    await pair.at_owner.reserve(request)
    renewed = await at_other.Renew(pb.RenewRequest(reservation_id=request.reservation_id))
    assert renewed.expires_in.ToMilliseconds() > 1_000
    outcome = succeeded()
    outcome.headers.add(name="anthropic-ratelimit-requests-limit", value=b"600")
    settled = await at_other.Commit(pb.CommitRequest(reservation_id=request.reservation_id, outcome=outcome))
    assert [each.charged for each in settled.settlements][:2] == [1, 90]
    assert settled.settlements[0].pool == POOL
    request = reserve()
    await pair.at_owner.reserve(request)
    assert (await at_other.Release(pb.ReleaseRequest(reservation_id=request.reservation_id))).released
    assert (await at_other.Release(pb.ReleaseRequest(reservation_id=new_id()))).tombstone


async def test_an_id_over_several_accounts_has_one_grant(pair: Pair) -> None:
    request = reserve()
    for account in ("second", "third", "fourth"):
        candidate = request.candidates.add()
        candidate.CopyFrom(request.candidates[0])
        candidate.target.account = account
    grants = [(await caller.reserve(request)).grant for caller in (pair.at_other, pair.at_owner, pair.at_other)]
    assert len({grant.target.account for grant in grants}) == 1
    open_ = sum(
        request.reservation_id in key
        for server in (pair.owner, pair.other)
        for slot in server.router.slots.values()
        if slot.state is not None
        for key in slot.state.open
    )
    assert open_ == 1


async def test_a_turn_is_taken_wherever_it_comes(pair: Pair) -> None:
    """Of two ledgers, through their owner and through the other server."""
    accounts = ("second", "third")
    for account in accounts:
        assert (await pair.at_other.reserve(account=account, input_tokens=59_990)).HasField("grant")
    for first in (0, 1):
        for caller in (pair.at_other, pair.at_owner):
            request = reserve(wait=50, input_tokens=30_000)
            request.candidates.add().CopyFrom(request.candidates[0])
            for place, account in enumerate(accounts):
                request.candidates[place].target.account = account
            request.candidates[first].estimate.input_tokens = 100
            granted = await caller.reserve(request)
            assert granted.grant.target.account == accounts[first]
            number = request.reservation_id
            # Found without its context, though the other ledger has a tombstone of it.
            for each in (pair.at_other, pair.at_owner):
                assert (await each.reserve(request)).grant.target.account == accounts[first]
                await each.coordinator.Renew(pb.RenewRequest(reservation_id=number))
            assert (await caller.coordinator.Release(pb.ReleaseRequest(reservation_id=number))).released
    states = [slot.engine for server in (pair.owner, pair.other) for slot in server.router.slots.values()]
    await until(lambda: not any(engine.waiting() for engine in states if engine is not None))


async def test_a_planned_stop_fails_no_call_and_keeps_places(pair: Pair) -> None:
    talk = Talk(pair.at_other)
    await talk.hello()
    await pair.at_other.reserve(input_tokens=59_990)
    waiting = await talk.send(*(pb.RequestItem(reserve=reserve(input_tokens=1_000, wait=15)) for _ in range(3)))
    await until(lambda: sum(pair.owner.router.slots[LEDGER].engine.waiting().values()) == 3)  # type: ignore[union-attr]
    stub: Any = health_pb2_grpc.HealthStub(pair.at_other.channel)
    stopping = asyncio.create_task(pair.owner.stop(1))
    loop = asyncio.get_running_loop()
    longest = 0.0
    while not stopping.done():
        begun = loop.time()
        request = reserve(model="claude-sonnet-4-5", input_tokens=1)
        answer = await pair.at_other.reserve(request)
        assert answer.WhichOneof("result") in ("grant", "denial")
        assert answer.denial.reason != pb.DENIAL_REASON_DRAINING
        longest = max(longest, loop.time() - begun)
        health = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.sleep(0.01)
    await stopping
    assert longest < 1.0
    assert not pair.other.router.slots[LEDGER].is_remote
    answers = await asyncio.gather(*(talk.answer(number, 20) for number in waiting[:1]))
    assert [answer.WhichOneof("result") for answer in answers] == ["reserve"]
    assert [answer.reserve.WhichOneof("result") for answer in answers] == ["grant"]
    assert answers[0].reserve.grant.waited.ToMilliseconds() > 300


async def test_administration_through_either(pair: Pair) -> None:
    request = reserve()
    await pair.at_owner.reserve(request)
    for caller in (pair.at_owner, pair.at_other):
        ledgers = await caller.admin.ListLedgers(pb.ListLedgersRequest())
        assert sorted(each.name for each in ledgers.ledgers) == sorted(ACCOUNTS)
        pool = await caller.admin.GetPool(pb.GetPoolRequest(name=POOL))
        assert pool.pool.name == POOL
        found = await caller.admin.GetReservation(pb.GetReservationRequest(reservation_id=request.reservation_id))
        assert found.reservation.state == pb.RESERVATION_STATE_OPEN


async def test_shares_for_clients_of_either(pair: Pair) -> None:
    for caller in (pair.at_owner, pair.at_other):
        talk = Talk(caller)
        await talk.hello(instance_id=new_id())
        for _ in range(40):
            await talk.one(reserve=reserve())
            if talk.shares:
                break
            await asyncio.sleep(0.1)
        assert [share.pool for share in talk.shares] == [POOL]


async def test_a_new_account_is_served_by_all(pair: Pair) -> None:
    for caller in (pair.at_other, pair.at_owner):
        answer: Any = await caller.reserve(account="brand-new")
        assert answer.WhichOneof("result") == "grant"


async def test_a_store_that_starts_later_is_waited_for() -> None:
    need_redis()
    late = RedisServer()
    server = Server(config(store=late.url, node="early"), environ={})
    starting = asyncio.create_task(server.start())
    await asyncio.sleep(0.3)
    assert not starting.done()
    await asyncio.to_thread(late.start)
    try:
        await asyncio.wait_for(starting, 10)
        await server.stop(0)
    finally:
        await asyncio.to_thread(late.close)
