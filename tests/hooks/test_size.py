"""Sizes of requests, and what the upstream's cache is expected to hold."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from paceline_client import estimate_tokens
from paceline_client.hooks._size import MAX_SEEN, Seen, of_completion, of_embeddings, of_messages

MODEL = "claude-sonnet-5"
LONG = "A sentence of some words. " * 400
MARKED = {"cache_control": {"type": "ephemeral"}}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def block(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def body(*turns: Any, **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": each} for number, each in enumerate(turns)
    ]
    return {"model": MODEL, "max_tokens": 64, "messages": messages, **more}


texts = st.one_of(st.text(max_size=40), st.lists(st.text(max_size=40).map(block), max_size=3))


@given(st.lists(texts, max_size=5), texts, st.booleans())
def test_without_marks_it_is_the_estimate_and_with_marks_the_same_in_two_parts(
    turns: list[Any], system: Any, tools: bool
) -> None:
    more: dict[str, Any] = {"system": system}
    if tools:
        more["tools"] = [{"name": "t", "description": "d", "input_schema": {"type": "object"}}]
    asked = body(*turns, **more)
    plain = of_messages(asked, Seen())
    assert (plain.input_tokens, plain.cached_tokens, plain.max_output_tokens) == (
        estimate_tokens(asked, MODEL),
        None,
        64,
    )
    marked = of_messages(asked | MARKED, Seen())
    # An empty message has a frame, but no block that could be marked; and frames of tools differ by rounding.
    assert abs(marked.input_tokens - plain.input_tokens) <= 4 * (len(turns) + 2)
    assert marked.cached_tokens == 0


def test_a_beginning_counts_as_cached_only_after_it_was_sent_and_only_while_the_cache_lives() -> None:
    clock = Clock()
    seen = Seen(clock)
    asked = body("and now?", system=[block(LONG, **MARKED)])
    first = of_messages(asked, seen)
    assert (first.cached_tokens, len(first.marks)) == (0, 1)
    # Asking again before anything succeeded changes nothing.
    assert of_messages(asked, seen) == first
    seen.add(first.marks)
    second = of_messages(copy.deepcopy(asked), seen)
    assert second.cached_tokens is not None
    assert second.cached_tokens > 1_024
    assert abs(second.cached_tokens + second.input_tokens - first.input_tokens) <= 1
    clock.now += 299
    assert of_messages(asked, seen).cached_tokens
    clock.now += 2
    assert of_messages(asked, seen).cached_tokens == 0


def test_an_hour_if_it_was_asked_for() -> None:
    clock = Clock()
    seen = Seen(clock)
    asked = body("and now?", system=[block(LONG, cache_control={"type": "ephemeral", "ttl": "1h"})])
    seen.add(of_messages(asked, seen).marks)
    clock.now += 3_599
    assert of_messages(asked, seen).cached_tokens


def test_a_conversation_reads_what_its_last_turn_wrote() -> None:
    seen = Seen()
    first = body([block(LONG, **MARKED)])
    seen.add(of_messages(first, seen).marks)
    # The mark has moved on.
    longer = body([block(LONG)], "answer", [block("more", **MARKED)])
    size = of_messages(longer, seen)
    assert size.cached_tokens == of_messages(first, Seen()).input_tokens
    assert 0 < size.input_tokens < 40


def test_another_beginning_another_model_and_a_short_one_are_not_cached() -> None:
    seen = Seen()
    asked = body("x", system=[block(LONG, **MARKED)])
    seen.add(of_messages(asked, seen).marks)
    assert of_messages(body("x", system=[block("Other. " + LONG, **MARKED)]), seen).cached_tokens == 0
    assert of_messages(asked | {"model": "claude-opus-5"}, seen).cached_tokens == 0
    tools = [{"name": "t", "description": "d", "input_schema": {}}]
    assert of_messages(asked | {"tools": tools}, seen).cached_tokens == 0
    assert of_messages(body("x", system=[block("short", **MARKED)]), seen).marks == ()


def test_what_is_remembered_is_bounded() -> None:
    seen = Seen()
    for number in range(MAX_SEEN + 10):
        seen.add([(number, 300.0)])
    assert len(seen) == MAX_SEEN
    assert 5 not in seen
    assert MAX_SEEN + 9 in seen


def test_images_and_documents_are_not_weighed_as_text() -> None:
    data = "A" * 400_000
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    document = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": data}}
    assert 1_000 < of_messages(body([image]), Seen()).input_tokens < 3_000
    assert 1_000 < of_messages(body([document]), Seen()).input_tokens < 20_000


def test_sizes_of_openai() -> None:
    asked = {"model": "gpt-5", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10, "n": 3}
    assert of_completion(asked).max_output_tokens == 30
    assert of_completion({"model": "gpt-5", "input": "hello", "max_output_tokens": 7}).max_output_tokens == 7
    assert of_completion({"model": "gpt-5", "input": "hello"}).max_output_tokens is None
    assert of_embeddings({"model": "text-embedding-3", "input": [1, 2, 3]}).input_tokens == 3
    assert of_embeddings({"model": "text-embedding-3", "input": []}).input_tokens == 0
