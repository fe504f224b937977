"""The caller's own keys, one for each account: the granted one is used, and none of them is shown to anybody."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest
from anthropic import Anthropic, AsyncAnthropic
from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from paceline_client import AsyncClient, Client, Denied, UnmappedAccount
from paceline_client.hooks import anthropic as anthropic_hook
from paceline_client.hooks import openai as openai_hook
from paceline_client.hooks._keys import Keys
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake, denied, granted
from tests.frontend.harness import running
from tests.hooks.conftest import BUDGET
from tests.hooks.stub import MODEL, Stub, refusing

MESSAGES: Any = [{"role": "user", "content": "hi"}]
KEYS = {"main": "secret-a", "spare": "secret-b"}


class Caller:
    """An SDK client of one kind, with a key of its own that must not be used."""

    def __init__(self, kind: str, url: str, paceline: Client) -> None:
        self.kind, self.url, self.paceline = kind, url, paceline

    def create(self, keys: Any, **options: Any) -> Any:
        sdk, _, how = self.kind.partition(" ")
        return asyncio.run(self._async(sdk, keys, options)) if how else self._sync(sdk, keys, options)

    def _sync(self, sdk: str, keys: Any, options: dict[str, Any]) -> Any:
        if sdk == "anthropic":
            hook = anthropic_hook.PacelineMiddleware(self.paceline, keys=keys, **options)
            with Anthropic(api_key="unused", base_url=self.url, middleware=[hook]) as client:
                return client.messages.create(model=MODEL, max_tokens=50, messages=MESSAGES)
        http = openai_hook.http_client(self.paceline, keys=keys, **options)
        if sdk == "azure":
            azure = AzureOpenAI(api_key="unused", azure_endpoint=self.url, api_version="1", http_client=http)
            return azure.chat.completions.create(model="gpt-5", messages=MESSAGES, max_completion_tokens=50)
        with OpenAI(api_key="unused", base_url=f"{self.url}/v1", http_client=http) as other:
            return other.chat.completions.create(model="gpt-5", messages=MESSAGES, max_completion_tokens=50)

    async def _async(self, sdk: str, keys: Any, options: dict[str, Any]) -> Any:
        if sdk == "anthropic":
            hook = anthropic_hook.PacelineMiddleware(self.paceline, keys=keys, **options)
            async with AsyncAnthropic(api_key="unused", base_url=self.url, middleware=[hook]) as client:
                return await client.messages.create(model=MODEL, max_tokens=50, messages=MESSAGES)
        http = openai_hook.async_http_client(self.paceline, keys=keys, **options)
        if sdk == "azure":
            azure = AsyncAzureOpenAI(api_key="unused", azure_endpoint=self.url, api_version="1", http_client=http)
            return await azure.chat.completions.create(model="gpt-5", messages=MESSAGES, max_completion_tokens=50)
        async with AsyncOpenAI(api_key="unused", base_url=f"{self.url}/v1", http_client=http) as other:
            return await other.chat.completions.create(model="gpt-5", messages=MESSAGES, max_completion_tokens=50)


KINDS = [f"{sdk}{how}" for sdk in ("anthropic", "openai", "azure") for how in ("", " async")]


@pytest.fixture(params=KINDS)
def caller(request: pytest.FixtureRequest, upstream: Stub, paceline: Client) -> Caller:
    return Caller(request.param, upstream.url, paceline)


def on_account(*names: str) -> Callable[[pb.ReserveRequest], pb.ReserveResponse]:
    """Grants the accounts in turn."""
    left = list(names)

    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        response = granted(request)
        response.grant.target.account = left.pop(0) if len(left) > 1 else left[0]
        return response

    return answer


def credentials(upstream: Stub) -> list[str]:
    """What came as a key with each call, wherever it may stand."""
    names = ("authorization", "x-api-key", "api-key")
    return [" ".join(each.headers[name] for name in names if name in each.headers) for each in upstream.seen]


def expected(caller: Caller, key: str) -> str:
    return key if caller.kind.startswith("azure") else f"Bearer {key}"


def test_the_key_of_the_granted_account_is_used(
    caller: Caller, coordinator: Fake, upstream: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    coordinator.on_reserve = on_account("spare")
    caller.create(KEYS, tenant="t", min_output_tokens=5)
    assert credentials(upstream) == [expected(caller, "secret-b")]
    (asked,) = coordinator.items("reserve")
    assert [each.target.account for each in asked.candidates] == ["main", "spare"]
    assert {each.target.provider for each in asked.candidates} == {""}
    assert [each.estimate.max_output_tokens for each in asked.candidates] == [50, 50]
    assert [each.min_output_tokens for each in asked.candidates] == [5, 5]
    coordinator.wait_for("commit")
    sent = b"".join(item.SerializeToString() for batch in coordinator.batches for item in batch)
    assert b"spare" in sent
    assert b"secret" not in sent
    assert "secret" not in caplog.text


def test_a_retry_takes_the_key_of_its_own_grant(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = on_account("main", "spare")
    upstream.scripts.append(refusing(529, "overloaded_error", "full", retry_after="0"))
    caller.create(KEYS)
    assert credentials(upstream) == [expected(caller, "secret-a"), expected(caller, "secret-b")]


def test_a_key_is_fetched_when_it_is_needed(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = on_account("spare")
    fetched = []

    def fetch() -> str:
        fetched.append("spare")
        return "secret-c"

    def wrong() -> str:
        raise AssertionError

    caller.create({"main": wrong, "spare": fetch})
    assert (credentials(upstream), fetched) == ([expected(caller, "secret-c")], ["spare"])


@pytest.mark.parametrize("kind", ["anthropic async", "openai async"])
def test_a_key_may_be_awaited(kind: str, coordinator: Fake, upstream: Stub, paceline: Client) -> None:
    coordinator.on_reserve = on_account("spare")

    async def fetch() -> str:
        await asyncio.sleep(0)
        return "secret-c"

    caller = Caller(kind, upstream.url, paceline)
    caller.create({"main": "a", "spare": fetch})
    assert credentials(upstream) == ["Bearer secret-c"]


def test_a_key_that_cannot_be_fetched_releases_the_call(coordinator: Fake, upstream: Stub, paceline: Client) -> None:
    coordinator.on_reserve = on_account("spare")

    async def fetch() -> str:
        return "secret-c"

    def fail() -> str:
        raise OSError("the vault is closed")

    for key, error in ((fetch, TypeError), (fail, OSError), (lambda: "", TypeError)):
        with pytest.raises(error):
            Caller("anthropic", upstream.url, paceline).create({"spare": key})
    assert not upstream.seen
    assert len(coordinator.wait_for("release", 3)) == 3


def test_with_an_account_only_that_one_is_asked_for(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = granted
    caller.create(KEYS, account="spare")
    assert credentials(upstream) == [expected(caller, "secret-b")]
    (asked,) = coordinator.items("reserve")
    assert [each.target.account for each in asked.candidates] == ["spare"]


def test_an_account_without_a_key_is_an_error_and_released(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = on_account("third")
    with pytest.raises(UnmappedAccount, match=r"'third' \(target.account\).*`keys`.*main, spare") as caught:
        caller.create(KEYS)
    assert isinstance(caught.value, (anthropic.APIStatusError, openai.APIStatusError))
    assert (caught.value.account, caught.value.field, caught.value.status_code) == ("third", "keys", 401)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.account, str(again)) == (type(caught.value), "third", str(caught.value))
    assert "secret" not in f"{caught.value!r} {caught.value} {caught.value.response.text}"
    # It is not retried, and no call is made.
    assert not upstream.seen
    assert len(coordinator.wait_for("release")) == len(coordinator.items("reserve")) == 1


def test_a_denial_of_all_accounts_stays_one_of_the_sdk(caller: Caller, coordinator: Fake, upstream: Stub) -> None:
    coordinator.on_reserve = lambda request: denied()
    with pytest.raises(Denied):
        caller.create(KEYS)
    assert not upstream.seen


def test_disabled_the_sdk_keeps_its_own_key(upstream: Stub) -> None:
    caller = Caller("openai", upstream.url, Client(disabled=True))
    caller.create(KEYS)
    assert credentials(upstream) == ["Bearer unused"]


@pytest.mark.parametrize(
    ("keys", "account", "message"),
    [({}, "", "no entry"), (KEYS, "third", "'third'"), ({"main": ""}, "", "'main'"), ({"": "secret"}, "", "the name")],
)
def test_mistakes_show_when_the_hook_is_made(paceline: Client, keys: Any, account: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        openai_hook.http_client(paceline, keys=keys, account=account)
    assert "secret" not in str(caught.value)


async def test_a_real_coordinator_moves_calls_to_the_account_with_room(
    upstream: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def account(requests: int) -> dict[str, Any]:
        limits = {"requests": requests, "input_tokens": 100_000, "output_tokens": 50_000}
        return {"provider": "anthropic", "tier": "build", "pools": {"sonnet-5": limits}}

    # It would believe what headers say of limits.
    monkeypatch.setattr("tests.hooks.stub.HEADERS", {"request-id": "req_1"})
    config = {"accounts": {"main": account(20), "spare": account(40)}}
    async with running(config) as server, AsyncClient(server.address, budget=BUDGET) as paceline:
        before = paceline.statistics()["uncoordinated"]  # of the process
        hook = anthropic_hook.PacelineMiddleware(paceline, keys=KEYS, max_wait=0)
        async with AsyncAnthropic(api_key="unused", base_url=upstream.url, middleware=[hook]) as client:
            with pytest.raises(anthropic.RateLimitError):  # noqa: PT012
                for _ in range(100):
                    await client.messages.create(model=MODEL, max_tokens=50, messages=MESSAGES)
        assert await paceline.flush(10)
        statistics = paceline.statistics()
    used = credentials(upstream)
    assert set(used) == {"Bearer secret-a", "Bearer secret-b"}
    assert used == sorted(used)
    assert (statistics["uncoordinated"], statistics["refused_reports"]) == (before, 0)


def test_keys_are_not_shown() -> None:
    keys = Keys(KEYS, "")
    assert repr(keys) == "<Keys main, spare>"
    with pytest.raises(TypeError) as caught:
        Keys({"main": b"secret"}, "")  # type: ignore[dict-item]
    assert "secret" not in str(caught.value)
