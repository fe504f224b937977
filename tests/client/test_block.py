"""What the ways out of a block mean, and what is said of the call. For threads and for asyncio alike."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from paceline_client import AsyncClient, Candidate, Client, Denied, Grant, GrantBatch, RequestRefused
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Fake, denied, granted, until

HEADERS = {
    "Anthropic-RateLimit-Requests-Limit": "50",
    "anthropic-ratelimit-requests-remaining": "49",
    "retry-after": "7",
    "set-cookie": "secret",
    "x-request-body": "secret",
}


class Both:
    """A client of either kind, used from a coroutine."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    @asynccontextmanager
    async def reserve(self, **ask: Any) -> AsyncIterator[Grant]:
        if isinstance(self.client, AsyncClient):
            async with self.client.reserve(**ask) as grant:
                yield grant
        else:
            with self.client.reserve(**ask) as grant:
                yield grant

    @asynccontextmanager
    async def reserve_many(self, count: int, **ask: Any) -> AsyncIterator[GrantBatch]:
        if isinstance(self.client, AsyncClient):
            async with self.client.reserve_many(count, **ask) as grants:
                yield grants
        else:
            with self.client.reserve_many(count, **ask) as grants:
                yield grants

    async def flush(self) -> None:
        done = await self.client.flush(10) if isinstance(self.client, AsyncClient) else self.client.flush(10)
        assert done


@pytest.fixture(params=["sync", "async", "sync unary", "async unary"])
def both(
    request: pytest.FixtureRequest, connect: Callable[..., Client], connect_async: Callable[..., AsyncClient]
) -> Both:
    kind, _, transport = request.param.partition(" ")
    make: Callable[..., Client | AsyncClient] = connect if kind == "sync" else connect_async
    return Both(make(transport=transport or "session"))


async def test_a_call_is_reserved_and_committed(both: Both, server: Fake) -> None:
    ask = {"tenant": "chat", "workspace": "w", "route": "r", "priority": "interactive", "max_wait": 30, "hold": 90}
    async with both.reserve(model="m", input_tokens=1200, max_output_tokens=0, provider="p", **ask) as grant:
        assert grant
        assert grant.target.model == "m"
        assert grant.fields["pool"] == "pool/m"
        assert not grant.local
        grant.commit({"usage": {"input_tokens": 3, "output_tokens": 5}, "model": "m-2026"})
    await both.flush()
    (reserve,) = server.items("reserve")
    assert reserve.candidates[0].target == pb.Target(model="m", provider="p")
    assert reserve.candidates[0].estimate == pb.Estimate(input_tokens=1200, max_output_tokens=0)
    assert (reserve.tenant, reserve.workspace, reserve.route) == ("chat", "w", "r")
    assert reserve.priority == pb.PRIORITY_INTERACTIVE
    assert reserve.hold.seconds == 90
    assert 29 < reserve.max_wait.ToNanoseconds() / 1e9 <= 30
    (commit,) = server.items("commit")
    assert commit.reservation_id == reserve.reservation_id
    assert commit.context == b"context of " + reserve.reservation_id.encode()
    outcome = commit.outcome
    assert outcome.disposition == pb.DISPOSITION_SUCCEEDED
    assert outcome.usage_kind == pb.USAGE_KIND_FINAL
    assert outcome.usage == pb.Usage(input_tokens=3, output_tokens=5)
    assert outcome.served_model == "m-2026"
    assert not server.items("release")


async def test_what_was_booked_comes_back(both: Both, server: Fake) -> None:
    server.settlement.cost.currency_code = "USD"
    server.settlement.cost.nanos = 250_000_000
    server.settlement.settlements.add(pool="p", dimension=pb.DIMENSION_INPUT_TOKENS, charged=3)
    async with both.reserve(model="m") as grant:
        grant.commit_usage(input_tokens=3)
        assert grant.ended
    await both.flush()
    until(lambda: grant.settlement is not None)
    assert grant.settlement is not None
    assert (grant.settlement.cost, grant.settlement.currency) == (0.25, "USD")
    assert grant.settlement.charged == {"input_tokens": 3}


async def test_without_a_commit_the_usage_is_missing_and_that_is_said_once(
    both: Both, server: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "paceline_client"):
        for _ in range(3):
            async with both.reserve(model="m"):
                pass
    await both.flush()
    assert [each.outcome.usage_kind for each in server.items("commit")] == [pb.USAGE_KIND_MISSING] * 3
    assert {each.outcome.disposition for each in server.items("commit")} == {pb.DISPOSITION_SUCCEEDED}
    assert len(caplog.records) == 1


async def test_each_grant_ends_once(both: Both, server: Fake) -> None:
    async with both.reserve(model="m") as grant:
        grant.commit_usage(output_tokens=1)
        grant.commit_usage(output_tokens=2)
        grant.release()
        grant.report(HEADERS)
    await both.flush()
    assert [each.outcome.usage.output_tokens for each in server.items("commit")] == [1]
    assert not server.items("release")
    assert not server.items("renew")


@pytest.mark.parametrize("how", ["release", "not_sent", "not_sent, raised"])
async def test_a_call_that_was_not_made_gives_all_back(both: Both, server: Fake, how: str) -> None:
    grant: Grant | None = None
    try:
        async with both.reserve(model="m") as grant:
            if how == "release":
                grant.release()
            else:
                grant.not_sent()
            if how.endswith("raised"):
                raise KeyError("before the call")
    except KeyError:
        pass
    await both.flush()
    assert grant is not None
    assert [each.reservation_id for each in server.items("release")] == [grant.reservation_id]
    assert server.items("release")[0].context
    assert not server.items("commit")


class Status429(Exception):
    """As the SDKs of Anthropic and OpenAI have it."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__("the text has a prompt in it")
        self.status_code = status
        self.body = body
        self.response = SimpleNamespace(status_code=status, headers=HEADERS)


@pytest.mark.parametrize(
    ("status", "disposition"),
    [
        (429, pb.DISPOSITION_REJECTED),
        (529, pb.DISPOSITION_REJECTED),
        (400, pb.DISPOSITION_FAILED),
        (500, pb.DISPOSITION_FAILED),
    ],
)
async def test_an_error_of_an_sdk_tells_the_outcome(both: Both, server: Fake, status: int, disposition: int) -> None:
    body = {
        "type": "error",
        "error": {"type": "some_error", "message": "of the prompt", "details": {"error_code": "ramp"}},
    }
    with pytest.raises(Status429):
        async with both.reserve(model="m"):
            raise Status429(status, body)
    await both.flush()
    (commit,) = server.items("commit")
    assert commit.outcome.disposition == disposition
    assert commit.outcome.http_status == status
    assert {header.name for header in commit.outcome.headers} == {
        "anthropic-ratelimit-requests-limit",
        "anthropic-ratelimit-requests-remaining",
        "retry-after",
    }
    assert commit.outcome.HasField("header_age")
    assert commit.outcome.error.type == "some_error"
    assert commit.outcome.error.code == "ramp"
    # What is not about limits may quote the prompt.
    assert bool(commit.outcome.error.message) == (status in (429, 529))
    assert b"secret" not in commit.SerializeToString()


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionError("x"), ValueError("a bug of the caller")])
async def test_an_error_without_a_response_counts_as_sent(both: Both, server: Fake, error: Exception) -> None:
    with pytest.raises(type(error)):
        async with both.reserve(model="m"):
            raise error
    await both.flush()
    (commit,) = server.items("commit")
    assert commit.outcome.disposition == pb.DISPOSITION_NO_RESPONSE
    assert commit.outcome.usage_kind == pb.USAGE_KIND_MISSING


async def test_headers_go_at_once_and_only_once(both: Both, server: Fake) -> None:
    async with both.reserve(model="m") as grant:
        grant.report(HEADERS)
        renew = (await asyncio.to_thread(server.wait_for, "renew"))[0]
        assert renew.reservation_id == grant.reservation_id
        assert renew.observation.disposition == pb.DISPOSITION_UNSPECIFIED
        assert renew.observation.http_status == 200
        assert len(renew.observation.headers) == 3
        assert renew.observation.HasField("header_age")
        assert renew.observation.header_age.ToNanoseconds() < 5e9
        grant.commit_usage(output_tokens=1, headers=HEADERS)
    await both.flush()
    (commit,) = server.items("commit")
    assert not commit.outcome.headers


async def test_a_stream_that_breaks_is_aborted_with_what_is_known(both: Both, server: Fake) -> None:
    with pytest.raises(ConnectionError):  # noqa: PT012
        async with both.reserve(model="m") as grant:
            grant.report(HEADERS)
            grant.progress(17)
            grant.progress(11)
            raise ConnectionError
    await both.flush()
    (commit,) = server.items("commit")
    assert commit.outcome.disposition == pb.DISPOSITION_ABORTED
    assert commit.outcome.usage_kind == pb.USAGE_KIND_PARTIAL
    assert commit.outcome.usage == pb.Usage(output_tokens=17)


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_an_interrupted_call_may_have_been_counted(
    connect: Callable[..., Client], server: Fake, error: type[BaseException]
) -> None:
    client = connect()
    with pytest.raises(error), client.reserve(model="m"):
        raise error
    assert client.flush()
    (commit,) = server.items("commit")
    assert commit.outcome.disposition == pb.DISPOSITION_ABORTED
    assert commit.outcome.usage_kind == pb.USAGE_KIND_MISSING


async def test_a_cancelled_call_may_have_been_counted(connect_async: Callable[..., AsyncClient], server: Fake) -> None:
    client = connect_async()
    inside = asyncio.Event()

    async def call() -> None:
        async with client.reserve(model="m"):
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(call())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.flush()
    assert server.items("commit")[0].outcome.disposition == pb.DISPOSITION_ABORTED


async def test_a_call_cancelled_while_it_waits_is_released(
    connect_async: Callable[..., AsyncClient], server: Fake
) -> None:
    client = connect_async()
    server.on_reserve = lambda request: None
    task = asyncio.create_task(client.acquire(model="m", max_wait=60))
    reserve = (await asyncio.to_thread(server.wait_for, "reserve"))[0]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release = (await asyncio.to_thread(server.wait_for, "release"))[0]
    assert release.reservation_id == reserve.reservation_id
    assert not release.context
    assert [target.model for target in release.targets] == ["m"]
    # The grant that crossed it belongs to nobody, and is not an error.
    session = server.sessions[0]
    number = next(iter(session.open))
    session.send(pb.ResponseItem(number=number, reserve=granted(reserve)))
    assert await client.flush()
    assert client.statistics()["waiting"] == 0
    assert len(server.items("release")) == 1


async def test_a_call_cancelled_before_it_was_sent_leaves_nothing(
    connect_async: Callable[..., AsyncClient], server: Fake
) -> None:
    client = connect_async()
    async with client.reserve(model="warm") as grant:
        grant.release()
    task = asyncio.create_task(client.acquire(model="m"))
    await asyncio.sleep(0)  # it has asked, in this tick
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.flush()
    assert [each.candidates[0].target.model for each in server.items("reserve")] == ["warm"]


def test_an_interrupt_while_waiting_releases(
    connect: Callable[..., Client], server: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    server.on_reserve = lambda request: None

    class Interrupted:
        def deliver(self, operation: object) -> None:
            pass

        def wait(self) -> None:
            server.wait_for("reserve")
            raise KeyboardInterrupt

    assert client._desk is not None
    monkeypatch.setattr(client._desk.hub, "call", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.acquire(model="m", max_wait=60)
    assert server.wait_for("release")[0].reservation_id == server.items("reserve")[0].reservation_id


async def test_a_denial_says_why(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: denied(retry_after=1.5)
    with pytest.raises(Denied) as caught:
        async with both.reserve(model="m"):
            pytest.fail("it was denied")
    error = caught.value
    assert (error.reason, error.retry_after, error.pool, error.dimension, error.window, error.local) == (
        "limit",
        1.5,
        "pool/x",
        "input_tokens",
        "minute",
        False,
    )
    async with both.reserve(model="m", raise_on_denial=False) as grant:
        assert not grant
        assert grant.denial is not None
        assert grant.denial.reason == "limit"
        grant.commit({"usage": {"output_tokens": 1}})
    await both.flush()
    assert not server.items("commit")


async def test_errors_are_raised(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: status_pb2.Status(code=7, message="not this tenant")
    with pytest.raises(RequestRefused, match="PERMISSION_DENIED: not this tenant"):
        async with both.reserve(model="m"):
            pytest.fail("it was refused")


async def test_candidates_and_ladders(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: granted(request, candidate_index=1, max_output_tokens=64)
    ways = [Candidate("big", max_output_tokens=1024, min_output_tokens=64), Candidate("small", input_tokens=5)]
    async with both.reserve(candidates=ways) as grant:
        assert (grant.candidate_index, grant.max_output_tokens) == (1, 64)
        grant.release()
    async with both.reserve(ladder="cheap", input_tokens=9) as grant:
        assert grant.target.model == "of-the-ladder"
        grant.release()
    first, second = server.items("reserve")
    assert [each.target.model for each in first.candidates] == ["big", "small"]
    assert first.candidates[0].min_output_tokens == 64
    assert second.ladder == "cheap"
    assert not second.candidates
    assert second.ladder_estimate == pb.Estimate(input_tokens=9)


@pytest.mark.parametrize(
    "ask",
    [{}, {"model": "m", "ladder": "l"}, {"model": "m", "candidates": [Candidate("m")]}, {"model": "m", "max_wait": -1}],
)
def test_what_cannot_be_asked(connect: Callable[..., Client], ask: Any) -> None:
    with pytest.raises(ValueError, match=r"exactly one|max_wait"):
        connect().reserve(**ask)


def test_unknown_arguments_are_errors(connect: Callable[..., Client]) -> None:
    with pytest.raises(TypeError, match="tokens"):
        connect().reserve(model="m", tokens=1)  # type: ignore[call-arg]


async def test_calls_in_bulk(both: Both, server: Fake) -> None:
    async with both.reserve_many(4, model="m", allow_partial=True) as grants:
        assert len(grants) == 4
        for number, grant in enumerate(grants):
            if number == 0:
                grant.commit_usage(output_tokens=1)
            elif number == 2:
                break
    await both.flush()
    (reserve,) = server.items("reserve")
    assert reserve.count == 4
    assert reserve.allow_partial
    commits = sorted(server.items("commit"), key=lambda each: each.reservation_id)
    releases = server.items("release")
    assert [each.reservation_id[-4:] for each in commits] == ["0000", "0001", "0002"]
    assert [each.outcome.usage_kind for each in commits] == [pb.USAGE_KIND_FINAL, *[pb.USAGE_KIND_MISSING] * 2]
    assert [each.reservation_id[-4:] for each in releases] == ["0003"]
    assert {each.context for each in [*commits, *releases]} == {commits[0].context}


async def test_an_error_in_a_bulk_block_belongs_to_the_last(both: Both, server: Fake) -> None:
    with pytest.raises(Status429):  # noqa: PT012
        async with both.reserve_many(3, model="m") as grants:
            assert grants[0]
            assert grants[1]
            raise Status429(429, None)
    await both.flush()
    commits = sorted(server.items("commit"), key=lambda each: each.reservation_id)
    assert [each.outcome.disposition for each in commits] == [
        pb.DISPOSITION_NO_RESPONSE,
        pb.DISPOSITION_REJECTED,
    ]
    assert len(server.items("release")) == 1


async def test_a_child_is_a_block_of_its_own(both: Both, server: Fake) -> None:
    async with both.reserve_many(2, model="m") as grants:
        with grants[0] as one:
            one.commit_usage(output_tokens=1)
        with pytest.raises(Status429), grants[1]:
            raise Status429(429, None)
    await both.flush()
    commits = sorted(server.items("commit"), key=lambda each: each.reservation_id)
    assert [each.outcome.disposition for each in commits] == [
        pb.DISPOSITION_SUCCEEDED,
        pb.DISPOSITION_REJECTED,
    ]


async def test_long_calls_are_renewed(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: granted(request, hold=0.2)
    async with both.reserve(model="m") as grant:
        before = grant.expires_at
        grant.progress(5)
        renew = (await asyncio.to_thread(server.wait_for, "renew"))[0]
        assert renew.reservation_id == grant.reservation_id
        assert renew.context
        assert renew.output_tokens == 5
        assert not renew.HasField("hold")
        await asyncio.to_thread(until, lambda: grant.expires_at > before + 30)
        grant.commit_usage(output_tokens=9)
    await both.flush()
    assert len(server.items("renew")) == 1


async def test_a_call_that_ended_or_was_forgotten_is_not_renewed(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: granted(request, hold=0.1)
    async with both.reserve(model="m") as grant:
        grant.commit_usage(output_tokens=9)
    client = both.client
    forgotten = await client.acquire(model="m") if isinstance(client, AsyncClient) else client.acquire(model="m")
    del forgotten
    await asyncio.sleep(0.2)
    assert not server.items("renew")


async def test_a_batch_is_renewed_as_one(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: granted(request, hold=0.2)
    async with both.reserve_many(3, model="m") as grants:
        renew = (await asyncio.to_thread(server.wait_for, "renew"))[0]
        assert renew.reservation_id == server.items("reserve")[0].reservation_id
        await asyncio.to_thread(until, lambda: all(each.expires_at > 0 for each in grants))
        grants.release()
    assert len(server.items("renew")) == 1


async def test_calls_without_a_grant_are_observed(both: Both, server: Fake) -> None:
    both.client.observe(
        "m", {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}, route="1", tenant="t", headers=HEADERS
    )
    both.client.observe("m", error=Status429(429, None), route="2")
    both.client.observe("m", output_tokens=3, route="3")
    await both.flush()
    observed = {each.route: each for each in server.items("observe")}
    first, second, third = (observed[route].outcome for route in "123")
    assert first.usage == pb.Usage(input_tokens=7, output_tokens=2, cache_read_tokens=0)
    assert len(first.headers) == 3
    assert second.disposition == pb.DISPOSITION_REJECTED
    assert third.usage.output_tokens == 3
    assert observed["1"].tenant == "t"
    assert len({each.observation_id for each in server.items("observe")}) == 3


def test_many_threads_share_one_session(connect: Callable[..., Client], server: Fake) -> None:
    client, other = connect(), connect(tenant="other")

    def work() -> None:
        for each in (client, other) * 5:
            with each.reserve(model="m", max_wait=5) as grant:
                grant.commit_usage(output_tokens=1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.flush()
    assert len(server.items("commit")) == 80
    assert len(server.sessions) == 1
    assert sum(server.grants.values()) == len(server.grants) == 80


def test_several_loops_share_one_session(connect_async: Callable[..., AsyncClient], server: Fake) -> None:
    client = connect_async()

    async def work() -> None:
        async with client.reserve(model="m") as grant:
            grant.commit_usage(output_tokens=1)
        await client.flush()

    asyncio.run(work())
    asyncio.run(work())
    assert len(server.items("commit")) == 2
    assert len(server.sessions) == 1
