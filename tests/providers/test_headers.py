"""Response headers: what is read, what is not believed, and that nothing breaks the reader."""

from __future__ import annotations

from collections import Counter

import pytest

from paceline.engine.dimensions import DAY_US, SECOND_US, Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.frontend.limits import MAX_HEADERS
from paceline.providers.headers import ALLOWED_HEADERS, FAMILIES, origin, parse

DATE = ("Date", b"Sun, 22 Nov 2026 12:00:00 GMT")
FULL = [
    ("anthropic-ratelimit-requests-limit", b"1000"),
    ("anthropic-ratelimit-requests-remaining", b"999"),
    ("anthropic-ratelimit-requests-reset", b"2026-11-22T12:00:01Z"),
    ("anthropic-ratelimit-input-tokens-limit", b"2000000"),
    ("anthropic-ratelimit-input-tokens-remaining", b"1985000"),
    ("anthropic-ratelimit-input-tokens-reset", b"2026-11-22T12:00:30Z"),
    ("anthropic-ratelimit-output-tokens-limit", b"400000"),
    ("anthropic-ratelimit-output-tokens-remaining", b"400000"),
    ("anthropic-ratelimit-output-tokens-reset", b"2026-11-22T12:00:00Z"),
    ("anthropic-ratelimit-tokens-limit", b"2400000"),
    ("anthropic-ratelimit-tokens-remaining", b"2385000"),
    DATE,
]
READINGS = (
    Reading(Dimension.REQUESTS, 1_000, 999, 0, SECOND_US, SECOND_US),
    Reading(Dimension.INPUT_TOKENS, 2_000_000, 1_985_000, 1_000, 30 * SECOND_US, SECOND_US),
    Reading(Dimension.OUTPUT_TOKENS, 400_000, 400_000, 1_000, 0, SECOND_US),
)
LIMIT = "anthropic-ratelimit-requests-limit"
REMAINING = "anthropic-ratelimit-requests-remaining"
RESET = "anthropic-ratelimit-requests-reset"


def read(*headers: tuple[str, bytes], family: str = "anthropic") -> tuple[Reading | None, Counter[str]]:
    """The one reading of a response, and what was ignored."""
    ignored: Counter[str] = Counter()
    found = parse(family, headers, 200, ignored=ignored)
    if found is None:
        return None, ignored
    (reading,) = found.readings
    return reading, ignored


def refused(**fields: object) -> Observation | None:
    return parse("anthropic", fields.pop("headers", []), ignored=Counter(), **fields)  # type: ignore[arg-type]


def test_a_full_set_is_read_without_the_combined_tokens() -> None:
    assert parse("anthropic", FULL, 200, age_us=7) == Observation(READINGS, age_us=7)


def test_names_are_read_in_any_case_and_order() -> None:
    shouted = [(name.upper(), value) for name, value in reversed(FULL)]
    assert parse("anthropic", shouted, 200) == Observation(READINGS)


def test_the_older_spelling_is_read_and_the_standard_one_goes_first() -> None:
    reading, _ = read(("X-RateLimit-Limit-Requests", b"50"), ("X-RateLimit-Remaining-Requests", b"49"))
    assert reading == Reading(Dimension.REQUESTS, 50, 49)
    reading, _ = read(("X-RateLimit-Remaining-Input-Tokens", b"9000"))
    assert reading == Reading(Dimension.INPUT_TOKENS, None, 9_000, 1_000)
    reading, _ = read(("X-RateLimit-Limit-Requests", b"50"), (LIMIT, b"60"))
    assert reading == Reading(Dimension.REQUESTS, 60)


def test_fast_mode_has_headers_of_its_own() -> None:
    fast = ("anthropic-fast-input-tokens-remaining", b"5000")
    assert read(fast, (LIMIT, b"60"), family="anthropic-fast")[0] == Reading(Dimension.INPUT_TOKENS, None, 5_000, 1_000)
    assert read(fast) == (None, Counter())


def test_a_response_without_limits_says_nothing() -> None:
    assert parse("anthropic", [DATE, ("x-other", b"1")], 200) is None
    assert parse("anthropic", [], 500, error_type="api_error") is None


def test_a_reset_counts_from_the_responses_own_date() -> None:
    assert read((RESET, b"2026-11-22T12:00:30Z")) == (None, Counter())
    for reset, expected in (
        (b"2026-11-22T12:00:30Z", 30),
        (b"2026-11-22T13:00:30.5+01:00", 30.5),
        (b"2026-11-22t12:00:30z", 30),
        (b"2026-11-22T11:59:58Z", 0),
    ):
        reading, ignored = read((RESET, reset), DATE)
        assert reading is not None
        assert (reading.reset_us, reading.reset_error_us) == (expected * SECOND_US, SECOND_US)
        assert not ignored


@pytest.mark.parametrize("value", [b"", b"-1", b"+1", b"1.5", b"1e3", b"0x10", b"10, 10", b"ten", b"\xd9\xa1", b"\xff"])
def test_what_is_no_number_is_ignored_and_counted(value: bytes) -> None:
    assert read((LIMIT, value)) == (None, Counter({LIMIT: 1}))


@pytest.mark.parametrize("value", [b"1000000000001", b"9" * 5000])
def test_absurd_numbers_are_ignored(value: bytes) -> None:
    assert read((REMAINING, value)) == (None, Counter({REMAINING: 1}))


def test_more_left_than_twice_the_limit_is_not_believed() -> None:
    assert read((LIMIT, b"10"), (REMAINING, b"20"))[0] == Reading(Dimension.REQUESTS, 10, 20)
    assert read((LIMIT, b"10"), (REMAINING, b"21")) == (Reading(Dimension.REQUESTS, 10), Counter({REMAINING: 1}))
    assert read((LIMIT, b" 0 "), (REMAINING, b"0"))[0] == Reading(Dimension.REQUESTS, 0, 0)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"30",
        b"2026-11-22",
        b"20261122T120030Z",
        b"2026-11-22T12:00:30",
        b"2026-13-22T12:00:30Z",
        b"2031-11-22T12:00:30Z",
        b"2020-11-22T12:00:30Z",
        b"9999-12-31T23:59:59-23:59",
        b"0001-01-01T00:00:00+23:59",
    ],
)
def test_resets_that_make_no_sense_are_ignored(value: bytes) -> None:
    assert read((RESET, value), DATE) == (None, Counter({RESET: 1}))


def test_a_date_that_makes_no_sense_leaves_the_reset_out() -> None:
    for date in (b"", b"yesterday", b"Sun, 99 Nov 2026 12:00:00 GMT", b"\xff" * 29, b"Sun, 22 Nov 99999 12:00:00 GMT"):
        reading, ignored = read((LIMIT, b"10"), (RESET, b"2026-11-22T12:00:30Z"), ("date", date))
        assert reading == Reading(Dimension.REQUESTS, 10)
        assert ignored["date"] == 1


def test_of_a_header_that_repeats_the_first_counts() -> None:
    assert read((LIMIT, b"10"), (LIMIT.upper(), b"20")) == (Reading(Dimension.REQUESTS, 10), Counter({LIMIT: 1}))
    assert read((LIMIT, b"10"), (LIMIT, b"10")) == (Reading(Dimension.REQUESTS, 10), Counter())


@pytest.mark.parametrize(
    ("message", "dimension", "limit"),
    [
        ("This request would exceed the rate limit of 30,000 input tokens per minute.", Dimension.INPUT_TOKENS, 30_000),
        ("… your organization's rate limit of 8,000 OUTPUT TOKENS per minute", Dimension.OUTPUT_TOKENS, 8_000),
        ("Number of requests has exceeded your rate limit of 50 requests per minute", Dimension.REQUESTS, 50),
        ("Number of requests has exceeded your rate limit", Dimension.REQUESTS, None),
        ("Too many tokens, please wait", Dimension.TOKENS, None),
        ("rate limit of 2 requests per second", Dimension.REQUESTS, None),
        ("rate limit of 1,000 requests per day", None, None),
        ("50 requests per minute and 8,000 output tokens per minute", None, None),
        ("Too many requests", None, None),
        ("This request would exceed your rate limit", None, None),
        ("input tokens and output tokens", None, None),
        ("", None, None),
    ],
)
def test_a_429_names_what_was_short(message: str, dimension: Dimension | None, limit: int | None) -> None:
    found = refused(http_status=429, error_type="rate_limit_error", error_message=message)
    readings = () if dimension is None or limit is None else (Reading(dimension, limit),)
    assert found == Observation(readings, refusal=Refusal.BUDGET, refused=dimension)


def test_too_many_at_once_is_no_matter_of_budget() -> None:
    for message in ("Too many concurrent connections", "Number of concurrent requests has exceeded your rate limit"):
        found = refused(http_status=429, error_type="rate_limit_error", error_message=message)
        assert found == Observation(refusal=Refusal.CONCURRENCY)


@pytest.mark.parametrize(
    ("status", "kind", "code", "message", "refusal"),
    [
        (429, "", "", "", Refusal.BUDGET),
        (429, "rate_limit_error", "ramp_limit_exceeded", "", Refusal.RAMP),
        (503, "server_error", "slow_down", "", Refusal.RAMP),
        (429, "", "team_spend_limit_exceeded", "", Refusal.SPEND),
        (429, "insufficient_quota", "insufficient_quota", "", Refusal.SPEND),
        (402, "billing_error", "", "", Refusal.SPEND),
        (429, "", "", "You exceeded your current quota, please check your plan and billing details.", Refusal.BUDGET),
        (200, "", "", "insufficient_quota", None),
        (429, "ModelNotReadyException", "", "", Refusal.OVERLOAD),
        (200, "server_error", "server_is_overloaded", "", Refusal.OVERLOAD),
        (429, "com.amazonaws#ThrottlingException:http://x", "", "", Refusal.BUDGET),
        (429, "", "", "limit: 0", Refusal.NO_QUOTA),
        (429, "", "", "Limit 0, Used 0, Requested 1", Refusal.NO_QUOTA),
        (429, "", "", "limit: 0.5 per second, limit 01, limit: 0,5", Refusal.BUDGET),
        (200, "rate_limit_error", "", "", Refusal.BUDGET),
        (429, "rate_limit_error", "enforced_spend_limit_reached", "", Refusal.SPEND),
        (429, "contract_spend_limit_reached", "", "", Refusal.SPEND),
        (429, "rate_limit_error", "", "stop: enforced_spend_limit_reached", Refusal.SPEND),
        (400, "invalid_request_error", "", "You have reached your specified API usage limits.", Refusal.SPEND),
        (400, "invalid_request_error", "", "max_tokens: too large", None),
        (529, "overloaded_error", "", "Overloaded", Refusal.OVERLOAD),
        (529, "", "", "", Refusal.OVERLOAD),
        (503, "", "", "", Refusal.OVERLOAD),
        (200, "overloaded_error", "", "", Refusal.OVERLOAD),
        (500, "api_error", "", "", None),
        (200, "", "", "", None),
    ],
)
def test_refusals(status: int, kind: str, code: str, message: str, refusal: Refusal | None) -> None:
    for family in (*FAMILIES, "a family that nobody knows"):
        found = parse(family, [], status, kind, message, error_code=code)
        assert (found.refusal if found else None) is refusal


@pytest.mark.parametrize(
    ("headers", "told", "expected"),
    [
        ([("Retry-After", b"7")], None, 7.0),
        ([("retry-after", b"0.25")], None, 0.25),
        ([("retry-after", b"7"), ("retry-after-ms", b"1500")], None, 1.5),
        ([("retry-after", b"Sun, 22 Nov 2026 12:00:09 GMT"), DATE], None, 9.0),
        ([("retry-after", b"Sun, 22 Nov 2026 11:00:00 GMT"), DATE], None, 0.0),
        ([("retry-after", b"Sun, 22 Nov 2026 12:00:09 GMT")], None, None),
        ([("retry-after", b"7")], 3 * SECOND_US, 7.0),
        ([], 3 * SECOND_US, 3.0),
        ([("retry-after", b"soon")], 3 * SECOND_US, 3.0),
        ([("retry-after", b"86400")], None, 86_400.0),
        ([("retry-after", b"86401")], None, None),
        ([("retry-after", b"-1")], None, None),
        ([], -1, None),
        ([], DAY_US + 1, None),
        ([], None, None),
    ],
)
def test_how_long_to_wait(headers: list[tuple[str, bytes]], told: int | None, expected: float | None) -> None:
    for family in FAMILIES:
        found = parse(family, headers, 429, error_retry_after_us=told, ignored=Counter())
        assert found is not None
        assert found.retry_after_us == (None if expected is None else expected * SECOND_US)


def test_a_wait_goes_with_a_refusal_and_not_with_a_spend_stop() -> None:
    assert parse("anthropic", [("retry-after", b"7")], 200) is None
    found = parse("anthropic", [("retry-after", b"7")], 429, "enforced_spend_limit_reached")
    assert found == Observation(refusal=Refusal.SPEND)


def test_headers_of_a_refusal_are_read_as_well() -> None:
    found = parse("anthropic", [*FULL, ("retry-after", b"2")], 429, "rate_limit_error", "50 requests per minute")
    assert found == Observation(READINGS, 0, Refusal.BUDGET, Dimension.REQUESTS, 2 * SECOND_US)


def test_only_harmless_names_are_wanted_and_not_too_many() -> None:
    assert {"retry-after", "date", LIMIT, "x-ratelimit-limit-requests", "anthropic-workspace-id"} <= ALLOWED_HEADERS
    assert {"anthropic-priority-input-tokens-limit", "x-ratelimit-reset-project-tokens"} <= ALLOWED_HEADERS
    assert {"ratelimit", "ratelimit-policy", "x-amzn-errortype", "x-rate-limit-reset-tokens"} <= ALLOWED_HEADERS
    # An outcome may bring them all, and a Welcome names them all.
    assert len(ALLOWED_HEADERS) <= MAX_HEADERS
    assert sum(map(len, ALLOWED_HEADERS)) < 4_096
    for name in ALLOWED_HEADERS:
        assert name == name.lower()
        assert not any(word in name for word in ("auth", "key", "cookie", "secret", "session"))
    assert not any(name.startswith("anthropic-ratelimit-tokens") for name in ALLOWED_HEADERS)


def test_the_origin_of_a_response() -> None:
    headers = [("Anthropic-Organization-Id", b" org "), ("anthropic-workspace-id", b"\xff"), ("x", b"y")]
    assert origin(headers) == ("org", "")
