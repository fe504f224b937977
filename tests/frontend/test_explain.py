"""Explain through a server: what it says of waiting, open, ended and denied calls, and of one that is not made."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from paceline.engine.audit import Audit
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, POOL, Caller, calling, commit, new_id, reserve, running, until

# One call at once, then one every 5 s: two that wait are served before the deadline of their calls.
SMALL = {"accounts": {LEDGER: {"tier": "build", "pools": {"sonnet-4": {"requests": {"amount": 12, "burst": 1}}}}}}


async def explain(caller: Caller, number: str, **fields: Any) -> pb.ExplainResponse:
    request = pb.ExplainRequest(reservation_id=number, **fields)
    return await caller.admin.Explain(request, metadata=caller.metadata)


async def would(caller: Caller, identity: str = "", **fields: Any) -> pb.ExplainResponse:
    request = pb.ExplainRequest(request=reserve("", **fields), identity=identity)
    return await caller.admin.Explain(request, metadata=caller.metadata)


async def status(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = caught.value.code()
    assert isinstance(found, grpc.StatusCode)
    return found


async def test_a_waiting_a_denied_an_open_and_an_ended_call_say_why() -> None:
    async with running(SMALL) as server, calling(server) as caller:
        first, second, third, turned_down = (reserve(wait=50) for _ in range(4))
        granted = (await caller.reserve(first)).grant
        waiting = [asyncio.ensure_future(caller.reserve(request)) for request in (second,)]
        (slot,) = server.router.slots.values()
        await until(lambda: slot.engine is not None and len(slot.engine.waiters()) == 1)
        waiting.append(asyncio.ensure_future(caller.reserve(third)))
        await until(lambda: slot.engine is not None and len(slot.engine.waiters()) == 2)

        found = await explain(caller, third.reservation_id)
        assert found.reservation.state == pb.RESERVATION_STATE_WAITING
        assert not found.HasField("decision")
        began, now = found.steps[:2]
        assert began.HasField("time")
        assert began.message.startswith("began to wait; it needs 1 request, of which nothing was left")
        assert not now.HasField("time")
        assert (now.limit.pool, now.limit.dimension) == (POOL, pb.DIMENSION_REQUESTS)
        assert (now.needed, now.available, now.position, now.candidate_index) == (1, 0, 1, 0)
        assert 7 < now.wait.ToMilliseconds() / 1e3 <= 10
        assert "1 call comes first" in now.message

        turned_down.max_wait.seconds = 1
        denial = (await caller.reserve(turned_down)).denial
        assert "limit of requests" in denial.message
        found = await explain(caller, turned_down.reservation_id)
        assert found.reservation.state == pb.RESERVATION_STATE_UNSPECIFIED
        assert (found.reservation.reservation_id, found.reservation.pool) == (turned_down.reservation_id, POOL)
        assert found.decision.denial == denial
        assert found.decision.binding_dimension.dimension == pb.DIMENSION_REQUESTS
        (step,) = found.steps
        assert (step.needed, step.available, step.position) == (1, 0, 2)
        assert step.wait == denial.retry_after

        found = await explain(caller, first.reservation_id)
        assert found.reservation.state == pb.RESERVATION_STATE_OPEN
        assert (found.decision.grant.pool, found.decision.grant.context) == (POOL, b"")
        assert found.steps[0].message == "granted at once"
        assert "it is open" in found.steps[-1].message
        await caller.coordinator.Commit(commit(first, granted.context))
        found = await explain(caller, first.reservation_id)
        assert found.reservation.state == pb.RESERVATION_STATE_SETTLED
        assert [step.message.split(";")[0] for step in found.steps] == ["granted at once", "settled"]
        for each in waiting:
            each.cancel()
        await until(lambda: slot.engine is not None and not len(slot.engine.waiters()))
        # Withdrawn: its callers had gone.
        assert (await explain(caller, third.reservation_id)).steps[-1].message.startswith("given back")


async def test_what_is_not_known_says_so(caller: Caller) -> None:
    assert await status(explain(caller, new_id())) is grpc.StatusCode.NOT_FOUND
    assert await status(explain(caller, "x")) is grpc.StatusCode.INVALID_ARGUMENT
    assert await status(caller.admin.Explain(pb.ExplainRequest())) is grpc.StatusCode.INVALID_ARGUMENT
    assert await status(would(caller, model="")) is grpc.StatusCode.INVALID_ARGUMENT
    assert await status(would(caller, "nobody")) is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_grant_that_is_no_longer_among_the_newest_is_explained_from_the_books(caller: Caller) -> None:
    request = reserve()
    grant = (await caller.reserve(request)).grant
    (slot,) = caller.server.router.slots.values()
    assert slot.engine is not None
    audit = slot.engine.stats.audit
    audit.note(audit.of({f"anonymous/{request.reservation_id}"})[0])
    vars(audit).update(vars(Audit(most=0)))
    found = await explain(caller, request.reservation_id)
    assert found.decision.grant.pool == POOL
    assert "does not remember why" in found.steps[0].message
    await caller.coordinator.Commit(commit(request, grant.context))
    found = await explain(caller, request.reservation_id)
    assert [step.message for step in found.steps][-1] == "settled"


async def test_a_call_that_is_not_made_is_explained_and_leaves_nothing() -> None:
    async with running(SMALL) as server, calling(server) as caller:
        found = await would(caller)
        assert (found.decision.grant.pool, found.HasField("reservation")) == (POOL, False)
        assert "would be granted at once" in found.steps[0].message
        await caller.reserve()
        (slot,) = server.router.slots.values()
        assert slot.state is not None
        before = slot.state.digest()
        found = await would(caller)
        assert found.decision.denial.reason == pb.DENIAL_REASON_LIMIT
        assert 3 < found.decision.denial.retry_after.ToMilliseconds() / 1e3 <= 5
        assert (found.steps[0].needed, found.steps[0].available, found.steps[0].position) == (1, 0, 0)
        found = await would(caller, wait=30)
        assert not found.HasField("decision")
        assert 3 < found.steps[0].wait.ToMilliseconds() / 1e3 <= 5
        assert slot.state.digest() == before
        found = await would(caller, model="claude-of-tomorrow")
        assert "nothing was decided in this pool yet" in found.steps[0].message
        answer = (await caller.reserve()).denial
        assert answer.reason == pb.DENIAL_REASON_LIMIT


async def test_identities_are_kept_apart() -> None:
    tokens = {"ann": "a" * 20, "bob": "b" * 20}
    roles = ["call", "teach", "admin"]
    identities = [{"name": name, "token_env": name.upper(), "roles": roles, "tenants": [name]} for name in tokens]
    environ = {name.upper(): token for name, token in tokens.items()}
    async with (
        running(SMALL | {"identities": identities}, environ=environ) as server,
        calling(server, tokens["ann"]) as ann,
        calling(server, tokens["bob"]) as bob,
    ):
        request = reserve()
        await ann.reserve(request)
        await bob.reserve(request)
        assert await status(explain(ann, request.reservation_id)) is grpc.StatusCode.FAILED_PRECONDITION
        found = await explain(bob, request.reservation_id, identity="ann")
        assert (found.reservation.identity, found.reservation.tenant) == ("ann", "ann")
        assert (await explain(bob, request.reservation_id, identity="bob")).decision.HasField("denial")
        # For whom it is decided counts, not who asks.
        assert await status(would(ann, tenant="bob")) is grpc.StatusCode.PERMISSION_DENIED
        assert (await would(ann, "bob", tenant="bob")).decision.HasField("denial")
