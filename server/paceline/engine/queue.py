"""Who is next. The seam of the queue discipline: today first come, first served.

A discipline keeps the waiters of one pool in the order of their turns. It knows nothing of levels: the engine asks for
the head, and serves or leaves it.
"""

from __future__ import annotations

from collections import deque

from paceline.engine.accounting import Sizes
from paceline.engine.operations import Reserve


class Option:
    """One candidate of a waiter: its place in the request, its pool, and what it would hold in which buckets."""

    __slots__ = ("buckets", "holds", "index", "open", "pool", "shares", "sizes")

    def __init__(
        self,
        index: int,
        pool: str,
        shares: tuple[str, ...],
        buckets: tuple[int, ...],
        holds: tuple[int, ...],
        sizes: Sizes,
    ) -> None:
        self.index = index
        self.pool = pool
        self.shares = shares
        self.buckets = buckets
        self.holds = holds
        self.sizes = sizes
        self.open = True
        """Whether it may still serve its waiter."""


class Waiter:
    """A Reserve that waits in the queues of all its options; ``tickets`` are all callers that sent it."""

    __slots__ = ("operation", "options", "since", "tickets", "waiting")

    def __init__(self, operation: Reserve, options: tuple[Option, ...], ticket: int, since: int) -> None:
        self.operation = operation
        self.options = options
        self.tickets = [ticket]
        self.since = since
        self.waiting = True


class FirstComeFirstServed:
    """The waiters of one pool. Those that left are dropped when they come to the head."""

    def __init__(self) -> None:
        self._line: deque[tuple[Waiter, Option]] = deque()
        self._ahead: dict[int, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, waiter: Waiter, option: Option) -> None:
        self._line.append((waiter, option))
        self._size += 1
        for number, hold in zip(option.buckets, option.holds, strict=True):
            self._ahead[number] = self._ahead.get(number, 0) + hold

    def head(self) -> tuple[Waiter, Option] | None:
        """Whose turn it is."""
        line = self._line
        while line:
            if line[0][1].open:
                return line[0]
            line.popleft()
        return None

    def left(self, option: Option) -> None:
        """An option of this queue was served, denied or withdrawn."""
        option.open = False
        self._size -= 1
        for number, hold in zip(option.buckets, option.holds, strict=True):
            self._ahead[number] -= hold
        if not self._size:
            self._line.clear()
            self._ahead.clear()

    def ahead(self, number: int) -> int:
        """What all that wait want of the bucket ``number``."""
        return self._ahead.get(number, 0)
