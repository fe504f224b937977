"""Reading usage, status, headers and errors off the objects of SDKs; and what never leaves the process."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline_client import Usage
from paceline_client._headers import MAX_HEADERS, MAX_VALUE_BYTES, HeaderFilter
from paceline_client._outcome import MAX_DETAILS_BYTES, MAX_MESSAGE_BYTES, from_exception, from_response, read_usage


def ns(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


ANTHROPIC = {
    "input_tokens": 10,
    "output_tokens": 20,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 4,
    "service_tier": "standard",
}


@pytest.mark.parametrize(
    ("response", "usage"),
    [
        ({"usage": ANTHROPIC}, Usage(10, 4, 3, 20)),
        (ns(usage=ns(**ANTHROPIC), content=[]), Usage(10, 4, 3, 20)),
        (ns(usage=ns(**{**ANTHROPIC, "cache_read_input_tokens": None})), Usage(10, None, 3, 20)),
        ({"type": "message_start", "message": {"usage": ANTHROPIC}}, Usage(10, 4, 3, 20)),
        (ANTHROPIC, Usage(10, 4, 3, 20)),
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}, Usage(9, 0, None, 2)),
        (
            ns(usage=ns(prompt_tokens=9, completion_tokens=2, prompt_tokens_details=ns(cached_tokens=5))),
            Usage(4, 5, None, 2),
        ),
        ({"usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9, 0, None, 0)),
        (
            {"usage": {"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 5}}},
            Usage(4, 5, None, 2),
        ),
        (
            {
                "usageMetadata": {
                    "promptTokenCount": 9,
                    "candidatesTokenCount": 2,
                    "thoughtsTokenCount": 3,
                    "cachedContentTokenCount": 1,
                }
            },
            Usage(8, 1, None, 5),
        ),
        (ns(usage_metadata=ns(prompt_token_count=9, candidates_token_count=None)), Usage(9, 0, None, 0)),
        (
            {"usage": {"inputTokens": 1, "outputTokens": 2, "cacheReadInputTokens": 3, "cacheWriteInputTokens": 4}},
            Usage(1, 3, 4, 2),
        ),
        ({"usage": {"input_tokens": -1, "output_tokens": True}}, None),
        ({"id": "x"}, None),
        ("text", None),
        (None, None),
    ],
)
def test_usage_of_the_common_apis(response: object, usage: Usage | None) -> None:
    assert read_usage(response) == usage


def test_a_raw_response_is_parsed_for_its_usage() -> None:
    body = ns(usage=ns(**ANTHROPIC), model="m-1")
    outcome = from_response(ns(status_code=200, headers={"retry-after": "1"}, parse=lambda: body))
    assert outcome.usage == Usage(10, 4, 3, 20)
    assert outcome.served_model == "m-1"
    assert outcome.headers == {"retry-after": "1"}


@pytest.mark.filterwarnings("error")
def test_a_body_that_is_not_there_is_not_read() -> None:
    async def parse() -> None:
        pytest.fail("awaited")

    def json_() -> None:
        pytest.fail("read")

    assert from_response(ns(status_code=200, headers={}, parse=parse)).usage is None
    assert from_response(ns(status_code=200, headers={}, json=json_, is_stream_consumed=False)).usage is None
    read = ns(status_code=200, headers={}, json=lambda: {"usage": ANTHROPIC}, is_stream_consumed=True)
    assert from_response(read).usage == Usage(10, 4, 3, 20)


def test_a_response_may_be_a_refusal() -> None:
    body = {"error": {"type": "rate_limit_error", "message": "output tokens"}}
    outcome = from_response(
        ns(status_code=429, headers={"Retry-After": "3"}, json=lambda: body, is_stream_consumed=True)
    )
    assert outcome.disposition == "rejected"
    assert outcome.error is not None
    assert (outcome.error.type, outcome.error.message, outcome.error.retry_after) == (
        "rate_limit_error",
        "output tokens",
        3.0,
    )


def test_objects_that_raise_are_survived() -> None:
    class Hostile:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    outcome = from_response(Hostile())
    assert (outcome.disposition, outcome.usage, outcome.usage_kind) == ("succeeded", None, "missing")


class SdkError(Exception):
    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)


def test_errors_of_anthropic() -> None:
    body = {
        "type": "error",
        "error": {
            "type": "rate_limit_error",
            "message": "of input tokens",
            "details": {"error_code": "ramp_limit_exceeded"},
        },
    }
    error = SdkError(status_code=429, body=body, response=ns(status_code=429, headers={"retry-after": "12"}))
    outcome = from_exception(error, started=False)
    assert (outcome.disposition, outcome.status, outcome.headers) == ("rejected", 429, {"retry-after": "12"})
    assert outcome.error is not None
    assert (outcome.error.type, outcome.error.code, outcome.error.retry_after) == (
        "rate_limit_error",
        "ramp_limit_exceeded",
        12,
    )
    assert json.loads(outcome.error.details) == body


def test_errors_of_openai() -> None:
    body = {
        "message": "Limit 100, Used 90, Requested 20",
        "type": "tokens",
        "code": "rate_limit_exceeded",
        "param": None,
    }
    error = SdkError(
        status_code=429,
        code="rate_limit_exceeded",
        body=body,
        response=ns(status_code=429, headers={"retry-after-ms": "250"}),
    )
    outcome = from_exception(error, started=False)
    assert outcome.error is not None
    assert (outcome.error.type, outcome.error.code, outcome.error.retry_after) == (
        "tokens",
        "rate_limit_exceeded",
        0.25,
    )
    assert outcome.error.message == body["message"]
    # In mid-stream there is a body but no status.
    broken = from_exception(SdkError(body={"message": "overloaded", "type": "server_error"}, code=None), started=True)
    assert (broken.disposition, broken.error and broken.error.type) == ("aborted", "server_error")


def test_an_overload_in_mid_stream() -> None:
    body = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    outcome = from_exception(
        SdkError(status_code=200, body=body, response=ns(status_code=200, headers={})), started=True
    )
    assert outcome.disposition == "aborted"
    assert outcome.error is not None
    assert outcome.error.type == "overloaded_error"


def test_errors_of_botocore_and_of_google() -> None:
    response = {
        "Error": {"Code": "ThrottlingException", "Message": "Too many tokens per limit"},
        "ResponseMetadata": {"HTTPStatusCode": 429, "HTTPHeaders": {"retry-after": "1"}},
    }
    outcome = from_exception(SdkError(response=response), started=False)
    assert (outcome.disposition, outcome.status, outcome.headers) == ("rejected", 429, {"retry-after": "1"})
    assert outcome.error is not None
    assert outcome.error.type == "ThrottlingException"
    details = {
        "error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "quota", "details": [{"retryDelay": "55s"}]}
    }
    outcome = from_exception(SdkError(code=429, details=details), started=False)
    assert outcome.status == 429
    assert outcome.error is not None
    assert outcome.error.type == "RESOURCE_EXHAUSTED"
    assert b"55s" in outcome.error.details


def test_an_error_that_wraps_another() -> None:
    def wrap(inner: Exception) -> Exception:
        try:
            try:
                raise inner
            except Exception as error:
                raise RuntimeError("of the framework") from error
        except RuntimeError as error:
            return error

    assert from_exception(wrap(SdkError(status_code=529)), started=False).disposition == "rejected"
    assert from_exception(wrap(TimeoutError()), started=False).disposition == "no_response"
    assert from_exception(wrap(TimeoutError()), started=True).disposition == "aborted"


@pytest.mark.parametrize("status", [400, 404, 422])
def test_an_error_that_may_quote_the_prompt_stays_here(status: int) -> None:
    body = {"error": {"type": "invalid_request_error", "message": "messages.0: my secret prompt"}}
    error = SdkError("my secret prompt", status_code=status, body=body, response=ns(status_code=status, headers={}))
    found = from_exception(error, started=False).error
    assert found is not None
    assert found.type == "invalid_request_error"
    assert "secret" not in found.message + found.details.decode()
    # A spend limit that somebody set is told with status 400, and must be known.
    told = {"error": {"type": "invalid_request_error", "message": "You have reached your specified API usage limits."}}
    found = from_exception(SdkError(status_code=400, body=told), started=False).error
    assert found is not None
    assert "usage limits" in found.message


@given(st.text(max_size=3_000), st.text(max_size=8_000))
def test_errors_are_bounded(message: str, extra: str) -> None:
    body = {"error": {"type": "x", "message": message, "details": {"extra": extra}}}
    error = from_exception(SdkError(status_code=429, body=body), started=False).error
    assert error is not None
    assert len(error.message.encode("utf-8")) <= MAX_MESSAGE_BYTES
    assert len(error.details) <= MAX_DETAILS_BYTES


@given(
    st.dictionaries(
        st.text("abcxyz-ratelimit", max_size=30)
        | st.sampled_from(["Retry-After", "authorization", "Set-Cookie", "X-RateLimit-Limit"]),
        st.text(max_size=20) | st.binary(max_size=20) | st.integers() | st.lists(st.text(max_size=3), max_size=3),
    )
)
def test_only_headers_on_the_list_are_kept(headers: dict[str, Any]) -> None:
    for source in (headers, list(headers.items()), {name.encode(): value for name, value in headers.items()}):
        for name, value in HeaderFilter().select(source):
            assert name == name.lower()
            assert name.startswith("x-ratelimit-") or name in ("retry-after", "ratelimit")
            assert isinstance(value, bytes)


def test_headers_are_bounded() -> None:
    many = {f"x-ratelimit-{n}": "1" for n in range(200)}
    assert len(HeaderFilter().select(many)) == MAX_HEADERS
    assert HeaderFilter().select({"retry-after": "1" * (MAX_VALUE_BYTES + 1)}) == []
    assert HeaderFilter().select(None) == []
    greedy = HeaderFilter(["*", "auth*", "x-api-key", "  X-Mine "])
    assert greedy.select({"authorization": "s", "x-api-key": "s", "x-mine": "1", "prompt": "s"}) == [("x-mine", b"1")]
