"""An HTTP response in the hands of a hook: read already, or passed on to the application with a tap on its body."""

from __future__ import annotations

from typing import Final

import httpx2

from paceline_client.hooks._call import Attempt
from paceline_client.hooks._tap import AsyncTap, SyncTap

_NEVER_SENT: Final = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)


def follow(response: httpx2.Response, attempt: Attempt) -> None:
    """Settle the attempt by this response, now or when its body has been read.

    The body of an error is read here: it says which limit binds, and the SDK throws it away when it retries.
    """
    if response.status_code >= 400 and not response.is_closed:
        try:
            response.read()
        except BaseException:
            attempt.answered(response.status_code, response.headers, b"")
            raise
    if response.is_closed:
        attempt.answered(response.status_code, response.headers, _content(response))
        return
    attempt.arrived(response.status_code, response.headers)
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = SyncTap(response.stream, attempt)
    else:
        attempt.exhausted()


async def follow_async(response: httpx2.Response, attempt: Attempt) -> None:
    """The same for a body that is read with ``async for``."""
    if response.status_code >= 400 and not response.is_closed:
        try:
            await response.aread()
        except BaseException:
            attempt.answered(response.status_code, response.headers, b"")
            raise
    if response.is_closed:
        attempt.answered(response.status_code, response.headers, _content(response))
        return
    attempt.arrived(response.status_code, response.headers)
    if isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = AsyncTap(response.stream, attempt)
    else:
        attempt.exhausted()


def _content(response: httpx2.Response) -> bytes:
    try:
        return response.content
    except httpx2.ResponseNotRead:
        # Closed unread, by somebody between the hook and the network.
        return b""


def was_sent(error: BaseException) -> bool:
    """Whether the call may have reached the upstream, by the error of httpx2 or one that an SDK made of it."""
    return not (isinstance(error, _NEVER_SENT) or isinstance(error.__cause__, _NEVER_SENT))
