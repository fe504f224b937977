"""What became of a call, read off the objects that SDKs return and raise.

Objects are looked at, never imported: any SDK whose responses and errors have the usual attributes is understood. Of a
response only the usage, the model's name, the status and the headers are read; of an error the status, the headers and,
where the error is about limits, its body. Prompts and completions are not.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from paceline_client._model import HeaderSource, Usage

Disposition = Literal["succeeded", "rejected", "failed", "aborted", "no_response", "not_sent"]
UsageKind = Literal["", "final", "partial", "missing"]

MAX_MESSAGE_BYTES: Final = 1_024
MAX_DETAILS_BYTES: Final = 4_096

_REJECTED: Final = frozenset({429, 503, 529})
"""Refused before any work was done. Every other error status may have been counted."""
_ABOUT_LIMITS: Final = frozenset({402, 403, 429, 503, 529})
"""Error bodies of these say what binds. Others may quote the request, and stay here unless they speak of limits."""
_LIMIT_WORDS: Final = re.compile(r"limit|quota|credit|spend|billing|balance|budget|overloaded", re.IGNORECASE)
_MAX_CHAIN: Final = 5


@dataclass(slots=True)
class UpstreamError:
    """The error of the upstream."""

    type: str = ""
    code: str = ""
    message: str = ""
    retry_after: float | None = None
    details: bytes = b""


@dataclass(slots=True)
class CallOutcome:
    """How one call ended."""

    disposition: Disposition | None
    status: int | None = None
    headers: HeaderSource | None = None
    error: UpstreamError | None = None
    usage: Usage | None = None
    usage_kind: UsageKind = ""
    served_model: str = ""


def from_response(response: object) -> CallOutcome:
    """The outcome of a call that returned: an SDK's response, parsed or raw, or a dict of the same shape."""
    usage = _usage(_get(response, "usage"))
    if usage is not None:
        # Parsed: such an object has a status of its own only in the shape of a dict.
        model = _get(response, "model")
        status = _get(response, "status_code")
        if not _is_status(status) or status < 400:
            found = _get(response, "headers")
            return CallOutcome(
                "succeeded",
                status if _is_status(status) else 200,
                found if isinstance(found, Mapping) else None,
                usage=usage,
                usage_kind="final",
                served_model=model if isinstance(model, str) else "",
            )
    status = _status(response)
    headers = _headers(response)
    body = _parsed(response)
    if status is not None and status >= 400:
        return CallOutcome(_disposition(status), status, headers, _error(body, status, headers))
    usage = read_usage(body)
    model = _get(body, "model") or _get(body, "model_version") or _get(body, "modelVersion")
    return CallOutcome(
        "succeeded",
        200 if status is None else status,
        headers,
        usage=usage,
        usage_kind="missing" if usage is None else "final",
        served_model=model if isinstance(model, str) else "",
    )


def from_refusal(status: int, headers: HeaderSource | None, body: object) -> CallOutcome:
    """The outcome of a call that was answered with an error status. ``body``: text, bytes, or parsed."""
    return CallOutcome(_disposition(status), status, headers, _error(body, status, headers))


def read_error(body: object) -> UpstreamError:
    """The error in an event of a stream that began with success."""
    return _error(body, 200, None)


def from_exception(error: BaseException, *, started: bool) -> CallOutcome:
    """The outcome of a call that raised. ``started``: response headers had come.

    Without a status nothing says that the call was not sent, so it counts as sent.
    """
    if not isinstance(error, Exception):
        # Cancelled, interrupted, or a generator that was closed: upstream may have counted what it did until then.
        return CallOutcome("aborted")
    for each in _chain(error):
        status = _status(each)
        if status is not None:
            headers = _headers(each)
            return CallOutcome(_disposition(status), status, headers, _error(_body(each), status, headers))
        body = _get(each, "body")
        if isinstance(body, Mapping):
            # An error event in the stream, after headers that said 200.
            return CallOutcome("aborted", 200, _headers(each), _error(body, 200, None))
    return CallOutcome("aborted" if started else "no_response")


def read_usage(response: object) -> Usage | None:
    """The usage in a response or usage object of the common APIs. ``None``: there is none."""
    for holder in (response, _get(response, "message"), _get(response, "response")):
        if holder is None:
            continue
        for name in ("usage", "usage_metadata", "usageMetadata"):
            found = _usage(_get(holder, name))
            if found is not None:
                return found
    return _usage(response)


def _usage(usage: object) -> Usage | None:
    if usage is None:
        return None
    total = _count(usage, "input_tokens")
    details = _get(usage, "input_tokens_details")
    if total is not None and details is None:
        return _anthropic(usage)
    prompt = _count(usage, "prompt_tokens")
    if prompt is not None:  # OpenAI: chat completions, embeddings
        cached = _count(_get(usage, "prompt_tokens_details"), "cached_tokens") or 0
        return Usage(max(0, prompt - cached), cached, None, _count(usage, "completion_tokens") or 0)
    prompt = _count(usage, "prompt_token_count", "promptTokenCount")
    if prompt is not None:  # Gemini
        cached = _count(usage, "cached_content_token_count", "cachedContentTokenCount") or 0
        produced = _count(usage, "candidates_token_count", "candidatesTokenCount") or 0
        thoughts = _count(usage, "thoughts_token_count", "thoughtsTokenCount") or 0
        return Usage(max(0, prompt - cached), cached, None, produced + thoughts)
    if details is not None and total is not None:  # OpenAI: responses, where the cached part is in the sum
        cached = _count(details, "cached_tokens") or 0
        return Usage(max(0, total - cached), cached, None, _count(usage, "output_tokens"))
    found = _anthropic(usage)
    return found if found.known else None


def _anthropic(usage: object) -> Usage:
    """As Anthropic and Bedrock have it, and with the names of this library."""
    return Usage(
        _count(usage, "input_tokens", "inputTokens"),
        _count(usage, "cache_read_input_tokens", "cacheReadInputTokens", "cache_read_tokens"),
        _count(usage, "cache_creation_input_tokens", "cacheWriteInputTokens", "cache_write_tokens"),
        _count(usage, "output_tokens", "outputTokens"),
    )


def _disposition(status: int) -> Disposition:
    if status in _REJECTED:
        return "rejected"
    # An error with a status of success was raised in mid-stream.
    return "failed" if status >= 400 else "aborted"


def _error(body: object, status: int, headers: HeaderSource | None) -> UpstreamError:
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            text = json.loads(text)
    inner = _get(text, "error") if isinstance(text, Mapping) else None
    part = inner if isinstance(inner, Mapping) else text
    message = _text(part, "message", "Message")
    if isinstance(part, str):
        message = part
    details = _get(part, "details")
    error = UpstreamError(
        type=_text(part, "type", "status", "Code", "__type")[:256],
        code=(_text(part, "code") or _text(details, "error_code"))[:256],
        retry_after=_retry_after(headers),
    )
    if status in _ABOUT_LIMITS or status < 400 or _LIMIT_WORDS.search(message):
        error.message = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
        if isinstance(text, Mapping):
            with contextlib.suppress(TypeError, ValueError):
                raw = json.dumps(text, separators=(",", ":"), default=str).encode("utf-8", "replace")
                # A body that was cut no longer parses: its inner part may still fit.
                if len(raw) > MAX_DETAILS_BYTES:
                    raw = json.dumps(details, separators=(",", ":"), default=str).encode("utf-8", "replace")
                error.details = raw if len(raw) <= MAX_DETAILS_BYTES else b""
    return error


def _retry_after(headers: HeaderSource | None) -> float | None:
    if not isinstance(headers, Mapping):
        return None
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        for key in (name, name.title()):
            with contextlib.suppress(Exception):
                value = headers[key]
                seconds = float(value.decode("latin-1") if isinstance(value, bytes) else value) * scale
                if 0 <= seconds <= 31 * 86_400:
                    return seconds
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it wraps."""
    each: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if each is None:
            return
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _status(thing: object) -> int | None:
    for name in ("status_code", "http_status", "status", "code"):
        value = _get(thing, name)
        if _is_status(value):
            return int(value)
    response = _get(thing, "response")
    if isinstance(response, Mapping):
        value = _get(_get(response, "ResponseMetadata"), "HTTPStatusCode")
    else:
        value = _get(response, "status_code")
        if not _is_status(value):
            value = _get(response, "status")
    if not _is_status(value):
        value = _get(_get(thing, "ResponseMetadata"), "HTTPStatusCode")
    return int(value) if _is_status(value) else None


def _is_status(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599


def _headers(thing: object) -> HeaderSource | None:
    for holder in (thing, _get(thing, "response"), _get(thing, "http_response")):
        if isinstance(holder, Mapping):
            found = _get(_get(holder, "ResponseMetadata"), "HTTPHeaders")
        else:
            found = _get(holder, "headers")
        if isinstance(found, Mapping) or (found is not None and callable(_get(found, "items"))):
            return found
    return None


def _body(error: object) -> object:
    body = _get(error, "body")
    if isinstance(body, (Mapping, str, bytes)):
        return body
    response = _get(error, "response")
    if isinstance(response, Mapping):
        return response.get("Error")
    details = _get(error, "details")
    return details if isinstance(details, Mapping) else _get(error, "message")


def _parsed(response: object) -> object:
    """The body of a raw response, if it is there already; else the response itself."""
    if isinstance(response, Mapping) or _get(response, "usage") is not None:
        return response
    read: Any = None
    if callable(_get(response, "parse")) and _get(response, "headers") is not None:
        read = _get(response, "parse")
    elif callable(_get(response, "json")) and (
        _get(response, "is_stream_consumed") is True or _get(response, "_content_consumed") is True
    ):
        read = _get(response, "json")
    if read is None:
        return response
    try:
        body = read()
    except Exception:
        return response
    if inspect.iscoroutine(body):
        body.close()
        return response
    return body


def _get(thing: object, name: str) -> Any:
    if thing is None:
        return None
    try:
        if type(thing) is dict or isinstance(thing, Mapping):
            return thing.get(name)
        return getattr(thing, name, None)
    except Exception:
        # A property of somebody else's class may do anything.
        return None


def _text(thing: object, *names: str) -> str:
    for name in names:
        value = _get(thing, name)
        if isinstance(value, str):
            return value
    return ""


def _count(thing: object, *names: str) -> int | None:
    for name in names:
        value = _get(thing, name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return min(value, 0x7FFFFFFF)
    return None
