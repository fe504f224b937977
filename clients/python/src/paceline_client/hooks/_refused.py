"""The answers that an upstream would have given, made here for calls that never went there."""

from __future__ import annotations

import json
import math
from typing import Final

import httpx2

from paceline_client._errors import Denied, RequestRefused, Unavailable, UnmappedAccount

TOO_MANY: Final = 429
AWAY: Final = 503
NOT_VALID: Final = 400
NO_KEY: Final = 401


def denial_response(denied: Denied, request: httpx2.Request) -> httpx2.Response:
    """As for a call beyond a limit. The SDK is told not to retry: the wait for a turn is over already."""
    headers = {"x-should-retry": "false", "x-paceline": "denied"}
    if denied.retry_after is not None:
        headers["retry-after"] = str(math.ceil(denied.retry_after))
        headers["retry-after-ms"] = str(math.ceil(denied.retry_after * 1000))
    return _response(TOO_MANY, headers, "rate_limit_error", str(denied), f"paceline_{denied.reason}", request)


def unavailable_response(error: Unavailable, request: httpx2.Request) -> httpx2.Response:
    """As for a service that is away."""
    headers = {"x-should-retry": "false", "x-paceline": "unavailable"}
    return _response(AWAY, headers, "api_error", str(error), "paceline_unavailable", request)


def refusal_response(error: RequestRefused, request: httpx2.Request) -> httpx2.Response:
    """As for a request that is not valid: ours, not the application's."""
    headers = {"x-should-retry": "false", "x-paceline": "refused"}
    return _response(NOT_VALID, headers, "invalid_request_error", str(error), "paceline_refused", request)


def unmapped_response(error: UnmappedAccount, request: httpx2.Request) -> httpx2.Response:
    """As for a request without a key."""
    headers = {"x-should-retry": "false", "x-paceline": "unmapped"}
    return _response(NO_KEY, headers, "authentication_error", str(error), "paceline_unmapped_account", request)


def _response(
    status: int, headers: dict[str, str], kind: str, message: str, code: str, request: httpx2.Request
) -> httpx2.Response:
    error = {"type": kind, "code": code, "message": message, "details": {"error_code": code}}
    return httpx2.Response(
        status,
        headers={"content-type": "application/json", **headers},
        content=json.dumps({"type": "error", "error": error}).encode(),
        request=request,
    )


def blank(kind: type[BaseException], arguments: tuple[object, ...]) -> BaseException:
    """For unpickling: an exception whose attributes are set afterwards."""
    return kind.__new__(kind, *arguments)
