"""Refill that was not counted, and when: what a call that is reported late may still cost.

A bucket that is full loses its refill, and a ledger that was away counts none. Had a call that is reported now been
booked when it was made, at ``s``, the bucket would have been lower ever since, and would have lost less. A token
bucket is a process reflected at its rim, ``level = X - sup(X - burst)``; taking ``c`` off ``X`` from ``s`` on takes
``min(c, W)`` off the supremum, where ``W`` is what was lost after ``s``. So such a call costs ``c - min(c, W)`` today,
exactly, and what it takes of the losses is not there for the next one.

Losses are kept as spans of time, in each of which refill was lost evenly. Where spans have to be joined, the joint one
ends earlier than its parts: less is lost after any instant, and a late call costs more, never less.
"""

from __future__ import annotations

import msgspec

SLOT_US = 250_000
"""Losses that begin within this time of each other are one span."""
MAX_SPANS = 128
MEMORY_US = 3_600_000_000
"""No report is older: its call would be stale."""

Span = tuple[int, int, int]
"""Start, end, amount. Times in µs of ledger time."""


class Losses(msgspec.Struct, array_like=True):
    """Spans in the order of time, none overlapping another."""

    spans: list[Span] = msgspec.field(default_factory=list)

    def add(self, start: int, end: int, amount: int) -> None:
        """``amount`` was lost evenly in [start, end], after everything that is known so far."""
        spans = self.spans
        if spans and start - spans[-1][0] < SLOT_US:
            spans[-1] = _join(spans[-1], (start, end, amount))
            return
        spans.append((start, end, amount))
        if len(spans) > MAX_SPANS:
            self._coarsen(end - MEMORY_US)

    def since(self, at: int) -> int:
        """What was lost after ``at``."""
        total = 0
        for start, end, amount in reversed(self.spans):
            if end <= at:
                break
            total += amount if start >= at else amount * (end - at) // (end - start)
        return total

    def take(self, at: int, amount: int) -> None:
        """Of what was lost after ``at``, the earliest ``amount`` was not: it is at most :meth:`since`."""
        spans, kept = self.spans, []
        for place, (start, end, lost) in enumerate(spans):
            if not amount:
                kept += spans[place:]
                break
            if end <= at:
                kept.append((start, end, lost))
                continue
            after = lost if start >= at else lost * (end - at) // (end - start)
            if start < at:
                kept.append((start, at, lost - after))
                start = at
            taken = min(after, amount)
            amount -= taken
            if taken < after:
                kept.append((start + (end - start) * taken // after, end, after - taken))
        self.spans = kept
        if len(kept) > MAX_SPANS:
            self._coarsen(kept[-1][1] - MEMORY_US)

    def _coarsen(self, oldest: int) -> None:
        """Forget what is too old, and halve the number of the older half."""
        spans = [span for span in self.spans if span[1] > oldest]
        half = len(spans) // 4 * 2
        joined = [_join(spans[place], spans[place + 1]) for place in range(0, half, 2)]
        self.spans = joined + spans[half:]


def _join(one: Span, other: Span) -> Span:
    """One span that begins with ``one`` and loses as fast."""
    return one[0], one[1] + other[1] - other[0], one[2] + other[2]
