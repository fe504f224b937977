"""From one response to one observation: header figures, and what an error adds to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import msgspec

from paceline.engine.dimensions import SECOND_US, Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.providers.headers.family import Response
from paceline.providers.headers.fault import Fault, fault
from paceline.providers.headers.refusals import refusal
from paceline.providers.headers.told import Told, told
from paceline.providers.headers.values import MAX_RETRY_AFTER_US, delay

Teller = Callable[[Fault, Refusal, Counter[str]], Told]
"""A family's own way to read figures from an error's body. What it does not find is taken from the message."""

_DIMENSIONAL = (Refusal.BUDGET, Refusal.RAMP)
_FINAL = (Refusal.SPEND, Refusal.NO_QUOTA)
"""Waiting does not help."""


def observation(
    response: Response, readings: Iterable[Reading], ignored: Counter[str], teller: Teller | None = None
) -> Observation | None:
    """Put together what a response said; ``None`` if it said nothing."""
    found = tuple(readings)
    error = fault(response, ignored)
    why = None if error is None else refusal(error)
    age_us = max(0, response.age_us)
    if error is None or why is None:
        return Observation(found, age_us) if found else None
    figures = told(error, why)
    if teller is not None:
        figures = _prefer(teller(error, why, ignored), figures)
    found = _merge(found, figures.readings)
    refused = figures.refused
    if why is Refusal.BUDGET and (
        figures.zero or any(each.limit == 0 and refused in (None, each.dimension) for each in found)
    ):
        why = Refusal.NO_QUOTA
    return Observation(
        readings=found,
        age_us=age_us,
        refusal=why,
        refused=refused if why in _DIMENSIONAL else None,
        retry_after_us=None if why in _FINAL else _retry_after(response, figures.wait_us, ignored),
        allowed=figures.allowed if why is Refusal.RAMP else None,
    )


def _retry_after(response: Response, told_us: int | None, ignored: Counter[str]) -> int | None:
    """How long the upstream asks to wait, in µs: from the headers, the caller's word, the error. At most a day.

    A header in whole seconds yields to a message that says the same exactly.
    """
    headers = response.headers
    exact = _header(headers, "retry-after-ms", 1_000, ignored)
    if exact is not None:
        return exact
    whole = _header(headers, "retry-after", SECOND_US, ignored)
    if whole is None:
        whole = response.error_retry_after_us
        if whole is not None and not 0 <= whole <= MAX_RETRY_AFTER_US:
            ignored["error.retry_after"] += 1
            whole = None
    if whole is None or (told_us is not None and whole - SECOND_US < told_us <= whole):
        return told_us
    return whole


def _header(headers: Mapping[str, bytes], name: str, unit: int, ignored: Counter[str]) -> int | None:
    raw = headers.get(name)
    if raw is None:
        return None
    value = delay(raw.strip(), unit, headers)
    if value is not None and value <= MAX_RETRY_AFTER_US:
        return value
    ignored[name] += 1
    return None


def _prefer(one: Told, other: Told) -> Told:
    """What ``one`` says, and where it says nothing what ``other`` does."""
    return Told(
        refused=one.refused if one.complete else other.refused,
        readings=one.readings if one.complete else other.readings,
        wait_us=other.wait_us if one.wait_us is None else one.wait_us,
        allowed=other.allowed if one.allowed is None else one.allowed,
        zero=one.zero or other.zero,
    )


def _merge(headers: tuple[Reading, ...], figures: tuple[Reading, ...]) -> tuple[Reading, ...]:
    """One reading for each dimension. What an error says of the level is exact, and newer than nothing."""
    if not figures:
        return headers
    found: dict[Dimension, Reading] = {reading.dimension: reading for reading in headers}
    for figure in figures:
        known = found.get(figure.dimension)
        if known is None or figure.remaining is not None:
            found[figure.dimension] = figure
        elif known.limit is None:
            found[figure.dimension] = msgspec.structs.replace(known, limit=figure.limit)
    return tuple(found.values())
