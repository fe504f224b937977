"""A virtual clock: what is to happen, in order; nothing ever sleeps."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

SECOND = 1_000_000
EPOCH = 1_790_000_000 * SECOND


class Clock:
    """Instants are µs. What is scheduled for the same instant happens in the order in which it was scheduled.

    ``wake`` is one more instant, which may be moved at any time (``None``: none is set), at which ``awake`` is called;
    it goes before what is scheduled for the same instant.
    """

    def __init__(self) -> None:
        self.now = EPOCH
        self.wake: int | None = None
        self.awake: Callable[[], None] = lambda: None
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return (self.now - EPOCH) / SECOND

    def at(self, instant: int, what: Callable[[], None]) -> None:
        """Schedule ``what``; an instant that has passed is the next one."""
        self._serial += 1
        heappush(self._events, (instant, self._serial, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Schedule ``what`` so long after now."""
        self.at(self.now + int(seconds * SECOND), what)

    def until(self, instant: int) -> None:
        """Let everything happen up to ``instant``, which then is now."""
        while True:
            event = self._events[0][0] if self._events else instant + 1
            wake = self.wake if self.wake is not None else instant + 1
            due = min(event, wake)
            if due > instant:
                break
            self.now = max(self.now, due)
            if wake <= event:
                self.wake = None
                self.awake()
            else:
                heappop(self._events)[2]()
        self.now = max(self.now, instant)
