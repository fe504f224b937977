"""The hooks between the real SDKs, a real coordinator and a simulated upstream: the books of both sides agree."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from paceline.engine.dimensions import Dimension
from paceline.frontend.server import Server
from paceline.upstream import Config, Scenario
from paceline.upstream.http.server import Upstream
from paceline_client import AsyncClient
from paceline_client.hooks.anthropic import PacelineMiddleware
from paceline_client.hooks.openai import async_http_client
from tests.frontend.harness import running, state_of, until
from tests.hooks.conftest import BUDGET
from tests.hooks.stub import MODEL

ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 60,
    "messages": [{"role": "user", "content": "hello there, how are you? " * 10}],
}


@asynccontextmanager
async def fleet() -> AsyncIterator[tuple[Server, Upstream, AsyncClient]]:
    """A coordinator, an upstream, and a client."""
    quick = Scenario(first_byte_ms=5, tokens_per_second=1_000, chunk_ms=5)
    openai = {"openai": {"provider": "openai", "pools": {"gpt-5": {"requests": 600, "tokens": 600_000}}}}
    base = {
        "default": {
            "tier": "build",
            "pools": {"sonnet-5": {"requests": 600, "input_tokens": 60_000, "output_tokens": 9_000}},
        }
    }
    async with running({"accounts": base | openai}) as server, Upstream.start(Config(), quick) as upstream:
        paceline = AsyncClient(server.address, budget=BUDGET)
        yield server, upstream, paceline
        await paceline.aclose()


def charged(server: Server, model: str, ledger: str = "default") -> dict[Dimension, int]:
    """What the coordinator has booked on the pool of a model."""
    return {
        bucket.dimension: bucket.charged
        for bucket in state_of(server, ledger).buckets
        if bucket.pool.endswith(f"/{model}") and not bucket.share
    }


async def settled(server: Server, paceline: AsyncClient, ledger: str = "default") -> None:
    await paceline.flush()
    await until(lambda: not state_of(server, ledger).open)


async def test_the_books_of_both_sides_agree() -> None:
    async with fleet() as (server, upstream, paceline):
        hook = PacelineMiddleware(paceline, tenant="t", max_wait=10)
        async with AsyncAnthropic(api_key="k", base_url=upstream.url, middleware=[hook]) as client:
            for _ in range(3):
                await client.messages.create(**ASK)
            async with client.messages.stream(**ASK) as stream:
                await stream.get_final_message()
            upstream.change(refuse_next=1)
            await client.messages.create(**ASK)
            await settled(server, paceline)
            truth = upstream.truth
            group = truth["groups"]["claude"]
            assert (truth["accepted"], truth["refused"]) == (5, 1)
            books = charged(server, "sonnet-5")
            assert books[Dimension.REQUESTS] == 5
            assert books[Dimension.INPUT_TOKENS] == group["input_tokens"]
            assert books[Dimension.OUTPUT_TOKENS] == group["output_tokens"]

            # Two that are cut off: what was produced is known but roughly; what went in, exactly.
            async with client.messages.stream(**ASK) as stream:
                async for event in stream:
                    if event.type == "text":
                        break
            upstream.change(stream_error_next=1, stream_error_after=20)
            with pytest.raises(anthropic.APIStatusError):
                async for _ in await client.messages.create(**ASK, stream=True):
                    pass
            await settled(server, paceline)
            await until(lambda: upstream.truth["groups"]["claude"]["in_flight"] == 0)
            group = upstream.truth["groups"]["claude"]
            more = charged(server, "sonnet-5")
            assert more[Dimension.REQUESTS] == 7
            assert more[Dimension.INPUT_TOKENS] == group["input_tokens"]
            produced = more[Dimension.OUTPUT_TOKENS] - books[Dimension.OUTPUT_TOKENS]
            assert 10 <= produced <= 60
        assert paceline.statistics()["refused_reports"] == 0


async def test_a_denial_reaches_the_application_as_one_of_the_sdk() -> None:
    async with fleet() as (server, upstream, paceline):
        hook = PacelineMiddleware(paceline, max_wait=0)
        async with AsyncAnthropic(api_key="k", base_url=upstream.url, middleware=[hook]) as client:
            huge = ASK | {"messages": [{"role": "user", "content": "word " * 400_000}]}
            with pytest.raises(anthropic.RateLimitError, match=r"too_large.*sonnet-5 input_tokens"):
                await client.messages.create(**huge)
        assert upstream.truth["calls"] == 0
        assert not state_of(server).open


async def test_openai() -> None:
    async with fleet() as (server, upstream, paceline):
        http = async_http_client(paceline, tenant="t", max_wait=10)
        async with AsyncOpenAI(api_key="k", base_url=f"{upstream.url}/v1", http_client=http) as client:
            ask: dict[str, Any] = {"model": "gpt-5", "max_completion_tokens": 60, "messages": ASK["messages"]}
            first = await client.chat.completions.create(**ask)
            assert first.usage is not None
            total = first.usage.total_tokens
            options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
            async for chunk in await client.chat.completions.create(**ask, **options):
                total += 0 if chunk.usage is None else chunk.usage.total_tokens
        await settled(server, paceline, "openai")
        assert upstream.truth["accepted"] == 2
        books = charged(server, "gpt-5", "openai")
        # This upstream charges at the start, and gives nothing back.
        assert (books[Dimension.REQUESTS], books[Dimension.TOKENS] >= total // 2) == (2, True)
        assert paceline.statistics()["refused_reports"] == 0
