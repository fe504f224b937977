"""The HTTP client in the real SDK, with a scripted upstream and a coordinator that records what it is told."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import DEFAULT_MAX_RETRIES, AsyncOpenAI, OpenAI

from paceline_client import Client, Denied, Unavailable
from paceline_client.hooks.openai import async_http_client, http_client
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake, denied, granted
from tests.hooks.stub import CHAT_DELTA, OPENAI_USAGE, TEXT, Stub, refusing, streaming

ASK: dict[str, Any] = {"model": "gpt-5", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 50}
FULL = pb.Usage(input_tokens=16, cache_read_tokens=4, output_tokens=7)


class Caller:
    """An SDK client of either kind, called alike."""

    def __init__(self, kind: str, url: str, paceline: Client, **options: Any) -> None:
        self.kind, self.url, self.paceline, self.options = kind, url, paceline, options

    def create(self, **ask: Any) -> Any:
        """A call; of a stream, all chunks."""
        ask = ASK | ask
        common: dict[str, Any] = {"api_key": "k", "base_url": f"{self.url}/v1"}
        if self.kind == "sync":
            with OpenAI(http_client=http_client(self.paceline, **self.options), **common) as client:
                answer = client.chat.completions.create(**ask)
                return list(answer) if ask.get("stream") else answer

        async def run() -> Any:
            async with AsyncOpenAI(http_client=async_http_client(self.paceline, **self.options), **common) as client:
                answer = await client.chat.completions.create(**ask)
                return [each async for each in answer] if ask.get("stream") else answer

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def caller(request: pytest.FixtureRequest, upstream: Stub, paceline: Client) -> Caller:
    return Caller(request.param, upstream.url, paceline, tenant="search")


def outcomes(coordinator: Fake, count: int = 1) -> list[pb.Outcome]:
    found = coordinator.wait_for("commit", count)
    assert len(found) == count
    return [each.outcome for each in found]


def test_a_call_is_reserved_and_booked_with_its_usage(caller: Caller, coordinator: Fake) -> None:
    assert caller.create().choices[0].message.content == "hi"
    (outcome,) = outcomes(coordinator)
    (asked,) = coordinator.items("reserve")
    target = asked.candidates[0].target
    assert (asked.tenant, target.provider, target.model) == ("search", "openai", "gpt-5")
    assert asked.candidates[0].estimate.max_output_tokens == 50
    assert (outcome.disposition, outcome.usage, outcome.served_model) == (pb.DISPOSITION_SUCCEEDED, FULL, "gpt-5-x")
    assert outcome.usage_kind == pb.USAGE_KIND_FINAL


@pytest.mark.parametrize("asked", [True, False])
def test_usage_of_a_stream_is_exact_only_if_the_application_asked_for_it(
    caller: Caller, coordinator: Fake, upstream: Stub, asked: bool
) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = caller.create(stream=True, **options)
    assert len(chunks) == 4 + asked
    assert upstream.seen[0].body == ASK | {"stream": True} | options
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.served_model) == (pb.DISPOSITION_SUCCEEDED, "gpt-5-x")
    if asked:
        assert (outcome.usage, outcome.usage_kind) == (FULL, pb.USAGE_KIND_FINAL)
    else:
        assert (outcome.usage, outcome.usage_kind) == (pb.Usage(output_tokens=len(TEXT)), pb.USAGE_KIND_PARTIAL)
    (renewed,) = coordinator.items("renew")
    assert renewed.observation.http_status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_each_attempt_has_a_reservation_of_its_own(
    caller: Caller, coordinator: Fake, upstream: Stub, stream: bool
) -> None:
    upstream.scripts.append(refusing(429, "tokens", "Limit 10, Used 9, Requested 5.", retry_after_ms="1"))
    caller.create(stream=stream)
    refused, served = outcomes(coordinator, 2)
    assert (refused.disposition, refused.error.message) == (pb.DISPOSITION_REJECTED, "Limit 10, Used 9, Requested 5.")
    assert served.disposition == pb.DISPOSITION_SUCCEEDED


def test_a_connection_that_is_cut_in_midstream(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    upstream.scripts.append(streaming(CHAT_DELTA, CHAT_DELTA, cut=True))
    with pytest.raises(openai.APIConnectionError):
        caller.create(stream=True)
    (outcome,) = outcomes(coordinator)
    assert outcome.disposition == pb.DISPOSITION_ABORTED
    assert outcome.usage.output_tokens == 2 * len(TEXT) // 4


def test_a_call_that_never_left_is_released(coordinator: Fake, paceline: Client) -> None:
    for kind in ("sync", "async"):
        with pytest.raises(openai.APIConnectionError):
            Caller(kind, "http://127.0.0.1:9", paceline).create()
    coordinator.wait_for("release", 2 * (1 + DEFAULT_MAX_RETRIES))
    assert coordinator.items("commit") == []


def test_a_denial_is_a_rate_limit_error_that_is_not_retried(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = lambda request: denied(retry_after=2.5)
    with pytest.raises(openai.RateLimitError, match=r"limit: for people \(pool/x input_tokens\)") as caught:
        caller.create()
    assert isinstance(caught.value, Denied)
    assert (caught.value.reason, caught.value.code) == ("limit", "paceline_limit")
    assert len(coordinator.items("reserve")) == 1
    assert upstream.seen == []


def test_no_coordinator_and_the_policy_closed(upstream: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeps(*_: Any, **__: Any) -> None:
        raise AssertionError("the SDK retries")

    for kind in ("SyncAPIClient", "AsyncAPIClient"):
        monkeypatch.setattr(f"openai._base_client.{kind}._sleep_for_retry", sleeps)
    paceline = Client("127.0.0.1:9", policy="closed", budget=0.1)
    for kind in ("sync", "async"):
        with pytest.raises(openai.APIConnectionError) as caught:
            Caller(kind, upstream.url, paceline, max_wait=0.1).create()
        assert isinstance(caught.value, Unavailable)
    assert upstream.seen == []
    paceline.close(0.1)


def test_embeddings_and_what_uses_no_quota(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    with OpenAI(api_key="k", base_url=f"{upstream.url}/v1", http_client=http_client(paceline)) as client:
        client.embeddings.create(model="text-embedding-3", input=["hello", "world"])
        client.embeddings.create(model="text-embedding-3", input=[[1, 2, 3], [4, 5]])
        client.models.list()
        client.moderations.create(input="x")
    first, second = coordinator.wait_for("reserve", 2)
    assert first.candidates[0].estimate.input_tokens == 3
    assert second.candidates[0].estimate.input_tokens == 5
    assert outcomes(coordinator, 2)[0].usage.input_tokens == 6


def test_a_bound_that_the_coordinator_lowers_is_sent(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = lambda request: granted(request, max_output_tokens=40)
    assert caller.create().usage.completion_tokens == OPENAI_USAGE["completion_tokens"]
    assert upstream.seen[0].body == ASK | {"max_completion_tokens": 40}
    outcomes(coordinator)


def test_the_http_client_has_what_that_of_the_sdk_has(paceline: Client) -> None:
    with OpenAI(api_key="k") as plain, OpenAI(api_key="k", http_client=http_client(paceline)) as hooked:
        assert hooked.timeout == plain.timeout
        assert hooked._client.timeout == plain._client.timeout
        assert hooked._client.follow_redirects == plain._client.follow_redirects
    with http_client(paceline, timeout=3.0) as client:
        assert client.timeout.read == 3.0
