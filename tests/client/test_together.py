"""Steps, accounts, mergers and calls in bulk against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from paceline_client import Answer, AsyncClient, AsyncMerger, Denied, Grant, Local, RequestRefused, Step, Turn
from tests.client.conftest import BUDGET
from tests.frontend.harness import MODEL, OTHER_MODEL, running

RESPONSE = {"usage": {"input_tokens": 10, "output_tokens": 10}}


def account(requests: int, **pools: Any) -> dict[str, Any]:
    limits = {"requests": requests, "input_tokens": 100_000, "output_tokens": 50_000}
    return {"provider": "anthropic", "tier": "build", "pools": {"sonnet-4": limits, **pools}}


CONFIG: dict[str, Any] = {
    "accounts": {"main": account(20), "spare": account(40)},
    "ladders": {"chat": [{"account": "main", "model": MODEL}, {"account": "spare", "model": MODEL}]},
}


@asynccontextmanager
async def client_of(config: dict[str, Any], **options: Any) -> AsyncIterator[AsyncClient]:
    async with running(config) as server, AsyncClient(server.address, budget=BUDGET, **options) as client:
        yield client
        assert await client.flush(10)
        assert client.statistics()["refused_reports"] == 0


async def test_a_ladder_then_the_callers_own_steps() -> None:
    async def send(turn: Turn) -> dict[str, Any]:
        sent.append((turn.grant.target.account, turn.client, turn.prompt))
        return RESPONSE

    sent: list[tuple[str, str, object]] = []
    async with client_of(CONFIG) as client:
        accounts = {"main": "client a", "spare": "client b"}
        ask: dict[str, Any] = {"ladder": "chat", "max_output_tokens": 50, "accounts": accounts, "prompt": "Hello."}
        answers: list[Answer[Any]] = []
        while not answers or (answers[-1].step == 0 and len(answers) < 100):
            answers.append(await client.call(send, **ask, steps=[Local("cached")]))
        # Both accounts are used up, in the order of the ladder, and each with its own client.
        assert answers[-1].value == "cached"
        (why,) = answers[-1].passed
        assert isinstance(why, Denied)
        assert (why.reason, why.dimension) == ("limit", "requests")
        assert {each[:2] for each in sent} == {("main", "client a"), ("spare", "client b")}
        assert [each[0] for each in sent] == sorted(each[0] for each in sent)


async def test_a_prompt_that_is_too_large_and_a_shorter_one() -> None:
    async def send(turn: Turn) -> dict[str, Any]:
        prompts.append(turn.prompt)
        return RESPONSE

    prompts: list[object] = []
    async with client_of(CONFIG) as client:
        answer = await client.call(
            send, model=MODEL, account="main", prompt="word " * 200_000, max_wait=5, steps=[Step(prompt="Hello.")]
        )
        assert (answer.step, prompts) == (1, ["Hello."])
        assert [each.reason for each in answer.passed if isinstance(each, Denied)] == ["too_large"]
        with pytest.raises(RequestRefused):
            await client.call(send, ladder="no such", steps=[Local("cached")])


async def test_calls_in_bulk_as_many_as_fit() -> None:
    async with client_of(CONFIG) as client:
        ask: dict[str, Any] = {"model": MODEL, "account": "main", "input_tokens": 10, "output_tokens": 10}
        async with client.reserve_many(100, allow_partial=True, **ask) as grants:
            assert 1 <= len(grants) <= 20
            assert len({each.reservation_id for each in grants}) == len(grants)
            for each in grants:
                each.commit(RESPONSE)
        with pytest.raises(Denied) as caught:
            async with client.reserve_many(100, **ask):
                raise AssertionError
        assert caught.value.dimension == "requests"


async def test_requests_that_bind_are_shared_by_items() -> None:
    """60 items, and 20 requests a minute: without merging most would wait for minutes."""

    async def send(grant: Grant, items: list[int]) -> list[int | Exception]:
        calls.append(len(items))
        await asyncio.sleep(0.01)
        grant.commit_usage(input_tokens=20 * len(items), output_tokens=5 * len(items))
        return [2 * item for item in items]

    calls: list[int] = []
    async with client_of(CONFIG) as client:
        ask: dict[str, Any] = {"model": MODEL, "account": "main", "max_output_tokens": 10, "max_wait": 30}
        async with AsyncMerger(client, send, size=lambda item: 20, max_calls=4, **ask) as merger:
            waiting = [merger.submit(item) for item in range(60)]
            found = await asyncio.wait_for(asyncio.gather(*waiting), 60)
            assert merger.merging
    assert found == [2 * item for item in range(60)]
    assert len(calls) <= 25
    assert max(calls) > 5


async def test_tokens_that_bind_are_no_reason_to_merge() -> None:
    async def send(grant: Grant, items: list[int]) -> list[int | Exception]:
        calls.append(len(items))
        grant.commit_usage(input_tokens=2_000, output_tokens=5)
        return list(items)

    calls: list[int] = []
    pool = {"requests": 10_000, "input_tokens": 40_000, "output_tokens": 50_000}
    config = {"accounts": {"main": account(20, **{"opus-4": pool})}}
    async with client_of(config) as client:
        ask: dict[str, Any] = {"model": OTHER_MODEL, "account": "main", "max_output_tokens": 10, "max_wait": 0.5}
        async with AsyncMerger(client, send, size=lambda item: 2_000, max_calls=4, **ask) as merger:
            found = await asyncio.gather(*(merger.submit(item) for item in range(40)), return_exceptions=True)
            assert not merger.merging
    assert set(calls) == {1}
    assert {each.dimension for each in found if isinstance(each, Denied) and not each.local} <= {"input_tokens"}
