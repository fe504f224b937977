"""Single values of headers and error messages, read strictly, because anybody may send anything.

Every reader takes bounded text, runs in time linear in it, and never raises. Durations are in µs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache

from paceline.engine.dimensions import DAY_US, SECOND_US

MAX_AMOUNT = 1_000_000_000_000
"""No real limit is larger."""
MAX_RETRY_AFTER_US = DAY_US
MAX_RESET_US = 32 * DAY_US
"""The longest window is a month."""
MAX_STALE_US = 3600 * SECOND_US
"""A reset that lies this far back means "full"; further back it means nothing."""

_RFC3339 = re.compile(rb"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_SECONDS = re.compile(rb"\d{1,12}(?:\.\d{1,9})?", re.ASCII)
# "1h2m3.5s" as Go prints durations, and "55.8s", "26 seconds", "1 minute" as messages do.
_PART = (
    r"(?P<whole>\d{1,12})(?:\.(?P<fraction>\d{1,9})\d{0,9})?\s?"
    r"(?P<unit>milliseconds?|seconds?|minutes?|hours?|days?|ms|us|µs|ns|[dhms])(?![a-z])"
)
_PARTS = re.compile(_PART, re.ASCII)
_MAX_PARTS = 6
_NANO = 1_000_000_000
_UNITS_US = {"d": DAY_US, "h": 3600 * SECOND_US, "m": 60 * SECOND_US, "s": SECOND_US}


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


def pair(
    headers: Mapping[str, bytes], limit_name: str, remaining_name: str, ignored: Counter[str]
) -> tuple[int | None, int | None]:
    """A limit and what is left of it. More left than twice the limit is not believed."""
    limit = count(headers, limit_name, ignored)
    remaining = count(headers, remaining_name, ignored)
    if limit is not None and remaining is not None and remaining > 2 * limit:
        ignored[remaining_name] += 1
        remaining = None
    return limit, remaining


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
    now = http_date(date.strip())
    if now is None:
        ignored["date"] += 1
        return None
    if not -MAX_STALE_US <= instant - now <= MAX_RESET_US:
        ignored[name] += 1
        return None
    return max(0, instant - now)


def within(headers: Mapping[str, bytes], name: str, ignored: Counter[str]) -> int | None:
    """A duration as Go prints it (``17ms``, ``1m26.4s``), at most 32 days."""
    raw = headers.get(name)
    if raw is None:
        return None
    span = duration(raw.strip().decode("latin-1")) if len(raw) <= 64 else None
    if span is None or span > MAX_RESET_US:
        ignored[name] += 1
        return None
    return span


def seconds(headers: Mapping[str, bytes], name: str, ignored: Counter[str]) -> int | None:
    """A number of seconds, whole or not, at most 32 days."""
    raw = headers.get(name)
    if raw is None:
        return None
    span = decimal(raw.strip(), SECOND_US)
    if span is None or span > MAX_RESET_US:
        ignored[name] += 1
        return None
    return span


def decimal(raw: bytes, unit: int) -> int | None:
    """``raw`` times ``unit``, rounded down; ``None`` if it is no plain decimal number."""
    if not _SECONDS.fullmatch(raw):
        return None
    whole, _, fraction = raw.partition(b".")
    return int(whole) * unit + int((fraction + b"000000000")[:9]) * unit // _NANO


def duration(text: str) -> int | None:
    """A sequence of numbers with units, in µs; ``None`` if it is anything else."""
    text = text.strip().lower()
    at = total = 0
    for _ in range(_MAX_PARTS):
        found = _PARTS.match(text, at)
        if found is None:
            # Go writes no space and no sign where we would have to guess.
            return None
        unit = found["unit"]
        nanos = int(found["whole"]) * _NANO + int(((found["fraction"] or "") + "000000000")[:9])
        if unit in ("ms", "us", "µs", "ns") or unit.startswith("milli"):
            total += nanos // {"m": _NANO // 1_000, "u": _NANO, "µ": _NANO, "n": _NANO * 1_000}[unit[0]]
        else:
            total += nanos * _UNITS_US[unit[0]] // _NANO
        at = found.end()
        while at < len(text) and text[at] == " ":
            at += 1
        if at == len(text):
            return total
    return None


def delay(raw: bytes, unit: int, headers: Mapping[str, bytes]) -> int | None:
    """A ``retry-after``: a number of ``unit``, or (in seconds) an HTTP date, counted from the response's own."""
    told = decimal(raw, unit)
    if told is not None or unit != SECOND_US:
        return told
    then, now = http_date(raw), http_date(headers.get("date", b"").strip())
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
def http_date(raw: bytes) -> int | None:
    """An HTTP date, in µs since 1970; ``None`` if it is none."""
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
