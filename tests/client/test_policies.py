"""What a client does while no coordinator can be reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline_client import AsyncClient, Candidate, Client, Denied, Target, Unavailable, Usage
from paceline_client._local import BUILT_IN, BURST, LocalGrant, LocalPolicy, Share
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Fake, granted, share

Connect = Callable[..., Client]
NOBODY = "127.0.0.1:9"
QUICK = {"budget": 0.05}


# -- the policy itself, on a clock of the test's ----------------------------------------------------------------------


def learned(scale: float = 1.0, **per_minute: int) -> LocalPolicy:
    policy = LocalPolicy(scale)
    policy.learn(Share("pool", per_minute, 1e9, [Target("m")]))
    return policy


def ask(policy: LocalPolicy, now: float, *, wait: float = 0.0, **sizes: Any) -> LocalGrant | float:
    return policy.reserve([Candidate("m", **sizes)], now, now + wait)


def test_a_share_is_used_at_its_rate() -> None:
    policy = learned(requests=60)
    burst = [ask(policy, 0.0) for _ in range(16)]
    assert sum(isinstance(each, LocalGrant) for each in burst) == 60 * BURST
    assert burst[-1] == pytest.approx(1.0)
    assert isinstance(ask(policy, 1.001), LocalGrant)
    assert isinstance(ask(policy, 1.001), float)


def test_who_was_busy_begins_without_a_burst() -> None:
    policy = learned(requests=60)
    for second in range(20):
        policy.granted("pool", Candidate("m"), 1, float(second))
    # It took its share: nothing is left, and nothing is owed.
    assert ask(policy, 19.0) == pytest.approx(1.0)
    assert isinstance(ask(policy, 20.001), LocalGrant)


def test_who_was_idle_has_its_burst() -> None:
    policy = learned(requests=60)
    policy.granted("pool", Candidate("m"), 15, 0.0)
    assert sum(isinstance(ask(policy, 15.001), LocalGrant) for _ in range(20)) == 15
    # A pool without a share is not thought of.
    policy.granted("other", Candidate("n"), 1_000, 15.0)
    assert isinstance(policy.reserve([Candidate("n", input_tokens=1, output_tokens=1)], 15.0, 15.0), LocalGrant)


def test_turns_are_in_the_order_of_asking() -> None:
    policy = learned(requests=60)
    for _ in range(15):
        ask(policy, 0.0)
    turns = [ask(policy, 0.0, wait=10) for _ in range(3)]
    assert [each.at for each in turns if isinstance(each, LocalGrant)] == pytest.approx([1, 2, 3])


def test_the_scale_is_kept() -> None:
    policy = learned(0.5, requests=80)
    assert sum(isinstance(ask(policy, 0.0), LocalGrant) for _ in range(80)) == 10


def test_what_was_used_replaces_what_was_expected() -> None:
    policy = learned(input_tokens=4_000)
    grant = ask(policy, 0.0, input_tokens=1_000)
    assert isinstance(grant, LocalGrant)
    assert isinstance(ask(policy, 0.0, input_tokens=500), float)
    policy.end(grant, Usage(input_tokens=100), 0.0)
    policy.end(grant, Usage(input_tokens=0), 0.0)
    assert isinstance(ask(policy, 0.0, input_tokens=900), LocalGrant)
    assert isinstance(ask(policy, 0.0, input_tokens=1), float)


def test_a_call_that_was_not_sent_gives_all_back() -> None:
    policy = learned(requests=4, input_tokens=4_000)
    grant = ask(policy, 0.0, input_tokens=1_000)
    assert isinstance(grant, LocalGrant)
    policy.end(grant, None, 0.0, sent=False)
    assert isinstance(ask(policy, 0.0, input_tokens=1_000), LocalGrant)


def test_no_call_is_impossible() -> None:
    policy = learned(input_tokens=4_000)
    assert isinstance(ask(policy, 0.0, input_tokens=100_000), LocalGrant)
    # It is paid for afterwards.
    assert ask(policy, 0.0, input_tokens=1) == pytest.approx((100_000 - 1_000 + 1) / (4_000 / 60))


def test_a_share_of_nothing_grants_nothing() -> None:
    assert ask(learned(requests=0), 0.0, wait=1e6) == float("inf")
    assert ask(learned(spend=0), 0.0, wait=1e6) == float("inf")
    assert ask(learned(concurrency=0), 0.0, wait=1e6) == float("inf")
    assert isinstance(ask(learned(spend=1), 0.0), LocalGrant)


def test_places_are_given_back() -> None:
    policy = learned(concurrency=2)
    first, second = ask(policy, 0.0), ask(policy, 0.0)
    assert isinstance(first, LocalGrant)
    assert isinstance(second, LocalGrant)
    assert isinstance(ask(policy, 0.0, wait=1), float)
    policy.end(first, None, 0.0)
    assert isinstance(ask(policy, 0.0), LocalGrant)
    # One whose call never said that it ended is free after a while.
    assert isinstance(ask(policy, 1_000.0), LocalGrant)


def test_the_first_candidate_that_fits() -> None:
    policy = LocalPolicy(1.0)
    policy.learn(Share("big", {"requests": 4}, 1e9, [Target("big")]))
    policy.learn(Share("small", {"requests": 4}, 1e9, [Target("small")]))
    ways = [Candidate("big"), Candidate("small")]
    turns = [policy.reserve(ways, 0.0, 0.0) for _ in range(3)]
    assert [each.index if isinstance(each, LocalGrant) else None for each in turns] == [0, 1, None]


def test_without_a_share_little_is_granted() -> None:
    policy = LocalPolicy(1.0)
    grants = [policy.reserve([Candidate("m", input_tokens=1, output_tokens=1)], 0.0, 0.0) for _ in range(50)]
    assert 1 <= sum(isinstance(each, LocalGrant) for each in grants) <= BUILT_IN["requests"]


def test_an_expired_share_is_not_used() -> None:
    policy = LocalPolicy(1.0)
    policy.learn(Share("pool", {"requests": 6_000}, 60.0, [Target("m")]))
    assert sum(isinstance(ask(policy, 59.0), LocalGrant) for _ in range(100)) == 100
    assert sum(isinstance(ask(policy, 61.0, input_tokens=0, output_tokens=0), LocalGrant) for _ in range(100)) <= 2


@pytest.mark.parametrize("dimension", ["requests", "input_tokens", "tokens", "concurrency", "spend"])
def test_silence_does_not_turn_nothing_into_something(dimension: str) -> None:
    policy = LocalPolicy(1.0)
    policy.learn(Share("pool", {dimension: 0}, 60.0, [Target("m")]))
    assert ask(policy, 59.0) == float("inf")
    assert ask(policy, 61.0) == float("inf")
    assert ask(policy, 1e6) == float("inf")
    policy.learn(Share("pool", {"requests": 400}, 2e6, [Target("m")]))
    assert isinstance(ask(policy, 1e6 + 60, wait=60), LocalGrant)


def test_an_expired_share_goes_on_to_bind() -> None:
    policy = LocalPolicy(1.0)
    policy.learn(Share("pool", {"requests": 2}, 60.0, [Target("m")]))
    assert isinstance(ask(policy, 61.0, input_tokens=1, output_tokens=1), LocalGrant)
    assert ask(policy, 61.0, input_tokens=1, output_tokens=1) == pytest.approx(30.0)


def test_a_share_without_targets_is_found_by_what_was_granted() -> None:
    policy = LocalPolicy(1.0)
    policy.learn(Share("pool", {"requests": 400}, 1e9, []))
    policy.learn_pool(Target("m"), "pool", "", 0)
    assert sum(isinstance(ask(policy, 0.0), LocalGrant) for _ in range(200)) == 100


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(0, 5_000), st.integers(0, 5_000), st.floats(0, 60), st.booleans()),
        max_size=60,
    )
)
def test_what_is_granted_never_exceeds_the_share(calls: list[tuple[float, int, int, float, bool]]) -> None:
    rate, burst = 6_000 / 60, 6_000 * BURST
    policy = learned(input_tokens=6_000)
    now, granted_tokens, largest = 0.0, 0.0, 0.0
    for step, expected, used, wait, sent in calls:
        now += step
        turn = ask(policy, now, wait=wait, input_tokens=expected)
        if not isinstance(turn, LocalGrant):
            continue
        assert now <= turn.at <= now + wait + 1e-6
        policy.end(turn, Usage(input_tokens=used), now, sent=sent)
        granted_tokens += used if sent else 0
        # A call larger than the burst is admitted into debt; an estimate may be wrong, but only until it is known.
        largest = max(largest, expected, used)
        if sent:
            assert granted_tokens <= burst + rate * turn.at + 2 * largest + 1e-3


# -- clients without a coordinator ------------------------------------------------------------------------------------


def test_closed_raises(connect: Connect) -> None:
    with pytest.raises(Unavailable):
        connect(NOBODY, policy="closed", **QUICK).acquire(model="m")


def test_open_goes_on(connect: Connect) -> None:
    client = connect(NOBODY, policy="open", **QUICK)
    for _ in range(20):
        with client.reserve(model="m", max_output_tokens=7) as grant:
            assert grant.local
            assert grant.target.model == "m"
            grant.commit_usage(output_tokens=1)
    with client.reserve_many(3, model="m") as grants:
        assert len(grants) == 3


def test_local_grants_within_its_means_and_then_denies(connect: Connect) -> None:
    client = connect(NOBODY, **QUICK)
    grant = client.acquire(model="m", input_tokens=10, output_tokens=10)
    assert grant.local
    with pytest.raises(Denied) as caught:  # noqa: PT012
        for _ in range(10):
            client.acquire(model="m", input_tokens=10, output_tokens=10)
    assert caught.value.local
    assert caught.value.reason == "limit"
    assert caught.value.retry_after is not None


async def test_local_waits_for_its_turn(connect_async: Callable[..., AsyncClient], server: Fake) -> None:
    server.welcome.fallback_shares.append(share("pool/m", {pb.DIMENSION_REQUESTS: 1_500}, model="m"))
    client = connect_async(policy="local", budget=0.05, local_scale=0.8)
    (await client.acquire(model="m")).release()
    server.stop()
    before = time.monotonic()
    grants = await asyncio.gather(*(client.acquire(model="m", max_wait=10) for _ in range(310)))
    took = time.monotonic() - before
    assert all(grant.local for grant in grants)
    # 300 at once, then 20 in a second.
    assert 0.4 < took < 3
    assert max(grant.waited for grant in grants) > 0.4


async def test_a_cancelled_local_wait_gives_back(connect_async: Callable[..., AsyncClient], server: Fake) -> None:
    server.welcome.fallback_shares.append(share("pool/m", {pb.DIMENSION_REQUESTS: 60}, model="m"))
    client = connect_async(budget=0.05, local_scale=1.0)
    (await client.acquire(model="m")).release()
    server.stop()
    # What the coordinator has granted counts too.
    for _ in range(13):
        await client.acquire(model="m")
    tasks = [asyncio.create_task(client.acquire(model="m", max_wait=60)) for _ in range(10)]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    with pytest.raises(Denied) as caught:
        await client.acquire(model="m")
    assert caught.value.retry_after is not None
    assert caught.value.retry_after < 1.1


@pytest.mark.parametrize("transport", ["session", "unary"])
@pytest.mark.parametrize("policy", ["local", "open"])
def test_calls_made_alone_are_reported_later(connect: Connect, server: Fake, policy: str, transport: str) -> None:
    client = connect(policy=policy, budget=0.2, transport=transport)
    client.acquire(model="m").release()
    assert client.flush()
    server.stop()
    with client.reserve(model="m", tenant="t", route="r", input_tokens=5, output_tokens=5) as grant:
        assert grant.local
        grant.report({"retry-after": "1"})
        grant.commit_usage(input_tokens=5, output_tokens=6)
    with client.reserve(model="m", input_tokens=5, output_tokens=5, max_wait=5) as grant:
        grant.release()
    server.start()
    assert client.flush(15)
    (observed,) = server.items("observe")
    assert (observed.target.model, observed.tenant, observed.route) == ("m", "t", "r")
    assert observed.outcome.usage == pb.Usage(input_tokens=5, output_tokens=6)
    assert [each.name for each in observed.outcome.headers] == ["retry-after"]
    assert len(observed.observation_id) == 36
    assert not server.items("commit")
    # Back in the queue of everybody.
    with client.reserve(model="m", max_wait=5) as grant:
        assert not grant.local
        grant.release()


def test_shares_come_with_answers_too(connect: Connect, server: Fake) -> None:
    def with_share(request: pb.ReserveRequest) -> pb.ReserveResponse:
        answer = granted(request)
        answer.fallback_shares.append(share("pool/m", {pb.DIMENSION_REQUESTS: 400}))
        return answer

    server.on_reserve = with_share
    client = connect(budget=0.2, local_scale=1.0)
    client.acquire(model="m").release()
    client.flush()
    server.stop()
    # A quarter of a minute's share, of which what the coordinator had granted has refilled or not.
    for _ in range(98):
        assert client.acquire(model="m").local
    more = [client.acquire(model="m", raise_on_denial=False) for _ in range(10)]
    assert not more[-1]


def test_a_ladder_leads_where_it_led_last(connect: Connect, server: Fake) -> None:
    client = connect(budget=0.2)
    with pytest.raises(Unavailable, match="ladder"):
        connect(NOBODY, **QUICK).acquire(ladder="cheap")
    server.on_reserve = lambda request: granted(request, candidate_index=2)
    client.acquire(ladder="cheap").release()
    client.flush()
    server.stop()
    grant = client.acquire(ladder="cheap", input_tokens=5, output_tokens=5)
    assert (grant.target.model, grant.candidate_index, grant.local) == ("of-the-ladder", 2, True)


def test_an_owner_that_is_away_is_an_outage_too(connect: Connect, server: Fake) -> None:
    server.on_reserve = lambda request: status_pb2.Status(code=14, message="store")
    client = connect(policy="open", budget=0.2)
    before = time.monotonic()
    assert client.acquire(model="m").local
    assert 0.05 < time.monotonic() - before < 1
    before = time.monotonic()
    assert client.acquire(model="m").local
    assert time.monotonic() - before < 0.15
    server.on_reserve = granted
    time.sleep(0.05)
    assert not client.acquire(model="m").local


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, connect: Connect) -> None:
    monkeypatch.setenv("PACELINE_ADDRESS", "https://pace.example:443/")
    monkeypatch.setenv("PACELINE_TOKEN", "t")
    monkeypatch.setenv("PACELINE_POLICY", "open")
    given = Client()._options
    assert (given.endpoint.address, given.endpoint.tls, given.endpoint.token, given.policy) == (
        "pace.example:443",
        True,
        "t",
        "open",
    )
    monkeypatch.setenv("PACELINE_POLICY", "shut")
    with pytest.raises(ValueError, match="PACELINE_POLICY"):
        Client()


def test_disabled_contacts_nothing(monkeypatch: pytest.MonkeyPatch, server: Fake) -> None:
    monkeypatch.setenv("PACELINE_DISABLED", "1")
    client = Client(server.address)
    assert client.disabled
    assert client.statistics() == {}
    before = time.perf_counter()
    for _ in range(1_000):
        with client.reserve(model="m", input_tokens=1, max_wait=60) as grant:
            assert grant
            grant.report({})
            grant.commit({"usage": {"output_tokens": 1}})
    assert time.perf_counter() - before < 1
    with client.reserve_many(3, ladder="l") as grants:
        assert len(list(grants)) == 3
    client.observe("m", output_tokens=1)
    assert client.flush()
    client.close()
    assert not server.sessions


async def test_disabled_async(server: Fake) -> None:
    async with AsyncClient(server.address, disabled=True) as client:
        async with client.reserve(model="m") as grant:
            grant.commit()
        assert await client.flush()
    assert not server.sessions
