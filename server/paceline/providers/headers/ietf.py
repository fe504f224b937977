"""The fields of draft-ietf-httpapi-ratelimit-headers.

``RateLimit-Policy`` tells quotas and windows, ``RateLimit`` what is left of them.
``"burst";q=100;w=60`` gives the amount per minute; the quota itself is the burst. Of several policies on one quantity
the slowest of those rules whose window is short; one with a long window rules where there is no other. Malformed fields
are ignored, and ``Retry-After`` goes before ``t``.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from paceline.engine.dimensions import SECOND_US, Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.observing import observation
from paceline.providers.headers.structured import Named, named_list
from paceline.providers.headers.told import dimension_of
from paceline.providers.headers.values import MAX_AMOUNT, MAX_RETRY_AFTER_US

POLICY, STATE = "ratelimit-policy", "ratelimit"
SHORT_WINDOW = 600
"""Seconds. A longer window's rate says little of the next minute."""
LONGEST_WINDOW = 32 * 86_400


class _Policy(msgspec.Struct, frozen=True):
    """A quota of ``quota`` in ``window`` seconds (``None``: not told)."""

    dimension: Dimension
    quota: int
    window: int | None

    @property
    def per_minute(self) -> int | None:
        """The rate, at least 1 unless the quota is zero."""
        if self.window is None:
            return None
        return min(MAX_AMOUNT, max(self.quota * 60 // self.window, min(1, self.quota)))


def _parse(response: Response, ignored: Counter[str]) -> Observation | None:
    policies = {}
    for name, parameters in _members(response, POLICY, ignored):
        policy = _policy(name, parameters, ignored)
        if policy is not None:
            policies[name] = policy
    left: dict[str, int] = {}
    again = 0
    for name, parameters in _members(response, STATE, ignored):
        remaining, wait = _integer(parameters, "r"), _integer(parameters, "t")
        if remaining is None:
            ignored[STATE] += 1
            continue
        left[name] = remaining
        if remaining == 0 and wait is not None:
            again = max(again, wait)
    seen = observation(response, _readings(policies, left, ignored), ignored)
    if (
        seen is not None
        and seen.refusal is Refusal.BUDGET
        and seen.retry_after_us is None
        and 0 < again * SECOND_US <= MAX_RETRY_AFTER_US
    ):
        return msgspec.structs.replace(seen, retry_after_us=again * SECOND_US)
    return seen


def _members(response: Response, field: str, ignored: Counter[str]) -> list[Named]:
    raw = response.headers.get(field)
    if raw is None:
        return []
    members = named_list(raw)
    if members is None:
        ignored[field] += 1
        return []
    return members


def _policy(name: str, parameters: dict[str, str], ignored: Counter[str]) -> _Policy | None:
    quota, window = _integer(parameters, "q"), _integer(parameters, "w")
    dimension = _dimension(name, parameters.get("qu", ""))
    if quota is None or dimension is None or ("w" in parameters and not (window and window <= LONGEST_WINDOW)):
        ignored[POLICY] += 1
        return None
    return _Policy(dimension, quota, window)


def _dimension(name: str, unit: str) -> Dimension | None:
    """What a policy counts: its unit says so, else its name, else it counts requests."""
    unit = unit.lower().replace("_", "-")
    if unit == "concurrent-requests":
        return Dimension.CONCURRENCY
    if unit in ("", "requests"):
        return dimension_of(name.lower()) if not unit else Dimension.REQUESTS
    return dimension_of(unit) if "token" in unit else None


def _readings(policies: dict[str, _Policy], left: dict[str, int], ignored: Counter[str]) -> list[Reading]:
    best: dict[Dimension, tuple[tuple[bool, int], Reading]] = {}
    for name, policy in policies.items():
        remaining = left.get(name)
        if remaining is not None and remaining > 2 * policy.quota:
            ignored[STATE] += 1
            remaining = None
        rate = policy.per_minute
        reading = _reading(policy, rate, remaining)
        order = (policy.window is None or policy.window > SHORT_WINDOW, MAX_AMOUNT if rate is None else rate)
        known = best.get(policy.dimension)
        if known is None or order < known[0]:
            best[policy.dimension] = (order, reading)
    for name, remaining in left.items():
        # What no policy explains is still what is left.
        dimension = _dimension(name, "")
        if name not in policies and dimension is not None and dimension not in best:
            best[dimension] = ((True, MAX_AMOUNT), Reading(dimension, None, remaining))
    return [reading for _, reading in best.values()]


def _reading(policy: _Policy, rate: int | None, remaining: int | None) -> Reading:
    if policy.dimension is Dimension.CONCURRENCY:
        return Reading(policy.dimension, policy.quota)
    if rate is None or policy.window is None:
        return Reading(policy.dimension, None, remaining)
    if remaining is None or policy.quota == 0:
        return Reading(policy.dimension, rate, remaining)
    full_us = max(0, policy.quota - remaining) * policy.window * SECOND_US // policy.quota
    return Reading(policy.dimension, rate, remaining, 0, full_us, 1)


def _integer(parameters: dict[str, str], name: str) -> int | None:
    told = parameters.get(name, "")
    if not told.isdigit() or len(told) > 13:
        return None
    value = int(told)
    return value if value <= MAX_AMOUNT else None


FAMILIES = (Family(name="ietf", wanted=COMMON | {POLICY, STATE}, parse=_parse),)
