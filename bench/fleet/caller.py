"""The loops of a caller process: when it calls, and with what.

A service's calls depend on the plan and its seed alone. So do a batch worker's items and their order; how many it gets
through, and how often it has to offer each, depends on the answers: a job has to do all of its work, so an item stays
its worker's until it is answered. What is too large to get through easily is not dropped for something smaller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator

from bench.fleet.application import Application
from bench.fleet.plan import Plan, Report, Settled, Start
from bench.workloads import WORKLOADS, Size, arrivals, seeded

MOST_OPEN = 4_000
"""Calls under way in one process. A plan that gets here is beyond what one process can do, and the run is void."""

_LAST_WORDS_S = 5.0
_PAUSE_S = (0.1, 0.5)
"""At least and at most, before a worker offers a lost item again: one that fails at once must not spin."""


class TooMuch(Exception):
    """The plan has more calls open at one time than this process can serve."""


class Caller:
    """Offers the calls of a plan, tells the fate of those offered in the window."""

    def __init__(self, plan: Plan, application: Application, start: Start, tell: Callable[[Report], None]) -> None:
        self._plan = plan
        self._application = application
        self._start = start
        self._tell = tell
        self._open: set[asyncio.Task[object]] = set()
        self._open_in_window = 0
        self._window_over = False
        self.offered = 0

    async def run(self) -> None:
        """Until the end of the plan, or until cancelled; then what is under way is told as cut.

        Raises :class:`TooMuch`.
        """
        now = asyncio.get_running_loop().time()
        timer = asyncio.get_running_loop().call_at(
            now + max(0.0, self._start.window_end - time.monotonic()), self._window_is_over
        )
        try:
            await (self._batch() if self._plan.workers else self._services())
        finally:
            timer.cancel()
            for task in (*self._open,):
                task.cancel()
            if self._open:
                await asyncio.wait(self._open, timeout=_LAST_WORDS_S)

    async def _services(self) -> None:
        chance = seeded(self._plan.seed, self._plan.tenant, "arrivals")
        sizes = self._sizes("sizes")
        for at in arrivals(self._plan.spans, self._plan.part, chance):
            await _until(self._start.at + at)
            if len(self._open) >= MOST_OPEN:
                raise TooMuch(f"{self._plan.tenant} has {MOST_OPEN} calls open")
            self._begin(self._one(next(sizes), chance.random()))
        await _until(self._start.end)

    async def _batch(self) -> None:
        for number in range(self._plan.workers):
            self._begin(self._worker(number))
        await _until(self._start.end)

    async def _worker(self, number: int) -> None:
        chance = seeded(self._plan.seed, self._plan.tenant, "worker", number)
        sizes = self._sizes("worker-sizes", number)
        # Its own: how often an item was lost must not change the items after it.
        pauses = seeded(self._plan.seed, self._plan.tenant, "worker-pauses", number)
        # Not all in one instant: no real pool of workers does that, and the first second would measure it.
        await _until(self._start.at + chance.random())
        while time.monotonic() < self._start.end:
            size, place = next(sizes), chance.random()
            while not await self._one(size, place):
                await asyncio.sleep(pauses.uniform(*_PAUSE_S))
                if time.monotonic() >= self._start.end:
                    return

    async def _one(self, size: Size, place: float) -> bool:
        """Offer one call, with a deadline of its own. Whether it was answered."""
        inside = self._start.window_start <= time.monotonic() < self._start.window_end
        self.offered += inside
        self._open_in_window += inside
        record = await self._application.call(size, place)
        if inside:
            self._tell(record)
            self._open_in_window -= 1
            if self._window_over and not self._open_in_window:
                self._tell(Settled())
        if record.fate == "cut":
            raise asyncio.CancelledError
        return record.answered

    def _window_is_over(self) -> None:
        self._window_over = True
        if not self._open_in_window:
            self._tell(Settled())

    def _begin(self, what: Coroutine[None, None, object]) -> None:
        task = asyncio.create_task(what)
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    def _sizes(self, *parts: object) -> Iterator[Size]:
        return WORKLOADS[self._plan.workload].sizes(seeded(self._plan.seed, self._plan.tenant, *parts))


async def _until(instant: float) -> None:
    delay = instant - time.monotonic()
    if delay > 0:
        await asyncio.sleep(delay)
