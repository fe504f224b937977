"""Observe mode: calls go ahead at once, and the coordinator is told behind them."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import paceline_client
from paceline_client import AsyncClient, Client, _core
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Fake, granted, until
from tests.ports import nobody

MODEL = "claude-sonnet-4-5"
AGES = 30.0
"""A budget that nobody would overlook, if a call waited for it."""
Connect = Callable[..., Client]


@pytest.fixture(name="nobody")
def nobody_() -> Iterator[str]:
    """An address where nobody listens."""
    with nobody() as address:
        yield address


def observed(request: pb.ReserveRequest) -> pb.ReserveResponse:
    """As a server in observe mode answers."""
    answer = granted(request)
    answer.observed_decision.reason = pb.DENIAL_REASON_LIMIT
    return answer


def call(client: Client, **ask: Any) -> float:
    """Make one call; the time that it took in this thread."""
    before = time.perf_counter()
    with client.reserve(model=MODEL, input_tokens=100, max_wait=30, **ask) as grant:
        grant.report({"anthropic-ratelimit-requests-limit": "50"})
        grant.commit_usage(input_tokens=90, output_tokens=5)
    assert grant
    return time.perf_counter() - before


# -- nobody answers ---------------------------------------------------------------------------------------------------


def test_a_dead_server_costs_nothing_and_fails_nothing(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "MAX_BEHIND", 100)
    monkeypatch.setattr(_core, "MAX_REPORTS", 200)
    with Client(nobody, mode="observe", budget=AGES, policy="closed") as client:
        call(client)
        took = [call(client) for _ in range(2_000)]
        assert statistics.median(took) < 0.001
        assert sum(took) < 2_000 * 0.001
        assert max(took) < 0.25
        said = client.statistics()
        assert said["unobserved"] == 1 + 2_000 - 100
        # What is kept stays bounded; what is dropped is counted.
        assert said["waiting"] == 100
        assert said["unacknowledged_reports"] == 200
        assert said["dropped_reports"] == 1 + 2_000 - 100 - 200
        with client.reserve_many(10, model=MODEL) as grants:
            for grant in grants:
                grant.commit_usage(input_tokens=1, output_tokens=1)
        with client.reserve(ladder="never heard of") as grant:
            grant.commit_usage(input_tokens=1, output_tokens=1)
        with client.reserve(model=MODEL) as grant:
            grant.not_sent()
        client.close(0)


async def test_the_same_for_asyncio(nobody: str) -> None:
    async with AsyncClient(nobody, mode="observe", budget=AGES, policy="closed") as client:

        async def one() -> float:
            before = time.perf_counter()
            async with client.reserve(model=MODEL, max_wait=30) as grant:
                took = time.perf_counter() - before
                await asyncio.sleep(0)
                grant.commit_usage(input_tokens=90, output_tokens=5)
            return took

        await one()
        took = await asyncio.gather(*(one() for _ in range(500)))
        assert statistics.median(took) < 0.001
        async with client.reserve_many(3, model=MODEL) as grants:
            assert len(grants) == 3
            grants.release()
        await client.aclose(0)


def test_a_server_that_says_nothing_costs_nothing(server: Fake, connect: Connect) -> None:
    server.mute = True
    client = connect(mode="observe", budget=0.1)
    call(client)
    server.wait_for("reserve")
    took = [call(client) for _ in range(200)]
    assert statistics.median(took) < 0.001
    # When the budget is over they count as calls without a grant, and their reserves are withdrawn.
    until(lambda: client.statistics()["waiting"] == 0)
    server.mute = False
    # What it never answered is sent again.
    server.break_sessions()
    assert client.flush(10)
    observes, commits = server.items("observe"), {each.reservation_id for each in server.items("commit")}
    assert len({each.observation_id for each in observes}) + len(commits) == 201
    assert observes
    withdrawn = {each.reservation_id for each in server.items("release")}
    assert withdrawn
    assert not withdrawn & commits


def test_a_refusal_by_the_coordinator_is_no_failure(server: Fake, connect: Connect) -> None:
    server.on_reserve = lambda request: status_pb2.Status(code=9, message="an unknown target")
    client = connect(mode="observe")
    call(client)
    (seen,) = server.wait_for("observe")
    assert seen.target.model == MODEL
    # The headers were not sent before: there was nothing to send them for.
    assert [header.name for header in seen.outcome.headers] == ["anthropic-ratelimit-requests-limit"]


# -- the coordinator is told ------------------------------------------------------------------------------------------


def test_the_reserve_goes_behind_and_the_commit_follows(server: Fake, connect: Connect) -> None:
    client = connect(mode="observe", tenant="chat")
    call(client, candidates=None, route="greeting")
    (reserve,) = server.wait_for("reserve")
    assert reserve.observe_only
    assert (reserve.tenant, reserve.route) == ("chat", "greeting")
    # What the call would wait is part of the question.
    assert 25 < reserve.max_wait.seconds <= 30
    (commit,) = server.wait_for("commit")
    assert commit.reservation_id == reserve.reservation_id
    assert commit.context == b"context of " + reserve.reservation_id.encode()
    assert commit.outcome.usage.input_tokens == 90
    assert not server.items("observe")
    assert client.flush(5)


def test_what_is_said_before_the_answer_is_sent_after_it(server: Fake, connect: Connect) -> None:
    client = connect(mode="observe")
    client.acquire(model=MODEL).release()
    server.wait_for("release")
    server.mute = True
    with client.reserve(model=MODEL) as grant:
        server.wait_for("reserve", 2)
        grant.report({"anthropic-ratelimit-requests-limit": "50"})
        grant.commit_usage(input_tokens=1, output_tokens=2)
    other = client.acquire(model=MODEL)
    server.wait_for("reserve", 3)
    other.release()
    time.sleep(0.05)
    assert len(server.items("release")) == 1
    assert not server.items("renew")
    assert not server.items("commit")
    assert not client.flush(0.01)
    # The answers come.
    server.mute = False
    (session,) = server.sessions
    for number, item in list(session.open.items()):
        session.send(pb.ResponseItem(number=number, reserve=granted(item.reserve)))
    (commit,) = server.wait_for("commit")
    (renew,) = server.wait_for("renew")
    assert commit.reservation_id == renew.reservation_id == grant.reservation_id
    assert server.wait_for("release", 2)[1].reservation_id == other.reservation_id
    assert [header.name for header in renew.observation.headers] == ["anthropic-ratelimit-requests-limit"]
    assert client.flush(5)


@pytest.mark.parametrize("count", [1, 3])
def test_calls_in_bulk_are_committed_under_the_ids_of_the_server(server: Fake, connect: Connect, count: int) -> None:
    client = connect(mode="observe")
    with client.reserve_many(count, model=MODEL) as grants:
        for grant in grants:
            grant.commit_usage(input_tokens=1, output_tokens=1)
            if count > 1:
                break
    (reserve,) = server.wait_for("reserve")
    assert reserve.count == count
    ids = list(granted(reserve).grant.child_reservation_ids) or [reserve.reservation_id]
    assert [each.reservation_id for each in server.wait_for("commit")] == ids[:1]
    if count > 1:
        assert [each.reservation_id for each in server.wait_for("release", count - 1)] == ids[1:]


def test_a_ladder_is_learned(server: Fake, connect: Connect) -> None:
    client = connect(mode="observe")
    with client.reserve(ladder="fast") as grant:
        assert grant.target.model == ""
        grant.commit_usage(input_tokens=1, output_tokens=1)
    server.wait_for("commit")
    with client.reserve(ladder="fast") as grant:
        assert grant.target.model == "of-the-ladder"
        grant.commit_usage(input_tokens=1, output_tokens=1)
    server.wait_for("commit", 2)


def test_a_grant_of_another_candidate_is_given_back(server: Fake, connect: Connect) -> None:
    server.on_reserve = lambda request: granted(request, candidate_index=1)
    client = connect(mode="observe")
    grant = client.acquire(model=MODEL)
    grant.commit_usage(input_tokens=1, output_tokens=1)
    (release,) = server.wait_for("release")
    assert release.reservation_id == grant.reservation_id
    (seen,) = server.wait_for("observe")
    assert seen.target.model == MODEL


async def test_asyncio_tells_too(server: Fake, connect_async: Callable[..., AsyncClient]) -> None:
    client = connect_async(mode="observe")
    grants = [await client.acquire(model=MODEL) for _ in range(5)]
    for grant in grants:
        grant.commit_usage(input_tokens=1, output_tokens=1)
    assert await client.flush(5)
    assert {each.reservation_id for each in server.items("commit")} == {grant.reservation_id for grant in grants}
    assert not server.items("observe")


def test_a_server_that_goes_and_comes_back(server: Fake, connect: Connect) -> None:
    client = connect(mode="observe", budget=0.2)
    call(client)
    server.wait_for("commit")
    server.stop()
    took = [call(client) for _ in range(50)]
    assert max(took) < 0.1
    time.sleep(0.3)
    took = [call(client) for _ in range(50)]
    assert max(took) < 0.1
    server.start()
    until(lambda: bool(client.statistics()["connected"]))
    assert client.flush(10)
    before = len(server.items("commit"))
    call(client)
    server.wait_for("commit", before + 1)
    # Each call is told of once, as one with a grant or as one without.
    assert len(server.items("observe")) + len(server.items("commit")) == 102


def test_long_calls_are_renewed(server: Fake, connect: Connect) -> None:
    server.on_reserve = lambda request: granted(request, hold=0.3)
    client = connect(mode="observe")
    grant = client.acquire(model=MODEL)
    (renew,) = server.wait_for("renew")
    assert renew.reservation_id == grant.reservation_id
    assert renew.context
    grant.release()


# -- the mode of the server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["local", "closed"])
def test_what_the_server_only_observes_goes_on_when_it_dies(server: Fake, connect: Connect, policy: str) -> None:
    server.on_reserve = observed
    client = connect(policy=policy, budget=AGES)
    call(client)
    server.stop()
    until(lambda: not client.statistics()["connected"])
    # Far more than the policy would let through: it knows of no share.
    took = [call(client) for _ in range(100)]
    assert max(took) < 0.25


def test_what_is_on_its_way_goes_on_when_the_server_dies(server: Fake, connect: Connect) -> None:
    server.on_reserve = observed
    client = connect(policy="closed", budget=AGES)
    call(client)
    server.mute = True
    before = time.monotonic()
    # It answers no more, and the connection stands.
    call(client)
    assert time.monotonic() - before < 0.5


def test_a_server_that_enforces_again_is_obeyed(server: Fake, connect: Connect) -> None:
    server.on_reserve = observed
    client = connect(policy="closed", budget=0.2)
    call(client)
    server.on_reserve = granted
    call(client)
    server.stop()
    until(lambda: not client.statistics()["connected"])
    with pytest.raises(paceline_client.Unavailable):
        client.acquire(model=MODEL, max_wait=0)


def test_a_server_that_lets_wait_again_is_waited_for(server: Fake, connect: Connect) -> None:
    server.on_reserve = observed
    client = connect(policy="closed")
    call(client)
    server.on_reserve = lambda request: None
    call(client)
    # The first one went on; the next one waits for its turn.
    answered: list[float] = []

    def later(request: pb.ReserveRequest) -> pb.ReserveResponse:
        time.sleep(0.3)
        answered.append(time.monotonic())
        return granted(request)

    server.on_reserve = later
    with client.reserve(model=MODEL, max_wait=30) as grant:
        assert answered
        assert not grant.local
        grant.commit_usage(input_tokens=1, output_tokens=1)


# -- options ----------------------------------------------------------------------------------------------------------


def test_the_mode_comes_from_the_environment(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_MODE", "observe")
    with Client(nobody, budget=AGES, policy="closed") as client:
        call(client)
    with (
        Client(nobody, mode="enforce", budget=0.05, policy="closed") as client,
        pytest.raises(Exception, match="closed"),
    ):
        client.acquire(model=MODEL)
    monkeypatch.setenv("PACELINE_MODE", "nonsense")
    with pytest.raises(ValueError, match="PACELINE_MODE"):
        Client(nobody)


def test_a_server_that_grants_fewer_than_asked_for_fails_nobody(server: Fake, connect: Connect) -> None:
    go = threading.Event()

    def fewer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        go.wait(10)
        answer = granted(request)
        del answer.grant.child_reservation_ids[1:]
        return answer

    server.on_reserve = fewer
    client = connect(mode="observe")
    grants = client.reserve_many(3, model=MODEL).__enter__()
    for grant in grants:
        grant.report({"anthropic-ratelimit-requests-limit": "50"})
        grant.commit_usage(input_tokens=1)
    go.set()
    # One was granted; the others are booked as calls without a grant, with the headers that were kept.
    server.wait_for("commit")
    first, second = server.wait_for("observe", 2)
    assert [header.name for header in first.outcome.headers] == ["anthropic-ratelimit-requests-limit"]
    assert len(second.outcome.headers) == 1
    assert client.flush()
