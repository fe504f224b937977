"""Who is next. The seam of the queue discipline: today the more urgent first, then who has waited longest.

A discipline keeps the waiters of one pool in the order of their turns. It knows nothing of levels: the engine asks for
the heads, and serves or leaves them. Waiters of different priorities and shares stand in lanes of their own, so that
the urgent never stand behind the patient, and those whom only the cap of their own share stops do not stop the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heappush

import msgspec

from paceline.engine.accounting import Sizes
from paceline.engine.operations import Priority, Reserve
from paceline.engine.recipe import Recipe
from paceline.engine.sizes import Kind


class Option(msgspec.Struct, eq=False, gc=False):
    """One candidate of a waiter: its place in the request, its pool, and what it would hold in which buckets."""

    index: int
    pool: str
    shares: tuple[str, ...]
    buckets: tuple[int, ...]
    holds: tuple[int, ...]
    sizes: Sizes
    recipe: Recipe
    count: int = 1
    """Calls that must fit together."""
    kind: Kind = ("", "", "")
    """Of what kind the call is, for what is learned of sizes."""
    margin: int = 0
    """What must be left beside the hold where the upstream lets a call in by an estimate of its own."""
    open: bool = True
    """Whether it may still serve its waiter."""


class Waiter:
    """A Reserve that waits in the lines of all its options; ``tickets`` are all callers that sent it.

    ``deadline`` is the latest that any of them has given. ``arrival`` is when the wait began, elsewhere maybe: what it
    was there before ``since`` counts.
    """

    __slots__ = ("arrival", "deadline", "operation", "options", "serial", "since", "tickets", "waiting")

    def __init__(self, operation: Reserve, options: tuple[Option, ...], ticket: int, since: int, serial: int) -> None:
        self.operation = operation
        self.options = options
        self.tickets = [ticket]
        self.since = self.deadline = since
        self.arrival = since - operation.waited_us
        self.serial = serial
        self.waiting = True


LaneKey = tuple[Priority, tuple[str, ...]]
"""A priority and a path of shares."""


_SPARE = 256
"""Places of those that left, kept beyond as many as wait, before they are swept."""

_Place = tuple[int, int, int, Waiter, Option]
"""Arrival, serial, index of the option: no two are equal."""


class _Lane:
    """Waiters of one key: a heap by arrival. Those that left are dropped at the head."""

    __slots__ = ("line", "size", "wanted")

    def __init__(self) -> None:
        self.line: list[_Place] = []
        self.wanted: dict[int, int] = {}
        self.size = 0

    def want(self, option: Option, sign: int) -> None:
        """Count what an option would hold: all of its calls, if they come together."""
        for number, hold in zip(option.buckets, option.holds, strict=True):
            self.wanted[number] = self.wanted.get(number, 0) + sign * hold * option.count

    def head(self) -> tuple[Waiter, Option] | None:
        line = self.line
        while line:
            _, _, _, waiter, option = line[0]
            if option.open:
                return waiter, option
            heappop(line)
        return None


class StrictPriority:
    """The waiters of one pool: by priority, then in the order of arrival."""

    def __init__(self) -> None:
        self._lanes: dict[LaneKey, _Lane] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Waiter]:
        """All that wait, in no order; one with several options here comes up once for each."""
        return (waiter for lane in self._lanes.values() for _, _, _, waiter, option in lane.line if option.open)

    def push(self, waiter: Waiter, option: Option) -> None:
        """Stand behind all of the same lane that began to wait before."""
        key = lane_of(waiter, option)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
        heappush(lane.line, (waiter.arrival, waiter.serial, option.index, waiter, option))
        lane.size += 1
        self._size += 1
        lane.want(option, 1)

    def left(self, waiter: Waiter, option: Option) -> None:
        """An option was served, denied or withdrawn."""
        option.open = False
        key = lane_of(waiter, option)
        lane = self._lanes[key]
        lane.size -= 1
        self._size -= 1
        if not lane.size:
            del self._lanes[key]
            return
        lane.want(option, -1)
        if len(lane.line) > 2 * lane.size + _SPARE:
            lane.line = [place for place in lane.line if place[4].open]
            heapify(lane.line)

    def refit(
        self, waiter: Waiter, option: Option, buckets: tuple[int, ...], holds: tuple[int, ...], recipe: Recipe
    ) -> None:
        """Definitions changed: a waiter would hold something else now."""
        lane = self._lanes[lane_of(waiter, option)]
        lane.want(option, -1)
        option.buckets, option.holds, option.recipe = buckets, holds, recipe
        lane.want(option, 1)

    def heads(self, least: Priority = Priority.BATCH) -> list[tuple[Waiter, Option]]:
        """The first of each lane, in the order of their turns; of this priority and of more urgent ones."""
        heads = [head for key, lane in self._lanes.items() if key[0] <= least and (head := lane.head()) is not None]
        if len(heads) > 1:
            heads.sort(key=_turn)
        return heads

    def waits(self, key: LaneKey) -> bool:
        """Whether anybody of this lane waits."""
        return key in self._lanes

    def wanted(self, number: int, least: Priority, besides: Collection[LaneKey] = ()) -> int:
        """What those of this priority and of more urgent ones want of the bucket ``number``, besides these lanes."""
        return sum(
            lane.wanted.get(number, 0) for key, lane in self._lanes.items() if key[0] <= least and key not in besides
        )


def lane_of(waiter: Waiter, option: Option) -> LaneKey:
    """Where a waiter stands for one of its options."""
    return waiter.operation.priority, option.shares


def _turn(head: tuple[Waiter, Option]) -> tuple[Priority, int, int]:
    waiter = head[0]
    return waiter.operation.priority, waiter.arrival, waiter.serial
