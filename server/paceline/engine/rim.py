"""The burst, where the time to a full bucket is too coarse to tell it.

Resets are whole seconds, so a burst of about a second's refill is known from them to a factor of two or three only. But
a bucket never holds more than its burst: if our books have said that it holds more, again and again, when about as much
was read as ever is, then what was read at most is where it ends. Traffic of others would have no such edge, and a burst
that is long enough to matter then is told by the reset.

Soft state: it begins anew with every process. What it lowers, any reading of more raises again.
"""

from __future__ import annotations

from heapq import heappush, heappushpop

READINGS = 400
"""Are looked at together."""
FEW = 30
"""Are enough if all of those times show the same."""
TIMES = 3
"""Our books must have said more so often among them."""
NEAR = 10
"""What is read then is less than the most ever by one part in so many at most."""
BESIDE = 4
"""So near to the most, what is missing may be lost at the rim."""


class Rim:
    """The readings of one limit, since the last verdict."""

    __slots__ = ("_before", "_count", "_least", "_most", "_short")

    def __init__(self) -> None:
        self._before = 0
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._most = self._least = 0
        self._short: list[int] = []

    def near(self, most: int) -> bool:
        """Whether a reading is about as much as is ever read: there, refill is lost that nobody takes."""
        top = max(self._before, self._most)
        return most >= top - top // BESIDE

    def read(self, most: int, least_burst: int, believed: int) -> int | None:
        """A reading of at most ``most`` came when our books said ``believed`` at least.

        ``least_burst`` is what the reset proves of the burst. Returns where the burst is, when it is found.
        """
        self._count += 1
        self._most = max(self._most, most)
        self._least = max(self._least, least_burst)
        if believed > most:
            if len(self._short) < TIMES:
                heappush(self._short, most)
            else:
                heappushpop(self._short, most)
        seen = len(self._short) == TIMES
        # The same figure again and again, and never more, is the edge itself.
        sharp = seen and self._count >= FEW and self._short[0] >= self._most
        if self._count < READINGS and not sharp:
            return None
        self._before = self._most
        edge = seen and self._short[0] >= self._most - self._most // NEAR
        found = max(self._most, self._least)
        self._clear()
        return found if edge else None
