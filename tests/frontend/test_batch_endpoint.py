"""Batch endpoints: a pool of their own, in which a batch is one request and its calls queue until it has ended."""

from __future__ import annotations

from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, MODEL, POOL, Caller, calling, commit, new_id, running

BATCHES = "anthropic/default/batches"
OPENAI = {
    "catalogue": {
        "profiles": {
            # The queue of an organization counts input tokens; `queued_requests` is the gauge that stands for it.
            "openai-batches": {"charges": {"queued_requests": {"hold": {"input": 1, "cached": 1}}}}
        },
        "providers": {
            "openai": {
                "endpoints": {
                    "batches": {"names": ["batches", "v1/batches"], "pool": "batches", "profile": "openai-batches"}
                }
            }
        },
    },
    "accounts": {LEDGER: {"provider": "openai", "pools": {"batches": {"queued_requests": 1_000_000}}}},
}


def batch(requests: int, model: str = MODEL, tenant: str = "", input_tokens: int = 0) -> pb.ReserveRequest:
    estimate = pb.Estimate(requests=requests, input_tokens=input_tokens, output_tokens=1)
    target = pb.Target(provider="openai" if input_tokens else "", model=model, endpoint="batches")
    candidate = pb.Candidate(target=target, estimate=estimate)
    return pb.ReserveRequest(reservation_id=new_id(), candidates=[candidate], tenant=tenant)


async def held(caller: Caller, pool: str) -> dict[int, int]:
    found = (await caller.admin.GetPool(pb.GetPoolRequest(name=pool))).pool
    return {limit.state.dimension: limit.state.held for limit in found.limits}


async def test_a_batch_books_in_the_pool_of_batches_until_it_has_ended() -> None:
    requests, queued = pb.DIMENSION_REQUESTS, pb.DIMENSION_QUEUED_REQUESTS
    shares = {"team": {"cap": {"queued_requests": 150_000}, "tenants": ["acme"]}}
    async with running({"shares": shares}) as server, calling(server) as caller:
        first = batch(100_000, tenant="acme")
        grant = (await caller.reserve(first)).grant
        assert await held(caller, BATCHES) == {requests: 100, queued: 100_000}
        assert not any((await held(caller, POOL)).values())
        # A share's cap holds there too, then the limit of the tier.
        denied = await caller.reserve(batch(60_000, tenant="acme"))
        assert (denied.HasField("denial"), denied.binding_dimension.share) == (True, "team")
        assert (await caller.reserve(batch(190_000))).HasField("grant")
        denied = await caller.reserve(batch(20_000))
        assert (denied.HasField("denial"), denied.binding_dimension.dimension) == (True, queued)
        await caller.coordinator.Commit(commit(first, grant.context))
        assert (await held(caller, BATCHES))[queued] == 190_000
        assert (await caller.reserve(batch(20_000))).HasField("grant")


async def test_a_queue_that_counts_tokens_can_be_described() -> None:
    async with running(OPENAI) as server, calling(server) as caller:
        assert (await caller.reserve(batch(500, "gpt-5", input_tokens=900_000))).HasField("grant")
        assert await held(caller, "openai/default/batches") == {pb.DIMENSION_QUEUED_REQUESTS: 900_000}
        assert (await caller.reserve(batch(500, "gpt-5", input_tokens=200_000))).HasField("denial")
