"""Calls whose reservation the coordinator does not accept, or that cannot be asked for. Not the application's fault."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import grpc
import httpx2
import openai
import pytest
from anthropic import Anthropic, AnthropicVertex, AsyncAnthropic
from openai import AsyncOpenAI, OpenAI

from paceline_client import AsyncClient, Client, RequestRefused
from paceline_client.hooks import _session, _tap
from paceline_client.hooks._trouble import uncoordinated
from paceline_client.hooks.anthropic import PacelineMiddleware
from paceline_client.hooks.openai import async_http_client, http_client
from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Fake
from tests.hooks.stub import MESSAGE, MODEL, Stub

ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
CHAT: dict[str, Any] = {"model": "gpt-5", "messages": ASK["messages"]}


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    uncoordinated.clear()
    yield
    uncoordinated.clear()


def anthropic_sync(url: str, paceline: Client) -> Any:
    with Anthropic(api_key="k", base_url=url, middleware=[PacelineMiddleware(paceline)]) as client:
        return client.messages.create(**ASK)


def anthropic_async(url: str, paceline: Client) -> Any:
    async def run() -> Any:
        async with AsyncAnthropic(api_key="k", base_url=url, middleware=[PacelineMiddleware(paceline)]) as client:
            return await client.messages.create(**ASK)

    return asyncio.run(run())


def openai_sync(url: str, paceline: Client) -> Any:
    with OpenAI(api_key="k", base_url=f"{url}/v1", http_client=http_client(paceline)) as client:
        return client.chat.completions.create(**CHAT)


def openai_async(url: str, paceline: Client) -> Any:
    async def run() -> Any:
        async with AsyncOpenAI(api_key="k", base_url=f"{url}/v1", http_client=async_http_client(paceline)) as client:
            return await client.chat.completions.create(**CHAT)

    return asyncio.run(run())


WAYS = [anthropic_sync, anthropic_async, openai_sync, openai_async]
Way = Callable[[str, Client], Any]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["local", "open"])
def test_a_refused_request_goes_on_uncoordinated_and_is_counted(
    way: Way, policy: Any, coordinator: Fake, upstream: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.on_reserve = lambda request: status_pb2.Status(code=3, message="model unknown")
    with Client(coordinator.address, policy=policy, budget=5) as paceline:
        with caplog.at_level(logging.WARNING, "paceline_client"):
            assert way(upstream.url, paceline).usage is not None
            way(upstream.url, paceline)
        (said,) = [each.getMessage() for each in caplog.records]
        assert "INVALID_ARGUMENT: model unknown" in said
        assert paceline.statistics()["uncoordinated"] == 2
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_identity_breaks_no_call(way: Way, upstream: Stub) -> None:
    server = Fake()
    server.refuse = grpc.StatusCode.UNAUTHENTICATED
    server.start()
    with Client(server.address, token="wrong", budget=5) as paceline:
        assert way(upstream.url, paceline).usage is not None
        assert paceline.statistics()["uncoordinated"] == 1
        paceline.close(0.1)
    server.stop()


@pytest.mark.parametrize("way", WAYS)
def test_by_the_policy_closed_it_is_an_error_of_both(
    way: Way, coordinator: Fake, upstream: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleeps(*_: Any, **__: Any) -> None:
        raise AssertionError("the SDK retries")

    sdk = anthropic if way in (anthropic_sync, anthropic_async) else openai
    for kind in ("SyncAPIClient", "AsyncAPIClient"):
        monkeypatch.setattr(f"{sdk.__name__}._base_client.{kind}._sleep_for_retry", sleeps)
    coordinator.on_reserve = lambda request: status_pb2.Status(code=3, message="model unknown")
    with Client(coordinator.address, policy="closed", budget=5) as paceline:
        with pytest.raises(sdk.APIStatusError, match="INVALID_ARGUMENT: model unknown") as caught:
            way(upstream.url, paceline)
        assert isinstance(caught.value, RequestRefused)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.code, again.status_code) == ("INVALID_ARGUMENT", 400)
        assert paceline.statistics()["uncoordinated"] == 0
    assert upstream.seen == []
    assert len(coordinator.items("reserve")) == 1


@pytest.mark.parametrize("make", [PacelineMiddleware, http_client, async_http_client])
def test_bad_options_are_said_when_the_hook_is_made(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_POLICY", "lokal")
    with pytest.raises(ValueError, match="PACELINE_POLICY"):
        make()
    with pytest.raises(TypeError, match="client must be"):
        make("127.0.0.1:7133")


def test_making_a_hook_contacts_nobody(coordinator: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_ADDRESS", coordinator.address)
    hook = PacelineMiddleware()
    assert isinstance(hook._session.async_client, AsyncClient)
    assert hook._session.client._desk is not None
    assert not hook._session.client._desk.hub._started
    hook._session.client.close()


@pytest.mark.parametrize("named", [False, True])
def test_calls_to_a_cloud_need_its_name(
    named: bool, coordinator: Fake, paceline: Client, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json=MESSAGE, request=request)

    place: dict[str, Any] = {"provider": "vertex", "region": "us-east5"} if named else {}
    with AnthropicVertex(
        region="us-east5",
        project_id="p",
        access_token="t",
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
        middleware=[PacelineMiddleware(paceline, **place)],
    ) as client:
        client.messages.create(**ASK)
        client.messages.create(**ASK)
    target = coordinator.wait_for("reserve", 2)[0].candidates[0].target
    assert (target.provider, target.region) == (("vertex", "us-east5") if named else ("", ""))
    assert sum("default account" in each.getMessage() for each in caplog.records) == (not named)


@pytest.mark.parametrize("what", ["seen", "tap"])
def test_locks_of_the_process_are_new_in_the_child_of_a_fork(what: str) -> None:
    held = _session._seen._lock if what == "seen" else _tap._lock
    with held:
        child = os.fork()
        if not child:

            def use() -> None:
                if what == "seen":
                    _session._seen.add([(1, 300.0)])
                else:
                    with _tap._lock:
                        pass

            thread = threading.Thread(target=use, daemon=True)
            thread.start()
            thread.join(2)
            os._exit(int(thread.is_alive()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
