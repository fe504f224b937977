"""The hook into the OpenAI SDK::

    from openai import OpenAI
    from paceline_client.hooks.openai import http_client

    client = OpenAI(http_client=http_client(tenant="search"))

For ``AsyncOpenAI``, and the clients for Azure, likewise. The SDK has no middleware, so the hook sits in its HTTP
client, where each attempt passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from paceline_client._client import AsyncClient, Client
from paceline_client._errors import Denied, RequestRefused, Unavailable, UnmappedAccount
from paceline_client._model import Priority

try:
    import httpx2
    import openai
    from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

    if not issubclass(DefaultHttpxClient, httpx2.Client):
        raise ImportError("this version of the OpenAI SDK does not use httpx2")
except ImportError as missing:
    raise ImportError(
        "paceline_client.hooks.openai needs an OpenAI SDK that uses httpx2: pip install 'openai>=3'"
    ) from missing

from paceline_client.hooks._call import Attempt
from paceline_client.hooks._http import follow, follow_async, was_sent
from paceline_client.hooks._keys import Key
from paceline_client.hooks._labels import Labels
from paceline_client.hooks._refused import (
    blank,
    denial_response,
    refusal_response,
    unavailable_response,
    unmapped_response,
)
from paceline_client.hooks._session import Session, seconds
from paceline_client.hooks._size import Size, of_completion, of_embeddings
from paceline_client.hooks._trouble import unreserved

__all__ = [
    "AccountWithoutKey",
    "CallDenied",
    "CoordinatorRefused",
    "CoordinatorUnavailable",
    "async_http_client",
    "http_client",
]

_BOUNDS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")

Sized = tuple[str, Size, Mapping[str, Any]]
"""The model, the size, and the body."""


class CallDenied(Denied, openai.RateLimitError):
    """Paceline denies the call: for the code around it, what a 429 of the upstream is. The SDK does not retry it."""

    def __init__(self, denied: Denied, request: httpx2.Request) -> None:
        response = denial_response(denied, request)
        openai.RateLimitError.__init__(self, str(denied), response=response, body=response.json()["error"])
        self.__dict__.update(denied.__dict__)
        # Both bases have a `message`. The SDK's is what applications log, so it says which limit binds.
        self.message = str(denied)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class CoordinatorUnavailable(Unavailable, openai.APIConnectionError, openai.APIStatusError):
    """No coordinator could be reached, and the policy is ``closed``. The SDK does not retry it."""

    def __init__(self, error: Unavailable, request: httpx2.Request) -> None:
        response = unavailable_response(error, request)
        openai.APIStatusError.__init__(self, str(error), response=response, body=response.json()["error"])

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class CoordinatorRefused(RequestRefused, openai.APIStatusError):
    """The coordinator does not accept the reservation, or who asks for it, and the policy is ``closed``. No retry."""

    code: str

    def __init__(self, error: RequestRefused, request: httpx2.Request) -> None:
        response = refusal_response(error, request)
        openai.APIStatusError.__init__(self, str(error), response=response, body=response.json()["error"])
        self.__dict__.update(error.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class AccountWithoutKey(UnmappedAccount, openai.APIStatusError):
    """The call was granted on an account for which ``keys`` has no entry. It was released. No retry."""

    def __init__(self, error: UnmappedAccount, request: httpx2.Request) -> None:
        response = unmapped_response(error, request)
        openai.APIStatusError.__init__(self, str(error), response=response, body=response.json()["error"])
        self.__dict__.update(error.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class _HttpClient(DefaultHttpxClient):
    """The SDK's own HTTP client, with its time-outs, limits and proxies."""

    def __init__(self, session: Session, **options: Any) -> None:
        super().__init__(**options)
        self._session = session

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """One attempt."""
        session = self._session
        kind = _kind(request)
        if kind is None or session.client.disabled:
            return super().send(request, stream=stream, **options)
        asked = _sized(request, kind)
        if asked is None:
            return super().send(request, stream=stream, **options)
        model, size, body = asked
        try:
            attempt = session.begin(model, size, _timeout(request))
        except (Denied, Unavailable, RequestRefused, UnmappedAccount) as error:
            _refuse(error, request)
        if attempt is None:
            return super().send(request, stream=stream, **options)
        try:
            response = super().send(_bounded(session, request, attempt, size, body), stream=stream, **options)
        except BaseException as error:
            attempt.failed(error, sent=was_sent(error))
            raise
        follow(response, attempt)
        return response


class _AsyncHttpClient(DefaultAsyncHttpxClient):
    """The same for asyncio."""

    def __init__(self, session: Session, **options: Any) -> None:
        super().__init__(**options)
        self._session = session

    async def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """One attempt."""
        session = self._session
        kind = _kind(request)
        if kind is None or session.async_client.disabled:
            return await super().send(request, stream=stream, **options)
        asked = _sized(request, kind)
        if asked is None:
            return await super().send(request, stream=stream, **options)
        model, size, body = asked
        try:
            attempt = await session.begin_async(model, size, _timeout(request))
        except (Denied, Unavailable, RequestRefused, UnmappedAccount) as error:
            _refuse(error, request)
        if attempt is None:
            return await super().send(request, stream=stream, **options)
        try:
            response = await super().send(_bounded(session, request, attempt, size, body), stream=stream, **options)
        except BaseException as error:
            attempt.failed(error, sent=was_sent(error))
            raise
        await follow_async(response, attempt)
        return response


def http_client(
    client: Client | AsyncClient | None = None,
    *,
    tenant: str = "",
    workspace: str = "",
    priority: Priority | None = None,
    route: str = "",
    max_wait: float | None = None,
    provider: str = "",
    account: str = "",
    region: str = "",
    upstream_workspace: str = "",
    min_output_tokens: int | None = None,
    keys: Mapping[str, Key] | None = None,
    **options: Any,
) -> httpx2.Client:
    """An HTTP client for ``OpenAI(http_client=…)`` that coordinates chat completions, responses and embeddings.

    The arguments are those of :class:`~paceline_client.hooks.anthropic.PacelineMiddleware`, with ``openai`` for the
    provider where neither it nor the account is given; further ones (``proxy``, ``limits``, ``timeout``, …) go to the
    HTTP client, whose defaults are those of the SDK.
    """
    labels = Labels(tenant, workspace, priority, route, max_wait)
    target = _target(provider, account, region, upstream_workspace, keys)
    return _HttpClient(Session(client, labels, target, min_output_tokens, keys), **options)


def async_http_client(
    client: Client | AsyncClient | None = None,
    *,
    tenant: str = "",
    workspace: str = "",
    priority: Priority | None = None,
    route: str = "",
    max_wait: float | None = None,
    provider: str = "",
    account: str = "",
    region: str = "",
    upstream_workspace: str = "",
    min_output_tokens: int | None = None,
    keys: Mapping[str, Key] | None = None,
    **options: Any,
) -> httpx2.AsyncClient:
    """The same for ``AsyncOpenAI(http_client=…)``."""
    labels = Labels(tenant, workspace, priority, route, max_wait)
    target = _target(provider, account, region, upstream_workspace, keys)
    return _AsyncHttpClient(Session(client, labels, target, min_output_tokens, keys), **options)


def _target(
    provider: str, account: str, region: str, upstream_workspace: str, keys: Mapping[str, Key] | None
) -> dict[str, str]:
    if not provider and not account and not keys:
        # The server's default is likely to be another. An account has its own.
        provider = "openai"
    return {"provider": provider, "account": account, "region": region, "upstream_workspace": upstream_workspace}


def _kind(request: httpx2.Request) -> str | None:
    """``completion`` or ``embeddings``. ``None``: such a call uses no quota that is coordinated."""
    if request.method != "POST":
        return None
    path = request.url.path
    if path.endswith(("/chat/completions", "/responses")):
        return "completion"
    return "embeddings" if path.endswith("/embeddings") else None


def _sized(request: httpx2.Request, kind: str) -> Sized | None:
    """``None``: nothing can be said of it, so nothing is."""
    try:
        body = json.loads(request.content)
        if isinstance(body, dict) and body.get("model"):
            return str(body["model"]), of_completion(body) if kind == "completion" else of_embeddings(body), body
    except Exception as error:
        unreserved("an estimate", error)
    return None


def _timeout(request: httpx2.Request) -> float | None:
    found = request.extensions.get("timeout")
    return seconds(found.get("read")) if isinstance(found, Mapping) else None


def _bounded(
    session: Session, request: httpx2.Request, attempt: Attempt, size: Size, body: Mapping[str, Any]
) -> httpx2.Request:
    """With the bound and the key that were granted."""
    if attempt.key is not None:
        # Azure has a header of its own.
        if "api-key" in request.headers:
            request.headers["api-key"] = attempt.key
        else:
            request.headers["authorization"] = f"Bearer {attempt.key}"
    bound = session.lowered(attempt.grant, size)
    if bound is None:
        return request
    changed = dict(body)
    for name in _BOUNDS:
        if name in changed:
            changed[name] = max(1, bound // max(1, body.get("n") or 1))
    content = json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()
    headers = httpx2.Headers(request.headers)
    headers["content-length"] = str(len(content))
    return httpx2.Request(
        request.method, request.url, headers=headers, content=content, extensions=dict(request.extensions)
    )


def _refuse(error: Denied | Unavailable | RequestRefused | UnmappedAccount, request: httpx2.Request) -> NoReturn:
    if isinstance(error, Denied):
        raise CallDenied(error, request) from None
    if isinstance(error, RequestRefused):
        raise CoordinatorRefused(error, request) from None
    if isinstance(error, UnmappedAccount):
        raise AccountWithoutKey(error, request) from None
    raise CoordinatorUnavailable(error, request) from None
