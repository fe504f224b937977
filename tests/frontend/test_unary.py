"""The unary calls, end to end: real engine, real journal in memory, real connection."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import (
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
    succeeded,
    until,
    violations,
)


async def test_reserve_and_commit(caller: Caller) -> None:
    request = reserve()
    granted = await caller.reserve(request)
    grant = granted.grant
    assert grant.pool == POOL
    assert (grant.target.provider, grant.target.account, grant.target.model) == ("anthropic", "default", MODEL)
    assert grant.max_output_tokens == 100
    assert grant.expires_in.seconds == 300
    levels = {state.dimension: state.level for state in granted.dimensions if state.pool}
    assert levels == {
        pb.DIMENSION_REQUESTS: 59,
        pb.DIMENSION_INPUT_TOKENS: 59_900,
        pb.DIMENSION_OUTPUT_TOKENS: 5_900,
    }
    settled = await caller.coordinator.Commit(commit(request, grant.context))
    assert {each.dimension: (each.held, each.charged) for each in settled.settlements if each.pool} == {
        pb.DIMENSION_REQUESTS: (1, 1),
        pb.DIMENSION_INPUT_TOKENS: (100, 90),
        pb.DIMENSION_OUTPUT_TOKENS: (100, 80),
    }
    assert settled.cost.currency_code == "USD"
    assert settled.cost.nanos == 90 * 3_000 + 80 * 15_000
    again = await caller.coordinator.Commit(commit(request, grant.context))
    assert again.duplicate
    assert [each.charged for each in again.settlements] == [each.charged for each in settled.settlements]


async def test_a_retry_gets_the_same_grant(caller: Caller, server: Server) -> None:
    request = reserve()
    first = await caller.reserve(request)
    second = await caller.reserve(request)
    assert second.grant.context == first.grant.context
    assert len(state_of(server).open) == 1


async def test_a_denial_is_an_answer(caller: Caller) -> None:
    answer = await caller.reserve(input_tokens=70_000)
    assert answer.denial.reason == pb.DENIAL_REASON_TOO_LARGE
    assert answer.denial.pool == POOL
    assert answer.binding_dimension.dimension == pb.DIMENSION_INPUT_TOKENS
    assert not answer.denial.HasField("retry_after")
    await caller.reserve(input_tokens=59_900)
    answer = await caller.reserve(input_tokens=10_000)
    assert answer.denial.reason == pb.DENIAL_REASON_LIMIT
    assert 0 < answer.denial.retry_after.ToMicroseconds() <= 11_000_000


async def test_a_waiting_call_gets_its_turn(caller: Caller) -> None:
    await caller.reserve(input_tokens=59_900)
    answer = await caller.reserve(input_tokens=300, wait=5)
    assert answer.HasField("grant")
    assert answer.grant.waited.ToMicroseconds() > 0
    assert answer.binding_dimension.dimension == pb.DIMENSION_INPUT_TOKENS


async def test_the_answer_comes_before_the_deadline(caller: Caller) -> None:
    await caller.reserve(input_tokens=59_900)
    started = time.monotonic()
    answer = await caller.coordinator.Reserve(reserve(input_tokens=300, wait=60), timeout=0.19)
    assert time.monotonic() - started < 0.19
    assert answer.denial.reason in (pb.DENIAL_REASON_TIMEOUT, pb.DENIAL_REASON_LIMIT)


async def test_release_gives_everything_back(caller: Caller, server: Server) -> None:
    request = reserve()
    granted = await caller.reserve(request)
    release = pb.ReleaseRequest(reservation_id=request.reservation_id, context=granted.grant.context)
    assert (await caller.coordinator.Release(release)).released
    assert (await caller.coordinator.Release(release)).duplicate
    assert not state_of(server).open
    assert (await caller.reserve(request)).denial.reason == pb.DENIAL_REASON_RELEASED


async def test_release_of_an_unknown_id_leaves_a_tombstone(caller: Caller) -> None:
    request = reserve()
    released = await caller.coordinator.Release(pb.ReleaseRequest(reservation_id=request.reservation_id))
    assert released.tombstone
    assert (await caller.reserve(request)).denial.reason == pb.DENIAL_REASON_RELEASED


async def test_release_withdraws_a_waiting_call(caller: Caller) -> None:
    await caller.reserve(input_tokens=59_900)
    request = reserve(input_tokens=10_000, wait=60)
    waiting = asyncio.ensure_future(caller.reserve(request))
    await asyncio.sleep(0.1)
    released = await caller.coordinator.Release(pb.ReleaseRequest(reservation_id=request.reservation_id))
    assert released.released
    assert (await waiting).denial.reason == pb.DENIAL_REASON_RELEASED


async def test_renew(caller: Caller, server: Server) -> None:
    request = reserve()
    request.hold.seconds = 10
    granted = await caller.reserve(request)
    renew = pb.RenewRequest(reservation_id=request.reservation_id, context=granted.grant.context, output_tokens=500)
    renew.hold.seconds = 100
    renewed = await caller.coordinator.Renew(renew)
    assert 90 < renewed.expires_in.ToMicroseconds() / 1e6 <= 100
    (reservation,) = state_of(server).open.values()
    assert reservation.output_tokens == 500
    await caller.coordinator.Commit(commit(request, granted.grant.context))
    assert (await caller.coordinator.Renew(renew)).ended


async def test_headers_teach(caller: Caller) -> None:
    request = reserve()
    granted = await caller.reserve(request)
    renew = pb.RenewRequest(reservation_id=request.reservation_id, context=granted.grant.context)
    renew.observation.http_status = 200
    for name, value in (("limit", "60000"), ("remaining", "30000"), ("reset", "2026-11-22T12:00:30Z")):
        renew.observation.headers.add(name=f"Anthropic-RateLimit-Input-Tokens-{name}", value=value.encode())
    renew.observation.headers.add(name="date", value=b"Sun, 22 Nov 2026 12:00:00 GMT")
    renew.observation.header_age.SetInParent()
    await caller.coordinator.Renew(renew)
    pool = await caller.admin.GetPool(pb.GetPoolRequest(name=POOL))
    (limit,) = [each for each in pool.pool.limits if each.state.dimension == pb.DIMENSION_INPUT_TOKENS]
    assert 29_000 <= limit.state.level <= 32_000
    assert limit.adjusted < 0


async def test_observe(caller: Caller) -> None:
    request = pb.ObserveRequest(
        observation_id=new_id(), target=pb.Target(model=MODEL), tenant="acme", outcome=succeeded(1_000, 200)
    )
    booked = await caller.coordinator.Observe(request)
    assert {each.dimension: each.charged for each in booked.settlements if each.pool} == {
        pb.DIMENSION_REQUESTS: 1,
        pb.DIMENSION_INPUT_TOKENS: 1_000,
        pb.DIMENSION_OUTPUT_TOKENS: 200,
    }
    assert booked.cost.nanos == 1_000 * 3_000 + 200 * 15_000
    assert (await caller.coordinator.Observe(request)).duplicate


async def test_bulk(caller: Caller, server: Server) -> None:
    request = reserve(count=50, allow_partial=True, output_tokens=200)
    granted = await caller.reserve(request)
    children = list(granted.grant.child_reservation_ids)
    assert len(children) == 30  # 6,000 output tokens
    one = pb.CommitRequest(reservation_id=children[7], context=granted.grant.context, outcome=succeeded(90, 150))
    settled = await caller.coordinator.Commit(one)
    assert [each.held for each in settled.settlements if each.dimension == pb.DIMENSION_OUTPUT_TOKENS] == [200]
    release = pb.ReleaseRequest(reservation_id=request.reservation_id, context=granted.grant.context)
    assert (await caller.coordinator.Release(release)).released
    assert not state_of(server).open


async def test_a_smaller_answer_rather_than_none(caller: Caller) -> None:
    request = reserve(output_tokens=7_000)
    request.candidates[0].min_output_tokens = 2_000
    granted = await caller.reserve(request)
    assert granted.grant.max_output_tokens == 2_000
    assert granted.grant.candidate_index == 0


async def test_the_first_candidate_that_fits(caller: Caller) -> None:
    request = reserve(output_tokens=5_000)
    request.candidates.add(target=pb.Target(model=OTHER_MODEL), estimate=pb.Estimate(output_tokens=10))
    assert (await caller.reserve(request)).grant.candidate_index == 0
    request.reservation_id = new_id()
    second = await caller.reserve(request)
    assert second.grant.candidate_index == 1
    assert second.grant.target.model == OTHER_MODEL


async def test_a_commit_without_context(caller: Caller) -> None:
    request = reserve()
    await caller.reserve(request)
    settled = await caller.coordinator.Commit(commit(request, b""))
    assert {each.pool for each in settled.settlements} == {POOL, ""}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.coordinator.Commit(commit(reserve(), b""))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert violations(caught.value) == ["context"]


async def test_a_forgotten_grant_is_booked_from_its_context() -> None:
    async with running() as one, calling(one) as caller:
        key = await one.store.get_meta("frontend.context-key")
        assert key is not None
        request = reserve()
        granted = await caller.reserve(request)
    from paceline.ledger.memory import MemoryStore

    store = MemoryStore()
    await store.put_meta("frontend.context-key", key)
    async with running(store=store) as other, calling(other) as caller:
        await caller.reserve()  # The pool is defined by its first call.
        settled = await caller.coordinator.Commit(commit(request, granted.grant.context))
        assert settled.late
        assert [each.charged for each in settled.settlements][:1] == [1]


async def test_what_a_client_gave_up_is_withdrawn(caller: Caller, server: Server) -> None:
    await caller.reserve(input_tokens=59_900)
    request = reserve(input_tokens=10_000, wait=60)
    waiting = caller.coordinator.Reserve(request)
    await asyncio.sleep(0.1)
    engine = server.router.slots["default"].engine
    assert engine is not None
    assert engine.waiting() == {POOL: 1}
    waiting.cancel()
    await until(lambda: not engine.waiting())
    assert (await caller.reserve(request)).denial.reason == pb.DENIAL_REASON_RELEASED


async def test_a_retry_after_a_broken_connection_keeps_its_place(caller: Caller, server: Server) -> None:
    await caller.reserve(input_tokens=59_900)
    request = reserve(input_tokens=3_000, wait=60)
    first = caller.coordinator.Reserve(request)
    await asyncio.sleep(0.1)
    first.cancel()
    await asyncio.sleep(0.1)
    assert (await caller.reserve(request)).HasField("grant")
    await asyncio.sleep(1.2)
    assert any(key.endswith(request.reservation_id) for key in state_of(server).open)


async def test_unary_answers_carry_fallback_shares(caller: Caller) -> None:
    granted = await caller.reserve()
    (share,) = granted.fallback_shares
    assert share.pool == POOL
    assert {each.dimension: each.per_minute for each in share.amounts} == {
        pb.DIMENSION_REQUESTS: 30,
        pb.DIMENSION_INPUT_TOKENS: 30_000,
        pb.DIMENSION_OUTPUT_TOKENS: 3_000,
    }
    assert share.expires_in.seconds == 600


async def test_observe_mode() -> None:
    async with running({"modes": {"default": "observe"}}) as server, calling(server) as caller:
        answer = await caller.reserve(input_tokens=70_000)
        assert answer.HasField("grant")
        assert answer.observed_decision.reason == pb.DENIAL_REASON_TOO_LARGE


async def test_ladders() -> None:
    ladders = {"small": [{"model": MODEL, "max_output_tokens": 5_000}, {"model": OTHER_MODEL}]}
    async with running({"ladders": ladders}) as server, calling(server) as caller:
        request = pb.ReserveRequest(reservation_id=new_id(), ladder="small")
        request.ladder_estimate.output_tokens = 4_000
        first = await caller.reserve(request)
        assert first.grant.target.model == MODEL
        assert first.grant.max_output_tokens == 5_000
        request.reservation_id = new_id()
        assert (await caller.reserve(request)).grant.candidate_index == 1
        request.ladder = "none"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.reserve(request)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert violations(caught.value) == ["ladder"]


async def test_a_ladder_by_tenant_and_priority() -> None:
    ladders = {name: [{"model": MODEL, "max_output_tokens": most}] for name, most in LADDERS.items()}
    rules = [
        {"ladder": "chat", "tenant": "acme", "use": "acme"},
        {"ladder": "chat", "priority": "batch", "use": "batch"},
        {"ladder": "chat", "tenant": "acme", "priority": "interactive", "use": "urgent"},
    ]
    cases = [
        ("", pb.PRIORITY_UNSPECIFIED, "chat"),
        ("other", pb.PRIORITY_INTERACTIVE, "chat"),
        ("other", pb.PRIORITY_BATCH, "batch"),
        ("acme", pb.PRIORITY_STANDARD, "acme"),
        ("acme", pb.PRIORITY_BATCH, "acme"),
        ("acme", pb.PRIORITY_INTERACTIVE, "urgent"),
    ]
    async with running({"ladders": ladders, "ladder_rules": rules}) as server, calling(server) as caller:
        for tenant, priority, name in cases:
            request = pb.ReserveRequest(reservation_id=new_id(), ladder="chat", tenant=tenant, priority=priority)
            request.ladder_estimate.output_tokens = 10
            assert (await caller.reserve(request)).grant.max_output_tokens == LADDERS[name]
        # A ladder by its own name is nobody's but that.
        request = pb.ReserveRequest(reservation_id=new_id(), ladder="batch", tenant="acme")
        request.ladder_estimate.output_tokens = 10
        assert (await caller.reserve(request)).grant.max_output_tokens == LADDERS["batch"]


LADDERS = {"chat": 101, "acme": 102, "batch": 103, "urgent": 104}


async def test_a_smaller_output_is_a_rung() -> None:
    """Of a ladder over two accounts: in full at the first, in part there, then in full at the second."""
    accounts = {name: {"provider": "openai", "pools": {"gpt-5": {"requests": 60, "tokens": 2_000}}} for name in "ab"}
    rungs = [{"account": name, "model": "gpt-5", "max_output_tokens": 1_500} for name in "ab"]
    rungs[0]["min_output_tokens"] = 300
    async with running({"accounts": accounts, "ladders": {"chat": rungs}}) as server, calling(server) as caller:
        got = []
        for _ in range(4):
            request = pb.ReserveRequest(reservation_id=new_id(), ladder="chat")
            request.ladder_estimate.input_tokens = 10
            answer = await caller.reserve(request)
            got.append((answer.grant.target.account, answer.grant.max_output_tokens, answer.grant.candidate_index))
        assert got == [("a", 1_500, 0), ("a", 300, 0), ("b", 1_500, 1), ("", 0, 0)]


# -- several accounts ---------------------------------------------------------------------------------------------

TWO = {
    "accounts": {
        name: {"provider": "anthropic", "pools": {"sonnet-4": {"requests": 10, "input_tokens": 1_000}}}
        for name in ("default", "second")
    }
}


def either(reservation_id: str | None = None, wait: float = 0) -> pb.ReserveRequest:
    request = reserve(reservation_id, input_tokens=800, wait=wait)
    request.candidates.add(
        target=pb.Target(model=MODEL, account="second"), estimate=pb.Estimate(input_tokens=800, output_tokens=1)
    )
    return request


async def test_candidates_over_accounts() -> None:
    async with running(TWO) as server, calling(server) as caller:
        first = await caller.reserve(either())
        second = await caller.reserve(either())
        assert [each.grant.target.account for each in (first, second)] == ["default", "second"]
        assert second.grant.candidate_index == 1
        third = await caller.reserve(either())
        assert third.denial.reason == pb.DENIAL_REASON_LIMIT
        assert third.denial.retry_after.ToMicroseconds() > 0
        assert not server.desk.spreads.running
        assert not server.desk.undelivered


async def test_an_id_has_one_grant_over_all_accounts() -> None:
    async with running(TWO) as server, calling(server) as caller:
        await caller.reserve(account="default", input_tokens=800)
        request = either()
        granted = await caller.reserve(request)
        assert granted.grant.target.account == "second"
        # The first account has room again, but the id is the second's.
        await asyncio.sleep(0.1)
        again, twice = await asyncio.gather(caller.reserve(request), caller.reserve(request))
        assert again.grant.context == twice.grant.context == granted.grant.context
        other = reserve(request.reservation_id, account="default", input_tokens=1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.reserve(other)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert violations(caught.value) == ["reservation_id"]


@pytest.mark.parametrize(("place", "account"), [(0, "default"), (1, "second")])
async def test_waiting_over_accounts_takes_the_first_turn(place: int, account: str) -> None:
    async with running(TWO) as server, calling(server) as caller:
        await asyncio.gather(caller.reserve(either()), caller.reserve(either()))
        request = either()
        for each, candidate in enumerate(request.candidates):
            candidate.estimate.input_tokens = 210 if each == place else 400
        request.max_wait.seconds = 18
        granted = await caller.reserve(request)
        assert granted.grant.target.account == account
        assert granted.grant.candidate_index == place
        assert granted.grant.waited.ToMicroseconds() > 0
        engines = [slot.engine for slot in server.router.slots.values()]
        await until(lambda: not any(engine and engine.waiting() for engine in engines))
        assert sum(len(state_of(server, name).open) for name in TWO["accounts"]) == 3


async def test_whoever_waits_over_accounts_may_give_up() -> None:
    async with running(TWO) as server, calling(server) as caller:
        await asyncio.gather(caller.reserve(either()), caller.reserve(either()))
        waiting = caller.coordinator.Reserve(either(wait=60))
        engines = [slot.engine for slot in server.router.slots.values()]
        await until(lambda: all(engine and engine.waiting() for engine in engines))
        waiting.cancel()
        await until(lambda: not any(engine and engine.waiting() for engine in engines))
        await until(lambda: not server.desk.undelivered and not server.desk.spreads.running)


async def test_what_the_others_gave_up_hides_no_grant() -> None:
    """The id is withdrawn at the account that lost, and stands at the one that won."""
    async with running(TWO) as server, calling(server) as caller:
        await asyncio.gather(caller.reserve(either()), caller.reserve(either()))
        request = either()
        request.candidates[0].estimate.input_tokens = 400
        request.candidates[1].estimate.input_tokens = 240
        request.max_wait.seconds = 18
        granted = await caller.reserve(request)
        assert granted.grant.target.account == "second"
        await until(lambda: any(request.reservation_id in key for key in state_of(server).ended))
        assert (await caller.reserve(request)).grant.context == granted.grant.context
        renewed = await caller.coordinator.Renew(pb.RenewRequest(reservation_id=request.reservation_id))
        assert renewed.expires_in.ToMilliseconds() > 1_000
        settled = await caller.coordinator.Commit(commit(request, b""))
        assert settled.settlements[0].pool == "anthropic/second/sonnet-4"
        assert (await caller.coordinator.Commit(commit(request, b""))).duplicate


async def test_a_release_without_context_reaches_every_ledger() -> None:
    async with running(TWO) as server, calling(server) as caller:
        request = either()
        released = await caller.coordinator.Release(pb.ReleaseRequest(reservation_id=request.reservation_id))
        assert released.tombstone
        assert (await caller.reserve(request)).denial.reason == pb.DENIAL_REASON_RELEASED
        second = reserve(request.reservation_id, account="second", input_tokens=1)
        assert (await caller.reserve(second)).denial.reason == pb.DENIAL_REASON_RELEASED


async def test_accounts_are_capped() -> None:
    async with running({"limits": {"max_accounts": 1, "drain_timeout": "1s"}}) as server, calling(server) as caller:
        assert (await caller.reserve(account="new")).HasField("grant")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.reserve(account="newer")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert violations(caught.value) == ["candidates[0].target.account"]


async def test_an_id_is_for_one_call(caller: Caller, server: Server) -> None:
    request = reserve()
    first = await caller.reserve(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.reserve(reserve(request.reservation_id, model=OTHER_MODEL))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert violations(caught.value) == ["reservation_id"]
    # With the target among others, it is the grant that there is.
    both = reserve(request.reservation_id, model=OTHER_MODEL)
    both.candidates.append(request.candidates[0])
    again = await caller.reserve(both)
    assert (again.grant.target, again.grant.pool) == (first.grant.target, POOL)
    assert again.grant.candidate_index == 1
    assert [each.pool for each in state_of(server).open.values()] == [POOL]
    assert not server.desk.undelivered


async def test_a_bulk_has_a_bound_that_no_configuration_lifts() -> None:
    async with running({"limits": {"max_bulk": 5_000}}) as server, calling(server) as caller:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.reserve(count=1_001)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violations(caught.value) == ["count"]
        assert (await caller.reserve(count=1_000)).HasField("denial")
