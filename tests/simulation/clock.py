"""Clocks of simulated machines: all off, each in its own way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.simulation.loop import Call, Loop

START_WALL = 1_767_225_600_000_000
"""When every run begins, µs since 1970."""


class NodeClock:
    """A :class:`~paceline.ledger.clock.Clock` on a loop's time.

    The monotonic one starts anywhere, and runs fast or slow by ``drift`` millionths; the wall clock is off by ``skew``
    µs, and :meth:`jump` lets it jump.
    """

    def __init__(self, loop: Loop, *, first: int = 0, drift: int = 0, skew: int = 0) -> None:
        self._loop = loop
        self._first = first
        self._since = loop.now
        self._drift = drift
        self._skew = skew

    def monotonic(self) -> int:
        passed = self._loop.now - self._since
        return self._first + passed + passed * self._drift // 1_000_000

    def wall(self) -> int:
        return START_WALL + self._loop.now + self._skew

    def jump(self, by: int) -> None:
        """Let the wall clock jump; the monotonic one does not notice."""
        self._skew += by

    def loop_time(self, when: int) -> int:
        """The first of the loop's µs at which :meth:`monotonic` is ``when``."""
        passed = max(0, when - self._first)
        return self._since - (-passed * 1_000_000 // (1_000_000 + self._drift))

    def call_at(self, when: int, callback: Callable[[], object]) -> Call:
        return self._loop.at(self.loop_time(when), callback)

    async def sleep_until(self, when: int) -> None:
        at = self.loop_time(when)
        if at <= self._loop.now:
            await asyncio.sleep(0)
            return
        woken = self._loop.create_future()
        timer = self._loop.at(at, _wake, woken)
        try:
            await woken
        finally:
            timer.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
