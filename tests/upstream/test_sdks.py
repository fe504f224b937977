"""The official SDKs against the simulator: what they parse is what the log says, and errors are their own classes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from paceline.upstream import Call
from paceline.upstream.http import Upstream
from paceline.upstream.tokens import count
from tests.upstream.conftest import MODEL, QUICK, Clock, config, until

GPT = "gpt-5"
LONG = "these words are long enough to be kept " * 200


def ask(output: int, **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": 300,
        "messages": [{"role": "user", "content": "How far is it from here to there?"}],
        "metadata": {"user_id": f"paceline-sim:output={output}"},
        **more,
    }


def ask_gpt(output: int, **more: Any) -> dict[str, Any]:
    return {
        "model": GPT,
        "max_completion_tokens": 300,
        "messages": [{"role": "user", "content": "How far is it from here to there?"}],
        "user": f"paceline-sim:output={output}",
        **more,
    }


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def up(clock: Clock) -> AsyncIterator[Upstream]:
    """Its time stands still, so levels are exact."""
    async with Upstream.start(config(coming=1_000_000, going=100_000), QUICK, clock=clock) as found:
        yield found


@pytest.fixture
async def claude(up: Upstream) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=up.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def gpt(up: Upstream) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=up.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def agrees(usage: anthropic.types.Usage, call: Call) -> bool:
    return (
        usage.input_tokens,
        usage.cache_creation_input_tokens,
        usage.cache_read_input_tokens,
        usage.output_tokens,
    ) == (call.input, call.cache_write, call.cache_read, call.produced)


async def test_messages_usage_is_the_truth(up: Upstream, claude: anthropic.AsyncAnthropic) -> None:
    system = [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}]
    for number in range(3):
        answer = await claude.messages.create(**ask(137 + number, system=system))
        call = up.account.calls[-1]
        assert agrees(answer.usage, call)
        assert (call.ended, answer.usage.output_tokens, answer.stop_reason) == ("finished", 137 + number, "end_turn")
        text = answer.content[0]
        assert isinstance(text, anthropic.types.TextBlock)
        assert count(text.text) == 137 + number
        assert bool(call.cache_read) == bool(number)
    counted = sum(call.input + call.cache_write for call in up.account.calls)
    buckets = up.truth["groups"]["claude"]["buckets"]
    assert buckets["input_tokens"]["level"] == 1_000_000 - counted
    assert buckets["output_tokens"]["level"] == 100_000 - 137 - 138 - 139


async def test_messages_stream_usage_is_the_truth(up: Upstream, claude: anthropic.AsyncAnthropic) -> None:
    up.change(tokens_per_second=500, chunk_ms=5)
    async with claude.messages.stream(**ask(137)) as stream:
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_message()
    call = up.account.calls[-1]
    assert agrees(answer.usage, call)
    assert (call.produced, call.ended) == (137, "finished")
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_delta") > 2


async def test_output_is_bounded_by_max_tokens_and_drawn_without_a_directive(
    up: Upstream, claude: anthropic.AsyncAnthropic
) -> None:
    answer = await claude.messages.create(**ask(999))
    assert (answer.usage.output_tokens, answer.stop_reason) == (300, "max_tokens")
    sizes = set()
    for _ in range(5):
        answer = await claude.messages.create(**ask(0, metadata={"user_id": "somebody"}, max_tokens=20_000))
        sizes.add(answer.usage.output_tokens)
    assert len(sizes) > 2
    answer = await claude.messages.create(**ask(5), extra_headers={"x-paceline-output": "17"})
    assert answer.usage.output_tokens == 17


TOOL = {"name": "look", "description": "Look it up.", "input_schema": {"type": "object", "properties": {}}}


async def test_tool_use(up: Upstream, claude: anthropic.AsyncAnthropic) -> None:
    wanted = ask(0, tools=[TOOL], metadata={"user_id": "paceline-sim:output=40,tool"})
    whole = await claude.messages.create(**wanted)
    up.change(tokens_per_second=2_000, chunk_ms=5)
    async with claude.messages.stream(**wanted) as stream:
        streamed = await stream.get_final_message()
    for answer, call in zip((whole, streamed), up.account.calls, strict=True):
        assert agrees(answer.usage, call)
        assert answer.stop_reason == "tool_use"
        block = answer.content[0]
        assert isinstance(block, anthropic.types.ToolUseBlock)
        assert block.name == "look"
        assert isinstance(block.input["text"], str)


async def test_count_tokens_is_what_a_call_costs(up: Upstream, claude: anthropic.AsyncAnthropic) -> None:
    wanted = ask(1, tools=[TOOL], system=LONG)
    told = await claude.messages.count_tokens(
        **{name: wanted[name] for name in ("model", "messages", "tools", "system")}
    )
    answer = await claude.messages.create(**wanted)
    assert told.input_tokens == answer.usage.input_tokens > 2_000
    assert up.truth["calls"] == 1


async def test_sync_clients(up: Upstream) -> None:
    def both() -> None:
        with anthropic.Anthropic(base_url=up.url, api_key="any", max_retries=0) as claude:
            assert claude.messages.create(**ask(11)).usage.output_tokens == 11
            with claude.messages.stream(**ask(12)) as stream:
                assert stream.get_final_message().usage.output_tokens == 12
        with openai.OpenAI(base_url=up.url + "/v1", api_key="any", max_retries=0) as gpt:
            answer = gpt.chat.completions.create(**ask_gpt(13))
            assert answer.usage.completion_tokens == 13
            *_, last = gpt.chat.completions.create(**ask_gpt(14, stream=True, stream_options={"include_usage": True}))
            assert last.usage.completion_tokens == 14

    await asyncio.to_thread(both)
    assert [call.produced for call in up.account.calls] == [11, 12, 13, 14]


async def test_chat_completions_usage_is_the_truth(up: Upstream, gpt: openai.AsyncOpenAI) -> None:
    whole = await gpt.chat.completions.create(**ask_gpt(21))
    up.change(tokens_per_second=2_000, chunk_ms=5)
    stream = await gpt.chat.completions.create(**ask_gpt(200, stream=True, stream_options={"include_usage": True}))
    chunks = [chunk async for chunk in stream]
    for usage, call in zip((whole.usage, chunks[-1].usage), up.account.calls, strict=True):
        assert (usage.prompt_tokens, usage.completion_tokens) == (call.input, call.produced)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text) > 200
    assert chunks[-2].choices[0].finish_reason == "stop"
    # The larger of max_tokens and the estimate is charged, and stays.
    assert up.truth["groups"]["gpt"]["buckets"]["tokens"]["charged"] == 600
    plain = await gpt.chat.completions.create(**ask_gpt(3, stream=True))
    assert all(chunk.usage is None for chunk in [chunk async for chunk in plain])


async def test_chat_tool_calls(up: Upstream, gpt: openai.AsyncOpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    wanted = ask_gpt(0, tools=tools, user="paceline-sim:output=20,tool")
    answer = await gpt.chat.completions.create(**wanted)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.name == "look"
    async with gpt.chat.completions.stream(**wanted) as stream:
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "look"


async def test_429_of_messages_then_accepted_after_retry_after(
    up: Upstream, claude: anthropic.AsyncAnthropic, clock: Clock
) -> None:
    up.change(limits={"claude": {"input_tokens": 60}})
    await claude.messages.create(**ask(1, system="word " * 20))
    with pytest.raises(anthropic.RateLimitError, match="60 input tokens per minute") as caught:
        await claude.messages.create(**ask(1, system="word " * 20))
    error, headers = caught.value, caught.value.response.headers
    assert error.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    assert error.request_id == error.body["request_id"]  # type: ignore[index]
    seconds = int(headers["retry-after"])
    call = up.account.calls[-1]
    assert (call.status, call.dimension, call.retry_after) == ("refused", "input_tokens", seconds)
    # A microsecond of refill more or less decides; the seconds are rounded up.
    clock.forward(seconds)
    await claude.messages.create(**ask(1, system="word " * 20))
    assert up.truth["groups"]["claude"]["refused_by"] == {"input_tokens": 1}


async def test_429_of_chat(up: Upstream, gpt: openai.AsyncOpenAI, clock: Clock) -> None:
    up.change(limits={"gpt": {"tokens": 600}})
    await gpt.chat.completions.create(**ask_gpt(1))
    await gpt.chat.completions.create(**ask_gpt(1))
    with pytest.raises(
        openai.RateLimitError, match=r"Limit 600, Used 600, Requested 300\. Please try again in 30s"
    ) as caught:
        await gpt.chat.completions.create(**ask_gpt(1))
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "tokens"
    assert caught.value.response.headers["retry-after-ms"] == "30000"
    assert caught.value.response.headers["x-ratelimit-reset-tokens"] == "1m0s"
    # The refused call cost a request.
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "97"
    clock.forward(30)
    await gpt.chat.completions.create(**ask_gpt(1))


async def test_overload(up: Upstream, claude: anthropic.AsyncAnthropic, gpt: openai.AsyncOpenAI, clock: Clock) -> None:
    up.change(overload_probability=1, overload_seconds=5)
    with pytest.raises(anthropic.APIStatusError) as caught:
        await claude.messages.create(**ask(1))
    assert caught.value.status_code == 529
    assert caught.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
    headers = caught.value.response.headers
    assert headers["x-should-retry"] == "true"
    assert not [name for name in headers if "ratelimit" in name or name == "retry-after"]
    with pytest.raises(openai.InternalServerError) as refused:
        await gpt.chat.completions.create(**ask_gpt(1))
    assert (refused.value.status_code, refused.value.code) == (503, "server_is_overloaded")
    assert up.truth["overloaded"] == 2
    clock.forward(5)
    await claude.messages.create(**ask(1))


async def test_sdk_retries_after_an_overload(up: Upstream) -> None:
    up.change(refuse_next=1, refuse_retry_after=1)
    async with anthropic.AsyncAnthropic(base_url=up.url, api_key="any", max_retries=1) as client:
        headers = {"x-paceline-call": "one", "x-paceline-tenant": "chat"}
        await client.messages.create(**ask(1), extra_headers=headers)
    calls = [(call.id, call.tenant, call.status, call.dimension) for call in up.account.calls]
    assert calls == [("one", "chat", "refused", "forced requests"), ("one", "chat", "accepted", "")]


async def test_error_in_mid_stream(up: Upstream, claude: anthropic.AsyncAnthropic, gpt: openai.AsyncOpenAI) -> None:
    up.change(stream_error_next=2, stream_error_after=7)
    with pytest.raises(anthropic.APIStatusError) as caught:
        async with claude.messages.stream(**ask(100)) as stream:
            await stream.get_final_message()
    assert caught.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
    with pytest.raises(openai.APIError, match="overloaded"):
        async for _ in await gpt.chat.completions.create(**ask_gpt(100, stream=True)):
            pass
    assert [(call.ended, call.produced) for call in up.account.calls] == [("error", 7)] * 2
    assert up.truth["groups"]["claude"]["buckets"]["output_tokens"]["charged"] == 7
    await claude.messages.create(**ask(100))


@pytest.mark.parametrize("streamed", [False, True])
async def test_connection_dropped(up: Upstream, claude: anthropic.AsyncAnthropic, streamed: bool) -> None:
    up.change(drop_next=1, drop_after=9)

    async def make() -> None:
        if streamed:
            async with claude.messages.stream(**ask(100)) as stream:
                await stream.get_final_message()
        else:
            await claude.messages.create(**ask(100))

    # In mid-stream the SDK lets the error of its transport through.
    with pytest.raises((anthropic.APIConnectionError, httpx2.TransportError)):
        await make()
    assert [(call.ended, call.produced) for call in up.account.calls] == [("dropped", 9)]
    await claude.messages.create(**ask(100))


async def test_stream_that_the_client_leaves_counts_as_far_as_it_got(
    up: Upstream, claude: anthropic.AsyncAnthropic
) -> None:
    up.change(tokens_per_second=400, chunk_ms=10)
    seen = 0
    async with claude.messages.stream(**ask(3_000, max_tokens=3_000)) as stream:
        async for event in stream:
            seen += event.type == "content_block_delta"
            if seen == 3:
                break
    call = up.account.calls[0]
    await until(lambda: call.ended != "")
    assert call.ended == "gone"
    assert 3 <= call.produced < 3_000
    assert up.truth["groups"]["claude"]["buckets"]["output_tokens"]["charged"] == call.produced
    before = call.produced
    await asyncio.sleep(0.1)
    assert call.produced == before
    assert up.truth["groups"]["claude"]["in_flight"] == 0


async def test_whole_answer_is_charged_while_it_is_produced_until_the_client_goes(
    up: Upstream, claude: anthropic.AsyncAnthropic
) -> None:
    up.change(tokens_per_second=200, chunk_ms=10, first_byte_ms=20)
    task = asyncio.create_task(claude.messages.create(**ask(3_000, max_tokens=3_000)))
    await until(lambda: bool(up.account.calls) and up.account.calls[0].produced > 20)
    call = up.account.calls[0]
    assert call.produced < 3_000
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: call.ended != "")
    assert call.ended == "gone"
    assert 20 < call.produced < 3_000
    assert up.truth["groups"]["claude"]["buckets"]["output_tokens"]["charged"] == call.produced


async def test_what_was_produced_since_the_last_charge_counts_when_the_client_goes(
    up: Upstream, claude: anthropic.AsyncAnthropic
) -> None:
    up.change(tokens_per_second=500, chunk_ms=60_000)
    task = asyncio.create_task(claude.messages.create(**ask(3_000, max_tokens=3_000)))
    await until(lambda: bool(up.account.calls))
    call = up.account.calls[0]
    await asyncio.sleep(0.1)
    assert call.produced == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: call.ended != "")
    assert 40 <= call.produced < 3_000


async def test_headers_of_responses(up: Upstream, claude: anthropic.AsyncAnthropic) -> None:
    raw = await claude.messages.with_raw_response.create(**ask(600, max_tokens=600))
    # The state at the end: 600 of 100,000 are gone.
    assert raw.headers["anthropic-ratelimit-output-tokens-remaining"] == "99000"
    assert raw.headers["anthropic-ratelimit-requests-remaining"] == "99"
    assert raw.headers["request-id"].startswith("req_")
    assert raw.headers["anthropic-organization-id"] == up.config.organization
    async with claude.messages.with_streaming_response.create(**ask(600, max_tokens=600, stream=True)) as response:
        # The state at the start.
        assert response.headers["anthropic-ratelimit-output-tokens-remaining"] == "99000"
        await response.read()
    up.change(spelling="older")
    raw = await claude.messages.with_raw_response.create(**ask(1))
    assert raw.headers["X-RateLimit-Remaining-Requests"] == "97"
    assert "anthropic-ratelimit-requests-remaining" not in raw.headers
    up.change(headers=False)
    raw = await claude.messages.with_raw_response.create(**ask(1))
    assert not [name for name in raw.headers if "ratelimit" in name]


async def test_errors_of_callers(up: Upstream, claude: anthropic.AsyncAnthropic, gpt: openai.AsyncOpenAI) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model: claudius"):
        await claude.messages.create(**ask(1, model="claudius"))
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        await claude.messages.create(**ask(1, messages=[]))
    with pytest.raises(openai.NotFoundError) as caught:
        await gpt.chat.completions.create(**ask_gpt(1, model=MODEL))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await gpt.chat.completions.create(**ask_gpt(1, messages=[{"role": "x", "content": ""}]))
    assert (up.truth["calls"], up.truth["invalid"]) == (0, 4)
