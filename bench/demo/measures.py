"""What is measured, as pure functions of what was recorded.

*Limit used*, *refused* and *service* come from the upstream's own books; *lost*, *first attempt* and *wait* from the
callers. Shares are parts of one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from bench.fleet.plan import Record

_ALMOST = 1e-9
_ENDLESS = 1_000.0
"""Times the capacity."""


class Waits(NamedTuple):
    """Seconds; ``None`` where nothing was accepted."""

    p50: float | None
    p99: float | None


def percentile(values: Collection[float], part: float) -> float | None:
    """The smallest value that at least ``part`` (0 to 1) of all values do not exceed; ``None`` of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(part * len(values) - _ALMOST) - 1)]


def used(
    accepted: Mapping[str, float], level: Mapping[str, float], rate: Mapping[str, float], seconds: float
) -> tuple[str, float]:
    """The binding dimension, and the part of it that accepted calls used: accepted ÷ (level at the start + refill).

    ``rate`` is per second; ``level`` may be negative. The binding dimension is the one of which most was used.
    """
    parts = {each: accepted.get(each, 0.0) / max(_ALMOST, level[each] + rate[each] * seconds) for each in rate}
    binding = max(parts, key=lambda each: parts[each])
    return binding, parts[binding]


def refused_per_1000(refused: int, accepted: int) -> float | None:
    """Refusals for each thousand accepted calls; ``None`` when nothing was accepted."""
    return 1_000 * refused / accepted if accepted else None


def lost(records: Collection[Record]) -> float:
    """The part of the offered calls that has no answer within its deadline. A lost item that is offered again is a new
    call."""
    return sum(not each.answered for each in records) / len(records) if records else 0.0


def first_attempt(records: Collection[Record]) -> float:
    """The part of the offered calls that was answered at its first attempt upstream."""
    return sum(each.answered and each.attempts == 1 for each in records) / len(records) if records else 0.0


def waits(records: Iterable[Record], own_s: float) -> Waits:
    """From the application's call to the first byte of the accepted attempt, less what the SDK takes without limits.

    Over answered calls: one that was lost has no end of its wait, and counts as lost instead.
    """
    waited = [max(0.0, each.sent - each.begun - own_s) for each in records if each.answered and each.sent is not None]
    return Waits(percentile(waited, 0.5), percentile(waited, 0.99))


def fair_shares(
    demands: Mapping[str, Mapping[str, float]],
    capacity: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Weighted max-min by dominant share: the part of the capacity that each tenant is entitled to.

    ``demands`` are amounts by dimension; those of a tenant that always has work come from :func:`endless`. Progressive
    filling: all shares grow at their weights, a tenant leaves when its demand is met or a dimension that it uses is
    full.
    """
    weight = {tenant: (weights or {}).get(tenant, 1.0) for tenant in demands}
    direction: dict[str, dict[str, float]] = {}
    wanted: dict[str, float] = {}
    for tenant, demand in demands.items():
        parts = {each: amount / capacity[each] for each, amount in demand.items() if amount > 0}
        dominant = max(parts.values(), default=0.0)
        wanted[tenant] = dominant
        direction[tenant] = {each: part / dominant for each, part in parts.items()} if dominant else {}
    share = dict.fromkeys(demands, 0.0)
    free = dict.fromkeys(capacity, 1.0)
    growing = {tenant for tenant in demands if wanted[tenant] > 0}
    # Each round somebody leaves, or a dimension is full.
    for _ in range(len(demands) + len(capacity)):
        if not growing:
            break
        speed = {
            each: sum(weight[tenant] * direction[tenant].get(each, 0.0) for tenant in growing) for each in capacity
        }
        step = min(
            *((wanted[tenant] - share[tenant]) / weight[tenant] for tenant in growing),
            *(free[each] / speed[each] for each in capacity if speed[each] > 0),
        )
        for tenant in growing:
            share[tenant] += step * weight[tenant]
        for each in capacity:
            free[each] -= step * speed[each]
        full = {each for each in capacity if free[each] <= _ALMOST}
        growing = {
            tenant
            for tenant in growing
            if share[tenant] < wanted[tenant] * (1 - _ALMOST) and not full & direction[tenant].keys()
        }
    return share


def endless(sample: Mapping[str, float], capacity: Mapping[str, float]) -> dict[str, float]:
    """The demand of a tenant that always has work like ``sample``: so much that no capacity meets it."""
    dominant = max((amount / capacity[each] for each, amount in sample.items()), default=0.0)
    return {each: amount * _ENDLESS / dominant for each, amount in sample.items()} if dominant else {}


def dominant_share(service: Mapping[str, float], capacity: Mapping[str, float]) -> float:
    """The largest part of a dimension that the service took."""
    return max((amount / capacity[each] for each, amount in service.items()), default=0.0)


def least_served(served: Mapping[str, float], fair: Mapping[str, float]) -> tuple[str, float] | None:
    """The tenant with the least service ÷ fair share, and that ratio; ``None`` when nobody is entitled to anything.

    Over all tenants: Jain's index leaves out those that asked for no more than their share, and they are the ones who
    lose when others crowd them out.
    """
    ratios = {tenant: served.get(tenant, 0.0) / share for tenant, share in fair.items() if share > 0}
    return min(ratios.items(), key=lambda each: each[1]) if ratios else None


def jain(values: Sequence[float]) -> float | None:
    """Jain's index: 1 when all are equal, 1/n when one has all; ``None`` of nothing."""
    squares = sum(value * value for value in values)
    if not values:
        return None
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def fairness(
    service: Mapping[str, Mapping[str, float]],
    demands: Mapping[str, Mapping[str, float]],
    capacity: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
) -> float | None:
    """Jain's index over service ÷ fair share, of the tenants that asked for more than their share."""
    fair = fair_shares(demands, capacity, weights)
    over = [each for each in fair if dominant_share(demands[each], capacity) > fair[each] * (1 + 1e-6)]
    return jain([dominant_share(service.get(each, {}), capacity) / fair[each] for each in over if fair[each] > 0])
