"""The wire itself: bad requests, side endpoints, events as bytes."""

from __future__ import annotations

import io
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest

from paceline.upstream import SettingsError
from paceline.upstream.http import Upstream
from paceline.upstream.http.server import MAX_BODY
from tests.upstream.conftest import MODEL, QUICK, Clock, config

KEY = {"x-api-key": "any"}


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def up(clock: Clock) -> AsyncIterator[Upstream]:
    async with Upstream.start(config(), QUICK, clock=clock, epoch_ns=1_790_000_000 * 10**9) as found:
        yield found


@pytest.fixture
async def web(up: Upstream) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(up.url) as session:
        yield session


def ask(output: int = 1, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {
        "model": MODEL,
        "max_tokens": 50,
        "messages": messages,
        "metadata": {"user_id": f"paceline-sim:{output}"},
    } | more


async def get(web: aiohttp.ClientSession, path: str, status: int = 200) -> Any:
    async with web.get(path) as response:
        assert response.status == status, await response.text()
        return msgspec.json.decode(await response.read())


async def post(
    web: aiohttp.ClientSession, path: str, body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Any:
    data = body if isinstance(body, bytes | io.BytesIO) else msgspec.json.encode(body)
    async with web.post(path, data=data, headers=KEY if headers is None else headers) as response:
        assert response.status == status, await response.text()
        return msgspec.json.decode(await response.read())


async def test_requests_that_are_no_calls(up: Upstream, web: aiohttp.ClientSession) -> None:
    for path, authentication in (
        ("/v1/messages", "authentication_error"),
        ("/v1/chat/completions", "invalid_request_error"),
    ):
        for headers in ({}, {"x-api-key": ""}, {"authorization": "Bearer "}):
            error = await post(web, path, ask(), 401, headers)
            assert error["error"]["type"] == authentication
        for body in (b"", b"{", b"[]", b"\xff", b'{"model":"\xff"}', b"[" * 100_000, b'{"model":"\\ud800"}'):
            await post(web, path, body, 400)
    error = await post(web, "/v1/messages", ask(metadata={"user_id": "paceline-sim:what=1"}), 400)
    assert error["error"]["type"] == "invalid_request_error"
    assert error["type"] == "error"
    error = await post(web, "/v1/messages", io.BytesIO(b" " * (MAX_BODY + 1)), 413)
    assert error["error"]["type"] == "request_too_large"
    await get(web, "/v1/messages", 405)
    await get(web, "/nothing", 404)
    await post(web, "/v1/messages", ask(), headers={"authorization": "Bearer any"})
    assert up.truth["accepted"] == 1


async def test_keys_are_nowhere(
    up: Upstream, web: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    up.change(refuse_next=1)
    for status in (429, 200):
        await post(web, "/v1/messages", ask(), status, {"x-api-key": "sk-very-secret"})
    told = msgspec.json.encode([await get(web, "/sim/truth"), await get(web, "/sim/calls")]).decode()
    assert "very-secret" not in told + caplog.text + "".join(capfd.readouterr())


async def test_stream_as_bytes(web: aiohttp.ClientSession) -> None:
    async with web.post("/v1/messages", json=ask(4, stream=True), headers=KEY) as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["date"] == "Mon, 21 Sep 2026 14:13:21 GMT"
        text = await response.text()
    events = [part.split("\n") for part in text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    contents = [msgspec.json.decode(data.removeprefix("data: ")) for _, data in events]
    assert [one["type"] for one in contents] == names
    assert contents[0]["message"]["usage"]["output_tokens"] == 1
    assert contents[-2]["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 4,
        "service_tier": "standard",
    }


async def test_truth_calls_marks_and_what_was_used(up: Upstream, web: aiohttp.ClientSession, clock: Clock) -> None:
    await post(web, "/sim/mark", {"name": "begin"})
    for _ in range(5):
        await post(web, "/v1/messages", ask(20))
    clock.forward(3)
    marked = await post(web, "/sim/mark", {"name": "end"})
    assert marked["name"] == "end"
    used = (await get(web, "/sim/used?from=begin&to=end"))["claude"]
    assert (used["output_tokens"]["accepted"], used["output_tokens"]["budget"]) == (100, 5_250)
    assert used["requests"] == {"accepted": 5, "budget": 105, "outside": 0, "drawn": 5, "part": 5 / 105, "net": 5 / 105}
    truth = await get(web, "/sim/truth")
    assert truth == msgspec.json.decode(msgspec.json.encode(up.truth))
    assert truth["groups"]["claude"]["ended"]["finished"] == truth["accepted"] == 5
    page = await get(web, "/sim/calls?since=3&limit=1")
    assert [(one["number"], one["status"], one["ended"], one["produced"]) for one in page["calls"]] == [
        (4, "accepted", "finished", 20)
    ]
    assert page["next"] == 4
    for path in ("/sim/used?from=begin&to=never", "/sim/used", "/sim/calls?since=x", "/sim/calls?limit=-1"):
        assert "error" in await get(web, path, 400)


async def test_scenario_and_reset(up: Upstream, web: aiohttp.ClientSession) -> None:
    assert (await post(web, "/sim/scenario", {"refuse_next": 1}))["refuse_next"] == 1
    await post(web, "/v1/messages", ask(), 429)
    await post(web, "/v1/messages", ask())
    body: object
    for body, named in (
        ({"refuse_next": -1}, "refuse_next"),
        ({"what": 1}, "what"),
        ([], "body"),
        (b"{", "body"),
    ):
        assert named in (await post(web, "/sim/scenario", body, 400))["error"]
    await post(web, "/sim/mark", {"name": "m"})
    limits = {"requests": 10, "input_tokens": 100, "output_tokens": 200}
    group = {"name": "g", "models": ["claude-*"], "limits": limits}
    fresh = await post(
        web, "/sim/reset", {"config": {"groups": [group], "initial": 0.5}, "scenario": {"first_byte_ms": 3}}
    )
    buckets = fresh["groups"]["g"]["buckets"]
    assert {name: bucket["level"] for name, bucket in buckets.items()} == {
        name: amount // 2 for name, amount in limits.items()
    }
    assert (fresh["calls"], fresh["scenario"]["first_byte_ms"], up.marks) == (0, 3, {})
    for body, named in (({"config": {"initial": 7}}, "initial"), ({"conf": {}}, "conf"), ({"scenario": 1}, "scenario")):
        assert named in (await post(web, "/sim/reset", body, 400))["error"]
    assert list(up.account.groups) == ["g"]
    for body, named in (({}, "name"), ({"name": ""}, "name"), ({"name": "x", "y": 1}, "y")):
        assert named in (await post(web, "/sim/mark", body, 400))["error"]


async def test_older_names_and_forced_refusals_of_every_kind(up: Upstream, web: aiohttp.ClientSession) -> None:
    for dimension, words in (
        ("input_tokens", "input tokens per minute"),
        ("output_tokens", "output tokens per minute"),
        ("requests", "requests per minute"),
        ("concurrency", "concurrent connections"),
    ):
        up.change(refuse_next=1, refuse_dimension=dimension, refuse_retry_after=None)
        async with web.post("/v1/messages", json=ask(), headers=KEY) as response:
            assert response.status == 429
            assert "retry-after" not in response.headers
            assert words in await response.text()
    with pytest.raises(SettingsError, match="refuse_dimension"):
        up.change(refuse_dimension="what")


async def test_reset_leaves_running_calls_to_the_old_books(up: Upstream, web: aiohttp.ClientSession) -> None:
    up.change(tokens_per_second=100, chunk_ms=5)
    async with web.post("/v1/messages", json=ask(30, stream=True), headers=KEY) as response:
        old = up.account
        up.reset(config(), QUICK)
        assert "message_stop" in await response.text()
    assert (old.calls[0].produced, old.calls[0].ended) == (30, "finished")
    assert up.truth["calls"] == 0


async def test_a_ramp_is_refused_with_its_code(up: Upstream, web: aiohttp.ClientSession) -> None:
    await post(web, "/sim/scenario", {"ramps": {"claude": {"start": 600, "step": 60}}})
    body = await post(web, "/v1/messages", ask(), 429)
    assert body["error"]["details"] == {"error_code": "ramp_limit_exceeded"}
    assert "allowed 600 input tokens per minute" in body["error"]["message"]
