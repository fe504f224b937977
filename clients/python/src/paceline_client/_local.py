"""What this process may do by itself while no coordinator can be reached.

Every pool has token buckets, one for each dimension of its newest fallback share. A bucket is refilled at the
share's amount per minute and holds a quarter of it. What the coordinator grants is taken off it too, down to nothing:
when all processes lose it at the same time, those that were busy begin without a burst, because the upstream's own
bucket may just have been emptied. A call larger than a bucket is admitted when that is full, into debt, so that none
is impossible.

A call is debited when it asks, and told when its turn comes: so turns are in the order of asking. All times are those
of the caller's clock.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from paceline_client._model import Candidate, Target, Usage

K = TypeVar("K")
V = TypeVar("V")

BUILT_IN: Final[Mapping[str, int]] = {
    "requests": 6,
    "input_tokens": 20_000,
    "output_tokens": 4_000,
    "concurrency": 2,
}
"""Per minute and model, for a pool of which no share is known: enough to go on, too little to do harm."""
GAUGES: Final = frozenset({"concurrency", "queued_requests"})
BURST: Final = 0.25
"""What a bucket holds, as a part of its amount per minute."""
DRAWN: Final = 2.0
"""How often a call that the coordinator grants is taken off here. Once would leave busy processes something whenever
their calls had come unevenly, and all of them together too much."""
LIKELY_INPUT: Final = 2_000
LIKELY_OUTPUT: Final = 1_000
"""For calls that say nothing of their size. Unit: tokens."""
GAUGE_RETRY: Final = 0.05
"""When to ask again for a place that nobody can promise. Unit: seconds."""
MAX_POOLS: Final = 1_024
MAX_TARGETS: Final = 4_096
HOLD: Final = 300.0
"""When a place is free again whose call never said that it ended. Unit: seconds."""


@dataclass(frozen=True, slots=True)
class Share:
    """A fallback share, as received."""

    pool: str
    per_minute: Mapping[str, int]
    expires_at: float
    targets: Sequence[Target]


@dataclass(slots=True, eq=False)
class LocalGrant:
    """A turn that was given here."""

    pool: str
    index: int
    at: float
    """When the turn comes."""
    charged: dict[str, float]


@dataclass(slots=True)
class _Bucket:
    rate: float
    """Per second."""
    burst: float
    level: float
    updated: float

    def refill(self, now: float) -> None:
        if now > self.updated:
            self.level = min(self.burst, self.level + self.rate * (now - self.updated))
            self.updated = now

    def wait(self, amount: float) -> float:
        """Until the amount fits. Unit: seconds."""
        if self.rate <= 0:
            return math.inf
        short = min(amount, self.burst) - self.level
        return short / self.rate if short > 1e-9 else 0.0


@dataclass(slots=True)
class _Pool:
    buckets: dict[str, _Bucket] = field(default_factory=dict)
    gauges: dict[str, int] = field(default_factory=dict)
    open: dict[LocalGrant, float] = field(default_factory=dict)
    """Grants in progress, with the time at which their place is free at the latest."""
    share: Share | None = None
    lapsed: bool = False
    """The share has expired."""


class LocalPolicy:
    """The shares, and what was taken of them."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._lock = threading.Lock()
        self._shares: OrderedDict[str, Share] = OrderedDict()
        self._pool_of: OrderedDict[Target, str] = OrderedDict()
        self._ladders: OrderedDict[str, tuple[int, Target]] = OrderedDict()
        self._pools: OrderedDict[str, _Pool] = OrderedDict()

    # -- learning -----------------------------------------------------------------------------------------------

    def learn(self, share: Share) -> None:
        """A new share; it replaces the older one of its pool."""
        with self._lock:
            _put(self._shares, share.pool, share, MAX_POOLS)

    def learn_pool(self, asked: Target, pool: str, ladder: str, index: int) -> None:
        """A grant has told which pool a target belongs to, and what a ladder led to."""
        with self._lock:
            if self._pool_of.get(asked) != pool:
                _put(self._pool_of, asked, pool, MAX_TARGETS)
            if ladder and self._ladders.get(ladder) != (index, asked):
                _put(self._ladders, ladder, (index, asked), MAX_TARGETS)

    def ladder(self, name: str) -> tuple[int, Target] | None:
        """What the ladder led to last."""
        return self._ladders.get(name)

    def granted(self, name: str, candidate: Candidate, count: int, now: float) -> None:
        """The coordinator has granted so many calls of a pool."""
        with self._lock:
            if name not in self._shares:
                return
            pool = self._ready(name, now)
            for dimension, amount in _cost(candidate).items():
                bucket = pool.buckets.get(dimension)
                if bucket is not None and bucket.level > 0:
                    bucket.level = max(0.0, bucket.level - DRAWN * amount * count)

    # -- deciding -----------------------------------------------------------------------------------------------

    def reserve(self, candidates: Sequence[Candidate], now: float, turn_by: float) -> LocalGrant | float:
        """The first candidate whose turn comes at once, else the one whose turn comes first.

        A grant whose ``at`` is no later than ``turn_by``; or, if there is none, the wait that it would take, in seconds
        (infinite: it would take for ever).
        """
        with self._lock:
            best = math.inf
            choice: tuple[int, _Pool, str, dict[str, float]] | None = None
            for index, candidate in enumerate(candidates):
                name, pool = self._pool(candidate.target, now)
                cost = _cost(candidate)
                wait = self._wait(pool, cost, now)
                if wait < best:
                    best, choice = wait, (index, pool, name, cost)
                if wait == 0:
                    break
            if choice is None or (best > 0 and now + best > turn_by):
                return best
            index, pool, name, cost = choice
            if any(self._full(pool, gauge, now) for gauge in pool.gauges):
                return best
            for dimension, bucket in pool.buckets.items():
                bucket.level -= cost.get(dimension, 0.0)
            if len(pool.open) % 1_024 == 1_023:
                _forget(pool, now)
            grant = LocalGrant(name, index, now + best, cost)
            pool.open[grant] = now + best + HOLD
            return grant

    def end(self, grant: LocalGrant, usage: Usage | None, now: float, *, sent: bool = True) -> None:
        """The call has ended. What it used replaces what it was charged; one that was not sent gets all back."""
        with self._lock:
            pool = self._pools.get(grant.pool)
            if pool is None or pool.open.pop(grant, None) is None:
                return
            for dimension, bucket in pool.buckets.items():
                charged = grant.charged.get(dimension, 0.0)
                used = _used(dimension, usage, charged) if sent else 0.0
                bucket.refill(now)
                bucket.level = min(bucket.burst, bucket.level + charged - used)

    # -- inside -------------------------------------------------------------------------------------------------

    def _pool(self, target: Target, now: float) -> tuple[str, _Pool]:
        name = self._pool_of.get(target) or self._match(target) or f"{target.provider}/{target.model}"
        return name, self._ready(name, now)

    def _ready(self, name: str, now: float) -> _Pool:
        """A pool with its buckets, at the present."""
        share = self._shares.get(name)
        lapsed = share is not None and share.expires_at <= now
        pool = self._pools.get(name)
        if pool is None:
            pool = _Pool()
            _put(self._pools, name, pool, MAX_POOLS)
        if not pool.buckets or pool.share is not share or pool.lapsed is not lapsed:
            pool.share, pool.lapsed = share, lapsed
            self._resize(pool, self._amounts(share, lapsed), now)
        for bucket in pool.buckets.values():
            bucket.refill(now)
        return pool

    def _match(self, target: Target) -> str:
        for share in self._shares.values():
            if any(_matches(each, target) for each in share.targets):
                return share.pool
        return ""

    def _amounts(self, share: Share | None, lapsed: bool) -> Mapping[str, float]:
        """What may be taken in a minute."""
        if share is None:
            return BUILT_IN
        amounts = {name: amount * self._scale for name, amount in share.per_minute.items()}
        if not lapsed:
            return amounts
        # That the coordinator is silent is no reason to take more than it last allowed, least of all more than nothing.
        for name, amount in BUILT_IN.items():
            amounts[name] = min(amount, amounts.get(name, amount))
        return amounts

    def _resize(self, pool: _Pool, amounts: Mapping[str, float], now: float) -> None:
        old = pool.buckets
        pool.buckets, pool.gauges = {}, {}
        for dimension, amount in amounts.items():
            if dimension in GAUGES:
                pool.gauges[dimension] = max(1, int(amount)) if amount > 0 else 0
                continue
            burst = amount * BURST
            before = old.get(dimension)
            if before is not None:
                before.refill(now)
            level = burst if before is None else min(burst, before.level)
            pool.buckets[dimension] = _Bucket(amount / 60.0, burst, level, now)

    def _wait(self, pool: _Pool, cost: Mapping[str, float], now: float) -> float:
        wait = 0.0
        for dimension, bucket in pool.buckets.items():
            amount = cost.get(dimension, 0.0)
            if dimension == "spend":
                # What a call costs is not known here: only a share of nothing stops it.
                wait = max(wait, 0.0 if bucket.rate > 0 else math.inf)
            elif amount > 0:
                wait = max(wait, bucket.wait(amount))
        for gauge, most in pool.gauges.items():
            if most == 0:
                return math.inf
            if self._full(pool, gauge, now):
                wait = max(wait, GAUGE_RETRY)
        return wait

    def _full(self, pool: _Pool, gauge: str, now: float) -> bool:
        if len(pool.open) < pool.gauges[gauge]:
            return False
        _forget(pool, now)
        return len(pool.open) >= pool.gauges[gauge]


def _forget(pool: _Pool, now: float) -> None:
    """Give the places of calls free that never said that they ended."""
    for grant in [each for each, until in pool.open.items() if until <= now]:
        del pool.open[grant]


def _cost(candidate: Candidate) -> dict[str, float]:
    cap = candidate.max_output_tokens
    output = candidate.output_tokens
    if output is None:
        output = LIKELY_OUTPUT if cap is None else min(cap, LIKELY_OUTPUT)
    given = LIKELY_INPUT if candidate.input_tokens is None else candidate.input_tokens
    requests = 1 if candidate.requests is None else candidate.requests
    # Where the sum is limited, the cap is usually charged at the start.
    return {
        "requests": float(requests),
        "input_tokens": float(given),
        "output_tokens": float(output),
        "tokens": float(given + (output if cap is None else cap)),
    }


def _used(dimension: str, usage: Usage | None, charged: float) -> float:
    if usage is None or dimension == "requests":
        return charged
    if usage.input_tokens is None and usage.cache_write_tokens is None:
        given = None
    else:
        given = (usage.input_tokens or 0) + (usage.cache_write_tokens or 0)
    output = usage.output_tokens
    if dimension == "input_tokens" and given is not None:
        return float(given)
    if dimension == "output_tokens" and output is not None:
        return float(output)
    if dimension == "tokens" and given is not None and output is not None:
        return float(given + output)
    return charged


def _matches(pattern: Target, target: Target) -> bool:
    """Empty matches every value, on either side: what the caller left out is the server's default."""
    return (
        (not pattern.model or pattern.model == target.model)
        and (not pattern.provider or not target.provider or pattern.provider == target.provider)
        and (not pattern.account or not target.account or pattern.account == target.account)
        and (not pattern.region or not target.region or pattern.region == target.region)
        and (
            not pattern.upstream_workspace
            or not target.upstream_workspace
            or pattern.upstream_workspace == target.upstream_workspace
        )
        and (not pattern.service_tier or pattern.service_tier == target.service_tier)
        and (not pattern.endpoint or not target.endpoint or pattern.endpoint == target.endpoint)
    )


def _put(table: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)
