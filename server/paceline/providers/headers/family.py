"""What a header family is, and how an observation is put together from what a response said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from paceline.engine.operations import Observation

COMMON = frozenset({"date", "retry-after", "retry-after-ms"})
"""Names that every family reads."""


class Response(msgspec.Struct, frozen=True):
    """What was reported of one response. ``headers`` by lower-case name, the first of each.

    ``error_details`` is the error's body or the part of it with details, as received.
    """

    headers: Mapping[str, bytes]
    http_status: int = 0
    error_type: str = ""
    error_code: str = ""
    error_message: str = ""
    error_retry_after_us: int | None = None
    age_us: int = 0
    error_details: bytes = b""


class Family(msgspec.Struct, frozen=True):
    """One way of telling limits in response headers and error bodies.

    ``wanted`` are the names that ``parse`` reads, in lower case. ``parse`` counts in its second argument, by
    header name, what it could not use; it never fails and never raises.
    """

    name: str
    wanted: frozenset[str]
    parse: Callable[[Response, Counter[str]], Observation | None]
