"""The OpenAI SDK, as applications use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

from paceline_client.hooks.openai import async_http_client, http_client
from tests.hooks_matrix.application import Settings
from tests.hooks_matrix.sdk_anthropic import PROMPT
from tests.hooks_matrix.seen import Seen
from tests.hooks_matrix.situations import Form


class OpenAiSdk:
    """See :class:`~tests.hooks_matrix.application.Sdk`."""

    api = "openai"
    model = "gpt-5"
    refusal: type[Exception] = openai.RateLimitError

    def __init__(self, include_usage: bool) -> None:
        self._stream: dict[str, Any] = {"stream": True}
        if include_usage:
            self._stream["stream_options"] = {"include_usage": True}

    def client(self, settings: Settings) -> OpenAI:
        more: dict[str, Any] = {}
        if settings.paceline is not None:
            more["http_client"] = http_client(
                settings.paceline, tenant="t", account="default", max_wait=settings.max_wait
            )
        return OpenAI(**_options(settings), **more)

    def async_client(self, settings: Settings) -> AsyncOpenAI:
        more: dict[str, Any] = {}
        if settings.paceline is not None:
            more["http_client"] = async_http_client(
                settings.paceline, tenant="t", account="default", max_wait=settings.max_wait
            )
        return AsyncOpenAI(**_options(settings), **more)

    def ask(self, output: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_completion_tokens": max(300, output),
            "messages": [{"role": "user", "content": PROMPT * 5}],
            "user": f"paceline-sim:output={output}",
            **more,
        }

    def use(self, client: OpenAI, form: Form, ask: Mapping[str, Any], seen: Seen, pieces: int) -> None:
        if form == "json":
            take(client.chat.completions.create(**ask), seen)
            return
        with client.chat.completions.create(**ask, **self._stream) as stream:
            for chunk in stream:
                take_chunk(chunk, seen)
                if len(seen.text) >= pieces > 0:
                    break

    async def use_async(self, client: AsyncOpenAI, form: Form, ask: Mapping[str, Any], seen: Seen, pieces: int) -> None:
        if form == "json":
            take(await client.chat.completions.create(**ask), seen)
            return
        async with await client.chat.completions.create(**ask, **self._stream) as stream:
            async for chunk in stream:
                take_chunk(chunk, seen)
                if len(seen.text) >= pieces > 0:
                    break


def take(answer: Any, seen: Seen) -> None:
    """A whole answer."""
    (choice,) = answer.choices
    seen.text.append(choice.message.content)
    seen.usage.append(answer.usage.model_dump())
    seen.other += [answer.id, answer.model, choice.finish_reason]


def take_chunk(chunk: Any, seen: Seen) -> None:
    """One of a stream."""
    seen.other.append(chunk.id)
    if chunk.usage is not None:
        seen.usage.append(chunk.usage.model_dump())
    for choice in chunk.choices:
        seen.kinds.append(str(choice.finish_reason))
        if choice.delta.content:
            seen.text.append(choice.delta.content)


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "api_key": "any",
        "base_url": f"{settings.url}/v1",
        "max_retries": settings.retries,
        "timeout": settings.timeout,
    }
