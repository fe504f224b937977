"""Pieces of responses as bytes: Messages and Chat Completions, as JSON and as server-sent events."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from paceline.upstream.account import Call
from paceline.upstream.tokens import sample

encode = msgspec.json.encode


def event(name: str, data: Any) -> bytes:
    """One named event."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), encode(data))


def data(content: Any) -> bytes:
    """One event without a name."""
    return b"data: %s\n\n" % encode(content)


PING = event("ping", {"type": "ping"})
DONE = b"data: [DONE]\n\n"
MESSAGE_STOP = event("message_stop", {"type": "message_stop"})
BLOCK_STOP = event("content_block_stop", {"type": "content_block_stop", "index": 0})
TEXT_START = event(
    "content_block_start", {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
)


def stop_reason(call: Call, tool: str | None) -> str:
    """Why an answer of Anthropic's ends."""
    if call.max_tokens is not None and call.output >= call.max_tokens:
        return "max_tokens"
    return "tool_use" if tool else "end_turn"


def finish_reason(call: Call, tool: str | None) -> str:
    """Why an answer of OpenAI's ends."""
    if call.max_tokens is not None and call.output >= call.max_tokens:
        return "length"
    return "tool_calls" if tool else "stop"


def _usage(call: Call, output: int) -> dict[str, Any]:
    return {
        "input_tokens": call.input,
        "cache_creation_input_tokens": call.cache_write,
        "cache_read_input_tokens": call.cache_read,
        "output_tokens": output,
        "service_tier": "standard",
    }


def _arguments(tokens: int) -> dict[str, str]:
    return {"text": sample(tokens)}


def message(call: Call, message_id: str, tool: str | None) -> bytes:
    """A whole answer of ``/v1/messages``."""
    if tool:
        content = [{"type": "tool_use", "id": f"toolu_{message_id}", "name": tool, "input": _arguments(call.output)}]
    else:
        content = [{"type": "text", "text": sample(call.output)}]
    return encode(
        {
            "id": f"msg_{message_id}",
            "type": "message",
            "role": "assistant",
            "model": call.model,
            "content": content,
            "stop_reason": stop_reason(call, tool),
            "stop_sequence": None,
            "usage": _usage(call, call.produced),
        }
    )


def message_start(call: Call, message_id: str, tool: str | None) -> bytes:
    """The beginning of a stream, with the input side of the usage."""
    start = event(
        "message_start",
        {
            "type": "message_start",
            "message": {
                "id": f"msg_{message_id}",
                "type": "message",
                "role": "assistant",
                "model": call.model,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": _usage(call, min(1, call.output)),
            },
        },
    )
    if not tool:
        return start + TEXT_START + PING
    block = {"type": "tool_use", "id": f"toolu_{message_id}", "name": tool, "input": {}}
    opening = {"type": "input_json_delta", "partial_json": '{"text":"'}
    return (
        start
        + event("content_block_start", {"type": "content_block_start", "index": 0, "content_block": block})
        + PING
        + event("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": opening})
    )


def message_delta_text(tokens: int, as_json: bool) -> bytes:
    """So many tokens more of the text, or of a tool's input."""
    return _small_delta(tokens, as_json) if tokens <= SMALL else _delta(tokens, as_json)


SMALL = 256
"""Tokens of a piece that is kept encoded."""


@lru_cache(maxsize=2 * SMALL)
def _small_delta(tokens: int, as_json: bool) -> bytes:
    return _delta(tokens, as_json)


def _delta(tokens: int, as_json: bool) -> bytes:
    text = sample(tokens) + " "
    delta = {"type": "input_json_delta", "partial_json": text} if as_json else {"type": "text_delta", "text": text}
    return event("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta})


TOOL_END = event(
    "content_block_delta",
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '"}'}},
)


def message_end(call: Call, tool: str | None) -> bytes:
    """The end of a stream: usage is cumulative."""
    return (
        (TOOL_END if tool else b"")
        + BLOCK_STOP
        + event(
            "message_delta",
            {
                "type": "message_delta",
                "delta": {"stop_reason": stop_reason(call, tool), "stop_sequence": None},
                "usage": _usage(call, call.produced),
            },
        )
        + MESSAGE_STOP
    )


def _chat_usage(call: Call) -> dict[str, Any]:
    prompt = call.input + call.cache_read + call.cache_write
    return {
        "prompt_tokens": prompt,
        "completion_tokens": call.produced,
        "total_tokens": prompt + call.produced,
        "prompt_tokens_details": {"cached_tokens": call.cache_read, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def completion(call: Call, message_id: str, created: int, tool: str | None) -> bytes:
    """A whole answer of ``/v1/chat/completions``."""
    answer: dict[str, Any] = {"role": "assistant", "content": None if tool else sample(call.output), "refusal": None}
    if tool:
        arguments = encode(_arguments(call.output)).decode()
        function = {"name": tool, "arguments": arguments}
        answer["tool_calls"] = [{"id": f"call_{message_id}", "type": "function", "function": function}]
    choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": finish_reason(call, tool)}
    return encode(
        {
            "id": f"chatcmpl-{message_id}",
            "object": "chat.completion",
            "created": created,
            "model": call.model,
            "choices": [choice],
            "usage": _chat_usage(call),
            "service_tier": "default",
        }
    )


class ChatStream:
    """The events of one streamed completion."""

    def __init__(self, call: Call, message_id: str, created: int, tool: str | None, include_usage: bool) -> None:
        self._call = call
        self._tool = tool
        self._id = message_id
        self._include_usage = include_usage
        self._frame: dict[str, Any] = {
            "id": f"chatcmpl-{message_id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": call.model,
            "service_tier": "default",
        }

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._include_usage else {}
        return data({**self._frame, "choices": [choice], **usage})

    def _tool_delta(self, arguments: str, **more: Any) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": arguments}
        if more:
            function["name"] = self._tool
        return {"tool_calls": [{"index": 0, **more, "function": function}]}

    def start(self) -> bytes:
        """The role, and the opening of a tool call."""
        if not self._tool:
            return self._chunk({"role": "assistant", "content": "", "refusal": None})
        opening = self._tool_delta('{"text":"', id=f"call_{self._id}", type="function")
        return self._chunk({"role": "assistant", "content": None, **opening})

    def piece(self, tokens: int) -> bytes:
        """So many tokens more."""
        text = sample(tokens) + " "
        return self._chunk(self._tool_delta(text) if self._tool else {"content": text})

    def end(self) -> bytes:
        """The reason, the usage if it was asked for, and the end."""
        found = self._chunk(self._tool_delta('"}')) if self._tool else b""
        found += self._chunk({}, finish_reason(self._call, self._tool))
        if self._include_usage:
            found += data({**self._frame, "choices": [], "usage": _chat_usage(self._call)})
        return found + DONE
