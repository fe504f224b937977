"""Where our own level was, a moment ago: what a reading of the upstream's level is compared with.

The bounds of :mod:`paceline.engine.reconcile` hold whatever the errors of estimates are, and so are wide as soon as
much is in flight: a level anywhere inside stays, and near zero that means refusals. But a reading says more. Had our
books been right, it would have shown what they showed when it was taken; so the difference is our error of the moment,
whatever its cause. The instant is known only to lie between the grant of the call and the receipt of its headers, so
the reading is compared with all levels that we had meanwhile: only what none of them explains is corrected. The
difference is applied to the level of today; corrections made since then move the trail along, so that several
readings of the same error correct it once.

Only for dimensions that are charged when a call starts: our level is net of what is held, and the upstream's is not.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

FINE_US = 50_000
COARSE_US = 1_000_000
"""Levels are kept as the least and the most of a slot: fine ones for calls answered soon, coarse ones for others."""
FINE_SLOTS = 60
COARSE_SLOTS = 60
"""A minute: about 15 kB for a limit. A reading that is older is compared with none."""
UNSEEN_US = 2_000_000
"""A call may take so long from its grant to the upstream: until it is there, our level is below what is read."""


class Span(NamedTuple):
    """Between what our level was, each less what its corrections were at that time."""

    least: int
    most: int


class _Slots:
    """The newest slots of one length, oldest first: (number, least, most)."""

    __slots__ = ("_kept", "_length")

    def __init__(self, length: int, count: int) -> None:
        self._length = length
        self._kept: deque[tuple[int, int, int]] = deque(maxlen=count)

    def note(self, at: int, level: int) -> None:
        kept, slot = self._kept, at // self._length
        if kept and kept[-1][0] >= slot:
            last, least, most = kept[-1]
            if level < least:
                kept[-1] = (last, level, most)
            elif level > most:
                kept[-1] = (last, least, level)
        else:
            kept.append((slot, level, level))

    def between(self, since: int, until: int) -> Span | None:
        """What was noted from ``since`` to ``until``, and in the slots beside: between two notes a level only rises.

        ``None``: it is forgotten, or was never known.
        """
        first, last = since // self._length, until // self._length + 1
        kept = self._kept
        if not kept or kept[0][0] > first:
            return None
        found: Span | None = None
        for slot, low, high in reversed(kept):
            if slot <= last:
                found = Span(low, high) if found is None else Span(min(low, found.least), max(high, found.most))
                if slot < first:
                    break
        return found


class Trail:
    """The levels of one limit over the last minute."""

    __slots__ = ("_coarse", "_fine")

    def __init__(self) -> None:
        self._fine = _Slots(FINE_US, FINE_SLOTS)
        self._coarse = _Slots(COARSE_US, COARSE_SLOTS)

    def note(self, at: int, level: int) -> None:
        """The level, less all corrections until then, was ``level`` at ``at``, no earlier than what was noted."""
        self._fine.note(at, level)
        self._coarse.note(at, level)

    def between(self, since: int, until: int) -> Span | None:
        """The least and the most of the levels from ``since`` to ``until``; ``None``: not known."""
        return self._fine.between(since, until) or self._coarse.between(since, until)
