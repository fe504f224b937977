"""Tokens of texts and prompts: exact filler, prefixes in the cache, directives."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.upstream.prompt import BadRequest, PrefixCache, Prompt, chat_prompt, directive_of, messages_prompt
from paceline.upstream.tokens import IMAGE, count, estimate, sample, text_of

SECOND = 1_000_000


@given(tokens=st.integers(0, 30_000), seed=st.integers(0, 2**32))
def test_filler_has_exactly_so_many_tokens(tokens: int, seed: int) -> None:
    text = text_of(tokens, random.Random(seed))
    assert count(text) == tokens
    if tokens > 1_000:
        assert 3.7 <= len(text) / tokens <= 4.2
        # The estimate at arrival is cruder, and close.
        assert 0.92 * tokens < estimate(len(text)) < 1.08 * tokens


@given(st.text())
def test_every_text_has_tokens(text: str) -> None:
    assert (count(text) > 0) == bool(text.strip() or count(text))
    assert count(text) == count(text)
    assert count(sample(7)) == 7


def test_counting_takes_time_in_proportion() -> None:
    """Ten times the text is far from a hundred times the work, on however slow a machine."""

    def best(text: str) -> float:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            count(text)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best(text_of(200_000, random.Random(1))) < 40 * best(text_of(20_000, random.Random(1)))


def body(*texts: str, marked: int | None = None, **more: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": text} for text in texts]
    if marked is not None:
        content[marked]["cache_control"] = {"type": "ephemeral"}  # type: ignore[assignment]
    return {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": content}], **more}


LONG = text_of(2_000, random.Random(2))
MORE = text_of(1_500, random.Random(3))


def test_prefix_is_written_then_read_then_forgotten() -> None:
    cache = PrefixCache(300, 1_024, 100)

    def ask(now: int, prompt: Prompt, let_in: bool = True) -> tuple[int, int, int]:
        split = cache.look(now, prompt)
        if let_in:
            cache.keep(split)
        assert split.input + split.cache_read + split.cache_write == prompt.tokens
        return split.input, split.cache_read, split.cache_write

    first, second = messages_prompt(body(LONG, "ask", marked=0)), messages_prompt(body(LONG, "other", marked=0))
    # What is refused caches nothing.
    assert ask(0, first, let_in=False) == (1, 0, 2_003)
    assert ask(0, first) == (1, 0, 2_003)
    assert ask(SECOND, second) == (1, 2_003, 0)
    # Reading keeps it alive; a longer prefix reads the old part and writes the new one.
    assert ask(300 * SECOND, second) == (1, 2_003, 0)
    longer = messages_prompt(body(LONG, MORE, "ask", marked=1))
    assert ask(301 * SECOND, longer) == (1, 2_003, 1_500)
    assert ask(602 * SECOND, first) == (1, 0, 2_003)


def test_cache_is_bounded_and_ignores_short_prefixes() -> None:
    cache = PrefixCache(300, 1_024, 3)
    short = messages_prompt(body("short", "ask", marked=0))
    assert cache.look(0, short).cache_write == 0
    prompts = [messages_prompt(body(f"{number} {LONG}", marked=0)) for number in range(5)]
    for prompt in prompts:
        cache.keep(cache.look(0, prompt))
    assert [bool(cache.look(0, prompt).cache_read) for prompt in prompts] == [False, False, True, True, True]


def test_system_tools_and_images_are_input() -> None:
    plain = messages_prompt(body("hello")).tokens
    system = messages_prompt(body("hello", system=LONG)).tokens
    assert system == plain + 2_000
    tool = {"name": "look", "input_schema": {"type": "object"}}
    with_tool = messages_prompt(body("hello", tools=[tool]))
    assert with_tool.tokens > plain + 300
    assert with_tool.tool == "look"
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 100_000, "media_type": "image/png"}}
    seen = messages_prompt({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [image]}]})
    assert (seen.tokens, seen.images, seen.size) == (IMAGE + 3, 1, 0)


def test_directives() -> None:
    assert directive_of("output=137,tool").output == 137
    assert directive_of("137").output == 137
    assert directive_of("tool").tool
    assert directive_of("").output is None
    for text in ("output=", "output=-1", "nonsense", "output=٣"):
        with pytest.raises(BadRequest):
            directive_of(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": 3}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"stream": "yes"}, "stream"),
        ({"tools": ["x"]}, "tools"),
        ({"system": 1}, "system"),
    ],
)
def test_bad_bodies_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        messages_prompt({**body("hello"), **fields})


@pytest.mark.parametrize("value", [None, 1, "x", [], {}])
def test_no_body_at_all(value: Any) -> None:
    for parse in (messages_prompt, chat_prompt):
        with pytest.raises(BadRequest):
            parse(value)
