"""Production of answers that are not streamed: one timer for all of them, instead of one each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from paceline.upstream.account import Account, Call


class Running(msgspec.Struct, gc=False, eq=False):
    """An answer that is being produced: ``target`` tokens at ``speed`` per second since ``began`` (loop time)."""

    account: Account
    call: Call
    began: float
    speed: float
    target: int

    def due(self, now: float) -> int:
        """Tokens that exist at ``now``."""
        return self.target if not self.speed else min(self.target, int((now - self.began) * self.speed))

    def settle(self, loop_now: float, now: int) -> None:
        """Charge what has been produced since the last time."""
        self.account.produced(now, self.call, self.due(loop_now) - self.call.produced)


class Pacer:
    """Charges the output of all running answers every so often."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._running: dict[int, Running] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, running: Running) -> None:
        """Charge this one too, until it is removed."""
        self._running[id(running)] = running
        if self._timer is None:
            self._arm(running.account)

    def remove(self, running: Running) -> None:
        """It has ended; whoever ended it settles it."""
        self._running.pop(id(running), None)

    def close(self) -> None:
        """No more timers."""
        if self._timer is not None:
            self._timer.cancel()
        self._running.clear()

    def _arm(self, account: Account) -> None:
        self._timer = asyncio.get_running_loop().call_later(account.scenario.chunk_ms / 1_000, self._tick)

    def _tick(self) -> None:
        self._timer = None
        loop_now, now = asyncio.get_running_loop().time(), self._clock()
        account = None
        for running in self._running.values():
            running.settle(loop_now, now)
            account = running.account
        if account is not None:
            self._arm(account)
