"""Two servers on one Redis: any of them administers any ledger, and the fallback shares of both add up to one limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import grpc
import pytest

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, MODEL, POOL, Caller, Talk, calling, commit, reserve, running
from tests.replicas.redis_server import RedisServer, need_redis

pytestmark = [pytest.mark.redis]


@pytest.fixture
def redis_url() -> Iterator[str]:
    need_redis()
    with RedisServer() as server:
        yield server.url


class Pair:
    """The server that owns the ledger, and the other one, each with a caller."""

    def __init__(self, servers: dict[str, Server], callers: dict[str, Caller]) -> None:
        self.servers = servers
        self.callers = callers

    async def owner(self) -> str:
        """The name of the owner, once there is one that both know."""
        async with asyncio.timeout(20):
            while True:
                shown = [
                    (await caller.admin.GetLedger(pb.GetLedgerRequest(name=LEDGER))).ledger
                    for caller in self.callers.values()
                ]
                if all(each.state == pb.LEDGER_STATE_READY for each in shown) and len({e.owner for e in shown}) == 1:
                    return shown[0].owner
                await asyncio.sleep(0.05)


@pytest.fixture
async def pair(redis_url: str) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        servers, callers = {}, {}
        for name in ("one", "two"):
            server = await stack.enter_async_context(running({"store": redis_url, "node": name}))
            servers[name] = server
            callers[name] = await stack.enter_async_context(calling(server))

        async def know_each_other() -> bool:
            return all(len(server.membership.nodes()) == 2 for server in servers.values())

        await soon(know_each_other)
        yield Pair(servers, callers)


async def soon(found: Callable[[], Awaitable[bool]], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not await found():  # noqa: ASYNC110 -- it is asked over the network
            await asyncio.sleep(0.05)


async def test_any_server_administers_any_ledger(pair: Pair) -> None:
    first = await pair.owner()
    (second,) = pair.callers.keys() - {first}
    asked = reserve()
    answer = await pair.callers[second].reserve(asked)
    assert answer.HasField("grant")
    for caller in pair.callers.values():
        (ledger,) = (await caller.admin.ListLedgers(pb.ListLedgersRequest())).ledgers
        assert (ledger.name, ledger.owner, ledger.open_reservations) == (LEDGER, first, 1)
        assert 0 < ledger.form <= ledger.newest_form
        found = await caller.admin.GetReservation(pb.GetReservationRequest(reservation_id=asked.reservation_id))
        assert found.reservation.state == pb.RESERVATION_STATE_OPEN
        listed = await caller.admin.ListReservations(pb.ListReservationsRequest())
        assert [each.reservation_id for each in listed.reservations] == [asked.reservation_id]
        (limits,) = (await caller.admin.ListLimits(pb.ListLimitsRequest(pool=POOL))).pools
        assert limits.details[0].at_risk == 1
        (advice,) = (await caller.admin.ListAdvice(pb.ListAdviceRequest())).pools
        assert (advice.pool, advice.calls) == (POOL, 1)
    # The one that was called knows the target, and not the one that owns the ledger.
    assert (await pair.callers[second].admin.GetPool(pb.GetPoolRequest(name=POOL))).pool.targets
    (limits,) = (await pair.callers[second].admin.ListLimits(pb.ListLimitsRequest(pool=POOL))).pools
    assert limits.pool.targets
    paused = await pair.callers[second].admin.PausePool(pb.PausePoolRequest(name=POOL, reason="a test"))
    assert paused.pool.state == pb.POOL_STATE_PAUSED
    for caller in pair.callers.values():
        assert (await caller.reserve()).denial.reason == pb.DENIAL_REASON_POOL_PAUSED
    await pair.callers[first].admin.ResumePool(pb.ResumePoolRequest(name=POOL))
    await pair.callers[second].coordinator.Commit(commit(asked, answer.grant.context))


async def test_a_ledger_goes_where_an_operator_wants_it(pair: Pair) -> None:
    first = await pair.owner()
    (second,) = pair.callers.keys() - {first}
    for target, asking in ((second, second), (first, second), (second, first)):
        request = pb.HandOverLedgerRequest(ledger=LEDGER, node=target)
        assert (await pair.callers[asking].admin.HandOverLedger(request)).node == target

        async def is_there(target: str = target) -> bool:
            return await pair.owner() == target

        await soon(is_there)
        for caller in pair.callers.values():
            assert (await caller.reserve()).HasField("grant")
    with pytest.raises(grpc.aio.AioRpcError, match="no other server 'three'"):
        await pair.callers[first].admin.HandOverLedger(pb.HandOverLedgerRequest(ledger=LEDGER, node="three"))
    answer = await pair.callers[first].admin.FinalizeUpgrade(pb.FinalizeUpgradeRequest(ledger=LEDGER))
    assert answer.ledger.form == answer.ledger.newest_form


async def test_a_watch_goes_on_over_a_change_of_owner(pair: Pair) -> None:
    first = await pair.owner()
    (second,) = pair.callers.keys() - {first}
    watch = pair.callers[second].admin.Watch(pb.WatchRequest(reservations=True))
    events: list[pb.WatchEvent] = []
    in_snapshot = True

    async def read() -> None:
        nonlocal in_snapshot
        async for response in watch:
            events.extend(response.events)
            in_snapshot &= response.phase != pb.WATCH_PHASE_SNAPSHOT_END

    reading = asyncio.create_task(read())

    async def over() -> bool:
        return not in_snapshot

    await soon(over)
    assert {event.pool.name for event in events if event.HasField("pool")} >= {POOL}
    events.clear()
    asked = reserve()
    answer = await pair.callers[second].reserve(asked)

    async def states_are(*states: pb.ReservationState.ValueType) -> bool:
        return [each.reservation.state for each in events if each.HasField("reservation")] == list(states)

    await soon(lambda: states_are(pb.RESERVATION_STATE_OPEN))
    await pair.callers[first].admin.HandOverLedger(pb.HandOverLedgerRequest(ledger=LEDGER, node=second))

    async def moved() -> bool:
        return any(event.ledger.owner == second for event in events if event.HasField("ledger"))

    await soon(moved)
    await pair.callers[first].coordinator.Commit(commit(asked, answer.grant.context))
    await soon(lambda: states_are(pb.RESERVATION_STATE_OPEN, pb.RESERVATION_STATE_SETTLED))
    assert not [event for event in events if event.removed]
    watch.cancel()
    await asyncio.wait([reading])


@pytest.mark.slow
async def test_the_shares_of_all_servers_add_up_to_one_limit(pair: Pair) -> None:
    first = await pair.owner()
    (second,) = pair.callers.keys() - {first}
    talks = {name: Talk(caller) for name, caller in pair.callers.items()}
    for name, talk in talks.items():
        await talk.hello(instance_id=name)
    newest: dict[str, dict[int, int]] = {}

    async def call(name: str) -> None:
        talk = talks[name]
        asked = reserve(model=MODEL, input_tokens=1, output_tokens=1)
        grant = (await talk.one(reserve=asked)).reserve.grant
        await talk.one(commit=commit(asked, grant.context))
        for share in talk.shares:
            assert share.pool == POOL
            newest[name] = {each.dimension: each.per_minute for each in share.amounts}
        talk.shares.clear()
        for dimension, limit in ((pb.DIMENSION_REQUESTS, 60), (pb.DIMENSION_INPUT_TOKENS, 60_000)):
            assert sum(amounts[dimension] for amounts in newest.values()) <= limit

    async def both_have_one() -> bool:
        for name in talks:
            await call(name)
        await asyncio.sleep(0.3)
        return len(newest) == 2

    await soon(both_have_one)
    assert all(amounts[pb.DIMENSION_REQUESTS] > 0 for amounts in newest.values())
    await pair.callers[first].admin.HandOverLedger(pb.HandOverLedgerRequest(ledger=LEDGER, node=second))
    # The next owner goes on with the accounts, and does not wait for ten minutes.
    newest.clear()
    await soon(both_have_one)
