"""Clocks. Everything in :mod:`paceline.ledger` that waits or measures does it through one of these. Unit:
µs."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call that is due at some time."""

    def cancel(self) -> None:
        """Do not make the call. Harmless if it was made."""
        ...


class Clock(Protocol):
    """Monotonic and wall time in µs, and waiting for the monotonic one."""

    def monotonic(self) -> int:
        """Time since some fixed instant; never decreases."""
        ...

    def wall(self) -> int:
        """Time since 1970 in UTC; may jump."""
        ...

    def call_at(self, when: int, callback: Callable[[], object]) -> Timer:
        """Call back from the event loop once :meth:`monotonic` is ``when``, or a little before or after."""
        ...

    async def sleep_until(self, when: int) -> None:
        """Return once :meth:`monotonic` is ``when``; with ``when`` in the past, give the loop one turn."""
        ...


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    def monotonic(self) -> int:
        return time.monotonic_ns() // 1_000

    def wall(self) -> int:
        return time.time_ns() // 1_000

    def call_at(self, when: int, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(max(0, when - self.monotonic()) / 1e6, callback)

    async def sleep_until(self, when: int) -> None:
        await asyncio.sleep(max(0, when - self.monotonic()) / 1e6)


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that stands still until it is told. For tests and simulations: the same calls, the same
    order."""

    def __init__(self, monotonic: int = 1_000_000, wall: int = 1_750_000_000_000_000) -> None:
        self._monotonic = monotonic
        self._offset = wall - monotonic
        self._numbers = itertools.count()
        self._timers: list[tuple[int, int, _ManualTimer]] = []

    def monotonic(self) -> int:
        return self._monotonic

    def wall(self) -> int:
        return self._monotonic + self._offset

    def set_wall(self, wall: int) -> None:
        """Let the wall clock jump; the monotonic one does not notice."""
        self._offset = wall - self._monotonic

    def call_at(self, when: int, callback: Callable[[], object]) -> Timer:
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    async def sleep_until(self, when: int) -> None:
        if when <= self._monotonic:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self.call_at(when, wake)
        try:
            await woken
        finally:
            timer.cancel()

    def next_timer(self) -> int | None:
        """When the next call is due."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def advance(self, duration: int) -> None:
        """Let ``duration`` pass, making every call on the way at its own time, in the order of their
        times."""
        end = self._monotonic + duration
        while (when := self.next_timer()) is not None and when <= end:
            timer = heapq.heappop(self._timers)[2]
            self._monotonic = max(self._monotonic, when)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self._monotonic = end


class LedgerTime:
    """A ledger's own time: starts at the later of ``floor`` (the last journalled time) and ``start`` (``None``: the
    wall clock), then counts monotonic time. Never runs backwards, whatever the wall clock does."""

    __slots__ = ("_base", "_clock")

    def __init__(self, clock: Clock, floor: int, start: int | None = None) -> None:
        self._clock = clock
        self._base = max(floor, clock.wall() if start is None else start) - clock.monotonic()

    def now(self) -> int:
        """Ledger time in µs."""
        return self._base + self._clock.monotonic()

    def monotonic(self, at: int) -> int:
        """The clock's monotonic time at ledger time ``at``."""
        return at - self._base

    def at_least(self, floor: int) -> None:
        """Jump forward to ``floor`` if it is later than now."""
        self._base = max(self._base, floor - self._clock.monotonic())
