"""The error of a response, made one whole: what its status, type, code, message and body say.

A body is untrusted: at most :data:`MAX_BODY_BYTES` of it are decoded, it is looked into to a fixed depth, and one that
is no JSON counts as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import msgspec

from paceline.providers.headers.family import Response

MAX_BODY_BYTES = 4_096
MAX_TEXT_CHARS = 5_120
"""The longest message and the longest body that are read as text."""
MAX_DETAILS = 32
"""Entries of an error's details that are looked at."""

_NAMES = ("type", "code", "status", "__type", "Code", "error_code", "reason")
_MESSAGES = ("message", "Message")
AMAZON_TYPE = "x-amzn-errortype"


class Fault(msgspec.Struct, frozen=True):
    """An error. ``names``: its types and codes in lower case; ``text``: its messages, likewise, with ``_`` as a space.

    ``details``: what its body has below ``details`` (a mapping counts as one entry), else the body; at most 32.
    """

    status: int
    names: frozenset[str]
    text: str
    details: tuple[Mapping[str, Any], ...]


def fault(response: Response, ignored: Counter[str]) -> Fault | None:
    """The error of a response; ``None`` if it had none."""
    told, raw = response.error_message, response.error_details
    if response.http_status < 400 and not (response.error_type or response.error_code or told or raw):
        return None
    names = {_name(response.error_type), _name(response.error_code)}
    amazon = response.headers.get(AMAZON_TYPE)
    if amazon is not None:
        names.add(_name(amazon[:256].decode("latin-1")))
    texts = [told]
    details: tuple[Mapping[str, Any], ...] = ()
    if raw:
        body = _decode(raw)
        if body is None:
            ignored["error.details"] += 1
            texts.append(raw[:MAX_BODY_BYTES].decode("utf-8", "replace"))
        else:
            error = _error(body)
            # Without details the body may be what was below them, sent alone because the whole was too long.
            details = _details(error.get("details", error))
            for part in (error, body if isinstance(body, dict) else {}, *details):
                names.update(_name(part[name]) for name in _NAMES if isinstance(part.get(name), str))
            texts += [error[name] for name in _MESSAGES if isinstance(error.get(name), str) and error[name] != told]
    names.discard("")
    text = " ".join(texts)[:MAX_TEXT_CHARS].lower().replace("_", " ")
    return Fault(response.http_status, frozenset(names), text, details)


def _name(text: str) -> str:
    """A type or code by itself: Amazon writes it with a namespace before, and an address behind."""
    return text[:256].lower().rpartition("#")[2].partition(":")[0].strip()


def _decode(raw: bytes) -> Any:
    if len(raw) > MAX_BODY_BYTES:
        return None
    try:
        found = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        # Invalid UTF-8 is a ValueError too; the decoder stops by itself where nesting gets too deep.
        return None
    return found if isinstance(found, dict | list) else None


def _error(body: Any, again: bool = True) -> dict[str, Any]:
    """The part of a body that describes the error, wherever this provider puts it."""
    if isinstance(body, list):
        inner = next((part for part in body[:MAX_DETAILS] if isinstance(part, dict) and "error" in part), None)
        body = {"details": body} if inner is None else inner
    error = body.get("error")
    if isinstance(error, str):
        return {**body, "message": body.get("message", error)}
    found: dict[str, Any] = error if isinstance(error, dict) else body
    message = found.get("message")
    if again and isinstance(message, str) and message[:1] in ("{", "["):
        # Some libraries put the whole body of the response into the message of theirs.
        nested = _decode(message.encode("utf-8", "replace"))
        if nested is not None:
            return _error(nested, again=False)
    return found


def _details(found: Any) -> tuple[dict[str, Any], ...]:
    listed = found if isinstance(found, list) else [found]
    return tuple(part for part in islice(listed, MAX_DETAILS) if isinstance(part, dict))
