"""The simulator's own errors, as it words them, read back: both sides must mean the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest

from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.providers.headers import parse
from paceline.upstream.account import RAMP, Refused
from paceline.upstream.errors import (
    anthropic_code,
    anthropic_error,
    anthropic_refusal,
    openai_error,
    openai_refusal,
)


def from_anthropic(refused: Refused) -> Observation | None:
    body = anthropic_error(429, anthropic_refusal(refused, "org", "m"), "req_1", anthropic_code(refused))
    return parse("anthropic", [], 429, error_details=json.dumps(body).encode(), ignored=Counter())


def from_openai(refused: Refused) -> Observation | None:
    body = openai_error(429, openai_refusal(refused, "org", "m"), code="rate_limit_exceeded")
    return parse("openai", [], 429, error_details=json.dumps(body).encode(), ignored=Counter())


def short(dimension: str, limit: int = 30_000, level: int = 1_000) -> Refused:
    return Refused(dimension=dimension, needed=9_000, level=level, limit=limit, wait_us=16_000_000, retry_after=None)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("requests", Dimension.REQUESTS),
        ("input_tokens", Dimension.INPUT_TOKENS),
        ("output_tokens", Dimension.OUTPUT_TOKENS),
    ],
)
def test_a_short_bucket_of_anthropic(name: str, dimension: Dimension) -> None:
    found = from_anthropic(short(name))
    assert found == Observation((Reading(dimension, 30_000),), refusal=Refusal.BUDGET, refused=dimension)


@pytest.mark.parametrize(("name", "dimension"), [("requests", Dimension.REQUESTS), ("tokens", Dimension.TOKENS)])
def test_a_short_bucket_of_openai(name: str, dimension: Dimension) -> None:
    found = from_openai(short(name))
    reading = Reading(dimension, 30_000, 1_000)
    assert found == Observation((reading,), 0, Refusal.BUDGET, dimension, 16_000_000)


@pytest.mark.parametrize("read", [from_anthropic, from_openai])
def test_too_many_in_flight(read: Callable[[Refused], Observation | None]) -> None:
    assert read(short("concurrency")) == Observation(refusal=Refusal.CONCURRENCY)


def test_a_ramp_says_what_is_allowed() -> None:
    found = from_anthropic(short(RAMP, limit=40_000))
    assert found == Observation(refusal=Refusal.RAMP, refused=Dimension.INPUT_TOKENS, allowed=40_000)
