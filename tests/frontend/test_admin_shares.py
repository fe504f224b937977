"""UpdateShare: what it changes at once, what it refuses, and that it outlives restarts and files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.engine.waiting import Waiters
from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, POOL, Caller, calling, new_id, reserve, running, state_of, until

REQUESTS, INPUT = pb.DIMENSION_REQUESTS, pb.DIMENSION_INPUT_TOKENS
SHARES: dict[str, Any] = {
    "team": {
        "weight": 3,
        "cap": {"requests": 10},
        "guarantee": {"requests": 6},
        "tenants": ["acme"],
        "shares": {"app": {"guarantee": {"requests": 2}, "tenants": ["bee"]}},
    },
    "other": {"weight": 3, "cap": {"requests": 10}, "guarantee": {"requests": 6}, "tenants": ["solo"]},
}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running({"shares": SHARES}) as found:
        yield found


@pytest.fixture
async def caller(server: Server) -> AsyncIterator[Caller]:
    async with calling(server) as found:
        yield found


def units(dimension: pb.Dimension.ValueType, amount: int) -> pb.ShareAmount:
    return pb.ShareAmount(dimension=dimension, units=amount)


def part(dimension: pb.Dimension.ValueType, permille: int) -> pb.ShareAmount:
    return pb.ShareAmount(dimension=dimension, permille=permille)


def waiters_of(server: Server) -> Waiters:
    engine = server.router.slots[LEDGER].engine
    assert engine is not None
    return engine.waiters()


async def shown(caller: Caller, name: str = "team", pool: str = "") -> pb.Share:
    request = pb.GetShareRequest(ledger="" if pool else LEDGER, pool=pool, name=name)
    return (await caller.admin.GetShare(request)).share


async def update(caller: Caller, share: pb.Share, allow_missing: bool = False) -> pb.Share:
    share.ledger = share.ledger or LEDGER
    return (await caller.admin.UpdateShare(pb.UpdateShareRequest(share=share, allow_missing=allow_missing))).share


async def refused(caller: Caller, share: pb.Share, allow_missing: bool = False) -> tuple[grpc.StatusCode, str]:
    """The status and the field."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await update(caller, share, allow_missing)
    code = caught.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code, (caught.value.details() or "").partition(":")[0]


async def test_what_is_configured_is_shown(caller: Caller) -> None:
    share = await shown(caller)
    assert (share.weight, share.parent, list(share.dimensions)) == (3, "", [])
    assert [(each.dimension, each.window, each.units) for each in share.caps] == [(REQUESTS, pb.WINDOW_MINUTE, 10)]
    assert [each.units for each in share.guarantees] == [6]
    assert (await shown(caller, "team/app")).parent == "team"


async def test_a_cap_holds_at_once(caller: Caller) -> None:
    assert (await caller.reserve(tenant="solo")).HasField("grant")
    after = await update(caller, pb.Share(name="other", weight=2, caps=[units(REQUESTS, 1)]))
    assert (after.weight, [each.units for each in after.caps], list(after.guarantees)) == (2, [1], [])
    assert after.dimensions[0].limit == 1
    # The level stays, within the new burst.
    assert (await caller.reserve(tenant="solo")).HasField("grant")
    denied = await caller.reserve(tenant="solo")
    assert (denied.HasField("denial"), denied.binding_dimension.share) == (True, "other")
    assert (await caller.reserve(tenant="else")).HasField("grant")


async def test_a_raised_cap_serves_those_who_wait(caller: Caller, server: Server) -> None:
    await update(caller, pb.Share(name="other", caps=[units(REQUESTS, 6)]))
    for _ in range(6):
        assert (await caller.reserve(tenant="solo")).HasField("grant")
    waiting = asyncio.ensure_future(caller.reserve(reserve(tenant="solo", wait=15)))
    await until(lambda: len(waiters_of(server)) == 1)
    await update(caller, pb.Share(name="other"))
    async with asyncio.timeout(2):
        assert (await waiting).HasField("grant")


async def test_a_part_follows_the_limit_of_the_pool(caller: Caller) -> None:
    await update(caller, pb.Share(name="team", caps=[part(INPUT, 250)], guarantees=[part(REQUESTS, 100)]))
    assert (await caller.reserve(tenant="acme")).HasField("grant")
    found = await shown(caller, pool=POOL)
    assert [each.permille for each in (*found.caps, *found.guarantees)] == [250, 100]
    limits = {each.dimension: each.limit for each in found.dimensions if each.HasField("limit")}
    assert limits == {INPUT: 15_000}
    change = pb.UpdateLimitRequest(
        limit=pb.DimensionRef(pool=POOL, dimension=INPUT), override=pb.LimitOverride(limit=8_000)
    )
    await caller.admin.UpdateLimit(change)
    (state,) = [each for each in (await shown(caller, pool=POOL)).dimensions if each.dimension == INPUT]
    assert (state.limit, state.burst) == (2_000, 2_000)
    assert state.level <= 2_000


async def test_an_etag_guards_and_the_same_again_is_no_change(caller: Caller, server: Server) -> None:
    before = await shown(caller)
    share = pb.Share(name="team", weight=5, etag=before.etag)
    after = await update(caller, share)
    assert after.etag != before.etag
    sequence = server.router.slots[LEDGER].owner.sequence
    assert await refused(caller, share) == (grpc.StatusCode.ABORTED, "share.etag")
    share.ClearField("etag")
    assert (await update(caller, share)).etag == after.etag
    assert server.router.slots[LEDGER].owner.sequence == sequence


async def test_what_cannot_be_is_refused(caller: Caller) -> None:
    bad, gone, not_now = (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
    spend = pb.DIMENSION_SPEND
    cases: list[tuple[pb.Share, tuple[grpc.StatusCode, str]]] = [
        (pb.Share(), (bad, "share.name")),
        (pb.Share(name="team//app"), (bad, "share.name")),
        (pb.Share(name="/".join("abcdefghi")), (bad, "share.name")),
        (pb.Share(name="team/app", parent="other"), (bad, "share.parent")),
        (pb.Share(name="new"), (gone, "share.name")),
        (pb.Share(name="team", ledger="x"), (gone, "share.ledger")),
        (pb.Share(name="team", pool=POOL), (grpc.StatusCode.UNIMPLEMENTED, "share.pool")),
        (pb.Share(name="team", weight=-1), (bad, "share.weight")),
        (pb.Share(name="team", caps=[pb.ShareAmount(dimension=REQUESTS)]), (bad, "share.caps[0].units")),
        (pb.Share(name="team", caps=[pb.ShareAmount(units=1)]), (bad, "share.caps[0].dimension")),
        (pb.Share(name="team", caps=[units(REQUESTS, -1)]), (bad, "share.caps[0].units")),
        (pb.Share(name="team", caps=[units(REQUESTS, 1), part(REQUESTS, 1)]), (bad, "share.caps[1]")),
        (pb.Share(name="team", caps=[part(REQUESTS, 1_001)]), (bad, "share.caps[0].permille")),
        (pb.Share(name="team", caps=[part(spend, 1)]), (bad, "share.caps[0].permille")),
        (pb.Share(name="team", guarantees=[units(spend, 1)]), (bad, "share.guarantees[0]")),
        # More than the app in it is promised, than the caps, than the pool has.
        (pb.Share(name="team", guarantees=[units(REQUESTS, 1)]), (not_now, "share.guarantees")),
        (pb.Share(name="team", caps=[units(REQUESTS, 1)]), (not_now, "share.caps")),
        (pb.Share(name="team/app", guarantees=[units(REQUESTS, 7)]), (not_now, "share.guarantees")),
        (pb.Share(name="team/app", guarantees=[part(REQUESTS, 200)]), (not_now, "share.guarantees")),
        (pb.Share(name="other", guarantees=[units(REQUESTS, 1_000_000)]), (not_now, "share.guarantees")),
        (pb.Share(name="other", guarantees=[part(REQUESTS, 1_000)]), (not_now, "share.guarantees")),
    ]
    before = [await shown(caller, name) for name in ("team", "team/app", "other")]
    for share, expected in cases:
        assert await refused(caller, share) == expected, share
    assert [await shown(caller, name) for name in ("team", "team/app", "other")] == before
    assert await refused(caller, pb.Share(name="none/new"), allow_missing=True) == (gone, "share.parent")
    made = await update(caller, pb.Share(name="other/new", weight=7), allow_missing=True)
    assert (made.parent, made.weight) == ("other", 7)
    await update(caller, pb.Share(name="other", guarantees=[units(REQUESTS, 54)]))


async def test_a_change_outlives_restarts_and_files(tmp_path: Path) -> None:
    kept = {"store": f"embedded:{tmp_path / 'store'}"}
    async with running({**kept, "shares": SHARES}) as server, calling(server) as caller:
        await update(caller, pb.Share(name="team", weight=9))
    other: dict[str, Any] = {**SHARES, "team": {**SHARES["team"], "weight": 4}}
    async with running({**kept, "shares": other}) as server, calling(server) as caller:
        share = await shown(caller)
        assert (share.weight, list(share.caps)) == (9, [])
        # What the file says ends the override: the next file rules.
        share.weight = 4
        share.caps.append(units(REQUESTS, 10))
        share.guarantees.append(units(REQUESTS, 6))
        await update(caller, share)
        assert not state_of(server).shares["team"].override
    async with running({**kept, "shares": SHARES}) as server, calling(server) as caller:
        assert (await shown(caller)).weight == 3


async def test_bulk_is_stopped_by_the_cap_of_a_share(caller: Caller) -> None:
    request = reserve(new_id(), tenant="acme")
    request.count = 11
    assert (await caller.reserve(request)).HasField("denial")
    request = reserve(new_id(), tenant="acme")
    request.count = 10
    assert (await caller.reserve(request)).HasField("grant")
