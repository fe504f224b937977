"""Whatever a response holds: the reader never raises, says nothing absurd, and takes bounded time."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.dimensions import DAY_US, Dimension
from paceline.engine.operations import Refusal
from paceline.frontend.limits import MAX_ERROR_DETAILS_BYTES, MAX_ERROR_MESSAGE_BYTES, MAX_HEADER_VALUE_BYTES
from paceline.providers.headers import ALLOWED_HEADERS, FAMILIES, parse
from tests.providers.test_corpus import CASES, details_of, load

MOST = 10**12
KNOWN = [load(path)["response"] for path in CASES.values()]
REAL_VALUES = sorted({value for response in KNOWN for value in response.get("headers", {}).values()})
REAL_WORDS = sorted(
    {
        response["error"][field]
        for response in KNOWN
        if "error" in response
        for field in ("type", "code", "message")
        if field in response["error"]
    }
)
REAL_DETAILS = [details_of(response["error"]) for response in KNOWN if "details" in response.get("error", {})]

NUMBERS = st.integers(-5, 10**14) | st.sampled_from([0, 1, MOST, MOST + 1, 2**63, 10**30])
VALUES = (
    st.binary(max_size=40)
    | NUMBERS.map(lambda number: str(number).encode())
    | st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1)).map(lambda at: f"{at.isoformat()}Z".encode())  # noqa: DTZ001
    | st.integers(-(10**6), 10**6).map(
        lambda seconds: (
            (datetime(2026, 11, 22, 12, tzinfo=UTC) + timedelta(seconds=seconds))
            .strftime("%a, %d %b %Y %H:%M:%S GMT")
            .encode()
        )
    )
    | st.lists(st.tuples(NUMBERS, st.sampled_from(["h", "m", "s", "ms", "µs", "ns", "", "d"])), max_size=4).map(
        lambda parts: "".join(f"{number}{unit}" for number, unit in parts).encode()
    )
    | st.lists(
        st.tuples(st.sampled_from(["a", '"b"', "input-tokens", '"']), NUMBERS, NUMBERS, NUMBERS), max_size=3
    ).map(lambda parts: ",".join(f"{n};q={q};w={w};r={r};t={q}" for n, q, w, r in parts).encode())
    | st.sampled_from(REAL_VALUES).map(str.encode)
)
HEADERS = st.lists(st.tuples(st.sampled_from(sorted(ALLOWED_HEADERS)) | st.text(max_size=30), VALUES), max_size=24)
KEYS = (
    st.sampled_from(["error", "type", "code", "status", "message", "details", "error_code", "allowed_tokens"])
    | st.sampled_from(["@type", "violations", "quotaId", "quotaMetric", "quotaValue", "retryDelay", "seconds", "nanos"])
    | st.text(max_size=8)
)
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.floats(allow_nan=False)
    | st.sampled_from(REAL_WORDS)
    | st.sampled_from(
        ["type.googleapis.com/google.rpc.QuotaFailure", "google.rpc.RetryInfo", "55s", "InputTokensPerMinute"]
    )
    | st.text(max_size=20)
)
BODIES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=16
)


def cut(body: Any) -> bytes:
    return json.dumps(body).encode()[:MAX_ERROR_DETAILS_BYTES]


DETAILS = st.just(b"") | BODIES.map(cut) | st.sampled_from(REAL_DETAILS) | st.binary(max_size=60)
MESSAGES = (
    st.tuples(
        st.sampled_from(["Limit {0}, Used {1}, Requested {2}. ", "rate limit of {0} ", "currently allowed {1} ", ""]),
        st.sampled_from(
            ["input tokens per minute", "requests per day", "tokens per min (TPM)", "concurrent requests", ""]
        ),
        st.sampled_from([". Please try again in {2}s", " retry after {1} days", " try again in {0}.{1}ms", ""]),
        NUMBERS,
        NUMBERS,
        NUMBERS,
    ).map(lambda parts: "".join(parts[:3]).format(*parts[3:]))
    | st.sampled_from(REAL_WORDS)
    | st.text(max_size=30)
)
WORDS = st.sampled_from(REAL_WORDS) | st.text(max_size=30)


@given(
    st.sampled_from([*FAMILIES, "none"]),
    HEADERS,
    st.sampled_from([0, 200, 400, 402, 429, 500, 503, 529]) | st.integers(),
    WORDS,
    WORDS,
    MESSAGES,
    DETAILS,
    st.none() | st.integers(),
    st.integers(),
)
def test_nothing_breaks_the_reader_and_what_it_says_is_sane(
    family: str,
    headers: list[tuple[str, bytes]],
    status: int,
    kind: str,
    code: str,
    message: str,
    details: bytes,
    told: int | None,
    age: int,
) -> None:
    ignored: Counter[str] = Counter()
    found = parse(
        family, headers, status, kind, message, told, age, error_code=code, error_details=details, ignored=ignored
    )
    assert set(ignored) <= ALLOWED_HEADERS | {"error.retry_after", "error.details"}
    if found is None:
        return
    assert found.readings or found.refusal is not None
    assert found.age_us >= 0
    assert len({reading.dimension for reading in found.readings}) == len(found.readings)
    assert found.refused is None or found.refusal in (Refusal.BUDGET, Refusal.RAMP)
    assert found.allowed is None or (found.refusal is Refusal.RAMP and 0 < found.allowed <= MOST)
    if found.retry_after_us is not None:
        assert found.refusal not in (None, Refusal.SPEND, Refusal.NO_QUOTA)
        assert 0 <= found.retry_after_us <= DAY_US
    for reading in found.readings:
        assert reading.dimension not in (Dimension.QUEUED_REQUESTS, Dimension.SPEND)
        for figure in (reading.limit, reading.remaining):
            assert figure is None or 0 <= figure <= MOST
        assert reading.reset_us is None or 0 <= reading.reset_us <= 32 * DAY_US
        assert 0 <= reading.rounding <= 1_000
        assert 0 <= reading.reset_error_us <= 1_000_000


@given(BODIES)
def test_any_body_is_read_in_any_family(body: object) -> None:
    for family in FAMILIES:
        assert parse(family, [], 429, error_details=cut(body), ignored=Counter()) is not None


def nasty(length: int) -> list[str]:
    """Texts that are hard on a pattern that goes back."""
    bits = [
        "1",
        "1 ",
        "1,",
        "1.1",
        "1.1s ",
        "a",
        " ",
        "limit ",
        "used: 1 ",
        "tokens per ",
        "allowed ",
        "1 tokens ",
        "\\",
        '"',
    ]
    bits += ["try again in ", "try again in 1s ", "x;", "a;q=1,", "a;q", "a ,", '"a', "[", '{"a":', "µ", "1m"]
    return [(bit * length)[:length] for bit in bits]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_takes_little_time(family: str) -> None:
    headers = sorted(ALLOWED_HEADERS)
    for text, body, value in zip(
        nasty(MAX_ERROR_MESSAGE_BYTES), nasty(MAX_ERROR_DETAILS_BYTES), nasty(MAX_HEADER_VALUE_BYTES), strict=True
    ):
        pairs = [(name, value.encode()) for name in headers]
        for code in ("", "ramp_limit_exceeded"):
            started = time.process_time()
            parse(family, pairs, 429, "", text, error_code=code, error_details=body.encode(), ignored=Counter())
            assert time.process_time() - started < 0.1, text[:20]


def test_more_of_a_body_than_may_come_is_not_decoded() -> None:
    body = json.dumps({"error": {"code": "insufficient_quota", "padding": "x" * 5_000}}).encode()
    ignored: Counter[str] = Counter()
    found = parse("openai", [], 429, error_details=body, ignored=ignored)
    assert found is not None
    assert found.refusal is Refusal.BUDGET
    assert ignored == Counter({"error.details": 1})
