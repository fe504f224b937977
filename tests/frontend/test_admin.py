"""AdminService: what it shows, what it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from paceline.engine.waiting import Waiters
from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import (
    LEDGER,
    MODEL,
    OTHER_MODEL,
    POOL,
    Caller,
    calling,
    commit,
    new_id,
    reserve,
    running,
    state_of,
    until,
)

OTHER_POOL = "anthropic/default/opus-4"
SMALL = {"requests": 60, "input_tokens": 60_000, "output_tokens": 6_000}
TWO_POOLS = {"accounts": {LEDGER: {"tier": "build", "pools": {"sonnet-4": SMALL, "opus-4": SMALL}}}}


async def refusal(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = caught.value.code()
    assert isinstance(found, grpc.StatusCode)
    return found


def limit_of(pool: pb.Pool, dimension: pb.Dimension.ValueType) -> pb.Limit:
    (found,) = [each for each in pool.limits if each.state.dimension == dimension]
    return found


async def test_ledgers(caller: Caller) -> None:
    await caller.reserve()
    (ledger,) = (await caller.admin.ListLedgers(pb.ListLedgersRequest())).ledgers
    assert (ledger.name, ledger.provider, ledger.state) == (LEDGER, "anthropic", pb.LEDGER_STATE_READY)
    assert ledger.open_reservations == 1
    assert ledger.mode == pb.MODE_ENFORCE
    assert (await caller.admin.GetLedger(pb.GetLedgerRequest(name=LEDGER))).ledger.epoch == 1
    assert await refusal(caller.admin.GetLedger(pb.GetLedgerRequest(name="x"))) is grpc.StatusCode.NOT_FOUND
    assert await refusal(caller.admin.GetLedger(pb.GetLedgerRequest())) is grpc.StatusCode.INVALID_ARGUMENT


async def test_pools_and_pages(caller: Caller) -> None:
    for model in ("a", "b", "c", OTHER_MODEL):
        await caller.reserve(model=model)
    everything = await caller.admin.ListPools(pb.ListPoolsRequest())
    names = [pool.name for pool in everything.pools]
    assert names == sorted(names)
    assert POOL in names
    assert not everything.next_page_token
    paged: list[str] = []
    token = ""
    while True:
        page = await caller.admin.ListPools(pb.ListPoolsRequest(page_size=2, page_token=token))
        assert len(page.pools) <= 2
        paged += [pool.name for pool in page.pools]
        token = page.next_page_token
        if not token:
            break
    assert paged == names
    bad = caller.admin.ListPools(pb.ListPoolsRequest(page_token="%%%"))
    assert await refusal(bad) is grpc.StatusCode.INVALID_ARGUMENT
    assert await refusal(caller.admin.ListPools(pb.ListPoolsRequest(page_size=-1))) is grpc.StatusCode.INVALID_ARGUMENT
    pool = (await caller.admin.GetPool(pb.GetPoolRequest(name="anthropic/default/opus-4"))).pool
    assert [target.model for target in pool.targets] == [OTHER_MODEL]


async def test_pause_and_resume(caller: Caller) -> None:
    paused = (await caller.admin.PausePool(pb.PausePoolRequest(name=POOL, reason="deploy"))).pool
    assert (paused.state, paused.state_reason) == (pb.POOL_STATE_PAUSED, "deploy")
    assert (await caller.reserve()).denial.reason == pb.DENIAL_REASON_POOL_PAUSED
    stale = caller.admin.ResumePool(pb.ResumePoolRequest(name=POOL, etag="0"))
    assert await refusal(stale) is grpc.StatusCode.ABORTED
    resumed = (await caller.admin.ResumePool(pb.ResumePoolRequest(name=POOL, etag=paused.etag))).pool
    assert resumed.state == pb.POOL_STATE_OPEN
    assert (await caller.reserve()).HasField("grant")


async def test_overrides(caller: Caller) -> None:
    ref = pb.DimensionRef(pool=POOL, dimension=pb.DIMENSION_REQUESTS, window=pb.WINDOW_MINUTE)
    limit = (await caller.admin.UpdateLimit(pb.UpdateLimitRequest(limit=ref, override=pb.LimitOverride(limit=2)))).limit
    assert (limit.source, limit.override_limit, limit.state.limit) == (pb.LIMIT_SOURCE_OVERRIDE, 2, 2)
    answers = [await caller.reserve() for _ in range(3)]
    assert [answer.HasField("grant") for answer in answers] == [True, True, False]
    cleared = await caller.admin.UpdateLimit(pb.UpdateLimitRequest(limit=ref, clear=True, etag=limit.etag))
    assert cleared.limit.state.limit == 60
    for request, code in (
        (pb.UpdateLimitRequest(limit=ref), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.UpdateLimitRequest(limit=ref, override=pb.LimitOverride()), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.UpdateLimitRequest(limit=ref, override=pb.LimitOverride(limit=-1)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.UpdateLimitRequest(limit=ref, override=pb.LimitOverride(limit=2**62)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.UpdateLimitRequest(limit=pb.DimensionRef(pool=POOL), clear=True), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.UpdateLimitRequest(limit=ref, clear=True, etag="x"), grpc.StatusCode.ABORTED),
        (pb.UpdateLimitRequest(limit=pb.DimensionRef(pool="x"), clear=True), grpc.StatusCode.NOT_FOUND),
    ):
        assert await refusal(caller.admin.UpdateLimit(request)) is code


async def test_modes(caller: Caller) -> None:
    answer = await caller.admin.SetMode(pb.SetModeRequest(tenant="acme", mode=pb.MODE_OBSERVE))
    assert pb.ModeSetting(ledger=LEDGER, tenant="acme", mode=pb.MODE_OBSERVE) in answer.settings
    assert (await caller.reserve(tenant="acme", input_tokens=70_000)).HasField("observed_decision")
    assert (await caller.reserve(tenant="other", input_tokens=70_000)).HasField("denial")


async def test_shares_and_spend() -> None:
    fields = {
        "shares": {
            "team": {
                "cap": {"requests": 1},
                "monthly_spend_cap": 5,
                "tenants": ["acme"],
                "shares": {"sub": {}},
            }
        }
    }
    async with running(fields) as server, calling(server) as caller:
        request = reserve(tenant="acme")
        granted = await caller.reserve(request)
        await caller.coordinator.Commit(commit(request, granted.grant.context))
        listed = await caller.admin.ListShares(pb.ListSharesRequest())
        assert [share.name for share in listed.shares] == ["team", "team/sub"]
        share = (await caller.admin.GetShare(pb.GetShareRequest(pool=POOL, name="team"))).share
        assert share.dimensions
        assert (await caller.reserve(tenant="acme")).binding_dimension.share == "team"
        children = await caller.admin.ListShares(pb.ListSharesRequest(parent="team"))
        assert [share.name for share in children.shares] == ["team/sub"]
        spend = await caller.admin.GetSpend(pb.GetSpendRequest(ledger=LEDGER))
        assert spend.spent.nanos == 90 * 3_000 + 80 * 15_000
        assert spend.held.nanos == 0
        assert spend.cap.units == 1_000
        assert spend.start_time.ToDatetime().day == spend.end_time.ToDatetime().day == 1
        team = await caller.admin.GetSpend(pb.GetSpendRequest(ledger=LEDGER, share="team"))
        assert team.cap.units == 5
        assert team.spent == spend.spent
        missing = caller.admin.GetShare(pb.GetShareRequest(ledger=LEDGER, name="x"))
        assert await refusal(missing) is grpc.StatusCode.NOT_FOUND


async def test_reservations(caller: Caller, server: Server) -> None:
    requests = [reserve(tenant=f"t{number % 2}", route="r", output_tokens=10) for number in range(7)]
    grants = [(await caller.reserve(request)).grant for request in requests]
    await caller.coordinator.Commit(commit(requests[0], grants[0].context))
    listed = await caller.admin.ListReservations(pb.ListReservationsRequest())
    assert [each.reservation_id for each in listed.reservations] == [each.reservation_id for each in requests[1:]]
    one = listed.reservations[0]
    assert (one.identity, one.pool, one.tenant, one.route) == ("anonymous", POOL, "t1", "r")
    assert one.estimate.input_tokens == 100
    assert one.state == pb.RESERVATION_STATE_OPEN
    filtered = await caller.admin.ListReservations(pb.ListReservationsRequest(tenant="t0"))
    assert len(filtered.reservations) == 3

    states = [pb.RESERVATION_STATE_OPEN, pb.RESERVATION_STATE_SETTLED]
    paged: list[str] = []
    token = ""
    while True:
        page = await caller.admin.ListReservations(
            pb.ListReservationsRequest(states=states, page_size=2, page_token=token)
        )
        paged += [each.reservation_id for each in page.reservations]
        token = page.next_page_token
        if not token:
            break
    assert sorted(paged) == sorted(each.reservation_id for each in requests)
    assert len(set(paged)) == 7

    found = await caller.admin.GetReservation(pb.GetReservationRequest(reservation_id=requests[0].reservation_id))
    assert found.reservation.state == pb.RESERVATION_STATE_SETTLED
    assert found.reservation.cost.nanos > 0
    unknown = caller.admin.GetReservation(pb.GetReservationRequest(reservation_id=new_id()))
    assert await refusal(unknown) is grpc.StatusCode.NOT_FOUND

    update = pb.UpdateReservationRequest(reservation_id=requests[1].reservation_id, etag=one.etag)
    update.expires_in.seconds = 1_000
    updated = (await caller.admin.UpdateReservation(update)).reservation
    assert updated.expire_time.seconds - one.expire_time.seconds > 600
    assert await refusal(caller.admin.UpdateReservation(update)) is grpc.StatusCode.ABORTED

    cancel = pb.CancelReservationRequest(reservation_id=requests[1].reservation_id, not_sent=True)
    released = (await caller.admin.CancelReservation(cancel)).reservation
    assert released.state == pb.RESERVATION_STATE_RELEASED
    assert await refusal(caller.admin.CancelReservation(cancel)) is grpc.StatusCode.FAILED_PRECONDITION
    kept = await caller.admin.CancelReservation(pb.CancelReservationRequest(reservation_id=requests[2].reservation_id))
    assert kept.reservation.settlements[0].charged == 1
    assert len(state_of(server).open) == 4


def waiters_of(server: Server) -> Waiters:
    engine = server.router.slots[LEDGER].engine
    assert engine is not None
    return engine.waiters()


async def reservations(caller: Caller, **filters: Any) -> list[str]:
    """Ids of every page, three to a page."""
    found: list[str] = []
    token = ""
    while True:
        request = pb.ListReservationsRequest(page_size=3, page_token=token, **filters)
        page = await caller.admin.ListReservations(request)
        found += [each.reservation_id for each in page.reservations]
        token = page.next_page_token
        if not token:
            return found


async def get(caller: Caller, reservation_id: str) -> pb.Reservation:
    request = pb.GetReservationRequest(reservation_id=reservation_id)
    return (await caller.admin.GetReservation(request)).reservation


@asynccontextmanager
async def waiting(
    caller: Caller, server: Server, *requests: pb.ReserveRequest
) -> AsyncIterator[list[asyncio.Task[pb.ReserveResponse]]]:
    """These wait, in this order. Their calls have no deadline, which would cut the wait."""

    async def reserving(request: pb.ReserveRequest) -> pb.ReserveResponse:
        return await caller.coordinator.Reserve(request)

    already = len(waiters_of(server))
    calls: list[asyncio.Task[pb.ReserveResponse]] = []
    try:
        for request in requests:
            calls.append(asyncio.create_task(reserving(request)))
            await until(lambda: len(waiters_of(server)) == already + len(calls))
        yield calls
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_waiting_reservations_are_listed(caller: Caller, server: Server) -> None:
    held = reserve(input_tokens=59_900)
    await caller.reserve(held)
    requests = [
        reserve(
            input_tokens=1_000 if number else 40_000,
            wait=60,
            tenant=f"t{number % 2}",
            route=f"r{number % 2}",
            priority=pb.PRIORITY_BATCH if number == 4 else pb.PRIORITY_INTERACTIVE,
        )
        for number in range(7)
    ]
    ids = [request.reservation_id for request in requests]
    async with waiting(caller, server, *requests):
        only = [pb.RESERVATION_STATE_WAITING]
        assert await reservations(caller, states=only) == ids
        assert await reservations(caller) == [*ids, held.reservation_id]
        assert await reservations(caller, states=[pb.RESERVATION_STATE_OPEN]) == [held.reservation_id]
        assert await reservations(caller, states=[pb.RESERVATION_STATE_SETTLED]) == []
        assert await reservations(caller, states=only, tenant="t1") == ids[1::2]
        assert await reservations(caller, states=only, route="r0") == ids[::2]
        assert await reservations(caller, states=only, priority=pb.PRIORITY_BATCH) == [ids[4]]
        assert await reservations(caller, states=only, pool=POOL, identity="anonymous") == ids
        assert await reservations(caller, states=only, identity="nobody") == []
        assert await reservations(caller, states=only, workspace="w") == []
        assert await reservations(caller, states=only, min_age=duration_pb2.Duration(seconds=30)) == []

        # The last of a page leaves before the next page is asked for.
        page = await caller.admin.ListReservations(pb.ListReservationsRequest(states=only, page_size=2))
        assert [each.reservation_id for each in page.reservations] == ids[:2]
        await caller.admin.CancelReservation(pb.CancelReservationRequest(reservation_id=ids[1]))
        rest = await caller.admin.ListReservations(
            pb.ListReservationsRequest(states=only, page_token=page.next_page_token)
        )
        assert [each.reservation_id for each in rest.reservations] == ids[2:]


async def test_waiting_reservations_are_shown_and_cancelled(caller: Caller, server: Server) -> None:
    await caller.reserve(input_tokens=59_900)
    first, second = (
        reserve(input_tokens=tokens, wait=60, tenant="acme", route="r", priority=pb.PRIORITY_BATCH)
        for tokens in (30_000, 20_000)
    )
    async with waiting(caller, server, first, second) as calls:
        shown = await get(caller, first.reservation_id)
        assert (shown.identity, shown.ledger, shown.pool) == ("anonymous", LEDGER, POOL)
        assert (shown.tenant, shown.route, shown.priority) == ("acme", "r", pb.PRIORITY_BATCH)
        assert shown.state == pb.RESERVATION_STATE_WAITING
        assert (shown.estimate.input_tokens, shown.estimate.requests) == (30_000, 1)
        assert shown.HasField("create_time")
        assert not shown.settlements
        assert not shown.HasField("grant_time")
        assert not shown.HasField("expire_time")

        update = pb.UpdateReservationRequest(reservation_id=first.reservation_id)
        update.expires_in.seconds = 10
        assert await refusal(caller.admin.UpdateReservation(update)) is grpc.StatusCode.FAILED_PRECONDITION
        cancel = pb.CancelReservationRequest(reservation_id=first.reservation_id, etag="0")
        assert await refusal(caller.admin.CancelReservation(cancel)) is grpc.StatusCode.ABORTED
        cancel.etag = shown.etag
        gone = (await caller.admin.CancelReservation(cancel)).reservation
        assert (gone.state, gone.tenant, gone.pool) == (pb.RESERVATION_STATE_RELEASED, "acme", POOL)
        assert gone.HasField("end_time")
        assert (await calls[0]).denial.reason == pb.DENIAL_REASON_RELEASED
        cancel.ClearField("etag")
        assert await refusal(caller.admin.CancelReservation(cancel)) is grpc.StatusCode.FAILED_PRECONDITION
        assert (await get(caller, first.reservation_id)).etag == gone.etag
        assert (await caller.reserve(first)).denial.reason == pb.DENIAL_REASON_RELEASED

        cancel = pb.CancelReservationRequest(reservation_id=second.reservation_id, not_sent=True)
        gone = (await caller.admin.CancelReservation(cancel)).reservation
        assert gone.state == pb.RESERVATION_STATE_RELEASED
        assert (await calls[1]).denial.reason == pb.DENIAL_REASON_RELEASED
        assert not len(waiters_of(server))
        assert len(state_of(server).open) == 1


async def test_a_waiting_reservation_goes_on_to_its_grant(caller: Caller, server: Server) -> None:
    await caller.reserve(input_tokens=59_900)
    request = reserve(input_tokens=1_000, wait=60)
    async with waiting(caller, server, request) as calls:
        waited = await get(caller, request.reservation_id)
        assert (await calls[0]).HasField("grant")
        granted = await get(caller, request.reservation_id)
        assert [waited.state, granted.state] == [pb.RESERVATION_STATE_WAITING, pb.RESERVATION_STATE_OPEN]
        assert waited.etag != granted.etag


async def test_queues_by_priority() -> None:
    async with running(TWO_POOLS) as server, calling(server) as caller:
        await caller.reserve(input_tokens=59_900)
        await caller.reserve(model=OTHER_MODEL, input_tokens=59_900)
        either = reserve(input_tokens=20_000, wait=60, priority=pb.PRIORITY_INTERACTIVE)
        for model in (OTHER_MODEL, MODEL):  # The second pool, and once more the first.
            either.candidates.add(target=pb.Target(model=model), estimate=either.candidates[0].estimate)
        batch = [reserve(input_tokens=1_000, wait=60, priority=pb.PRIORITY_BATCH) for _ in range(2)]
        async with waiting(caller, server, either, *batch):
            one = (await caller.admin.GetPool(pb.GetPoolRequest(name=POOL))).pool
            other = (await caller.admin.GetPool(pb.GetPoolRequest(name=OTHER_POOL))).pool
            assert [(queue.priority, queue.waiting) for queue in one.queues] == [
                (pb.PRIORITY_INTERACTIVE, 1),
                (pb.PRIORITY_BATCH, 2),
            ]
            assert [(queue.priority, queue.waiting) for queue in other.queues] == [(pb.PRIORITY_INTERACTIVE, 1)]
            waits = [queue.oldest_wait.ToMicroseconds() for queue in one.queues]
            assert waits[0] > waits[1] > 0
            ledger = (await caller.admin.GetLedger(pb.GetLedgerRequest(name=LEDGER))).ledger
            assert ledger.waiting_reservations == 3
            assert (await get(caller, either.reservation_id)).pool == POOL
            assert await reservations(caller, states=[pb.RESERVATION_STATE_WAITING], pool=OTHER_POOL) == [
                either.reservation_id
            ]
        await until(lambda: not len(waiters_of(server)))
        pool = (await caller.admin.GetPool(pb.GetPoolRequest(name=POOL))).pool
        assert not pool.queues


async def test_the_view_of_a_waiter_shows_its_latest_deadline(caller: Caller, server: Server) -> None:
    await caller.reserve(input_tokens=59_900)
    request = reserve(input_tokens=40_000, wait=50)
    key = f"anonymous/{request.reservation_id}"
    async with waiting(caller, server, request):
        (before,) = waiters_of(server)
        assert (before.key, before.pools, before.deadline - before.since) == (key, (POOL,), 50_000_000)
        request.max_wait.seconds = 60
        again = caller.coordinator.Reserve(request)

        def later() -> bool:
            found = waiters_of(server).get(key)
            return found is not None and found.deadline > before.deadline

        await until(later)
        request.max_wait.seconds = 0
        assert (await caller.reserve(request)).denial.reason == pb.DENIAL_REASON_TIMEOUT
        assert later()
        assert len(waiters_of(server)) == 1
        again.cancel()
    assert waiters_of(server).get("anonymous/unknown") is None


async def test_watch(caller: Caller) -> None:
    watch = caller.admin.Watch(pb.WatchRequest(pools=[POOL], reservations=True))
    kinds: set[str] = set()
    while True:
        message = await watch.read()
        assert isinstance(message, pb.WatchResponse)
        kinds |= {str(event.WhichOneof("resource")) for event in message.events}
        if message.phase == pb.WATCH_PHASE_SNAPSHOT_END:
            break
        assert not message.resume_token
    assert {"ledger", "pool"} <= kinds
    request = reserve()
    granted = await caller.reserve(request)
    token = ""
    async with asyncio.timeout(5):
        seen: list[pb.WatchEvent] = []
        while not any(event.HasField("reservation") for event in seen):
            message = await watch.read()
            assert isinstance(message, pb.WatchResponse)
            assert message.phase == pb.WATCH_PHASE_CHANGE
            seen += message.events
            token = message.resume_token or token
    watch.cancel()
    await caller.coordinator.Commit(commit(request, granted.grant.context))
    resumed = caller.admin.Watch(pb.WatchRequest(pools=[POOL], reservations=True, resume_token=token))
    async with asyncio.timeout(5):
        while True:
            message = await resumed.read()
            assert isinstance(message, pb.WatchResponse)
            assert message.phase == pb.WATCH_PHASE_CHANGE
            ends = [event.reservation for event in message.events if event.HasField("reservation")]
            if ends:
                break
    assert ends[0].state == pb.RESERVATION_STATE_SETTLED
    assert not any(event.pool.name not in ("", POOL) for event in message.events)
    resumed.cancel()
    old = caller.admin.Watch(pb.WatchRequest(resume_token="0.1"))
    assert await refusal(old.read()) is grpc.StatusCode.OUT_OF_RANGE
    unknown = caller.admin.Watch(pb.WatchRequest(pools=["x"]))
    assert await refusal(unknown.read()) is grpc.StatusCode.NOT_FOUND
