"""What the calls of each pool used, and which limit held calls back. Not part of the books.

Everything here is soft, as all of :mod:`~paceline.engine.hindsight` is: it is not journalled, a restart begins at zero,
and nothing that is enforced depends on it. Times are µs of ledger time, amounts in the unit of their dimension.

A call that waited and then had its turn was held back by the limit that had the least left behind its grant, in time
of refill: that is the one which had just become enough. Of a denial, and of what is only observed, the decision itself
names the dimension, but not whether it was the pool's own limit or the cap of a share: it counts for the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from paceline.engine.accounting import Usage
from paceline.engine.answers import Would
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import MINUTE_US, UNLIMITED, WINDOW_US, Dimension
from paceline.engine.operations import Outcome

RECENT_US: Final = 5 * MINUTE_US
"""Length of a slot: "lately" is the present slot and the one before it."""
MAX_POOLS: Final = 2_048
"""Pools with a record of their own; about 1,500 bytes each. A ledger has fewer, unless somebody raised its cap."""
_NEVER: Final = 1 << 62


class Held:
    """Calls that one limit held back."""

    __slots__ = ("_before", "_minute", "_now", "_slot", "denied", "minutes", "wait_us", "waited")

    def __init__(self) -> None:
        self.waited = 0
        self.denied = 0
        self.wait_us = 0
        self.minutes = 0
        """Different minutes in which it held a call back."""
        self._minute = -1
        self._slot = -1
        self._now = [0, 0]
        self._before = [0, 0]

    @property
    def calls(self) -> int:
        """All of them."""
        return self.waited + self.denied

    def note(self, now: int, count: int, wait_us: int, *, denied: bool) -> None:
        """``count`` calls waited ``wait_us`` each, or were denied."""
        if denied:
            self.denied += count
        else:
            self.waited += count
            self.wait_us += wait_us * count
        if now // MINUTE_US != self._minute:
            self._minute = now // MINUTE_US
            self.minutes += 1
        self._turn(now)
        self._now[denied] += count

    def lately(self, now: int) -> tuple[int, int]:
        """Calls that waited, and that were denied, in the last five to ten minutes."""
        self._turn(now)
        return self._now[0] + self._before[0], self._now[1] + self._before[1]

    def _turn(self, now: int) -> None:
        slot = now // RECENT_US
        if slot > self._slot:
            self._before = self._now if slot == self._slot + 1 else [0, 0]
            self._now = [0, 0]
            self._slot = slot


class PoolDemand:
    """The record of one pool. No more limits than there are dimensions, of the pool and of shares."""

    __slots__ = (
        "_minute",
        "cache_read_tokens",
        "cache_write_tokens",
        "charged",
        "decided",
        "held",
        "input_tokens",
        "minutes",
        "output_tokens",
        "since",
        "used",
    )

    def __init__(self, now: int) -> None:
        self.since = now
        self.decided = 0
        """Calls that were granted or denied."""
        self.used = 0
        """Calls whose usage was reported."""
        self.input_tokens = 0
        """Neither read from nor written to the cache."""
        self.cache_read_tokens = 0
        self.cache_write_tokens = 0
        self.output_tokens = 0
        self.minutes = 0
        """Different minutes in which the usage of a call was reported."""
        self._minute = -1
        self.held: dict[tuple[Dimension, bool], Held] = {}
        """By dimension, and whether it was the cap of a share."""
        self.charged: dict[Dimension, tuple[int, int]] = {}
        """By dimension: sum of the pool's charges for calls with a usage, and how many they were."""

    def use(self, now: int, usage: Usage) -> None:
        """A call has used so much."""
        self.used += 1
        self.input_tokens += usage.input_tokens
        self.cache_read_tokens += usage.cache_read_tokens
        self.cache_write_tokens += usage.cache_write_tokens
        self.output_tokens += usage.output_tokens
        if now // MINUTE_US != self._minute:
            self._minute = now // MINUTE_US
            self.minutes += 1

    def held_by(self, dimension: Dimension, share: bool = False) -> Held:
        """The record of one limit; made when it is first asked for."""
        found = self.held.get((dimension, share))
        if found is None:
            found = self.held[dimension, share] = Held()
        return found


class Demand:
    """The records of one ledger."""

    def __init__(self) -> None:
        self.pools: dict[str, PoolDemand] = {}
        self._buckets: Sequence[Bucket] = ()
        self._now = 0

    def begin(self, buckets: Sequence[Bucket], now: int) -> None:
        """Start a step."""
        self._buckets, self._now = buckets, now

    def granted(
        self,
        pool: str,
        count: int,
        numbers: tuple[int, ...],
        holds: tuple[int, ...],
        waited_us: int,
        would: Would | None,
    ) -> None:
        """Calls were granted, and the books have it. ``would`` of ``None``: enforced."""
        record = self._record(pool)
        if record is None:
            return
        record.decided += count
        if would is None:
            if waited_us:
                tight = self._tightest(numbers, holds)
                if tight is not None:
                    bucket = self._buckets[tight]
                    held = record.held_by(bucket.dimension, bool(bucket.share))
                    held.note(self._now, count, waited_us, denied=False)
        elif would.binding is not None:
            denied = would.reason is not None
            if denied or would.wait_us:
                record.held_by(would.binding).note(self._now, count, would.wait_us, denied=denied)

    def denied(self, pool: str, binding: Dimension | None) -> None:
        """A Reserve was denied in earnest; ``binding`` of ``None``: not for a limit."""
        record = self._record(pool)
        if record is not None:
            record.decided += 1
            if binding is not None:
                record.held_by(binding).note(self._now, 1, 0, denied=True)

    def settled(self, pool: str, outcome: Outcome, numbers: tuple[int, ...], charges: tuple[int, ...]) -> None:
        """The outcome of a call came. ``numbers``: the buckets that ``charges`` stand in; empty if not known."""
        usage = outcome.usage
        record = None if usage is None else self._record(pool)
        if record is None or usage is None:
            return
        record.use(self._now, usage)
        buckets, charged = self._buckets, record.charged
        for number, charge in zip(numbers, charges, strict=False):
            bucket = buckets[number]
            if bucket.pool and not bucket.share:
                total, calls = charged.get(bucket.dimension, (0, 0))
                charged[bucket.dimension] = (total + charge, calls + 1)

    def _record(self, pool: str) -> PoolDemand | None:
        record = self.pools.get(pool)
        if record is None and len(self.pools) < MAX_POOLS:
            record = self.pools[pool] = PoolDemand(self._now)
        return record

    def _tightest(self, numbers: tuple[int, ...], holds: tuple[int, ...]) -> int | None:
        """Of the limits that a grant took from, the one that has the least left, in time of refill."""
        found: int | None = None
        least = _NEVER
        for number, hold in zip(numbers, holds, strict=True):
            bucket = self._buckets[number]
            if not hold or bucket.amount >= UNLIMITED:
                continue
            window = WINDOW_US.get(bucket.window)
            if window is None:
                left = 0 if bucket.level < hold else _NEVER
            else:
                left = (bucket.level - bucket.margin(hold)) * window // max(1, bucket.amount)
            if left < least:
                found, least = number, left
        return found
