"""An independent judge of work conservation: token buckets of its own, and those that it saw waiting.

It knows the limits, and sees what was offered, granted, settled and given back: never the queue. Levels are exact, in
whole :data:`GRAINS` of a unit. Two things are waste, whatever order a queue gives to those that wait:

- **idle**: everybody who waits for a pool would have fitted, each by itself, in every dimension, so also whoever is
  first; and nobody was let go. In µs; and **parked**, what lay in the bucket meanwhile, in µs of refill times µs.
- **lost**: a bucket stood full, so that refill found no place, while somebody waited who would have fitted beside the
  largest of those that wait. In units.

A queue that saves up for a large call wastes nothing by that until the bucket is full. A bucket that does not bind may
well be full meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from bench.fairness.setup import PoolLimits
from paceline.engine.dimensions import MINUTE_US

GRAINS = MINUTE_US
"""Of one unit: what ``amount`` refills in a microsecond is whole."""
SLACK_US = 2
"""An instant is rounded up to whole microseconds, here and in the engine."""

Needs = tuple[int, ...]
"""What a call needs, by dimension."""


class Tank:
    """One limit."""

    def __init__(self, amount: int, burst: int, level: int, at: int) -> None:
        self.amount, self.burst = amount, burst * GRAINS
        self.level, self.at = level * GRAINS, at
        self.charged = 0
        """In units, given back ones taken off."""

    def fits_at(self, need: int) -> int:
        """When it has so much, at its level of now; an instant that has passed counts as now."""
        missing = need * GRAINS - self.level
        return self.at if missing <= 0 else self.at - (-missing // self.amount)

    @property
    def full_at(self) -> int:
        """When refill begins to be lost."""
        return self.at - (-(self.burst - self.level) // self.amount)

    def advance(self, now: int) -> None:
        """Refill up to ``now``."""
        self.level = min(self.burst, self.level + self.amount * (now - self.at))
        self.at = now

    def take(self, units: int) -> None:
        """Charge; below zero: give back."""
        self.level = min(self.burst, self.level - units * GRAINS)
        self.charged += units


class _Line:
    """Those that wait for one pool, and the largest and the least need among them by dimension."""

    def __init__(self, dimensions: int) -> None:
        self.waiting: dict[str, Needs] = {}
        self._most: list[list[tuple[int, str]]] = [[] for _ in range(dimensions)]
        self._least: list[list[tuple[int, str]]] = [[] for _ in range(dimensions)]

    def add(self, key: str, needs: Needs) -> None:
        self.waiting[key] = needs
        for place, need in enumerate(needs):
            heappush(self._most[place], (-need, key))
            heappush(self._least[place], (need, key))

    def most(self) -> Needs:
        return tuple(-self._first(heap, place, -1) for place, heap in enumerate(self._most))

    def least(self) -> Needs:
        return tuple(self._first(heap, place, 1) for place, heap in enumerate(self._least))

    def _first(self, heap: list[tuple[int, str]], place: int, sign: int) -> int:
        while (needs := self.waiting.get(heap[0][1])) is None or needs[place] != sign * heap[0][0]:
            heappop(heap)
        return heap[0][0]


def _first(tanks: Sequence[tuple[Tank, int]], calls: Iterable[Needs], places: Sequence[int]) -> int:
    """When the first of these calls fits into all of these tanks, each with so much beside it."""
    return min(
        max(tank.fits_at(needs[place] + beside) for (tank, beside), place in zip(tanks, places, strict=True))
        for needs in calls
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """The books of the oracle at one instant, of one pool; amounts by dimension."""

    at: int
    levels: tuple[float, ...]
    charged: tuple[int, ...]
    lost: tuple[float, ...]
    idle_us: int
    parked: float
    largest: tuple[int, ...]
    """The largest need of those that wait."""


class Oracle:
    """Tell it of everything in the order of time: :meth:`advance` first, then what happened at that instant."""

    def __init__(self, pools: Mapping[str, PoolLimits], fill: int, at: int) -> None:
        self.tanks = {
            name: tuple(
                Tank(amount, burst, burst * fill // 1_000, at)
                for amount, burst in zip(limits.amounts, limits.bursts, strict=True)
            )
            for name, limits in pools.items()
        }
        self._lines = {name: _Line(len(tanks)) for name, tanks in self.tanks.items()}
        self.idle_us = dict.fromkeys(pools, 0)
        self._parked = dict.fromkeys(pools, 0.0)
        self._lost = {name: [0] * len(tanks) for name, tanks in self.tanks.items()}

    def advance(self, now: int) -> None:
        """Go on to ``now``, and judge the time since: nothing happened in it."""
        for name, tanks in self.tanks.items():
            line = self._lines[name]
            if line.waiting and now > tanks[0].at:
                self._judge(name, tanks, line, now)
            for tank in tanks:
                tank.advance(now)

    def _judge(self, name: str, tanks: Sequence[Tank], line: _Line, now: int) -> None:
        all_fit = max(tank.fits_at(need) for tank, need in zip(tanks, line.most(), strict=True))
        if now - all_fit > SLACK_US:
            self.idle_us[name] += now - all_fit
            lies = min(tank.level / tank.amount for tank in tanks) + (now - tanks[0].at) / 2
            self._parked[name] += lies * (now - all_fit)
        full = [tank.full_at for tank in tanks]
        if min(full) >= now - SLACK_US:
            return
        # The largest must still find its place when the bucket is full, beside a call that passes it.
        besides = line.most() if len(line.waiting) > 1 else (0,) * len(tanks)
        for place, tank in enumerate(tanks):
            if full[place] >= now - SLACK_US:
                continue
            others = [(other, besides[at]) for at, other in enumerate(tanks) if at != place]
            kept = [at for at in range(len(tanks)) if at != place]
            if _first(others, [line.least()], kept) >= now:
                continue
            span = now - max(full[place], _first(others, line.waiting.values(), kept))
            if span > SLACK_US:
                self._lost[name][place] += span * tank.amount

    def waits(self, key: str, options: Sequence[tuple[str, Needs]]) -> None:
        """A call waits, for the first of these that it gets."""
        for pool, needs in options:
            self._lines[pool].add(key, needs)

    def left(self, key: str) -> None:
        """It waits no longer."""
        for line in self._lines.values():
            line.waiting.pop(key, None)

    def charge(self, pool: str, amounts: Needs) -> None:
        """A call was let go, or (below zero) gave something back."""
        for tank, amount in zip(self.tanks[pool], amounts, strict=True):
            tank.take(amount)

    def waiting(self, pool: str) -> int:
        """How many wait for it."""
        return len(self._lines[pool].waiting)

    def mark(self, pool: str) -> Mark:
        """Its books at the instant of the last :meth:`advance`."""
        tanks, line = self.tanks[pool], self._lines[pool]
        return Mark(
            tanks[0].at,
            tuple(tank.level / GRAINS for tank in tanks),
            tuple(tank.charged for tank in tanks),
            tuple(lost / GRAINS for lost in self._lost[pool]),
            self.idle_us[pool],
            self._parked[pool],
            line.most() if line.waiting else (0,) * len(tanks),
        )


def conserved(limits: PoolLimits, begin: Mark, end: Mark) -> dict[str, float]:
    """What was made of one pool between two marks.

    ``used``: charged ÷ (level at the start + refill − level at the end), in the dimension that binds: of which most was
    used. Of the level at the end no more is taken off than the largest call that waits may be saving up for. ``lost``
    is a part of that dimension's refill, ``idle`` of the time; ``parked_s`` is what lay there while all that waited
    would have fitted, in seconds of refill, in the mean over the time.
    """
    elapsed = end.at - begin.at
    found: list[tuple[float, float]] = []
    for place, amount in enumerate(limits.amounts):
        refill = amount * elapsed / MINUTE_US
        saved = min(end.levels[place], end.largest[place])
        used = (end.charged[place] - begin.charged[place]) / (begin.levels[place] + refill - saved)
        found.append((used, (end.lost[place] - begin.lost[place]) / refill))
    used, lost = max(found)
    return {
        "used": used,
        "lost": lost,
        "idle": (end.idle_us - begin.idle_us) / elapsed,
        "parked_s": (end.parked - begin.parked) / elapsed / 1_000_000,
    }


def worst(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several pools or runs: the least use and the least minimum, and the most of what is wasted."""
    return {name: (min if name in ("used", "minimum") else max)(one[name] for one in each) for name in each[0]}
