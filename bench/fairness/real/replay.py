"""What client processes wrote down, told to the oracle of the laboratory.

Instants are those of the clients, in µs of the machine's monotonic clock, which all processes of one machine share: of
the call, of the answer's arrival, of the Commit's answer. So all that a call waits counts, the network and the journal
as well; the servers' own clock and books play no part, but for what they say that a call was charged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from bench.fairness.judging import quantile
from bench.fairness.ledger import Call
from bench.fairness.oracle import Oracle, Tank
from bench.fairness.setup import PoolLimits
from bench.fairness.window import Figures, Window
from paceline.engine.operations import Priority


class Seen(msgspec.Struct):
    """One call, as its client saw it. Vectors are requests and tokens."""

    key: str
    tenant: str
    tokens: int
    priority: int
    shares: tuple[str, ...]
    pools: tuple[str, ...]
    max_wait_us: int
    took_us: int
    offered_at: int
    granted_at: int | None = None
    denied_at: int | None = None
    pool: str = ""
    held: tuple[int, int] = (0, 0)
    settled_at: int | None = None
    settled: tuple[int, int] = (0, 0)

    def call(self) -> Call:
        """As the laboratory knows it."""
        return Call(
            self.key,
            self.tenant,
            self.tokens,
            Priority(self.priority),
            self.shares,
            self.pools,
            self.max_wait_us,
            self.took_us,
            offered_at=self.offered_at,
            granted_at=self.granted_at,
            denied_at=self.denied_at,
            pool=self.pool,
            held=self.held,
        )


@dataclass(frozen=True, slots=True)
class Books:
    """A run; see :class:`~bench.fairness.window.Recorded`."""

    pools: Mapping[str, PoolLimits]
    calls: Sequence[Call]


class _Tank(Tank):
    """Knows what found no place."""

    spilled = 0
    """In grains."""
    found = 0
    """What of it has found its place after all."""

    def advance(self, now: int) -> None:
        before = self.level + self.amount * (now - self.at)
        super().advance(now)
        self.spilled += before - self.level

    def recover(self, since: int) -> None:
        """What was spilled since it had been so much was not, for somebody had taken something by then."""
        self.level += self.spilled - max(since, self.found)
        self.found = self.spilled


class _Watch(Oracle):
    """Keeps each stretch of time in which all that waited for a pool would have fitted, until one was let go.

    When the servers let a call go is not known, but that it was between the call and the arrival of the answer. A wait
    goes on until the arrival. A full bucket is refilled from the call on, so that there is never more room than this
    judge believes.
    """

    def __init__(self, pools: Mapping[str, PoolLimits], fill: int, at: int) -> None:
        super().__init__(pools, fill, at)
        self.open = {
            name: tuple(
                _Tank(amount, burst, burst * fill // 1_000, at)
                for amount, burst in zip(limits.amounts, limits.bursts, strict=True)
            )
            for name, limits in pools.items()
        }
        self.tanks = dict(self.open)
        self.stretches: list[tuple[int, int]] = []
        """Its end, and its length in µs."""
        self._closed = dict.fromkeys(pools, 0)

    def close(self, pool: str) -> None:
        """Somebody was let go, or nobody waits any longer."""
        length = self.idle_us[pool] - self._closed[pool]
        self._closed[pool] = self.idle_us[pool]
        if length:
            self.stretches.append((self.tanks[pool][0].at, length))


@dataclass(frozen=True, slots=True)
class Replayed:
    """A measured window, and the waits beside a room that ended in it, in µs."""

    window: Window
    waits: Sequence[int]

    def late(self) -> Figures:
        """How long calls waited although they fitted, ms. Zero: never."""
        return {
            "late_max_ms": max(self.waits, default=0) / 1_000,
            "late_p99_ms": quantile(self.waits or (0,), 0.99) / 1_000,
        }


def replay(calls: Sequence[Seen], pools: Mapping[str, PoolLimits], start: int, begin: int, end: int) -> Replayed:
    """All ``calls`` of a run whose buckets were full at ``start``, with the window from ``begin`` to ``end``, µs."""
    oracle = _Watch(pools, 1_000, start)
    books = Books(pools, [seen.call() for seen in sorted(calls, key=lambda seen: seen.offered_at)])
    happened = [event for seen in calls for event in _events(oracle, seen)]
    marks = []
    for mark_at in (begin, end):
        now = [event for event in happened if event[0] < mark_at]
        happened = [event for event in happened if event[0] >= mark_at]
        for at, _, what in sorted(now, key=lambda event: event[:2]):
            oracle.advance(at)
            what()
        oracle.advance(mark_at)
        marks.append({name: oracle.mark(name) for name in pools})
    for name in pools:
        oracle.close(name)
    return Replayed(Window(books, *marks), [length for at, length in oracle.stretches if begin < at <= end])


_Event = tuple[int, int, Callable[[], None]]
"""When; the order among those of one instant; what to tell the oracle."""


def _events(oracle: _Watch, seen: Seen) -> list[_Event]:
    since: dict[str, tuple[int, ...]] = {}

    def offered() -> None:
        oracle.waits(seen.key, [(pool, needs) for pool in seen.pools])
        since.update({pool: tuple(tank.spilled for tank in oracle.open[pool]) for pool in seen.pools})

    def granted() -> None:
        oracle.close(seen.pool)
        left()
        for tank, spilled in zip(oracle.open[seen.pool], since[seen.pool], strict=True):
            tank.recover(spilled)
        oracle.charge(seen.pool, seen.held)

    def left() -> None:
        oracle.left(seen.key)
        for pool in seen.pools:
            if not oracle.waiting(pool):
                oracle.close(pool)

    def settled() -> None:
        oracle.charge(seen.pool, tuple(now - was for now, was in zip(seen.settled, seen.held, strict=True)))

    needs = 1, seen.tokens
    found: list[_Event] = [(seen.offered_at, 0, offered)]
    if seen.granted_at is not None:
        found.append((seen.granted_at, 1, granted))
    if seen.denied_at is not None:
        found.append((seen.denied_at, 1, left))
    if seen.settled_at is not None:
        found.append((seen.settled_at, 2, settled))
    return found
