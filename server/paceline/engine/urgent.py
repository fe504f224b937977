"""What urgent calls take of a limit, so that others leave that much to them: a burst of them need not wait for refill.

It costs the others nothing but once: they come as fast as the limit refills, at a level that is a little higher.
"""

from __future__ import annotations

from paceline.engine.dimensions import SECOND_US

SLOT_US = SECOND_US // 4
LEAVE_PART = 8
"""At most this part of the burst is left to them."""
_FADE = 0.985
"""A peak lasts: to half of it in some twelve seconds."""


class Urgent:
    """Of one limit: the most that urgent calls took of it in a quarter of a second, lately."""

    __slots__ = ("_most", "_peak", "_slot", "_sum")

    def __init__(self, burst: int) -> None:
        self._most = burst // LEAVE_PART
        self._slot = 0
        self._sum = 0
        self._peak = 0.0

    def note(self, amount: int, now: int) -> None:
        """An urgent call took so much."""
        self._turn(now)
        self._sum += amount

    def kept(self, now: int) -> int:
        """What to leave to those that come."""
        self._turn(now)
        return min(self._most, int(max(self._peak, self._sum)))

    def _turn(self, now: int) -> None:
        slot = now // SLOT_US
        if slot != self._slot:
            self._peak = max(self._peak, float(self._sum)) * _FADE ** min(1_000, slot - self._slot)
            self._slot, self._sum = slot, 0
