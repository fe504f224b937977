"""The ways in which applications use the Anthropic SDK: to each of them the hook makes no difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytest
from anthropic import Anthropic, AsyncAnthropic

from paceline.engine.operations import Reserve
from tests.hooks_matrix.application import MODES, Mode
from tests.hooks_matrix.judge import judge
from tests.hooks_matrix.sdk_anthropic import PROMPT, AnthropicSdk, take, take_event
from tests.hooks_matrix.seen import Seen
from tests.hooks_matrix.situations import FORMS, LONG, SPEED, Form, Mark, Situation, both
from tests.hooks_matrix.world import Background

SUCCESS: Final = Situation(name="success", marks=both("final"), fails=False)
HEADERS: Final = ("request-id", "anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining")
TOOL: Final = {"name": "look", "description": "Look it up.", "input_schema": {"type": "object", "properties": {}}}
Ask = Mapping[str, Any]


class Tools(AnthropicSdk):
    """The answer is a call of a tool."""

    def ask(self, output: int, **more: Any) -> dict[str, Any]:
        return super().ask(output, tools=[TOOL], **more) | {
            "metadata": {"user_id": f"paceline-sim:output={output},tool"}
        }


class Cached(AnthropicSdk):
    """The same long prompt twice: the upstream's cache is written, then read."""

    def __init__(self, word: str) -> None:
        self._word = word

    def ask(self, output: int, **more: Any) -> dict[str, Any]:
        text = {"type": "text", "text": f"{self._word}. " + PROMPT * 100, "cache_control": {"type": "ephemeral"}}
        return super().ask(output, system=[text], **more)

    def use(self, client: Anthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        super().use(client, form, ask, seen, pieces)
        super().use(client, form, ask, seen, pieces)

    async def use_async(self, client: AsyncAnthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        await super().use_async(client, form, ask, seen, pieces)
        await super().use_async(client, form, ask, seen, pieces)


class Helper(AnthropicSdk):
    """``messages.stream()``."""

    def use(self, client: Anthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        with client.messages.stream(**ask) as stream:
            for event in stream:
                seen.kinds.append(event.type)
            take(stream.get_final_message(), seen)

    async def use_async(self, client: AsyncAnthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        async with client.messages.stream(**ask) as stream:
            async for event in stream:
                seen.kinds.append(event.type)
            take(await stream.get_final_message(), seen)


class Raw(AnthropicSdk):
    """``with_raw_response``."""

    def use(self, client: Anthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        raw: Any = client.messages.with_raw_response.create(**ask, stream=form == "stream")
        seen.other += [raw.headers[name] for name in HEADERS]
        if form == "json":
            take(raw.parse(), seen)
            return
        for event in raw.parse():
            take_event(event, seen)

    async def use_async(self, client: AsyncAnthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        raw: Any = await client.messages.with_raw_response.create(**ask, stream=form == "stream")
        seen.other += [raw.headers[name] for name in HEADERS]
        if form == "json":
            take(await raw.parse(), seen)
            return
        async for event in await raw.parse():
            take_event(event, seen)


class Streaming(AnthropicSdk):
    """``with_streaming_response``."""

    def use(self, client: Anthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        with client.messages.with_streaming_response.create(**ask, stream=form == "stream") as raw:
            response: Any = raw
            seen.other += [response.headers[name] for name in HEADERS]
            if form == "json":
                take(response.parse(), seen)
            else:
                seen.kinds += list(response.iter_lines())

    async def use_async(self, client: AsyncAnthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        async with client.messages.with_streaming_response.create(**ask, stream=form == "stream") as raw:
            response: Any = raw
            seen.other += [response.headers[name] for name in HEADERS]
            if form == "json":
                take(await response.parse(), seen)
            else:
                seen.kinds += [line async for line in response.iter_lines()]


class Unread(AnthropicSdk):
    """Only the headers are of interest."""

    def use(self, client: Anthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        with client.messages.with_streaming_response.create(**ask, stream=form == "stream") as raw:
            seen.other += [raw.headers[name] for name in HEADERS]

    async def use_async(self, client: AsyncAnthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        async with client.messages.with_streaming_response.create(**ask, stream=form == "stream") as raw:
            seen.other += [raw.headers[name] for name in HEADERS]


class Counting(AnthropicSdk):
    """``count_tokens`` takes nothing from the limits."""

    def use(self, client: Anthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        seen.usage.append(client.messages.count_tokens(model=ask["model"], messages=ask["messages"]).input_tokens)

    async def use_async(self, client: AsyncAnthropic, form: Form, ask: Ask, seen: Seen, pieces: int) -> None:
        counted = await client.messages.count_tokens(model=ask["model"], messages=ask["messages"])
        seen.usage.append(counted.input_tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sdk", [Tools(), Raw(), Streaming()], ids=lambda sdk: type(sdk).__name__)
def test_use(background: Background, sdk: AnthropicSdk, form: Form, mode: Mode) -> None:
    judge(background, sdk, mode, form, SUCCESS)


@pytest.mark.parametrize("mode", MODES)
def test_stream_helper(background: Background, mode: Mode) -> None:
    seen, _ = judge(background, Helper(), mode, "stream", SUCCESS)
    assert seen.kinds.count("message_stop") == 1


@pytest.mark.parametrize("mode", MODES)
def test_tool_whose_stream_is_cut_off(background: Background, mode: Mode) -> None:
    cut = Situation(
        name="cut off",
        marks={"stream": ("partial",)},
        scenario=SPEED,
        output=LONG,
        pieces=4,
        is_rough=True,
        fails=False,
    )
    judge(background, Tools(), mode, "stream", cut)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_cached_prompt(background: Background, form: Form, mode: Mode) -> None:
    twice = Situation(name="cached", marks=both("final", "final"), fails=False)
    seen, record = judge(background, Cached(f"{form} {mode}"), mode, form, twice)
    (first, _), (second, _) = record.of(Reserve)
    written = max(usage["cache_creation_input_tokens"] or 0 for usage in seen.usage)
    assert written > 1_024
    assert written == max(usage["cache_read_input_tokens"] or 0 for usage in seen.usage)
    # The estimate of the second knew it.
    estimates = [operation.candidates[0].estimate.cached_input_tokens for operation in (first, second)]
    assert estimates[0] == 0
    assert estimates[1] == pytest.approx(written, rel=0.25)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_response_that_nobody_reads(background: Background, form: Form, mode: Mode) -> None:
    mark: Mark = "unknown"
    unread = Situation(name="unread", marks=both(mark), fails=False)
    judge(background, Unread(), mode, form, unread)


@pytest.mark.parametrize("mode", MODES)
def test_count_tokens_needs_no_reservation(background: Background, mode: Mode) -> None:
    seen, record = judge(background, Counting(), mode, "json", Situation(name="count", marks=both(), fails=False))
    assert seen.usage[0] > 50
    assert not record.of(Reserve)
