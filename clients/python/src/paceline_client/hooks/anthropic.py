"""The hook into the Anthropic SDK::

    from anthropic import Anthropic
    from paceline_client.hooks.anthropic import PacelineMiddleware

    client = Anthropic(middleware=[PacelineMiddleware(tenant="search")])

It works with every client of that SDK that speaks the Messages API, sync and async.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from paceline_client._client import AsyncClient, Client
from paceline_client._errors import Denied, RequestRefused, Unavailable, UnmappedAccount
from paceline_client._model import Priority

try:
    import anthropic
    import httpx2
    from anthropic import Middleware
except ImportError as missing:
    raise ImportError(
        "paceline_client.hooks.anthropic needs the Anthropic SDK, with middleware and httpx2: "
        "pip install 'paceline-client[anthropic]'"
    ) from missing

from paceline_client.hooks._call import Attempt
from paceline_client.hooks._http import follow, follow_async, was_sent
from paceline_client.hooks._keys import Bearer, Key
from paceline_client.hooks._labels import Labels
from paceline_client.hooks._refused import (
    blank,
    denial_response,
    refusal_response,
    unavailable_response,
    unmapped_response,
)
from paceline_client.hooks._session import Session, seconds
from paceline_client.hooks._size import Size, of_messages
from paceline_client.hooks._trouble import unreserved

if TYPE_CHECKING:
    from anthropic import APIResponse, AsyncAPIResponse
    from anthropic._middleware import AsyncCallNext, CallNext
    from anthropic._request import APIRequest

__all__ = ["AccountWithoutKey", "CallDenied", "CoordinatorRefused", "CoordinatorUnavailable", "PacelineMiddleware"]

_PATH: Final = "/v1/messages"
_ELSEWHERE: Final = (":rawPredict", ":streamRawPredict", "/invoke", "/invoke-with-response-stream")
"""How paths end at Vertex and Bedrock."""
_SECRETS: Final = frozenset({"authorization", "x-api-key"})

log = logging.getLogger("paceline_client")


class CallDenied(Denied, anthropic.RateLimitError):
    """Paceline denies the call: for the code around it, what a 429 of the upstream is. The SDK does not retry it."""

    def __init__(self, denied: Denied, request: httpx2.Request) -> None:
        response = denial_response(denied, request)
        anthropic.RateLimitError.__init__(self, str(denied), response=response, body=response.json())
        self.__dict__.update(denied.__dict__)
        # Both bases have a `message`. The SDK's is what applications log, so it says which limit binds.
        self.message = str(denied)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


# The SDK retries whatever is an `APIConnectionError`, with seconds of sleep in between, unless it is an
# `APIStatusError` too: then its response decides. By the policy `closed` a call fails at once, so it is both.
class CoordinatorUnavailable(Unavailable, anthropic.APIConnectionError, anthropic.APIStatusError):
    """No coordinator could be reached, and the policy is ``closed``. The SDK does not retry it."""

    def __init__(self, error: Unavailable, request: httpx2.Request) -> None:
        response = unavailable_response(error, request)
        anthropic.APIStatusError.__init__(self, str(error), response=response, body=response.json())

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class CoordinatorRefused(RequestRefused, anthropic.APIStatusError):
    """The coordinator does not accept the reservation, or who asks for it, and the policy is ``closed``. No retry."""

    def __init__(self, error: RequestRefused, request: httpx2.Request) -> None:
        response = refusal_response(error, request)
        anthropic.APIStatusError.__init__(self, str(error), response=response, body=response.json())
        self.__dict__.update(error.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class AccountWithoutKey(UnmappedAccount, anthropic.APIStatusError):
    """The call was granted on an account for which ``keys`` has no entry. It was released. No retry."""

    def __init__(self, error: UnmappedAccount, request: httpx2.Request) -> None:
        response = unmapped_response(error, request)
        anthropic.APIStatusError.__init__(self, str(error), response=response, body=response.json())
        self.__dict__.update(error.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self), self.args), self.__dict__


class PacelineMiddleware(Middleware):
    """Coordinates each attempt of each call of the Messages API. Other calls pass through untouched.

    Put it last in the list of middleware, next to the network: so it sees what is really sent.
    """

    def __init__(
        self,
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
    ) -> None:
        """``client``: whose options to use, of either kind; without it one is made from the environment.

        ``max_wait`` is how long an attempt waits for its turn, in seconds: 60 unless given, and never longer than the
        request's own time-out. With ``min_output_tokens`` the coordinator may lower ``max_tokens``, down to that.
        :func:`~paceline_client.hooks.labels` overrides the first five for a block of code.

        ``keys`` has an API key, or a function that fetches it, for each account, best first: an attempt goes to the
        first of them that has room, with its key. With ``account`` only to that one. Not for Vertex and Bedrock.
        """
        self._session = Session(
            client,
            Labels(tenant, workspace, priority, route, max_wait),
            {
                "provider": provider,
                "account": account,
                "region": region,
                "upstream_workspace": upstream_workspace,
            },
            min_output_tokens,
            keys,
        )
        self._place_is_known = bool(provider or account or keys)

    def handle(self, request: APIRequest, call_next: CallNext) -> APIResponse[Any]:
        """One attempt of the sync client."""
        session = self._session
        if not _uses_quota(request) or session.client.disabled:
            return call_next(request)
        asked = self._size(request)
        if asked is None:
            return call_next(request)
        model, size = asked
        try:
            attempt = session.begin(model, size, seconds(request.timeout))
        except (Denied, Unavailable, RequestRefused, UnmappedAccount) as error:
            _refuse(error, request)
        if attempt is None:
            return call_next(request)
        try:
            response = call_next(self._bounded(request, attempt, size))
        except BaseException as error:
            attempt.failed(error, sent=_was_sent(error))
            raise
        raw = _raw(response, attempt)
        if raw is not None:
            self._look_where(raw)
            follow(raw, attempt)
        return response

    async def handle_async(self, request: APIRequest, call_next: AsyncCallNext) -> AsyncAPIResponse[Any]:
        """One attempt of the async client."""
        session = self._session
        if not _uses_quota(request) or session.async_client.disabled:
            return await call_next(request)
        asked = self._size(request)
        if asked is None:
            return await call_next(request)
        model, size = asked
        try:
            attempt = await session.begin_async(model, size, seconds(request.timeout))
        except (Denied, Unavailable, RequestRefused, UnmappedAccount) as error:
            _refuse(error, request)
        if attempt is None:
            return await call_next(request)
        try:
            response = await call_next(self._bounded(request, attempt, size))
        except BaseException as error:
            attempt.failed(error, sent=_was_sent(error))
            raise
        raw = _raw(response, attempt)
        if raw is not None:
            self._look_where(raw)
            await follow_async(raw, attempt)
        return response

    def _size(self, request: APIRequest) -> tuple[str, Size] | None:
        """The model and the size. ``None``: nothing can be said of it, so nothing is."""
        body = request.json
        try:
            if isinstance(body, Mapping) and body.get("model"):
                return str(body["model"]), of_messages(body, self._session.seen)
        except Exception as error:
            unreserved("an estimate", error)
        return None

    def _look_where(self, raw: httpx2.Response) -> None:
        """Say once that the calls go to a cloud which was not named. Before they are sent, the SDK does not tell."""
        if self._place_is_known:
            return
        try:
            url = raw.url
        except RuntimeError:
            # Made by another middleware, without a request.
            return
        if url.path.endswith(_ELSEWHERE):
            self._place_is_known = True
            log.warning(
                "paceline: calls go to %s but are coordinated on the default account: give the middleware their "
                "provider (and account or region). Said once.",
                url.host,
            )

    def _bounded(self, request: APIRequest, attempt: Attempt, size: Size) -> APIRequest:
        """With the bound and the key that were granted."""
        if attempt.key is not None:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _SECRETS}
            key: dict[str, str | anthropic.Omit] = {
                "Authorization": Bearer(attempt.key),
                "X-Api-Key": anthropic.Omit(),
            }
            request = request.copy(headers={**headers, **key})
        bound = self._session.lowered(attempt.grant, size)
        body = request.json
        if bound is None or not isinstance(body, Mapping):
            return request
        return request.copy(body={**body, "max_tokens": bound})


def _uses_quota(request: APIRequest) -> bool:
    url = request.url
    if request.method.lower() != "post" or _PATH not in url:
        return False
    return url.partition("?")[0].rstrip("/").endswith(_PATH)


def _raw(response: object, attempt: Attempt) -> httpx2.Response | None:
    """The HTTP response. ``None``: another middleware has put something in its place, which is settled as it is."""
    raw = getattr(response, "http_response", None)
    if isinstance(raw, httpx2.Response):
        return raw
    attempt.replaced(response)
    return None


def _was_sent(error: BaseException) -> bool:
    """Whether it may have reached the upstream."""
    return not isinstance(error, anthropic.CredentialsError) and was_sent(error)


def _refuse(error: Denied | Unavailable | RequestRefused | UnmappedAccount, request: APIRequest) -> NoReturn:
    url = request.url if "://" in request.url else f"https://paceline.invalid{request.url}"
    asked = httpx2.Request(request.method.upper(), url)
    # Without the original as a cause, in which the SDK would look for a reason to retry.
    if isinstance(error, Denied):
        raise CallDenied(error, asked) from None
    if isinstance(error, RequestRefused):
        raise CoordinatorRefused(error, asked) from None
    if isinstance(error, UnmappedAccount):
        raise AccountWithoutKey(error, asked) from None
    raise CoordinatorUnavailable(error, asked) from None
