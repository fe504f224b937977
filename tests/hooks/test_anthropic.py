"""The middleware in the real SDK, with a scripted upstream and a coordinator that records what it is told."""

from __future__ import annotations

import asyncio
import gc
import gzip
import pickle
import threading
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from paceline_client import Client, Denied, Unavailable
from paceline_client.hooks import labels
from paceline_client.hooks.anthropic import PacelineMiddleware
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake, denied, granted, until
from tests.hooks.stub import DELTA, HEADERS, MESSAGE, MODEL, OVERLOADED, START, TEXT, WHOLE, Stub, refusing, streaming

ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hi there"}]}
FULL = pb.Usage(input_tokens=12, cache_read_tokens=3, cache_write_tokens=2, output_tokens=5)
STREAMED = pb.Usage(input_tokens=12, cache_read_tokens=3, cache_write_tokens=2, output_tokens=15)
NAMES = [name for name in HEADERS if name.startswith("anthropic")]


class Caller:
    """An SDK client of either kind, called alike."""

    def __init__(self, kind: str, url: str, middleware: PacelineMiddleware, **options: Any) -> None:
        self.kind = kind
        self.options: dict[str, Any] = {"api_key": "k", "base_url": url, "middleware": [middleware], **options}

    def create(self, **ask: Any) -> Any:
        """A call; of a stream, all events."""
        ask = ASK | ask
        if self.kind == "sync":
            with Anthropic(**self.options) as client:
                answer = client.messages.create(**ask)
                return list(answer) if ask.get("stream") else answer

        async def run() -> Any:
            async with AsyncAnthropic(**self.options) as client:
                answer = await client.messages.create(**ask)
                return [each async for each in answer] if ask.get("stream") else answer

        return asyncio.run(run())

    def cut_short(self, after: int = 6) -> None:
        """Read some events of a stream, and close it."""
        if self.kind == "sync":
            with Anthropic(**self.options) as client, client.messages.create(**ASK, stream=True) as stream:
                for number, _ in enumerate(stream):
                    if number == after:
                        break
            return

        async def run() -> None:
            async with (
                AsyncAnthropic(**self.options) as client,
                await client.messages.create(**ASK, stream=True) as stream,
            ):
                number = 0
                async for _ in stream:
                    number += 1
                    if number > after:
                        break

        asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def caller(request: pytest.FixtureRequest, upstream: Stub, paceline: Client) -> Caller:
    return Caller(request.param, upstream.url, PacelineMiddleware(paceline, tenant="search"))


def outcomes(coordinator: Fake, count: int = 1) -> list[pb.Outcome]:
    """What was committed: so many, and each once."""
    found = coordinator.wait_for("commit", count)
    assert len(found) == count
    assert len({each.reservation_id for each in found}) == count
    return [each.outcome for each in found]


def names(outcome: pb.Outcome) -> list[str]:
    return [each.name for each in outcome.headers]


def test_a_call_is_reserved_and_booked_with_its_usage(caller: Caller, coordinator: Fake) -> None:
    assert caller.create().content[0].text == "hello"
    (outcome,) = outcomes(coordinator)
    (asked,) = coordinator.items("reserve")
    assert (asked.tenant, asked.candidates[0].target.model) == ("search", MODEL)
    estimate = asked.candidates[0].estimate
    assert 2 <= estimate.input_tokens <= 20
    assert (estimate.max_output_tokens, estimate.HasField("output_tokens")) == (100, False)
    assert 55 < asked.max_wait.ToTimedelta().total_seconds() <= 60
    assert (outcome.disposition, outcome.http_status) == (pb.DISPOSITION_SUCCEEDED, 200)
    assert (outcome.usage, outcome.usage_kind) == (FULL, pb.USAGE_KIND_FINAL)
    assert (outcome.served_model, names(outcome)) == (MODEL, NAMES)
    # The headers came with the body: a report of their own would tell nothing more.
    assert coordinator.items("renew") == []


def test_of_a_stream_headers_and_input_are_reported_while_it_runs(
    caller: Caller, coordinator: Fake, upstream: Stub
) -> None:
    go = threading.Event()

    async def script(exchange: Any) -> None:
        await exchange.begin(200, "text/event-stream")
        coordinator.wait_for("renew", 1)
        await exchange.chunk(START)
        coordinator.wait_for("renew", 2)
        go.set()
        await exchange.chunk(WHOLE.removeprefix(START))
        await exchange.finish()

    upstream.scripts.append(script)
    events = caller.create(stream=True)
    assert [each.type for each in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert go.is_set()
    first, second = (each.observation for each in coordinator.items("renew"))
    assert (names(first), first.disposition, first.HasField("usage")) == (NAMES, pb.DISPOSITION_UNSPECIFIED, False)
    assert first.usage_kind == pb.USAGE_KIND_UNSPECIFIED
    assert (names(second), second.usage_kind) == ([], pb.USAGE_KIND_PARTIAL)
    assert (second.usage.input_tokens, second.usage.cache_read_tokens, second.usage.cache_write_tokens) == (12, 3, 2)
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.usage) == (pb.DISPOSITION_SUCCEEDED, STREAMED)
    # They have been sent already.
    assert names(outcome) == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (529, "overloaded_error")])
def test_each_attempt_has_a_reservation_of_its_own(
    caller: Caller, coordinator: Fake, upstream: Stub, stream: bool, status: int, kind: str
) -> None:
    upstream.scripts.append(refusing(status, kind, "input tokens per minute", retry_after_ms="1"))
    caller.create(stream=stream)
    refused, served = outcomes(coordinator, 2)
    assert (refused.disposition, refused.http_status) == (pb.DISPOSITION_REJECTED, status)
    assert (refused.error.type, refused.error.code) == (kind, "why")
    assert refused.error.message == "input tokens per minute"
    assert refused.error.retry_after.ToNanoseconds() == 1_000_000
    assert names(refused) == [*NAMES, "retry-after-ms"]
    assert b"input tokens" in refused.error.details
    assert served.disposition == pb.DISPOSITION_SUCCEEDED
    assert len(coordinator.items("reserve")) == 2


def test_other_errors_keep_their_class_and_tell_nothing_of_the_prompt(
    caller: Caller, coordinator: Fake, upstream: Stub
) -> None:
    upstream.scripts.append(refusing(400, "invalid_request_error", "the prompt: hi there"))
    with pytest.raises(anthropic.BadRequestError) as caught:
        caller.create()
    assert caught.value.error_code == "why"
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.http_status) == (pb.DISPOSITION_FAILED, 400)
    assert (outcome.error.type, outcome.error.message, outcome.error.details) == ("invalid_request_error", "", b"")


def test_an_error_in_midstream(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    upstream.scripts.append(streaming(START, DELTA, OVERLOADED))
    with pytest.raises(anthropic.APIStatusError):
        caller.create(stream=True)
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.http_status) == (pb.DISPOSITION_ABORTED, 200)
    assert outcome.error.type == "overloaded_error"
    assert (outcome.usage_kind, outcome.usage.input_tokens) == (pb.USAGE_KIND_PARTIAL, 12)
    assert outcome.usage.output_tokens == 1 + len(TEXT) // 4


def test_a_connection_that_is_cut_in_midstream(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    upstream.scripts.append(streaming(START, DELTA, DELTA, cut=True))
    # The SDK lets the error of the transport through.
    with pytest.raises(Exception, match="peer closed connection"):
        caller.create(stream=True)
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.usage_kind) == (pb.DISPOSITION_ABORTED, pb.USAGE_KIND_PARTIAL)
    assert outcome.usage.output_tokens == 1 + 2 * len(TEXT) // 4


def test_a_body_that_is_not_a_stream_and_is_cut(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    async def script(exchange: Any) -> None:
        await exchange.begin(200, "application/json")
        await exchange.chunk(b'{"usage":')

    upstream.scripts += [script, script]
    with Anthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)]) as client:
        with (
            pytest.raises(Exception, match="peer closed connection"),
            client.messages.with_streaming_response.create(**ASK) as response,
        ):
            response.read()
        (outcome,) = outcomes(coordinator)
        assert (outcome.disposition, outcome.usage_kind) == (pb.DISPOSITION_ABORTED, pb.USAGE_KIND_MISSING)
        # Read by the SDK, of which nothing but the error is seen.
        with pytest.raises(anthropic.APIConnectionError):
            client.with_options(max_retries=0).messages.create(**ASK)
        assert outcomes(coordinator, 2)[-1].disposition == pb.DISPOSITION_NO_RESPONSE


def test_a_body_that_ends_in_good_order_in_the_middle_of_the_answer(
    caller: Caller, coordinator: Fake, upstream: Stub
) -> None:
    upstream.scripts.append(streaming(START, DELTA))
    caller.create(stream=True)
    (outcome,) = outcomes(coordinator)
    assert outcome.disposition == pb.DISPOSITION_ABORTED


def test_a_stream_that_the_caller_closes_early(caller: Caller, coordinator: Fake) -> None:
    caller.cut_short(after=2)
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.usage_kind) == (pb.DISPOSITION_ABORTED, pb.USAGE_KIND_PARTIAL)
    assert outcome.usage.input_tokens == 12
    assert 1 < outcome.usage.output_tokens < 15


def test_a_call_that_never_left_is_released(coordinator: Fake, paceline: Client) -> None:
    for kind in ("sync", "async"):
        caller = Caller(kind, "http://127.0.0.1:9", PacelineMiddleware(paceline), max_retries=0)
        with pytest.raises(anthropic.APIConnectionError):
            caller.create()
    coordinator.wait_for("release", 2)
    assert coordinator.items("commit") == []


def test_a_time_out_before_the_headers(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    async def silent(exchange: Any) -> None:
        await asyncio.sleep(5)

    for number, kind in enumerate(("sync", "async")):
        upstream.scripts.append(silent)
        caller = Caller(kind, upstream.url, PacelineMiddleware(paceline), max_retries=0, timeout=0.3)
        with pytest.raises(anthropic.APITimeoutError):
            caller.create(timeout=0.3)
        outcome = outcomes(coordinator, number + 1)[-1]
        assert outcome.disposition == pb.DISPOSITION_NO_RESPONSE
        # And the turn is waited for no longer than the call itself may take.
        assert coordinator.items("reserve")[-1].max_wait.ToTimedelta().total_seconds() <= 0.3


@pytest.mark.parametrize("sent", [START + DELTA, b""], ids=["in the stream", "before the headers"])
async def test_a_task_that_is_cancelled(sent: bytes, coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    never = threading.Event()

    async def silent(exchange: Any) -> None:
        await asyncio.sleep(5)

    upstream.scripts.append(streaming(sent, then=never) if sent else silent)
    async with AsyncAnthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)]) as client:
        seen = asyncio.Event()

        async def read() -> None:
            async for each in await client.messages.create(**ASK, stream=True):
                if each.type == "content_block_delta":
                    seen.set()

        task = asyncio.create_task(read())
        if sent:
            await asyncio.wait_for(seen.wait(), 10)
        else:
            await asyncio.to_thread(until, lambda: bool(upstream.seen))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    never.set()
    (outcome,) = await asyncio.to_thread(outcomes, coordinator)
    assert outcome.disposition == pb.DISPOSITION_ABORTED
    if sent:
        assert outcome.usage == pb.Usage(
            input_tokens=12, cache_read_tokens=3, cache_write_tokens=2, output_tokens=1 + len(TEXT) // 4
        )


@pytest.mark.parametrize("read", [0, 4])
def test_a_stream_that_is_thrown_away_is_settled(
    read: int, coordinator: Fake, paceline: Client, upstream: Stub
) -> None:
    client = Anthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)])
    stream = client.messages.create(**ASK, stream=True)
    for _ in range(read):
        next(stream)
    coordinator.wait_for("renew")
    assert coordinator.items("commit") == []
    del stream
    gc.collect()
    (outcome,) = outcomes(coordinator)
    assert outcome.disposition == pb.DISPOSITION_ABORTED
    assert outcome.usage_kind == (pb.USAGE_KIND_PARTIAL if read else pb.USAGE_KIND_MISSING)
    client.close()


@pytest.mark.parametrize("read", [0, 4])
async def test_a_stream_that_a_task_throws_away_is_settled(
    read: int, coordinator: Fake, paceline: Client, upstream: Stub
) -> None:
    client = AsyncAnthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)])
    stream = await client.messages.create(**ASK, stream=True)
    for _ in range(read):
        await anext(stream)
    del stream
    gc.collect()
    (outcome,) = await asyncio.to_thread(outcomes, coordinator)
    assert outcome.disposition == pb.DISPOSITION_ABORTED
    assert outcome.usage_kind == (pb.USAGE_KIND_PARTIAL if read else pb.USAGE_KIND_MISSING)
    await client.close()


def test_helpers_raw_responses_and_beta(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    with Anthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)]) as client:
        with client.messages.stream(**ASK) as stream:
            assert "".join(stream.text_stream) == TEXT * 4
        assert outcomes(coordinator, 1)[-1].usage == STREAMED
        raw = client.messages.with_raw_response.create(**ASK)
        assert (raw.headers["request-id"], raw.parse().usage.output_tokens) == ("req_1", 5)
        assert outcomes(coordinator, 2)[-1].usage == FULL
        with client.messages.with_streaming_response.create(**ASK) as response:
            # The body is not here yet: the attempt is settled when it is read.
            assert len(coordinator.items("commit")) == 2
            assert response.json() == MESSAGE
            assert response.elapsed.total_seconds() > 0
        assert outcomes(coordinator, 3)[-1].usage == FULL
        assert client.beta.messages.create(**ASK, betas=["x"]).usage.output_tokens == 5
        assert "x" in upstream.seen[-1].headers["anthropic-beta"]
        assert outcomes(coordinator, 4)[-1].usage == FULL


def test_what_uses_no_quota_passes_by(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    with Anthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)]) as client:
        assert client.messages.count_tokens(model=MODEL, messages=ASK["messages"]).input_tokens == 9
        client.messages.create(**ASK)
    outcomes(coordinator)
    assert len(coordinator.items("reserve")) == 1


def test_a_denial_is_a_rate_limit_error_that_is_not_retried(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = lambda request: denied(retry_after=2.5)
    with pytest.raises(anthropic.RateLimitError, match=r"limit: for people \(pool/x input_tokens\)") as caught:
        caller.create()
    error = caught.value
    assert isinstance(error, Denied)
    assert (error.reason, error.dimension, error.retry_after) == ("limit", "input_tokens", 2.5)
    assert (error.status_code, error.response.headers["retry-after"]) == (429, "3")
    assert "input_tokens" in error.message
    assert len(coordinator.items("reserve")) == 1
    assert upstream.seen == []
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, str(again)) == (type(error), "limit", str(error))


def test_no_coordinator_and_the_policy_closed(upstream: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeps(*_: Any, **__: Any) -> None:
        raise AssertionError("the SDK retries")

    for kind in ("SyncAPIClient", "AsyncAPIClient"):
        monkeypatch.setattr(f"anthropic._base_client.{kind}._sleep_for_retry", sleeps)
    paceline = Client("127.0.0.1:9", policy="closed", budget=0.1)
    for kind in ("sync", "async"):
        caller = Caller(kind, upstream.url, PacelineMiddleware(paceline, max_wait=0.1))
        with pytest.raises(anthropic.APIConnectionError) as caught:
            caller.create()
        assert isinstance(caught.value, Unavailable)
    assert upstream.seen == []
    paceline.close(0.1)


def test_no_coordinator_and_the_policy_open(upstream: Stub) -> None:
    paceline = Client("127.0.0.1:9", policy="open", budget=0.1)
    for kind in ("sync", "async"):
        caller = Caller(kind, upstream.url, PacelineMiddleware(paceline, max_wait=0.1))
        assert len(caller.create(stream=True)) == 9
    paceline.close(0.1)


def test_labels_of_a_block(caller: Caller, coordinator: Fake) -> None:
    with labels(tenant="other", priority="batch", max_wait=5):
        with labels(route="r"):
            caller.create()
        caller.create()
    caller.create()
    inner, outer, none = coordinator.wait_for("reserve", 3)
    assert (inner.tenant, inner.route, inner.priority) == ("other", "r", pb.PRIORITY_BATCH)
    assert (outer.tenant, outer.route) == ("other", "")
    assert 4 < outer.max_wait.ToTimedelta().total_seconds() <= 5
    assert (none.tenant, none.priority) == ("search", pb.PRIORITY_UNSPECIFIED)


def test_mistakes_in_the_arguments_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="priority"):
        PacelineMiddleware(priority="urgent")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_wait"):
        PacelineMiddleware(max_wait=-1)
    with pytest.raises(ValueError, match="min_output"):
        PacelineMiddleware(min_output_tokens=-1)


def test_a_bound_that_the_coordinator_lowers_is_sent(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    coordinator.on_reserve = lambda request: granted(request, max_output_tokens=40)
    middleware = PacelineMiddleware(paceline, min_output_tokens=32)
    ask = {**ASK, "messages": [{"role": "user", "content": "hi"}]}
    with Anthropic(api_key="k", base_url=upstream.url, middleware=[middleware]) as client:
        client.messages.create(**ask)
    assert coordinator.items("reserve")[0].candidates[0].min_output_tokens == 32
    assert (upstream.seen[0].body["max_tokens"], ask["max_tokens"]) == (40, 100)
    assert upstream.seen[0].body["messages"] == ask["messages"]


def test_a_prompt_that_was_cached_before(caller: Caller, coordinator: Fake) -> None:
    system = [{"type": "text", "text": f"{caller.kind} prompt. " * 1000, "cache_control": {"type": "ephemeral"}}]
    for _ in range(2):
        caller.create(system=system)
    first, second = (each.candidates[0].estimate for each in coordinator.wait_for("reserve", 2))
    assert (first.cached_input_tokens, second.input_tokens < 20) == (0, True)
    assert second.cached_input_tokens + second.input_tokens == pytest.approx(first.input_tokens, abs=2)


def test_a_compressed_stream(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    data = gzip.compress(WHOLE)
    upstream.scripts.append(streaming(data[:100], data[100:], content_encoding="gzip"))
    assert len(caller.create(stream=True)) == 9
    (outcome,) = outcomes(coordinator)
    assert (outcome.disposition, outcome.usage) == (pb.DISPOSITION_SUCCEEDED, STREAMED)


def test_text_is_counted_for_the_renewals(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    never = threading.Event()
    coordinator.on_reserve = lambda request: granted(request, hold=0.5)
    upstream.scripts.append(streaming(START, DELTA * 20, then=never))
    with Anthropic(api_key="k", base_url=upstream.url, middleware=[PacelineMiddleware(paceline)]) as client:
        stream = client.messages.create(**ASK, stream=True)
        for _ in range(22):
            next(stream)
        until(lambda: any(each.output_tokens == 61 for each in coordinator.items("renew")))
        never.set()
        stream.close()
    assert outcomes(coordinator)[0].usage.output_tokens == 61
