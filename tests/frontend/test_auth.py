"""Who may do what."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import pytest

from paceline.frontend.auth import Authenticator, Caller, Identity, digest_of
from paceline.frontend.errors import Code, Problem
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import POOL, calling, commit, reserve, running, state_of


def spec(name: str, token: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "token_sha256": hashlib.sha256(token.encode()).hexdigest(), **fields}


IDENTITIES = {
    "identities": [
        spec("chat", "chat-token", tenants=["acme", "beta-*"], roles=["call"]),
        spec("batch", "batch-token", tenants=["*"]),
        spec("one", "one-token", tenants=["only"], workspaces=["team"]),
        spec("boss", "boss-token", roles=["admin"]),
    ],
    "shares": {"team": {"cap": {"requests": 5}}, "other": {}},
}


async def refusal(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = caught.value.code()
    assert isinstance(found, grpc.StatusCode)
    return found


async def test_tokens() -> None:
    async with running(IDENTITIES) as server:
        for token in (None, "", "wrong", "chat-token2"):
            async with calling(server, token) as caller:
                assert await refusal(caller.reserve(tenant="acme")) is grpc.StatusCode.UNAUTHENTICATED
                answer = caller.coordinator.Session(metadata=caller.metadata).read()
                assert await refusal(answer) is grpc.StatusCode.UNAUTHENTICATED
        async with calling(server, "chat-token") as caller:
            assert (await caller.reserve(tenant="acme")).HasField("grant")
            assert next(iter(state_of(server).open)).startswith("chat/")


async def test_tenants_and_workspaces() -> None:
    async with running(IDENTITIES) as server:
        async with calling(server, "chat-token") as caller:
            assert (await caller.reserve(tenant="beta-7")).HasField("grant")
            assert await refusal(caller.reserve(tenant="other")) is grpc.StatusCode.PERMISSION_DENIED
            assert await refusal(caller.reserve()) is grpc.StatusCode.PERMISSION_DENIED
        async with calling(server, "batch-token") as caller:
            assert (await caller.reserve(tenant="whoever")).HasField("grant")
            assert (await caller.reserve()).HasField("grant")
        async with calling(server, "one-token") as caller:
            granted = await caller.reserve()
            assert {state.share for state in granted.dimensions} == {"", "team"}
            reservation = list(state_of(server).open.values())[-1]
            assert reservation.tenant == "only"
            assert await refusal(caller.reserve(workspace="other")) is grpc.StatusCode.PERMISSION_DENIED


async def test_ids_are_per_identity() -> None:
    async with (
        running(IDENTITIES) as server,
        calling(server, "chat-token") as chat,
        calling(server, "batch-token") as batch,
    ):
        request = reserve(tenant="acme")
        mine = await chat.reserve(request)
        other = await batch.reserve(request)
        assert mine.grant.context != other.grant.context
        assert len(state_of(server).open) == 2
        # Another's context is as good as a forged one.
        assert await refusal(
            batch.coordinator.Commit(commit(request, mine.grant.context), metadata=batch.metadata)
        ) is (grpc.StatusCode.INVALID_ARGUMENT)
        found = await refusal(batch.admin.ListPools(pb.ListPoolsRequest(), metadata=batch.metadata))
        assert found is grpc.StatusCode.PERMISSION_DENIED


async def test_only_teachers_teach() -> None:
    async with running(IDENTITIES) as server, calling(server, "chat-token") as caller:
        request = reserve(tenant="acme")
        granted = await caller.reserve(request)
        message = commit(request, granted.grant.context)
        message.outcome.http_status = 429
        message.outcome.error.type = "rate_limit_error"
        message.outcome.error.retry_after.seconds = 60
        await caller.coordinator.Commit(message, metadata=caller.metadata)
        assert state_of(server).pools[POOL].blocked_until == 0
        assert (await caller.reserve(tenant="acme")).HasField("grant")


async def test_administration_needs_its_role() -> None:
    async with running(IDENTITIES) as server:
        async with calling(server, "boss-token") as boss:
            ledgers = await boss.admin.ListLedgers(pb.ListLedgersRequest(), metadata=boss.metadata)
            assert len(ledgers.ledgers) == 1
            assert await refusal(boss.reserve()) is grpc.StatusCode.PERMISSION_DENIED
        async with calling(server, "chat-token") as chat:
            for call in (
                chat.admin.ListLedgers(pb.ListLedgersRequest(), metadata=chat.metadata),
                chat.admin.Watch(pb.WatchRequest(), metadata=chat.metadata).read(),
            ):
                assert await refusal(call) is grpc.StatusCode.PERMISSION_DENIED


def test_how_a_token_is_sent() -> None:
    known = Authenticator([Identity("a", (digest_of("x"), digest_of("y")))])
    assert known.identify([("authorization", "Bearer x")]).name == "a"
    assert known.identify([("authorization", "bearer y")]).name == "a"
    for metadata in (
        [],
        [("authorization", "x")],
        [("authorization", "Basic x")],
        [("authorization", "Bearer x"), ("authorization", "Bearer y")],
        [("authorization", b"Bearer \xff")],
    ):
        with pytest.raises(Problem) as caught:
            known.identify(metadata)
        assert caught.value.code is Code.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("patterns", "name", "allowed"),
    [
        (None, "any", True),
        ((), "", True),
        ((), "a", False),
        (("a",), "", False),
        (("a",), "a", True),
        (("*",), "", True),
        (("a*",), "ab", True),
        (("a*",), "b", False),
        (("[a]",), "a", False),
        (("[a]",), "[a]", True),
        (("a?",), "ab", False),
    ],
)
def test_patterns(patterns: tuple[str, ...] | None, name: str, allowed: bool) -> None:
    caller = Caller(Identity("a", tenants=patterns))
    if allowed:
        caller.check_tenant(name)
    else:
        with pytest.raises(Problem):
            caller.check_tenant(name)
