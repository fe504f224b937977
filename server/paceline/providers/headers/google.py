"""Vertex AI and Gemini: no header tells a limit; the details of an error do, as ``google.rpc`` messages.

``QuotaFailure`` names the quotas that were short, with the window in their names, and ``RetryInfo`` how long to wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from paceline.engine.dimensions import SECOND_US, Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.fault import MAX_DETAILS, Fault
from paceline.providers.headers.observing import observation
from paceline.providers.headers.told import Told, dimension_of
from paceline.providers.headers.values import MAX_AMOUNT, MAX_RETRY_AFTER_US, duration


def _tell(fault: Fault, why: Refusal, ignored: Counter[str]) -> Told:
    dimensions: set[Dimension | None] = set()
    limits: dict[Dimension, int] = {}
    zero, wait_us = False, None
    for part in fault.details:
        kind = part.get("@type")
        if not isinstance(kind, str):
            continue
        if kind.endswith("google.rpc.RetryInfo"):
            wait_us = _delay(part.get("retryDelay"), ignored)
        elif kind.endswith("google.rpc.QuotaFailure"):
            violations = part.get("violations")
            for violation in violations[:MAX_DETAILS] if isinstance(violations, list) else ():
                if not isinstance(violation, dict):
                    continue
                dimension, limit = _violation(violation, ignored)
                dimensions.add(dimension)
                zero = zero or limit == 0
                if dimension is not None and limit is not None:
                    limits[dimension] = min(limit, limits.get(dimension, limit))
    # Of several that are short, none can be told to be the one; of a day's, no minute's level follows.
    refused = next(iter(dimensions)) if why is Refusal.BUDGET and len(dimensions) == 1 else None
    readings = tuple(Reading(dimension, limit) for dimension, limit in limits.items())
    return Told(refused, readings, wait_us, zero=zero, complete=bool(dimensions))


def _violation(violation: Mapping[str, Any], ignored: Counter[str]) -> tuple[Dimension | None, int | None]:
    """The dimension that was short (``None``: not one per minute) and its limit."""
    names = [violation.get(name) for name in ("quotaId", "quotaMetric", "subject")]
    name = " ".join(name[:256] for name in names if isinstance(name, str)).lower()
    plain = name.replace("_", "").replace(" ", "")
    per_minute = "perminute" in plain and "perday" not in plain
    raw = violation.get("quotaValue")
    limit: int | None = None
    if isinstance(raw, str) and raw.isascii() and raw.isdigit() and len(raw) <= 13:
        limit = int(raw)
    elif isinstance(raw, int) and not isinstance(raw, bool):
        limit = raw
    if raw is not None and (limit is None or not 0 <= limit <= MAX_AMOUNT):
        ignored["error.details"] += 1
        limit = None
    return (dimension_of(name) if per_minute else None), limit


def _delay(told: Any, ignored: Counter[str]) -> int | None:
    """A protobuf duration: ``55.8s``, or seconds and nanoseconds apart. At most a day."""
    span: int | None = None
    if isinstance(told, str):
        span = duration(told[:64])
    elif isinstance(told, dict):
        whole, nanos = told.get("seconds", 0), told.get("nanos", 0)
        if isinstance(whole, str) and whole.isascii() and whole.isdigit() and len(whole) <= 12:
            whole = int(whole)
        if type(whole) is int and type(nanos) is int and 0 <= nanos < 1_000_000_000:
            span = whole * SECOND_US + nanos // 1_000
    if span is not None and 0 <= span <= MAX_RETRY_AFTER_US:
        return span
    ignored["error.details"] += 1
    return None


def _parse(response: Response, ignored: Counter[str]) -> Observation | None:
    return observation(response, (), ignored, _tell)


FAMILIES = (Family(name="google", wanted=COMMON, parse=_parse),)
