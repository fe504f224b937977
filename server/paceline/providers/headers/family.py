"""What a header family is, and how single values are read: strictly, because anybody may send anything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache

import msgspec

from paceline.engine.dimensions import DAY_US, SECOND_US, Dimension
from paceline.engine.operations import Observation, Reading, Refusal

MAX_AMOUNT = 1_000_000_000_000
MAX_RETRY_AFTER_US = DAY_US
MAX_RESET_US = 32 * DAY_US
"""The longest window is a month."""
MAX_STALE_US = 3600 * SECOND_US
"""A reset that lies this far back means "full"; further back it means nothing."""

_RFC3339 = re.compile(rb"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_SECONDS = re.compile(rb"\d{1,12}(?:\.\d{1,9})?", re.ASCII)

SPEND_CODES = ("enforced_spend_limit_reached", "contract_spend_limit_reached")


class Response(msgspec.Struct, frozen=True):
    """What was reported of one response. ``headers`` by lower-case name, the first of each."""

    headers: Mapping[str, bytes]
    http_status: int = 0
    error_type: str = ""
    error_code: str = ""
    error_message: str = ""
    error_retry_after_us: int | None = None
    age_us: int = 0


class Family(msgspec.Struct, frozen=True):
    """One way of telling limits in response headers.

    ``wanted`` are the names that ``parse`` reads, in lower case. ``parse`` counts in its second argument, by
    header name, what it could not use; it never fails and never raises.
    """

    name: str
    wanted: frozenset[str]
    parse: Callable[[Response, Counter[str]], Observation | None]


def count(headers: Mapping[str, bytes], name: str, ignored: Counter[str]) -> int | None:
    """A whole number between 0 and 10^12."""
    raw = headers.get(name)
    if raw is None:
        return None
    raw = raw.strip()
    if raw.isdigit() and len(raw) <= 13:
        value = int(raw)
        if value <= MAX_AMOUNT:
            return value
    ignored[name] += 1
    return None


def until(headers: Mapping[str, bytes], name: str, ignored: Counter[str]) -> int | None:
    """From the ``date`` of the response to an RFC 3339 instant, in µs, not below 0. Right to a second."""
    raw = headers.get(name)
    if raw is None:
        return None
    instant = _rfc3339(raw.strip())
    if instant is None:
        ignored[name] += 1
        return None
    date = headers.get("date")
    if date is None:
        return None
    now = _http_date(date.strip())
    if now is None:
        ignored["date"] += 1
        return None
    if not -MAX_STALE_US <= instant - now <= MAX_RESET_US:
        ignored[name] += 1
        return None
    return max(0, instant - now)


def retry_after(response: Response, ignored: Counter[str]) -> int | None:
    """How long the upstream asks to wait, in µs: from the headers, else from the error. At most a day."""
    for name, unit in (("retry-after-ms", 1_000), ("retry-after", SECOND_US)):
        raw = response.headers.get(name)
        if raw is None:
            continue
        value = _delay(raw.strip(), unit, response.headers)
        if value is not None and value <= MAX_RETRY_AFTER_US:
            return value
        ignored[name] += 1
    told = response.error_retry_after_us
    if told is None:
        return None
    if 0 <= told <= MAX_RETRY_AFTER_US:
        return told
    ignored["error.retry_after"] += 1
    return None


def refusal(response: Response) -> Refusal | None:
    """Why the upstream refused this call, from its status and its error; ``None`` if it did not."""
    if not response.error_type and not response.error_code and response.http_status < 400:
        return None
    status, kind = response.http_status, response.error_type.lower()
    message = response.error_message.lower()
    told = f"{kind} {response.error_code.lower()} {message}"
    if any(code in told for code in SPEND_CODES):
        return Refusal.SPEND
    if status == 400 and ("spend limit" in message or "api usage limits" in message):
        return Refusal.SPEND
    if status in (503, 529) or kind == "overloaded_error":
        return Refusal.OVERLOAD
    if status == 429 or kind == "rate_limit_error":
        return Refusal.BUDGET
    return None


def refused(message: str) -> Dimension | None:
    """The dimension that a 429's text names; ``None`` if it names none, or several."""
    text = message.lower()
    named = set()
    if "concurrent" in text:
        named.add(Dimension.CONCURRENCY)
    if "input token" in text:
        named.add(Dimension.INPUT_TOKENS)
    if "output token" in text:
        named.add(Dimension.OUTPUT_TOKENS)
    # "This request would exceed … input tokens" names no request limit; "50 requests per minute" does.
    if not named and "requests" in text:
        named.add(Dimension.REQUESTS)
    return named.pop() if len(named) == 1 else None


def observation(response: Response, readings: Iterable[Reading], ignored: Counter[str]) -> Observation | None:
    """Put together what a response said; ``None`` if it said nothing."""
    why = refusal(response)
    found = tuple(readings)
    if why is None and not found:
        return None
    return Observation(
        readings=found,
        age_us=max(0, response.age_us),
        refusal=why,
        refused=refused(response.error_message) if why is Refusal.BUDGET else None,
        retry_after_us=None if why is None or why is Refusal.SPEND else retry_after(response, ignored),
    )


def _delay(raw: bytes, unit: int, headers: Mapping[str, bytes]) -> int | None:
    if _SECONDS.fullmatch(raw):
        whole, _, fraction = raw.partition(b".")
        return int(whole) * unit + int((fraction + b"000000000")[:9]) * unit // 1_000_000_000
    if unit != SECOND_US:
        return None
    then, now = _http_date(raw), _http_date(headers.get("date", b"").strip())
    return None if then is None or now is None else max(0, then - now)


# Responses come many to a second, and their dates repeat.
@lru_cache(maxsize=256)
def _rfc3339(raw: bytes) -> int | None:
    if not _RFC3339.fullmatch(raw):
        return None
    try:
        return _micros(datetime.fromisoformat(raw.decode("ascii").upper()))
    except (ValueError, OverflowError):
        return None


@lru_cache(maxsize=256)
def _http_date(raw: bytes) -> int | None:
    if not raw.isascii() or not 20 <= len(raw) <= 40:
        return None
    try:
        parsed = parsedate_to_datetime(raw.decode("ascii"))
        return _micros(parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC))
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _micros(instant: datetime) -> int:
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND_US + since.microseconds
