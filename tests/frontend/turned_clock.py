"""A clock for servers under test that stands in another month, and can be turned forward."""

from __future__ import annotations

from datetime import datetime

from paceline.ledger.clock import SystemClock


class TurnedClock(SystemClock):
    """The machine's clock, set to an instant, and turned forward by the test."""

    def __init__(self, begin: datetime) -> None:
        self._shift = int(begin.timestamp() * 1e6) - super().wall()
        self._turned = 0

    def monotonic(self) -> int:
        return super().monotonic() + self._turned

    def wall(self) -> int:
        return super().wall() + self._shift + self._turned

    def turn(self, to: datetime) -> None:
        self._turned += int(to.timestamp() * 1e6) - self.wall()
