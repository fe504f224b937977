"""``paceline limits`` and ``paceline advise`` over a running server: their figures are those of its calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.cli.test_commands import Command, Said, paceline
from tests.frontend.harness import LEDGER, MODEL, POOL, Caller, calling, commit, reserve, running, succeeded

__all__ = ["paceline"]

FIELDS = {
    "accounts": {
        LEDGER: {
            "tier": "start",
            "pools": {"sonnet-4": {"requests": {"amount": 60, "burst": 20}}},
        }
    }
}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(FIELDS) as found:
        yield found


@pytest.fixture
async def caller(server: Server) -> AsyncIterator[Caller]:
    async with calling(server) as found:
        yield found


class Ask:
    """A command to the server, in a thread beside it."""

    def __init__(self, paceline: Command, server: Server) -> None:
        self.paceline = paceline
        self.address = server.address

    async def __call__(self, *arguments: str) -> Said:
        return await asyncio.to_thread(self.paceline, *arguments, "--address", self.address)

    async def json(self, *arguments: str) -> list[dict[str, Any]]:
        said = await self(*arguments, "--json")
        assert said.code == 0, said.err
        found: list[dict[str, Any]] = json.loads(said.out)
        return found


@pytest.fixture
def ask(paceline: Command, server: Server) -> Ask:
    return Ask(paceline, server)


async def traffic(caller: Caller, count: int) -> int:
    """So many calls at once, each tried once; how many were granted. They end with 1,000 and 50 tokens."""
    granted = 0
    for _ in range(count):
        request = reserve(input_tokens=1_000, output_tokens=100)
        answer = await caller.reserve(request)
        if answer.HasField("grant"):
            granted += 1
            outcome = succeeded(1_000, 50)
            await caller.coordinator.Commit(commit(request, answer.grant.context, outcome))
        else:
            assert answer.denial.reason == pb.DENIAL_REASON_LIMIT
    return granted


def headers(**values: int) -> pb.Outcome:
    outcome = succeeded(1_000, 50)
    for name, value in values.items():
        header = f"anthropic-ratelimit-{name.replace('_', '-')}"
        outcome.headers.add(name=header, value=str(value).encode())
    return outcome


async def test_limits_show_what_was_learned_and_why(caller: Caller, ask: Ask) -> None:
    request = reserve(input_tokens=1_000, output_tokens=100)
    answer = await caller.reserve(request)
    open_call = reserve(input_tokens=2_000, output_tokens=300)
    await caller.reserve(open_call)
    taught = headers(input_tokens_limit=1_000_000, input_tokens_remaining=400_000)
    await caller.coordinator.Commit(commit(request, answer.grant.context, taught))

    (found,) = await ask.json("limits", POOL)
    assert found["pool"]["name"] == POOL
    assert found["pool"]["state"] == "POOL_STATE_OPEN"
    limits = {limit["state"]["dimension"]: limit for limit in found["pool"]["limits"]}
    details = {detail["limit"]["dimension"]: detail for detail in found["details"]}
    assert list(limits) == list(details)
    told, detail = limits["DIMENSION_INPUT_TOKENS"], details["DIMENSION_INPUT_TOKENS"]
    assert (told["source"], told["state"]["limit"]) == ("LIMIT_SOURCE_UPSTREAM", "1000000")
    assert int(told["adjusted"]) < -500_000
    # Upstream may count half as much again of the open call.
    assert (told["state"]["held"], detail["over"], detail["at_risk"]) == ("2000", "1000", "3000")
    assert (detail["configured_limit"], "lapses_in" in detail) == ("2000000", True)
    reading = detail["reading"]
    assert float(reading["age"].removesuffix("s")) < 10
    assert int(reading["lower"]) <= int(told["state"]["level"]) <= int(reading["upper"])
    assert limits["DIMENSION_REQUESTS"]["source"] == "LIMIT_SOURCE_OVERRIDE"
    assert limits["DIMENSION_OUTPUT_TOKENS"]["source"] == "LIMIT_SOURCE_TIER"
    assert details["DIMENSION_OUTPUT_TOKENS"]["at_risk"] == "300"
    assert found["binding"] == "DIMENSION_INPUT_TOKENS"
    assert found["tier"] == {"configured": "start", "at_most": "start"}

    text = (await ask("limits", POOL)).out
    print(text)
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:5]}
    assert rows["requests"][1:5] == ["minute", "60", "configured", "20"]
    assert rows["input_tokens"][1:4] == ["minute", "1,000,000", "learned"]
    assert rows["output_tokens"][1:5] == ["minute", "400,000", "tier", "400,000"]
    assert text.startswith(f"{POOL} · open\n")
    assert "\n  below start, the smallest tier of the catalogue (configured: start)\n" in text
    assert "\n  input_tokens: restricted by readings (configured: 2,000,000); lapses in " in text
    assert "\n  binds now: input_tokens has the least left\n" in text


async def test_limits_say_why_a_pool_does_not_grant(caller: Caller, ask: Ask) -> None:
    await caller.admin.PausePool(pb.PausePoolRequest(name=POOL, reason="deploy"))
    said = await ask("limits", POOL)
    assert said.out.startswith(f"{POOL} · paused: deploy, until it is resumed\n")


async def test_limits_of_all_pools_and_of_a_ledger(caller: Caller, ask: Ask) -> None:
    await caller.reserve(model="nobody-knows-me")
    everything = await ask.json("limits")
    names = [each["pool"]["name"] for each in everything]
    assert POOL in names
    assert "anthropic/default/nobody-knows-me" in names
    guessed = next(each for each in everything if each["pool"]["name"].endswith("nobody-knows-me"))
    assert {limit["source"] for limit in guessed["pool"]["limits"]} == {"LIMIT_SOURCE_DEFAULT"}
    assert "tier" not in guessed
    assert await ask.json("limits", "--ledger", LEDGER) == everything or names == [
        each["pool"]["name"] for each in await ask.json("limits", "--ledger", LEDGER)
    ]
    assert " guessed " in (await ask("limits", "anthropic/default/nobody-knows-me")).out
    assert " guessed " in (await ask("pools")).out


async def test_what_held_calls_back_is_shown(caller: Caller, ask: Ask) -> None:
    granted = await traffic(caller, 40)
    denied = 40 - granted
    assert denied > 5
    (found,) = await ask.json("limits", POOL)
    assert found["binding"] == "DIMENSION_REQUESTS"
    assert found["recently"] == [{"dimension": "DIMENSION_REQUESTS", "denied": str(denied)}]
    text = (await ask("limits", POOL)).out
    assert f" min: requests {denied} (0 waited, {denied} denied)\n" in text


async def test_advice_has_the_figures_of_the_calls(caller: Caller, ask: Ask) -> None:
    granted = await traffic(caller, 130)
    denied = 130 - granted
    assert denied > 80
    (found,) = await ask.json("advise", POOL)
    assert (found["pool"], found["ledger"], found["calls"]) == (POOL, LEDGER, "130")
    (held,) = found["held_back"]
    assert (held["dimension"], held["denied"]) == ("DIMENSION_REQUESTS", str(denied))
    assert found["usage"]["calls"] == str(granted)
    assert found["usage"]["input_tokens"] == str(granted * 1_000)
    assert found["usage"]["output_tokens"] == str(granted * 50)
    by_kind = {each["kind"].removeprefix("ADVICE_KIND_"): each for each in found["advice"]}
    assert by_kind["TIER"]["name"] == "start"
    assert (by_kind["TIER"]["calls_per_minute"], by_kind["TIER"]["calls_per_minute_then"]) == ("60", "1000")
    # 60 calls of 1,000 and 50 tokens a minute, of 2,000,000 and 400,000.
    assert by_kind["MERGING"]["calls_to_merge"] == 33
    assert "CACHING" not in by_kind
    others = [each for each in found["advice"] if each["kind"] == "ADVICE_KIND_OTHER_POOL"]
    assert len(others) == 3
    assert all(each["cost_then"] <= each["cost"] for each in others if "units" in each["cost_then"])

    text = (await ask("advise")).out
    print(text)
    assert f"{POOL} · since 2" in text
    assert (
        f" UTC · 130 calls\n  held back by requests: {denied} (100 %), of which 0 waited and {denied} were denied"
        in text
    )
    assert "\n  → tier start: requests 1,000 instead of 60 a minute (16.7 times)" in text
    assert "\n  → merging: with requests used up, input_tokens at 3 % and output_tokens at " in text


async def test_no_advice_without_evidence(caller: Caller, ask: Ask) -> None:
    assert (await ask("advise")).out == "nothing to advise: no calls yet\n"
    assert await ask.json("advise") == []
    await traffic(caller, 3)
    assert (await ask("advise")).out.endswith("\n  nothing to advise: only 3 calls so far: advice needs 100\n")
    (found,) = await ask.json("advise", POOL)
    assert "advice" not in found


@pytest.mark.parametrize("command", ["limits", "advise"])
async def test_an_unknown_pool_is_an_error_that_says_what_to_do(ask: Ask, command: str) -> None:
    (await ask(command, "anthropic/default/nope")).is_error("NOT_FOUND", "pool", "`paceline pools` lists them")
    (await ask(command, "--ledger", "nope")).is_error("NOT_FOUND", "ledger")
    (await ask(command, POOL, "--ledger", "nope")).is_error("NOT_FOUND", "pool")


async def test_pages(caller: Caller) -> None:
    models = (MODEL, "claude-opus-4-5", "x", "y")
    for model in models:
        await caller.reserve(model=model)
    calls: tuple[tuple[Any, Any], ...] = (
        (pb.ListLimitsRequest, caller.admin.ListLimits),
        (pb.ListAdviceRequest, caller.admin.ListAdvice),
    )
    for kind, method in calls:
        seen: list[pb.PoolLimits | pb.PoolAdvice] = []
        token = ""
        while True:
            page = await method(kind(page_size=2, page_token=token))
            assert len(page.pools) <= 2
            seen += page.pools
            token = page.next_page_token
            if not token:
                break
        names = [each.pool if isinstance(each, pb.PoolAdvice) else each.pool.name for each in seen]
        assert names == sorted(set(names))
        assert {"anthropic/default/x", "anthropic/default/y", POOL} <= set(names)
