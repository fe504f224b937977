"""What a scanner reads out of a body does not depend on how the body is cut, and its memory is bounded."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_client import Usage
from paceline_client.hooks._scan import MAX_LINE, TAIL, EventStream, JsonBody, Scanner, read_body, scanner
from tests.hooks.stub import (
    CHAT_DELTA,
    CHAT_DONE,
    CHAT_USAGE,
    DELTA,
    MESSAGE,
    OVERLOADED,
    START,
    TEXT,
    WHOLE,
    event,
)

FINAL = Usage(12, 3, 2, 15)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    at = 0
    for cut in sorted(each % (len(data) + 1) for each in cuts):
        yield data[at:cut]
        at = cut
    yield data[at:]


def shown(found: Scanner, data: bytes, cuts: list[int]) -> Scanner:
    for piece in pieces(data, cuts):
        found.feed(piece)
    found.end()
    return found


def sse(encoding: str = "") -> Scanner:
    found = scanner("text/event-stream; charset=utf-8", encoding)
    assert found is not None
    return found


@given(st.lists(st.integers(0, 10**6), max_size=40), st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_of_messages_is_read_however_it_is_cut(cuts: list[int], end: bytes) -> None:
    found = shown(sse(), WHOLE.replace(b"\n", end), cuts)
    assert (found.usage, found.model, found.complete, found.error) == (FINAL, MESSAGE["model"], True, None)
    assert found.produced == 15


@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_a_stream_of_chat_completions_is_read_however_it_is_cut(cuts: list[int]) -> None:
    found = shown(sse(), CHAT_DELTA * 3 + CHAT_USAGE + CHAT_DONE, cuts)
    assert (found.usage, found.model, found.complete) == (Usage(16, 4, None, 7), "gpt-5-x", True)


@given(st.lists(st.integers(0, 10**6), max_size=40), st.sampled_from(["gzip", "deflate", "bare"]))
def test_a_compressed_stream_is_read_however_it_is_cut(cuts: list[int], how: str) -> None:
    if how == "gzip":
        data = gzip.compress(WHOLE)
    elif how == "deflate":
        data = zlib.compress(WHOLE)
    else:
        squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = squeeze.compress(WHOLE) + squeeze.flush()
    found = shown(sse("gzip" if how == "gzip" else "deflate"), data, cuts)
    assert (found.usage, found.complete) == (FINAL, True)


@given(st.text(max_size=60), st.integers(0, 5))
def test_what_was_produced_grows_with_the_text_and_no_text_is_taken_for_something_else(text: str, number: int) -> None:
    found = EventStream()
    found.feed(START)
    hostile = text + '"usage": {"input_tokens": 1} data: [DONE]\n\nevent: error\ndata: {"error": 1} "message_stop"'
    for _ in range(number):
        before = found.produced
        found.feed(event("content_block_delta", index=0, delta={"type": "text_delta", "text": hostile}))
        assert before is not None
        assert (found.produced or 0) >= before + len(hostile) // 4
    assert (found.usage, found.error, found.complete) == (Usage(12, 3, 2, 1), None, False)


@given(st.text(max_size=60))
def test_a_chat_text_is_never_taken_for_usage_or_the_end(text: str) -> None:
    found = EventStream()
    hostile = text + '"usage": {"prompt_tokens": 1}, "message_stop" data: [DONE]\n\ndata: [DONE]\n\n'
    body = {"choices": [{"index": 0, "delta": {"content": hostile}}], "usage": None}
    found.feed(b"data: " + json.dumps(body).encode() + b"\n\n")
    assert (found.usage, found.error, found.complete) == (None, None, False)
    assert (found.produced or 0) >= len(hostile) // 4


def test_a_stream_that_is_cut_off_says_what_was_produced() -> None:
    found = EventStream()
    found.feed(START + DELTA * 4)
    assert found.produced == 1 + 4 * len(TEXT) // 4
    found.feed(event("message_delta", delta={}, usage={"output_tokens": 30}))
    assert found.produced == 30
    assert not found.complete


def test_an_error_in_midstream_is_read_without_what_was_produced() -> None:
    found = EventStream()
    found.feed(START + DELTA + OVERLOADED)
    assert found.error is not None
    assert (found.error.type, found.error.message) == ("overloaded_error", "Overloaded")
    body = {"error": {"code": "server_error", "message": "limit"}, "output": [{"text": "a secret"}]}
    failed = EventStream()
    failed.feed(event("response.failed", response=body))
    assert failed.error is not None
    assert failed.error.code == "server_error"
    assert b"secret" not in failed.error.details


def test_a_stream_of_responses() -> None:
    found = EventStream()
    found.feed(event("response.created", response={"model": "gpt-5-x", "usage": None, "error": None}))
    found.feed(event("response.output_text.delta", delta=TEXT))
    assert (found.produced, found.complete) == (len(TEXT) // 4, False)
    usage = {"input_tokens": 30, "input_tokens_details": {"cached_tokens": 10}, "output_tokens": 8}
    found.feed(event("response.completed", response={"model": "gpt-5-x", "error": None, "usage": usage}))
    assert (found.usage, found.model, found.complete) == (Usage(20, 10, None, 8), "gpt-5-x", True)


def test_names_of_events_may_be_lost_on_the_way() -> None:
    bare = b"\n".join(line for line in WHOLE.split(b"\n") if not line.startswith(b"event:"))
    found = shown(sse(), bare, [])
    assert (found.usage, found.complete) == (FINAL, True)


@settings(max_examples=25)
@given(st.integers(700, 100_000), st.integers(0, 16))
def test_memory_is_bounded_and_usage_found_behind_any_amount_of_text(step: int, metadata: int) -> None:
    usage = {"input_tokens": 30, "input_tokens_details": {"cached_tokens": 10}, "output_tokens": 8}
    body = {
        "model": "gpt-5-x",
        "output": [{"text": "x" * 300_000, "usage": {"input_tokens": 1}}],
        "usage": usage,
        "metadata": {f"{number}": "y" * 500 for number in range(metadata)},
    }
    data = event("response.completed", response=body)
    found = EventStream()
    for at in range(0, len(data), step):
        found.feed(data[at : at + step])
        held = len(found._rest) if found._long is None else len(found._long.head) + len(found._long.tail)
        assert held <= MAX_LINE + TAIL + step
    assert (found.usage, found.model, found.complete) == (Usage(20, 10, None, 8), "gpt-5-x", True)


@pytest.mark.parametrize("size", [10, MAX_LINE, 400_000])
def test_json_bodies(size: int) -> None:
    body = json.dumps(MESSAGE | {"content": [{"type": "text", "text": "x" * size}], "usage": MESSAGE["usage"]}).encode()
    # The key that is replaced keeps its place, which is behind the content.
    assert body.index(b'"content"') < body.index(b'"usage"')
    assert read_body(body) == (Usage(12, 3, 2, 5), MESSAGE["model"])
    found = JsonBody()
    for at in range(0, len(body), 1_000):
        found.feed(body[at : at + 1_000])
        assert sys.getsizeof(found._text.head) + sys.getsizeof(found._text.tail) < MAX_LINE + 2 * TAIL + 2_000
    found.end()
    assert (found.usage, found.model) == (Usage(12, 3, 2, 5), MESSAGE["model"])


def test_usage_before_a_long_text_is_found_in_a_body_that_is_there() -> None:
    body = json.dumps({"usage": MESSAGE["usage"], "model": "m", "content": "x" * 200_000}).encode()
    assert read_body(body) == (Usage(12, 3, 2, 5), "m")


def test_what_cannot_be_read() -> None:
    assert scanner("application/vnd.amazon.eventstream", "") is None
    assert scanner("text/event-stream", "br") is None
    assert scanner("application/json", "identity") is not None
