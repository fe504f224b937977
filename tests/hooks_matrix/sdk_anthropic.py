"""The Anthropic SDK, as applications use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anthropic
from anthropic import Anthropic, AsyncAnthropic

from paceline_client.hooks.anthropic import PacelineMiddleware
from tests.hooks_matrix.application import Settings
from tests.hooks_matrix.seen import Seen
from tests.hooks_matrix.situations import Form

PROMPT = "How far is it from here to there, and how long would somebody take who walks? "


class AnthropicSdk:
    """See :class:`~tests.hooks_matrix.application.Sdk`."""

    api = "anthropic"
    model = "claude-sonnet-5"
    refusal: type[Exception] = anthropic.RateLimitError

    def client(self, settings: Settings) -> Anthropic:
        return Anthropic(**_options(settings))

    def async_client(self, settings: Settings) -> AsyncAnthropic:
        return AsyncAnthropic(**_options(settings))

    def ask(self, output: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_tokens": max(300, output),
            "messages": [{"role": "user", "content": PROMPT * 5}],
            "metadata": {"user_id": f"paceline-sim:output={output}"},
            **more,
        }

    def use(self, client: Anthropic, form: Form, ask: Mapping[str, Any], seen: Seen, pieces: int) -> None:
        if form == "json":
            take(client.messages.create(**ask), seen)
            return
        with client.messages.create(**ask, stream=True) as stream:
            for event in stream:
                take_event(event, seen)
                if len(seen.text) >= pieces > 0:
                    break

    async def use_async(
        self, client: AsyncAnthropic, form: Form, ask: Mapping[str, Any], seen: Seen, pieces: int
    ) -> None:
        if form == "json":
            take(await client.messages.create(**ask), seen)
            return
        async with await client.messages.create(**ask, stream=True) as stream:
            async for event in stream:
                take_event(event, seen)
                if len(seen.text) >= pieces > 0:
                    break


def take(message: Any, seen: Seen) -> None:
    """A whole answer."""
    for block in message.content:
        seen.text.append(block.text if block.type == "text" else str(block.input))
        seen.kinds.append(block.type)
    seen.usage.append(message.usage.model_dump())
    seen.other += [message.id, message.model, message.stop_reason]


def take_event(event: Any, seen: Seen) -> None:
    """One of a stream."""
    seen.kinds.append(event.type)
    if event.type == "message_start":
        seen.usage.append(event.message.usage.model_dump())
        seen.other += [event.message.id, event.message.model]
    elif event.type == "content_block_delta":
        delta = event.delta
        seen.text.append(delta.text if delta.type == "text_delta" else delta.partial_json)
    elif event.type == "message_delta":
        seen.usage.append(event.usage.model_dump())
        seen.other.append(event.delta.stop_reason)


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "api_key": "any",
        "base_url": settings.url,
        "max_retries": settings.retries,
        "timeout": settings.timeout,
    }
    if settings.paceline is not None:
        options["middleware"] = [PacelineMiddleware(settings.paceline, tenant="t", max_wait=settings.max_wait)]
    return options
